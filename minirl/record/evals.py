"""What rows of evals.jsonl say: one summarised, several seeds pooled, two compared.

Invariant: the unit of evidence is the problem, never the sample. A row that is none is refused by
its label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minirl.errors import UserError
from minirl.record.statistics import (
    Difference,
    Interval,
    cluster_interval,
    mean_interval,
    paired,
    pass_at_k,
    ratio_interval,
)

COUNTS = ("searches", "response", "steps", "calls", "errors", "malformed")
"""The scores that are no shares."""
MOST_COUNTED = 1e9
"""A count beyond it is none."""


class _Tries(NamedTuple):
    """One problem of an evaluation: how many samples, passed on the first try, passed within two,
    the errors of each try, its scores."""

    samples: int
    first: int
    second: int
    first_errors: list[str]
    second_errors: list[str]
    scores: dict[str, list[float]]


def _tries(row: Mapping[str, Any]) -> dict[str, _Tries]:
    """An evaluation by problem id. A failed first try without a second one counts as failed."""
    found: dict[str, _Tries] = {}
    try:
        for problem in row["problems"]:
            first = [bool(x) for x in problem["first"]]
            second = [bool(x) for x in problem.get("second") or [None] * len(first)]
            errors = [
                [str(e) for e in problem.get(key) or () if e is not None]
                for key in ("first_error", "second_error")
            ]
            scores = {
                str(name): [float(x) for x in values if x is not None]
                for name, values in problem.get("scores", {}).items()
            }
            within = sum(a or b for a, b in zip(first, second, strict=True))
            if wrong := [
                name
                for name, values in scores.items()
                for x in values
                if not 0 <= x <= (MOST_COUNTED if name in COUNTS else 1)
            ]:
                raise ValueError(f"score {wrong[0]!r} is not in its range")
            found[str(problem["id"])] = _Tries(
                len(first), sum(first), within, errors[0], errors[1], scores
            )
        if (
            len(found) != len(row["problems"])
            or not found
            or any(t.samples == 0 for t in found.values())
        ):
            raise ValueError(
                "expected problems with an id of their own and at least one sample each"
            )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        label = row.get("label")
        raise UserError(
            f"evaluation {label!r}: not a row of evals.jsonl ({type(error).__name__}: {error});"
            " evaluate again"
        ) from error
    return found


def summarise(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of evals.jsonl says, every share as an Interval.

    first: passed at once. second: passed within two tries. fixed: share of the failed first tries
    that the retry mends; second and fixed are None for a single try, fixed also where nothing
    failed. pass_at_k: {k: Interval} over first tries, k = 1 .. samples. first_errors,
    second_errors: {kind: count}, commonest first. scores: {name: Interval} of the metrics.SCORES
    that the row has, over the problems that have them; counted: {name: how many of the problems x
    samples have it}. UserError for a row that is none.
    """
    problems = list(_tries(row).values())
    samples = min(t.samples for t in problems)
    two = row.get("tries", 1) == 2
    failed = [t for t in problems if t.first < t.samples]
    names = dict.fromkeys(name for t in problems for name in t.scores)
    by_k = {k: [pass_at_k(t.samples, t.first, k) for t in problems] for k in range(1, samples + 1)}
    return {
        **{key: row.get(key) for key in ("label", "stage", "step", "tries", "temperature")},
        "samples": samples,
        "problems": len(problems),
        "first": ratio_interval([t.first for t in problems], [t.samples for t in problems]),
        "second": (
            ratio_interval([t.second for t in problems], [t.samples for t in problems])
            if two
            else None
        ),
        "fixed": (
            ratio_interval(
                [t.second - t.first for t in failed], [t.samples - t.first for t in failed]
            )
            if two and failed
            else None
        ),
        # k samples make one trial of pass@k.
        "pass_at_k": {k: cluster_interval(values, samples // k) for k, values in by_k.items()},
        "first_errors": dict(Counter(e for t in problems for e in t.first_errors).most_common()),
        "second_errors": dict(Counter(e for t in problems for e in t.second_errors).most_common()),
        "scores": {name: _score(name, problems) for name in names},
        "counted": {name: sum(len(t.scores.get(name, ())) for t in problems) for name in names},
    }


def _score(name: str, problems: Sequence[_Tries]) -> Interval:
    values = [found for t in problems if (found := t.scores.get(name))]
    if name in COUNTS:
        return mean_interval([sum(found) / len(found) for found in values])
    return ratio_interval([sum(found) for found in values], [len(found) for found in values])


def pool(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Evaluations made alike in runs of several seeds as one row, `runs` of them: a problem's
    samples are those of all runs.

    So intervals go over problems and keep the draws of all seeds together. UserError where the
    problems or the settings differ.
    """

    def way(row: Mapping[str, Any]) -> tuple[Any, ...]:
        ids = sorted(str(problem["id"]) for problem in row["problems"])
        return ids, row.get("tries", 1), row.get("temperature"), row.get("changed")

    first, *others = rows
    if any(way(row) != way(first) for row in others):
        raise UserError(
            f"evaluation {first.get('label')!r}: the runs' rows differ in problems or settings,"
            " expected equal ones to pool"
        )
    problems = []
    for problem in first["problems"]:
        same = [next(p for p in row["problems"] if p["id"] == problem["id"]) for row in rows]
        pooled = {
            key: [x for p in same for x in p[key]]
            for key, value in problem.items()
            if isinstance(value, list)
        }
        names = dict.fromkeys(name for p in same for name in p.get("scores", {}))
        scores = {
            name: [x for p in same for x in p.get("scores", {}).get(name, [None] * len(p["first"]))]
            for name in names
        }
        problems.append({"id": problem["id"], **pooled} | ({"scores": scores} if scores else {}))
    return {
        **first,
        "samples": sum(row.get("samples", 1) for row in rows),
        "runs": len(rows),
        "problems": problems,
    }


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Difference | None]:
    """Two rows of evals.jsonl, paired over the problems they share: first, second, fixed over the
    problems that failed in both, and every share among their scores (f1, em, ...; see COUNTS for
    those that are none) over the problems that have it in both.

    None where the two have nothing to compare.
    """
    left, right = _tries(before), _tries(after)
    common = [(left[name], right[name]) for name in left if name in right]
    failed = [(a, b) for a, b in common if a.first < a.samples and b.first < b.samples]
    two = before.get("tries", 1) == after.get("tries", 1) == 2

    def fixed(t: _Tries) -> float:
        return (t.second - t.first) / (t.samples - t.first)

    return {
        "first": (
            paired(
                [a.first / a.samples for a, _ in common], [b.first / b.samples for _, b in common]
            )
            if common
            else None
        ),
        "second": (
            paired(
                [a.second / a.samples for a, _ in common], [b.second / b.samples for _, b in common]
            )
            if common and two
            else None
        ),
        "fixed": (
            paired([fixed(a) for a, _ in failed], [fixed(b) for _, b in failed])
            if failed and two
            else None
        ),
    } | {
        name: _compare_scores(name, common)
        for name in dict.fromkeys(name for a, _ in common for name in a.scores)
        if name not in COUNTS
    }


def _compare_scores(name: str, pairs: Sequence[tuple[_Tries, _Tries]]) -> Difference | None:
    both = [
        (a.scores[name], b.scores[name])
        for a, b in pairs
        if a.scores.get(name) and b.scores.get(name)
    ]
    return (
        paired([sum(a) / len(a) for a, _ in both], [sum(b) / len(b) for _, b in both])
        if both
        else None
    )
