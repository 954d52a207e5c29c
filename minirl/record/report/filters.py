"""The filter stages of a run in words: what each filter keeps, and how far the judge agrees with
rules and outcomes (SWiRL, arXiv 2504.04736, section 3).

Invariant: every rate is a ratio of sums over the parts that a stage filters one by one.
`methods.swirl.filters.tally` defines the counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from minirl import recipe as recipes
from minirl.record.report.rows import Rows, is_number


def show_filters(recipe: recipes.Recipe, metrics: Rows) -> list[dict[str, Any]]:
    """Title and lines of each filter stage that has begun; `done` says how far an unfinished one
    is."""
    filters = []
    for index, stage in enumerate(recipe.stages):
        rows = [
            {name: x for name, x in row.items() if is_number(x)}
            for row in metrics
            if row.get("stage") == index
        ]
        if isinstance(stage, recipes.Filter) and rows:
            done = "" if len(rows) == stage.parts else f"{len(rows)} of {stage.parts} parts"
            lines = describe_filter(rows, asked=stage.judge is not None)
            filters.append({"title": f"Stage {index}, {stage.keep}", "done": done, "lines": lines})
    return filters


def describe_filter(rows: Sequence[Mapping[str, float]], *, asked: bool) -> list[str]:
    """Lines that say what a filter kept, from the counts of its parts. asked: whether a judge
    was."""
    names = dict.fromkeys(name for row in rows for name in row)
    total = {name: sum(row.get(name, 0) for row in rows) for name in names}

    def count(name: str) -> str:
        return f"{total.get(name, 0):.0f}"

    def share(name: str, of: str = "trajectories") -> str:
        return f"{total.get(name, 0) / max(total.get(of, 0), 1):.1%}"

    def both(name: str) -> str:
        return f"{count(name)} ({share(name)})"

    unknown = f", unknown {both('outcome_unknown')}" if total.get("outcome_unknown") else ""
    lines = [
        f"{count('trajectories')} trajectories, {count('states')} states; kept {both('kept')}",
        f"outcome right {both('outcome')}{unknown}",
    ]
    if not asked:
        return lines
    lines[1] += f"; process {both('process')}; both {both('both')}"
    lines.append(
        f"steps approved {share('good_steps', 'states')}; {count('unreadable')} verdicts"
        f" unreadable, {count('unanswered')} unanswered: not approved"
    )
    for kind, name in (("pairs", "rules, step by step"), ("ends", "outcome, last step")):
        if agreement := filter_agreement(total, kind):
            same, kappa, pairs = agreement
            lines.append(
                f"judge against {name}: agree {same:.1%}, kappa {kappa:.2f}, {pairs} pairs"
            )
    return lines


def filter_agreement(counts: Mapping[str, float], kind: str) -> tuple[float, float, int] | None:
    """Share of pairs on which both say the same, Cohen's kappa (1960), and the number of pairs;
    None without pairs. counts: `<kind>_11`, `_10`, `_01` and `_00`."""
    yes, only_a, only_b, no = (counts.get(f"{kind}_{pair}", 0) for pair in ("11", "10", "01", "00"))
    total = yes + only_a + only_b + no
    if not total or not isfinite(total):  # a file that was edited by hand
        return None
    share = (yes + no) / total
    chance = ((yes + only_a) * (yes + only_b) + (no + only_a) * (no + only_b)) / total**2
    return share, 1.0 if chance == 1 else (share - chance) / (1 - chance), int(total)
