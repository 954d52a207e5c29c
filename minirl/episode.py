"""The nouns that both wings share: Problem, Turn, Episode, Group, Ask, Completion, Verdict.

Invariant: the mask is born with the token. Whoever appends a turn says whether it was sampled and
whether it is trained, and nothing is ever decoded, cut and encoded again. All of these are
immutable and go to JSON and back without loss.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from minirl.errors import UserError

Finish = Literal["stop", "length", "failed"]
Part = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Turn:
    """One author's run of token ids.

    kind: who wrote it ("prompt", "attempt", "request", "reflection", "retry", "demonstration",
    ...).
    logprobs: one natural logarithm a token, under the sampling distribution (temperature included);
    None if nobody sampled it.
    trained: whether a loss may touch these tokens.
    """

    kind: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    trained: bool = False

    def __post_init__(self) -> None:
        if self.logprobs is not None and len(self.logprobs) != len(self.tokens):
            raise ValueError(
                f"turn {self.kind!r}: {len(self.logprobs)} logprobs for {len(self.tokens)} tokens"
            )

    @property
    def sampled(self) -> bool:
        """Whether the policy wrote it: then every token has a log-probability."""
        return self.logprobs is not None


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its gold answer, and (where an episode starts in the middle) the turns that came
    before.

    prompt: the first user message. system: the system message, None for the template's own. tools:
    JSON schemas for the tool template.
    answer: any JSON value; only the task's verifier reads it. solution: a worked solution, for
    demonstrations.
    context: turns that replace the rendered prompt (R3's failed attempt, SWiRL's stored state).
    """

    id: str
    prompt: str
    answer: Any
    solution: str | None = None
    system: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    context: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says: score is the reward, passed whether the answer is right, parts what a
    report counts ("error_kind", ...)."""

    score: float
    passed: bool
    parts: dict[str, Part] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Episode:
    """One played problem. reward None means "not scored": it is never trained and never counted as
    zero.

    parts: what a report counts. "first" and "second" (bool) say whether the first and the second
    try passed, "first_error" and "second_error" how they failed; a key is absent where there was no
    such try.
    step_rewards: where credit is by step, one for each trained turn in place of `reward`; None for
    one that was not scored.
    """

    problem: Problem
    turns: tuple[Turn, ...]
    reward: float | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    finish: str = "stop"
    step_rewards: tuple[float | None, ...] | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """All turns' tokens, one after the other."""
        return tuple(token for turn in self.turns for token in turn.tokens)

    @property
    def mask(self) -> tuple[bool, ...]:
        """True at the tokens that are trained; as long as `tokens`."""
        return tuple(turn.trained for turn in self.turns for _ in turn.tokens)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The sampler's log-probabilities, 0.0 where nobody sampled; as long as `tokens`."""
        return tuple(lp for turn in self.turns for lp in turn.logprobs or (0.0,) * len(turn.tokens))

    @property
    def trained_tokens(self) -> int:
        """How many tokens enter the loss."""
        return sum(len(turn.tokens) for turn in self.turns if turn.trained)

    @property
    def sampled_tokens(self) -> int:
        """Tokens sampled in this episode; those of the problem's own context were sampled, and
        counted, elsewhere."""
        return sum(
            len(turn.tokens) for turn in self.turns[len(self.problem.context) :] if turn.sampled
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, one line of a JSONL file; `from_json` reads them."""
        problem = {
            k: getattr(self.problem, k) for k in ("id", "prompt", "answer", "solution", "system")
        }
        problem |= {"tools": list(self.problem.tools), "context": len(self.problem.context)}
        return {
            "problem": problem,
            "turns": [_turn_to_json(turn) for turn in self.turns],
            "reward": self.reward,
            "parts": self.parts,
            "finish": self.finish,
            **({} if self.step_rewards is None else {"step_rewards": list(self.step_rewards)}),
        }

    @classmethod
    def from_json(cls, row: dict[str, Any], where: str = "episode") -> Self:
        """The episode that `to_json` wrote. Raises UserError naming `where` when the row is not
        one."""
        try:
            turns = tuple(_turn_from_json(turn) for turn in row["turns"])
            fields = dict(row["problem"])
            # A context is always the head of the turns, so it is stored as a length and never
            # twice.
            head = _whole(fields["context"])
            if not 0 <= head <= len(turns):
                raise ValueError(f"a context of {head} turns among {len(turns)}")
            fields["context"] = turns[:head]
            fields["tools"] = tuple(dict(tool) for tool in fields["tools"])
            reward = None if row["reward"] is None else float(row["reward"])
            steps = row.get("step_rewards")
            step_rewards = (
                None
                if steps is None
                else tuple(None if step is None else float(step) for step in steps)
            )
            return cls(
                Problem(**fields),
                turns,
                reward,
                dict(row["parts"]),
                str(row["finish"]),
                step_rewards,
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{where}: not an episode ({type(error).__name__}: {error}); delete the row or"
                " collect again"
            ) from error

    def show(self, decode: Any) -> str:
        """The episode as text, trained tokens between ⟦ and ⟧. `decode` turns a sequence of ids
        into text."""
        lines = []
        for turn in self.turns:
            text = decode(list(turn.tokens))
            lines.append(f"[{turn.kind}] " + (f"⟦{text}⟧" if turn.trained else text))
        return "\n".join(
            [*lines, f"reward {self.reward}  {json.dumps(self.parts)}  finish {self.finish}"]
        )


@dataclass(frozen=True, slots=True)
class Group:
    """The G episodes that share a problem and its context: what a group advantage is taken over."""

    problem: Problem
    episodes: tuple[Episode, ...]

    @property
    def rewards(self) -> tuple[float | None, ...]:
        """Of its episodes, in order."""
        return tuple(episode.reward for episode in self.episodes)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a method puts to a sampler: continue these tokens.

    max_tokens: most tokens to sample. temperature: 0 is greedy. stop: the reply ends with the token
    that completes one of these strings.
    seed: the reply is a function of the weights, the tokens and this number, whatever else is in
    the batch.
    """

    tokens: tuple[int, ...]
    max_tokens: int
    temperature: float
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampler's reply: ids with their log-probabilities, the text they decode to, and why it
    ended ("failed": no server answered)."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: Finish


def regroup(episodes: Sequence[Episode], size: int) -> list[Group]:
    """Consecutive runs of `size` episodes as groups; each run must be of one problem."""
    groups = [tuple(episodes[i : i + size]) for i in range(0, len(episodes), size)]
    for group in groups:
        if any(episode.problem is not group[0].problem for episode in group) or len(group) != size:
            raise ValueError(
                f"expected runs of {size} episodes of one problem, got"
                f" {[e.problem.id for e in group]}"
            )
    return [Group(group[0].problem, group) for group in groups]


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    return {
        "kind": turn.kind,
        "tokens": list(turn.tokens),
        "logprobs": None if turn.logprobs is None else list(turn.logprobs),
        "trained": turn.trained,
    }


def _turn_from_json(row: dict[str, Any]) -> Turn:
    logprobs = None if row["logprobs"] is None else tuple(float(x) for x in row["logprobs"])
    if not isinstance(row["trained"], bool):
        raise TypeError(f"trained: got {row['trained']!r}, expected true or false")
    return Turn(str(row["kind"]), tuple(_whole(x) for x in row["tokens"]), logprobs, row["trained"])


def _whole(value: Any) -> int:
    """`int()` would read 1.5 as 1 and the text "12" as two tokens."""
    if type(value) is not int:
        raise TypeError(f"got {value!r}, expected a whole number")
    return value
