"""Filters: which trajectories are kept, and what the filters say of each other (SWiRL, arXiv 2504.04736, section 3).

Invariant: pure. A step that was not scored is not approved, a trajectory without steps passes no process filter, and every rate is a ratio
of counts that add up over the parts that trajectories are judged in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from minirl.episode import Episode
from minirl.judge import Opinion

_MARKS = {"unreadable": "?", "unanswered": "!"}


class Judged(NamedTuple):
    """A trajectory with an opinion on each of its steps (None: nobody was asked), and whether its answer is right (None: not known).

    rules: what rules say of the same steps, to compare the judge with; None where the rules are the judge.
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
    """The episode with what was said of it: `process`, `outcome`, and `verdicts`, a letter a step: G, B, ? unreadable or ! unanswered."""
    parts = {**judged.episode.parts, "outcome": judged.right}
    if judged.opinions is not None:
        letters = (_MARKS.get(o.came, "G" if approved(o, at) else "B") for o in judged.opinions)
        parts |= {"process": process(judged, at), "verdicts": "".join(letters)}
    return replace(judged.episode, parts=parts)


def tally(trajectories: Sequence[Judged], keep: str, at: float) -> dict[str, int]:
    """Counts to log: trajectories and steps, what was approved, right, both and kept; and the pairs that agreement is reckoned from.

    outcome_unknown: trajectories of which nobody could say whether they are right; they are not right, and in no ends.
    pairs_xy: steps of which the judge says x and the rules y; ends_xy: last steps of which the judge says x and the outcome y (1 is good).
    Steps that were not scored are in no pair.
    """
    names = ("trajectories", "states", "good_steps", "unreadable", "unanswered", "process", "outcome", "outcome_unknown", "both", "kept")
    counts = dict.fromkeys(names, 0)
    counts |= {f"{kind}_{a}{b}": 0 for kind in ("pairs", "ends") for a in (1, 0) for b in (1, 0)}
    for judged in trajectories:
        opinions, fine, right = judged.opinions or (), process(judged, at), bool(judged.right)
        counts["trajectories"] += 1
        counts["states"] += sum(turn.trained for turn in judged.episode.turns)
        counts["good_steps"] += sum(approved(o, at) for o in opinions)
        counts["unreadable"] += sum(o.came == "unreadable" for o in opinions)
        counts["unanswered"] += sum(o.came == "unanswered" for o in opinions)
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


def agreement(counts: Mapping[str, float], kind: str) -> tuple[float, float, int] | None:
    """Share of pairs on which both say the same, Cohen's kappa (1960), and how many pairs; None without pairs."""
    yes, only_a, only_b, no = (counts.get(f"{kind}_{pair}", 0) for pair in ("11", "10", "01", "00"))
    total = yes + only_a + only_b + no
    if not total:
        return None
    share = (yes + no) / total
    chance = ((yes + only_a) * (yes + only_b) + (no + only_a) * (no + only_b)) / total**2
    return share, 1.0 if chance == 1 else (share - chance) / (1 - chance), int(total)


def summary(rows: Sequence[Mapping[str, float]], *, asked: bool) -> list[str]:
    """Lines that say what the filters did, from the counts of all parts. asked: whether a judge was."""
    total = {name: sum(row.get(name, 0) for row in rows) for name in dict.fromkeys(name for row in rows for name in row)}
    count, steps = max(total.get("trajectories", 0), 1), max(total.get("states", 0), 1)

    def share(name: str) -> str:
        return f"{total.get(name, 0):.0f} ({total.get(name, 0) / count:.1%})"

    lines = [f"{total.get('trajectories', 0):.0f} trajectories, {total.get('states', 0):.0f} states; kept {share('kept')}"]
    unknown = f", unknown {share('outcome_unknown')}" if total.get("outcome_unknown") else ""
    lines.append(f"outcome right {share('outcome')}{unknown}" + (f"; process {share('process')}; both {share('both')}" if asked else ""))
    if asked:
        unread = f"{total['unreadable']:.0f} verdicts unreadable, {total['unanswered']:.0f} unanswered"
        lines.append(f"steps approved {total['good_steps'] / steps:.1%}; {unread}: not approved")
    for kind, name in (("pairs", "rules, step by step"), ("ends", "outcome, last step")):
        if asked and (found := agreement(total, kind)):
            lines.append(f"judge against {name}: agree {found[0]:.1%}, kappa {found[1]:.2f}, {found[2]} pairs")
    return lines
