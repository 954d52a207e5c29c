"""Rollout: a method is a generator written for ONE episode; `play` runs many of them against one
sampler.

Invariant: an episode is resumed as soon as its own completion is there, in whatever order the
sampler finishes, and what it becomes does not depend on the others: each ask carries its own seed,
and a search is a function of its query alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from minirl.chat import Chat
from minirl.episode import Ask, Completion, Episode, Finish, Part, Problem, Turn, Verdict
from minirl.recipe import Sampling
from minirl.retrieve import Passage, Retriever


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a method puts to a retriever; it is answered with at most `k` passages, best first."""

    retriever: Retriever
    query: str
    k: int


# An Ask is answered with a Completion, a Lookup with a list of passages.
Play = Generator[Ask | Lookup, Any, Episode]


class Sampler(Protocol):
    """Takes asks and gives completions as they finish."""

    def add(self, key: int, ask: Ask) -> None:
        """Queue an ask under a key of the caller's."""

    def poll(self) -> list[tuple[int, Completion]]:
        """Work until at least one queued ask is finished; the finished ones."""


class Talk:
    """One conversation in the making: what a method tells and asks becomes the turns of its
    episode."""

    def __init__(
        self, problem: Problem, chat: Chat, sampling: Sampling, *, temperature: float, seed: str
    ) -> None:
        self.problem = problem
        self.chat = chat
        self.sampling = sampling
        self.temperature = temperature
        self.turns: list[Turn] = list(problem.context) or [Turn("prompt", chat.prompt(problem))]
        self.seed = seed
        self._dropped = 0  # turns of conversations that `begin` has ended
        self._finish: Finish = "stop"

    def begin(self, user: str, *, system: str | None = None) -> None:
        """Put the problem in a method's own words, or begin again in others: nothing that was said
        before stays in the conversation."""
        self._dropped += len(self.turns) - 1
        self.turns = [
            Turn("prompt", self.chat.prompt(replace(self.problem, prompt=user, system=system)))
        ]

    def tell(self, kind: str, text: str) -> None:
        """Append a user message."""
        self.turns.append(Turn(kind, self.chat.user(text, after=self.turns[-1].tokens)))

    def ask(
        self, kind: str, *, max_tokens: int, trained: bool = False, stop: tuple[str, ...] = ()
    ) -> Generator[Ask, Completion, str]:
        """Let the model speak: appends its turn and returns its text. Use as `text = yield from
        talk.ask(...)`."""
        tokens = tuple(token for turn in self.turns for token in turn.tokens)
        completion = yield Ask(
            tokens,
            max_tokens,
            self.temperature,
            stop,
            seed_of(self.seed, self._dropped + len(self.turns)),
        )
        self.turns.append(Turn(kind, completion.tokens, completion.logprobs, trained))
        if trained or not any(turn.trained for turn in self.turns):
            self._finish = (
                completion.finish
            )  # that of the trained turn, where there is one: overlong filtering goes by it
        return completion.text

    def reply(self, kind: str, text: str, *, trained: bool) -> None:
        """Append an assistant message that nobody sampled: a demonstration."""
        self.turns.append(Turn(kind, self.chat.reply(text), None, trained))

    def insert(self, kind: str, tokens: Sequence[int], *, trained: bool = False) -> None:
        """Append ids that nobody sampled inside the assistant's turn, which goes on after them; see
        `Chat.inside`."""
        self.turns.append(Turn(kind, tuple(tokens), None, trained))

    @property
    def replied(self) -> tuple[int, ...]:
        """All tokens after the prompt (or the problem's context), results included."""
        return tuple(
            token for turn in self.turns[len(self.problem.context) or 1 :] for token in turn.tokens
        )

    def mark_cut(self) -> None:
        """Mark the episode as cut by the token limit, however its last turn ended."""
        self._finish = "length"

    def end(self, verdict: Verdict | None, **parts: Part) -> Episode:
        """The finished episode; a verdict of None is "not scored".

        parts: what a report counts. Unless they say how the first try went (`first`), the verdict
        does, with its own parts.
        """
        reward = None if verdict is None else verdict.score
        if verdict is not None and "first" not in parts:
            others = {key: part for key, part in verdict.parts.items() if key != "error_kind"}
            error = verdict.parts.get("error_kind")
            parts = {"first": verdict.passed, "first_error": error, **others, **parts}
        return Episode(self.problem, tuple(self.turns), reward, parts, self._finish)


def play(
    plays: Iterable[Play], sampler: Sampler, *, on_done: Callable[[Episode], Any] | None = None
) -> list[Episode]:
    """Run every episode to its end; the episodes in the order of `plays`.

    Whoever waits for passages is answered before the sampler works on, all of them by one call of
    their retriever.
    """
    running = dict(enumerate(plays))
    lookups: dict[int, Lookup] = {}
    done: dict[int, Episode] = {}

    def advance(key: int, answer: Completion | list[Passage] | None) -> None:
        try:
            wanted = running[key].send(answer)
        except StopIteration as stop:
            done[key] = stop.value
            del running[key]
            if on_done is not None:
                on_done(stop.value)
        else:
            if isinstance(wanted, Lookup):
                lookups[key] = wanted
            else:
                sampler.add(key, wanted)

    for key in list(running):
        advance(key, None)
    while running:
        while lookups:
            found = look_up(lookups)
            lookups.clear()
            for key, passages in found.items():
                advance(key, passages)
        if running:
            for key, completion in sampler.poll():
                advance(key, completion)
    return [done[key] for key in sorted(done)]


def look_up(lookups: Mapping[int, Lookup]) -> dict[int, list[Passage]]:
    """The passages of each lookup: one search a retriever, for all that ask it."""
    found: dict[int, list[Passage]] = {}
    for retriever in {
        id(lookup.retriever): lookup.retriever for lookup in lookups.values()
    }.values():
        keys = [key for key, lookup in lookups.items() if lookup.retriever is retriever]
        answers = retriever.search(
            [lookups[key].query for key in keys], max(lookups[key].k for key in keys)
        )
        found |= {
            key: passages[: lookups[key].k] for key, passages in zip(keys, answers, strict=True)
        }
    return found


def seed_of(*parts: object) -> int:
    """A 63-bit seed that is the same in every process and on every machine (`hash` is not)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
