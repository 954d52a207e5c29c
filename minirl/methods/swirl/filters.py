"""Filters: which trajectories are kept, and what is counted of them (SWiRL, arXiv 2504.04736,
section 3).

Invariant: pure. A step that was not scored is not approved, a trajectory without steps passes no
process filter, and what is counted adds up over the parts that trajectories are judged in
(record/report/filters.py says what it comes to).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from minirl.episode import Episode
from minirl.judge.judge import Opinion

_MARKS = {"unreadable": "?", "unanswered": "!"}


class Judged(NamedTuple):
    """A trajectory with an opinion on each of its steps (None: nobody was asked), and whether its
    answer is right (None: not known).

    rules: what rules say of the same steps, to compare the judge with; None where the rules are the
    judge.
    """

    episode: Episode
    opinions: tuple[Opinion, ...] | None
    right: bool | None
    rules: tuple[bool, ...] | None = None


def approved(opinion: Opinion, at: float) -> bool:
    """Whether an opinion is good enough."""
    return opinion.score is not None and opinion.score >= at and opinion.score > 0


def process(judged: Judged, at: float) -> bool:
    """Whether every step is approved."""
    return bool(judged.opinions) and all(approved(o, at) for o in judged.opinions or ())


def passes(judged: Judged, keep: str, at: float) -> bool:
    """Whether filter `keep` keeps a trajectory; what nobody could say is no."""
    wanted = {
        "none": (),
        "process": (process(judged, at),),
        "outcome": (bool(judged.right),),
        "both": (process(judged, at), bool(judged.right)),
    }
    return all(wanted[keep])


def marked(judged: Judged, at: float) -> Episode:
    """The episode with what was said of it: `process`, `outcome`, and `verdicts`, a letter a step:
    G, B, ? unreadable or ! unanswered."""
    parts = {**judged.episode.parts, "outcome": judged.right}
    if judged.opinions is not None:
        letters = (_MARKS.get(o.status, "G" if approved(o, at) else "B") for o in judged.opinions)
        parts |= {"process": process(judged, at), "verdicts": "".join(letters)}
    return replace(judged.episode, parts=parts)


def tally(trajectories: Sequence[Judged], keep: str, at: float) -> dict[str, int]:
    """Counts to log: trajectories and steps, what was approved, right, both and kept; and the pairs
    that agreement is reckoned from.

    outcome_unknown: trajectories of which nobody could say whether they are right; they are not
    right, and in no ends.
    pairs_xy: steps of which the judge says x and the rules y; ends_xy: last steps of which the
    judge says x and the outcome y (1 is good). Steps that were not scored are in no pair.
    """
    names = (
        "trajectories",
        "states",
        "good_steps",
        "unreadable",
        "unanswered",
        "process",
        "outcome",
        "outcome_unknown",
        "both",
        "kept",
    )
    counts = dict.fromkeys(names, 0)
    counts |= {f"{kind}_{a}{b}": 0 for kind in ("pairs", "ends") for a in (1, 0) for b in (1, 0)}
    for judged in trajectories:
        opinions, fine, right = judged.opinions or (), process(judged, at), bool(judged.right)
        counts["trajectories"] += 1
        counts["states"] += sum(turn.trained for turn in judged.episode.turns)
        counts["good_steps"] += sum(approved(o, at) for o in opinions)
        counts["unreadable"] += sum(o.status == "unreadable" for o in opinions)
        counts["unanswered"] += sum(o.status == "unanswered" for o in opinions)
        counts["process"] += fine
        counts["outcome"] += right
        counts["outcome_unknown"] += judged.right is None
        counts["both"] += fine and right
        counts["kept"] += passes(judged, keep, at)
        for o, rule in zip(opinions, judged.rules or (), strict=False):
            if o.score is not None:
                counts[f"pairs_{int(approved(o, at))}{int(rule)}"] += 1
        if opinions and opinions[-1].score is not None and judged.right is not None:
            counts[f"ends_{int(approved(opinions[-1], at))}{int(right)}"] += 1
    return counts
