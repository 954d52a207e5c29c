"""Split: a trajectory of K actions becomes K states, each a problem of its own (SWiRL, arXiv
2504.04736, section 3).

Invariant: a state's context is an exact token prefix of the trajectory, everything before its
action and none of it trained; the actions are the trained turns, whichever method wrote them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random

from minirl.episode import Episode, Problem, Turn


def actions(episode: Episode) -> list[int]:
    """Which turns of an episode are its actions."""
    return [i for i, turn in enumerate(episode.turns) if turn.trained]


def states(episodes: Iterable[Episode]) -> list[Problem]:
    """The states of all actions, in order; each has its trajectory's number and its own in its id:
    `gsm8k/train/7#12.0`."""
    return [
        _problem(e, i, f"#{n}.{k}", ())
        for n, e in enumerate(episodes)
        for k, i in enumerate(actions(e))
    ]


def imitations(episodes: Iterable[Episode]) -> list[Problem]:
    """The same states, each with its own action behind it, trained: what SFT on the same
    trajectories learns (see methods.imitate).

    The action counts as sampled by nobody: its log-probabilities are those of the weights of then.
    """
    return [
        _problem(e, i, f"#{n}.{k}", (replace(e.turns[i], logprobs=None, trained=True),))
        for n, e in enumerate(episodes)
        for k, i in enumerate(actions(e))
    ]


def some(problems: Sequence[Problem], most: int | None, seed: int) -> list[Problem]:
    """At most `most` of them, a choice that the seed makes; in the order in which they were."""
    if most is None or len(problems) <= most:
        return list(problems)
    chosen = sorted(Random(f"states/{seed}").sample(range(len(problems)), most))
    return [problems[i] for i in chosen]


def _problem(episode: Episode, turn: int, mark: str, more: tuple[Turn, ...]) -> Problem:
    before = tuple(replace(t, trained=False) for t in episode.turns[:turn])
    return replace(episode.problem, id=f"{episode.problem.id}{mark}", context=(*before, *more))
