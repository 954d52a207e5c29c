"""A sampler that follows a script: no model, no weights, any order of finishing.

Invariant: a reply is a function of its ask alone (its text, its limit, its stop strings, its seed),
as a real sampler's has to be, so that whatever differs between two orders of finishing comes from
the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from minirl.chat import Chat
from minirl.episode import Ask, Completion, Problem
from minirl.recipe import Sampling
from minirl.rollout import Talk

Script = Callable[[str, Ask], str]
Order = Callable[[list[int]], Sequence[int]]


class Scripted:
    """`script(text, ask)` says what is answered to the conversation `text` (special tokens shown),
    `order(waiting)` who finishes at a poll.

    Without an `order` the oldest ask finishes alone. asks: all that were put, in order. trace:
    ("add" | "done", key) as it happened.
    """

    def __init__(
        self, chat: Chat, script: Script, order: Order = lambda waiting: waiting[:1]
    ) -> None:
        self.chat = chat
        self.script = script
        self.order = order
        self.asks: list[Ask] = []
        self.trace: list[tuple[str, int]] = []
        self._waiting: dict[int, Ask] = {}

    def add(self, key: int, ask: Ask) -> None:
        assert key not in self._waiting, f"episode {key} asks twice at once"
        self._waiting[key] = ask
        self.asks.append(ask)
        self.trace.append(("add", key))

    def poll(self) -> list[tuple[int, Completion]]:
        finished = self.order(list(self._waiting))
        assert finished, "an order must let somebody finish"
        self.trace += [("done", key) for key in finished]
        return [(key, self.complete(self._waiting.pop(key))) for key in finished]

    def complete(self, ask: Ask) -> Completion:
        """The scripted reply, ended by a stop string, by the end marker or by `max_tokens`,
        whichever comes first."""
        text = self.script(self.chat.text(ask.tokens, special=True), ask)
        ends = [text.index(stop) + len(stop) for stop in ask.stop if stop in text]
        said = tuple(
            self.chat.tokenizer.encode(
                text[: min(ends, default=len(text))], add_special_tokens=False
            )
        )
        tokens = said if ends else (*said, self.chat.end)
        finish = "stop" if len(tokens) <= ask.max_tokens else "length"
        tokens = tokens[: ask.max_tokens]
        return Completion(tokens, logprobs_of(tokens, ask.seed), self.chat.text(tokens), finish)


def logprobs_of(tokens: Sequence[int], seed: int) -> tuple[float, ...]:
    """Numbers that stand for log-probabilities: of the tokens and the seed, exact in binary."""
    return tuple(-((token + seed) % 97 + 1) / 64 for token in tokens)


def at_random(rng: Random) -> Order:
    """Any number of those who wait finish, in any order."""
    return lambda waiting: rng.sample(waiting, rng.randint(1, len(waiting)))


def talk_of(
    problem: Problem, chat: Chat, *, seed: str = "0", temperature: float = 1.0, tokens: int = 200
) -> Talk:
    """A conversation with room for `tokens` tokens a turn."""
    sampling = Sampling(attempt_tokens=tokens, reflection_tokens=tokens)
    return Talk(problem, chat, sampling, temperature=temperature, seed=seed)
