"""The evaluations of a run as the report's page shows them: shares, what changed and how sure that
is, errors, pass@k.

Invariant: only evaluations of equal settings (tries, samples, temperature, overrides) are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minirl.record.evals import Row, compare, settings, summarise
from minirl.record.measures import MEASURES, OUTCOMES, Measure
from minirl.record.report.rows import Rows
from minirl.record.statistics import Difference

Summary = dict[str, Any]


def show_evaluations(evals: Rows) -> dict[str, Any] | None:
    """The run's own evaluations; None before the first one."""
    if not evals:
        return None
    summaries = [summarise(row) for row in evals]
    alike = [i for i, row in enumerate(evals) if settings(row) == settings(evals[-1])]
    start, last = alike[0], alike[-1]
    earlier = [
        i
        for i in alike
        if evals[i].get("stage") != evals[last].get("stage") or evals[i].get("label") == "start"
    ]
    before = earlier[-1] if earlier else start  # the end of the stage before, where there is one
    pairs = [(evals[i], evals[last]) for i in dict.fromkeys((before, start)) if i != last]
    shown = [summaries[i] for i in dict.fromkeys((start, before, last))]
    return {
        "summaries": summaries,
        "scores": _score_columns(summaries),
        "start": summaries[start],
        "last": summaries[last],
        "changes": compare(evals[start], evals[last]) if start != last else None,
        "comparisons": _compare_pairs(pairs),
        "errors": _errors(shown),
        "shown": shown,
        "pass_at_k": _powers_of_two(min(s["samples"] for s in shown)),
    }


def show_later_evaluations(evals: Rows, later: Rows) -> dict[str, Any] | None:
    """The evaluations of `minirl eval`: its base against its adapter, else against the run's own of
    the same settings. None if there are none."""
    if not later:
        return None
    pairs = []
    for kind in dict.fromkeys(map(settings, later)):
        own = [row for row in evals if settings(row) == kind]
        by_label: dict[str, Row] = {}
        if own and own[0].get("label") == "start":
            by_label = {"base": own[0], "adapter": own[-1]}
        by_label |= {str(row.get("label")): row for row in later if settings(row) == kind}
        base, adapter = by_label.get("base"), by_label.get("adapter")
        if base is not None and adapter is not None and base is not adapter:
            pairs.append((base, adapter))
    summaries = [summarise(row) | {"changed": row.get("changed") or []} for row in later]
    return {
        "summaries": summaries,
        "scores": _score_columns(summaries),
        "comparisons": _compare_pairs(pairs),
    }


def p_value(difference: Difference) -> str:
    """How a difference's p is written."""
    if difference.p < 1e-4:
        return "p < 0.0001"
    return f"p = {difference.p:.{4 if difference.p < 0.1 else 2}f}"


def _score_columns(summaries: Sequence[Summary]) -> list[Measure]:
    """The scores and picks that any of the evaluations has, in the order of the table."""
    known = [m for m in MEASURES if m.source in ("score", "pick")]
    return [m for m in known if any(m.key in s["scores"] for s in summaries)]


def _compare_pairs(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    """Older and newer rows of evals.jsonl, problem by problem."""
    rows = [
        (f"{new.get('label')} against {old.get('label')}", compare(old, new)) for old, new in pairs
    ]
    scores = [m for m in MEASURES if m.source in ("score", "pick")]
    compared = [m for m in scores if any(changes.get(m.key) for _, changes in rows)]
    return {"rows": rows, "columns": [*OUTCOMES, *compared]}


def _errors(summaries: Sequence[Summary]) -> dict[str, Any] | None:
    """Counts of each kind of error, a column for each try of each evaluation; None without one."""
    tries = [
        (key, title)
        for key, title in (("first_errors", "first try"), ("second_errors", "second try"))
        if any(s[key] for s in summaries)
    ]
    kinds = dict.fromkeys(kind for key, _ in tries for s in summaries for kind in s[key])
    columns = [(s, key, title) for s in summaries for key, title in tries]
    if not kinds:
        return None
    return {
        "columns": [f"{s['label']}, {title}" for s, _, title in columns],
        "kinds": [(kind, [s[key].get(kind, 0) for s, key, _ in columns]) for kind in kinds],
    }


def _powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself; none for a single sample."""
    return sorted({2**i for i in range(most.bit_length())} | {most}) if most > 1 else []
