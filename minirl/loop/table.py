"""The table of a comparison as text: a line an evaluation, a column a score.

Invariant: pure; each number has its 95 % interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minirl.loop.trial import Evaluation
from minirl.record.measures import SCORES
from minirl.record.statistics import Interval

COLUMNS = ("em", "f1", "judged", "recall", "searches")


def format_table(evaluations: Sequence[Evaluation]) -> str:
    """ReSearch's table: percent, and searches an episode.

    Above it stands what all lines share: how many problems, and what differs from the run's own
    recipe. `judged` is a share of the answers that have a verdict; how many of all these are stands
    beside it, and methods that differ in it do not compare.
    """
    first = evaluations[0]
    shared = [
        text for text in first.row["changed"] if all(text in e.row["changed"] for e in evaluations)
    ]
    names = [name for name in COLUMNS if any(name in e.summary["scores"] for e in evaluations)]
    lines = [["model", "method", *names]]
    for summary in (e.summary for e in evaluations):
        cells = [_cell(name, summary) for name in names]
        lines.append([str(summary["label"]), str(summary["method"]), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    runs = [f"{first.row['runs']} runs"] if "runs" in first.row else []
    title = ", ".join([f"{first.summary['problems']} held-out problems", *runs, *shared])
    return "\n".join([title, *rows])


def _cell(name: str, summary: dict[str, Any]) -> str:
    score: Interval | None = summary["scores"].get(name)
    if score is None:
        return "-"
    if SCORES[name].kind == "count":
        return f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]"
    share = f"{100 * score.value:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"
    if name != "judged":
        return share
    return f"{share} ({summary['counted'][name]} of {summary['problems'] * summary['samples']})"


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """One evaluation in lines: what several samples give, then the counts of error kinds."""
    shares = {
        f"{name}@{summary['samples']}": summary["scores"][name]
        for name in ("majority", "reranked")
        if name in summary["scores"]
    } | {f"pass@{k}": share for k, share in summary["pass_at_k"].items()}
    lines = [
        f"{name} {share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"
        for name, share in shares.items()
    ]
    for attempt in ("first", "second"):
        if attempt == "first" or summary["second"] is not None:
            errors = (f"{kind} {n}" for kind, n in summary[f"{attempt}_errors"].items())
            lines.append(f"{attempt} errors: {', '.join(errors) or 'none'}")
    return lines
