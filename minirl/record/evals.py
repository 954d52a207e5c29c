"""Rows of evals.jsonl: one summarised, those of several seeds pooled, two compared; and where
`minirl eval` puts its own.

Invariant: the unit of evidence is the problem, never the sample. A malformed row is rejected,
naming its label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from minirl.errors import UserError
from minirl.io.files import read_rows, write_rows
from minirl.record.measures import OUTCOMES, measure
from minirl.record.statistics import (
    Difference,
    Interval,
    cluster_interval,
    mean_interval,
    paired,
    pass_at_k,
    ratio_interval,
)

Row = Mapping[str, Any]
LATER = "later_evals.jsonl"  # the evaluations of `minirl eval`


class _Tries(NamedTuple):
    """One problem of an evaluation."""

    samples: int
    first: int  # samples that pass at once
    second: int  # samples that pass within two tries
    first_errors: list[str]
    second_errors: list[str]
    scores: dict[str, list[float]]

    def ratio(self, key: str) -> tuple[float, int]:
        """Successes (or the sum of a score) and trials; no trials where the problem has none."""
        if key == "first":
            return self.first, self.samples
        if key == "second":
            return self.second, self.samples
        if key == "fixed":
            return self.second - self.first, self.samples - self.first
        values = self.scores.get(key, [])
        return sum(values), len(values)


def settings(row: Row) -> tuple[Any, ...]:
    """How an evaluation was made: tries, samples, temperature, and the overrides that `minirl eval`
    was given. Only rows of equal settings are compared."""
    changed = tuple(row.get("changed") or ())
    return row.get("tries", 1), row.get("samples", 1), row.get("temperature"), changed


def summarise(row: Row) -> dict[str, Any]:
    """The shares and means of one row of evals.jsonl, each an Interval.

    first: passed at once. second: passed within two tries. fixed: share of the failed first tries
    that the retry solves; second and fixed are None for a single try, fixed also where nothing
    failed. pass_at_k: {k: Interval} over first tries, k = 1 .. samples. first_errors,
    second_errors: {kind: count}, commonest first. scores: {key: Interval} over the problems that
    have the score; counted: {key: number of its values}. Raises UserError for a malformed row.
    """
    problems = list(_read(row).values())
    samples = min(t.samples for t in problems)
    scores = dict.fromkeys(key for t in problems for key in t.scores if t.scores[key])
    by_k = {k: [pass_at_k(t.samples, t.first, k) for t in problems] for k in range(1, samples + 1)}
    return {
        **{key: row.get(key) for key in ("label", "stage", "step", "tries", "temperature")},
        "samples": samples,
        "problems": len(problems),
        **{m.key: None for m in OUTCOMES},
        **{key: _interval(key, problems) for key in _outcomes(row)},
        # k samples make one trial of pass@k.
        "pass_at_k": {k: cluster_interval(values, samples // k) for k, values in by_k.items()},
        "first_errors": _count(error for t in problems for error in t.first_errors),
        "second_errors": _count(error for t in problems for error in t.second_errors),
        "scores": {key: _interval(key, problems) for key in scores},
        "counted": {key: sum(t.ratio(key)[1] for t in problems) for key in scores},
    }


def pool(rows: Sequence[Row]) -> dict[str, Any]:
    """Evaluations of the same problems in runs of several seeds as one row: a problem's samples are
    those of all runs, and `runs` says how many.

    So intervals go over problems and keep the draws of all seeds together. Raises UserError where
    the problems or the settings differ.
    """

    def kind(row: Row) -> tuple[Any, ...]:
        ids = sorted(str(problem["id"]) for problem in row["problems"])
        return ids, settings({**row, "samples": 1})

    first, *others = rows
    if any(kind(row) != kind(first) for row in others):
        raise UserError(
            f"evaluation {first.get('label')!r}: the runs' rows differ in problems or settings,"
            " expected equal ones to pool"
        )
    by_id = [{str(problem["id"]): problem for problem in row["problems"]} for row in rows]
    ids = [str(problem["id"]) for problem in first["problems"]]
    return {
        **first,
        "samples": sum(row.get("samples", 1) for row in rows),
        "runs": len(rows),
        "problems": [_pool_problem([run[name] for run in by_id]) for name in ids],
    }


def compare(before: Row, after: Row) -> dict[str, Difference | None]:
    """Two rows of evals.jsonl, paired over the problems that both have: the outcomes (fixed over
    the problems that failed in both) and each score that is a fraction.

    None where there is nothing to compare.
    """
    left, right = _read(before), _read(after)
    common = [(left[name], right[name]) for name in left if name in right]
    both = [key for key in _outcomes(before) if key in _outcomes(after)]
    scores = dict.fromkeys(name for t, _ in common for name in t.scores)
    keys = both + [key for key in scores if measure(key).kind == "fraction"]
    return {m.key: None for m in OUTCOMES} | {key: _difference(key, common) for key in keys}


def add_later_eval(folder: Path, row: Row) -> None:
    """Put an evaluation that `minirl eval` made beside the run's own, in place of one of the same
    label, settings and number of problems. Needs no open run, and does not wait for its lock."""

    def kind(row: Row) -> tuple[Any, ...]:
        return row.get("label"), len(row["problems"]), settings(row)

    try:
        with filelock.FileLock(folder / ".evals.lock"):
            others = [old for old in read_rows(folder / LATER) if kind(old) != kind(row)]
            write_rows(folder / LATER, [*others, row])
    except OSError as error:
        raise UserError(
            f"{folder / LATER}: cannot be written ({error}), so this evaluation is lost; make the"
            " folder writable and evaluate again"
        ) from error


def _read(row: Row) -> dict[str, _Tries]:
    """The problems of a row by their id."""
    try:
        problems = {str(problem["id"]): _read_problem(problem) for problem in row["problems"]}
        if not problems or len(problems) != len(row["problems"]):
            raise ValueError("expected problems, each with an id of its own")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"evaluation {row.get('label')!r}: not a row of evals.jsonl"
            f" ({type(error).__name__}: {error}); evaluate again"
        ) from error
    return problems


def _read_problem(problem: Row) -> _Tries:
    """A failed first try without a second one counts as failed."""
    first = [bool(x) for x in problem["first"]]
    second = [bool(x) for x in problem.get("second") or [None] * len(first)]
    within = sum(a or b for a, b in zip(first, second, strict=True))
    if not first:
        raise ValueError("expected at least one sample of each problem")
    first_errors, second_errors = (
        [str(error) for error in problem.get(key) or () if error is not None]
        for key in ("first_error", "second_error")
    )
    scores = {
        str(name): [float(x) for x in values if x is not None]
        for name, values in problem.get("scores", {}).items()
    }
    for name, values in scores.items():
        if not all(map(measure(name).accepts, values)):
            raise ValueError(f"score {name!r} is not in its range")
    return _Tries(len(first), sum(first), within, first_errors, second_errors, scores)


def _outcomes(row: Row) -> list[str]:
    """The keys of the outcomes that an evaluation has: a single try can only be first."""
    return [m.key for m in OUTCOMES if m.key == "first" or row.get("tries", 1) == 2]


def _count(errors: Iterable[str]) -> dict[str, int]:
    return dict(Counter(errors).most_common())


def _interval(key: str, problems: Sequence[_Tries]) -> Interval | None:
    ratios = [(total, n) for total, n in (t.ratio(key) for t in problems) if n]
    if not ratios:
        return None
    if measure(key).kind == "count":
        return mean_interval([total / n for total, n in ratios])
    return ratio_interval([total for total, _ in ratios], [n for _, n in ratios])


def _difference(key: str, pairs: Sequence[tuple[_Tries, _Tries]]) -> Difference | None:
    ratios = [(a.ratio(key), b.ratio(key)) for a, b in pairs]
    both = [(a / n, b / m) for (a, n), (b, m) in ratios if n and m]
    return paired([a for a, _ in both], [b for _, b in both]) if both else None


def _pool_problem(same: Sequence[Row]) -> dict[str, Any]:
    """One problem's rows from several runs, their lists joined; a score that a run lacks is None in
    each of its samples."""
    joined = {
        key: [x for p in same for x in p[key]]
        for key, value in same[0].items()
        if isinstance(value, list)
    }
    names = dict.fromkeys(name for p in same for name in p.get("scores", {}))
    scores = {
        name: [x for p in same for x in p.get("scores", {}).get(name, [None] * len(p["first"]))]
        for name in names
    }
    return {"id": same[0]["id"], **joined} | ({"scores": scores} if scores else {})
