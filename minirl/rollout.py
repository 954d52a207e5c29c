"""Rollout: a method is a generator written for ONE episode; `play` runs many of them against one sampler.

Invariant: an episode is resumed as soon as its own completion is there, in whatever order the sampler finishes, and what it becomes
does not depend on the others: each ask carries its own seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol

from minirl.chat import Chat
from minirl.episode import Ask, Completion, Episode, Part, Problem, Turn, Verdict
from minirl.recipe import Sampling

Play = Generator[Ask, Completion, Episode]


class Sampler(Protocol):
    """Takes asks and gives completions as they finish."""

    def add(self, key: int, ask: Ask) -> None:
        """Queue an ask under a key of the caller's."""

    def poll(self) -> list[tuple[int, Completion]]:
        """Work until at least one queued ask is finished; the finished ones."""


class Talk:
    """One conversation in the making: what a method tells and asks becomes the turns of its episode."""

    def __init__(self, problem: Problem, chat: Chat, sampling: Sampling, *, temperature: float, seed: str) -> None:
        self.problem = problem
        self.chat = chat
        self.sampling = sampling
        self.temperature = temperature
        self.turns: list[Turn] = list(problem.context) or [Turn("prompt", chat.prompt(problem))]
        self.seed = seed
        self._finish = "stop"

    def tell(self, kind: str, text: str) -> None:
        """Append a user message."""
        self.turns.append(Turn(kind, self.chat.user(text, after=self.turns[-1].tokens)))

    def ask(self, kind: str, *, max_tokens: int, trained: bool = False, stop: tuple[str, ...] = ()) -> Generator[Ask, Completion, str]:
        """Let the model speak: appends its turn and returns its text. Use as `text = yield from talk.ask(...)`."""
        tokens = tuple(token for turn in self.turns for token in turn.tokens)
        completion = yield Ask(tokens, max_tokens, self.temperature, stop, seed_of(self.seed, len(self.turns)))
        self.turns.append(Turn(kind, completion.tokens, completion.logprobs, trained))
        if trained or not any(turn.trained for turn in self.turns):
            self._finish = completion.finish  # that of the trained turn, where there is one: overlong filtering goes by it
        return completion.text

    def reply(self, kind: str, text: str, *, trained: bool) -> None:
        """Append an assistant message that nobody sampled: a demonstration."""
        self.turns.append(Turn(kind, self.chat.reply(text), None, trained))

    def end(self, verdict: Verdict | None, **parts: Part) -> Episode:
        """The finished episode; a verdict of None is "not scored"."""
        reward = None if verdict is None else verdict.score
        return Episode(self.problem, tuple(self.turns), reward, parts, self._finish)


def play(plays: Iterable[Play], sampler: Sampler, *, on_done: Callable[[Episode], Any] | None = None) -> list[Episode]:
    """Run every episode to its end; the episodes in the order of `plays`."""
    running = dict(enumerate(plays))
    done: dict[int, Episode] = {}

    def advance(key: int, completion: Completion | None) -> None:
        try:
            ask = next(running[key]) if completion is None else running[key].send(completion)
        except StopIteration as stop:
            done[key] = stop.value
            del running[key]
            if on_done is not None:
                on_done(stop.value)
        else:
            sampler.add(key, ask)

    for key in list(running):
        advance(key, None)
    while running:
        for key, completion in sampler.poll():
            advance(key, completion)
    return [done[key] for key in sorted(done)]


def seed_of(*parts: object) -> int:
    """A 63-bit seed that is the same in every process and on every machine (`hash` is not)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
