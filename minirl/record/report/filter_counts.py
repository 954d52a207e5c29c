"""What the filters say of each other, from the counts that a filter stage logs (SWiRL, arXiv
2504.04736, section 3).

Invariant: pure; every rate is a ratio of sums over the parts that trajectories were judged in.
filters.tally says what each count is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite


def filter_agreement(counts: Mapping[str, float], kind: str) -> tuple[float, float, int] | None:
    """Share of pairs on which both say the same, Cohen's kappa (1960), and how many pairs; None
    without pairs."""
    yes, only_a, only_b, no = (counts.get(f"{kind}_{pair}", 0) for pair in ("11", "10", "01", "00"))
    total = yes + only_a + only_b + no
    if not total or not isfinite(total):  # a file that was edited by hand
        return None
    share = (yes + no) / total
    chance = ((yes + only_a) * (yes + only_b) + (no + only_a) * (no + only_b)) / total**2
    return share, 1.0 if chance == 1 else (share - chance) / (1 - chance), int(total)


def summary(rows: Sequence[Mapping[str, float]], *, asked: bool) -> list[str]:
    """Lines that say what the filters did, from the counts of all parts. asked: whether a judge
    was."""
    total = {
        name: sum(row.get(name, 0) for row in rows)
        for name in dict.fromkeys(name for row in rows for name in row)
    }
    count, steps = max(total.get("trajectories", 0), 1), max(total.get("states", 0), 1)

    def share(name: str) -> str:
        return f"{total.get(name, 0):.0f} ({total.get(name, 0) / count:.1%})"

    lines = [
        f"{total.get('trajectories', 0):.0f} trajectories, {total.get('states', 0):.0f} states;"
        f" kept {share('kept')}"
    ]
    unknown = f", unknown {share('outcome_unknown')}" if total.get("outcome_unknown") else ""
    lines.append(
        f"outcome right {share('outcome')}{unknown}"
        + (f"; process {share('process')}; both {share('both')}" if asked else "")
    )
    if asked:
        unread = (
            f"{total.get('unreadable', 0):.0f} verdicts unreadable,"
            f" {total.get('unanswered', 0):.0f} unanswered"
        )
        lines.append(
            f"steps approved {total.get('good_steps', 0) / steps:.1%}; {unread}: not approved"
        )
    for kind, name in (("pairs", "rules, step by step"), ("ends", "outcome, last step")):
        if asked and (found := filter_agreement(total, kind)):
            lines.append(
                f"judge against {name}: agree {found[0]:.1%}, kappa {found[1]:.2f}, {found[2]}"
                " pairs"
            )
    return lines
