"""How sure a measured number is: intervals, paired tests, pass@k, and the summary of one evaluation.

Invariant: pure functions of their arguments with no randomness but a fixed seed, so a report says the same whenever it is made. The
unit of evidence is the problem, never the sample: many samples of one problem are one cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import comb, lcm, sqrt
from random import Random
from typing import Any, NamedTuple

from minirl.errors import UserError

Z = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""
GRID = 200
"""Differences that are multiples of 1/GRID or coarser get the exact test."""
FLIPS = 20_000
"""Sign flips drawn where the exact test would be too large."""

COUNTS = ("searches", "response", "steps", "calls", "errors", "malformed")
"""The scores that are no shares."""


class Interval(NamedTuple):
    """A share (or, from `mean_interval`, a mean) with its 95 % interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of after - before over `problems` problems, its 95 % interval, and the two-sided p of "no difference"."""

    value: float
    low: float
    high: float
    p: float
    problems: int


def wilson(successes: float, n: float) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927). n may be an effective, non-integer sample size; n = 0 gives (0, 1)."""
    if not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    # The bounds at 0 and 1 are exact; rounding would leave 1e-17 there.
    return (0.0 if successes == 0 else max(0.0, centre - half)), (1.0 if successes == n else min(1.0, centre + half))


def ratio_interval(successes: Sequence[float], trials: Sequence[float]) -> Interval:
    """Share of successes, with trials clustered in problems: Wilson's interval at the effective sample size.

    That size is what binomial sampling would need for the between-problem (linearised) variance of the ratio, at most the number of
    trials; where every trial went the same way it is Kish's (sum n)^2 / sum n^2, i.e. a problem's trials count as one. With one trial a
    problem it is Wilson's interval itself, and unlike a bootstrap it does not collapse at 0 or 1. ValueError without trials.
    """
    total = sum(trials)
    if total <= 0:
        raise ValueError("ratio_interval: no trials")
    share = min(1.0, sum(successes) / total)
    variance = sum((s - share * n) ** 2 for s, n in zip(successes, trials, strict=True)) / total**2
    if share in (0.0, 1.0):
        size = total**2 / sum(n * n for n in trials)
    else:
        size = min(total, share * (1 - share) / variance) if variance > 0 else total
    return Interval(share, *wilson(share * size, size))


def cluster_interval(per_problem_means: Sequence[float], samples: int = 1) -> Interval:
    """Mean over problems, each problem's value being a mean of `samples` samples; see `ratio_interval`."""
    return ratio_interval([mean * samples for mean in per_problem_means], [samples] * len(per_problem_means))


def mean_interval(per_problem_means: Sequence[float]) -> Interval:
    """Mean over problems of a number that is no share, with its normal 95 % interval; that of a single problem has no width."""
    n = len(per_problem_means)
    centre = sum(per_problem_means) / n
    half = Z * sqrt(sum((value - centre) ** 2 for value in per_problem_means) / (n * (n - 1))) if n > 1 else 0.0
    return Interval(centre, centre - half, centre + half)


def paired(before: Sequence[float], after: Sequence[float]) -> Difference:
    """Compare two evaluations problem by problem (values in [0, 1], same order).

    p: sign-flip test of the summed differences, exact where they lie on a grid of 1/200 or coarser (with single samples this is
    McNemar's exact test), else from 20,000 seeded flips. Interval: adjusted Wald for matched pairs (Agresti and Min 2005: half a pair in
    every cell), which does not collapse when nothing changed. ValueError for unequal or no problems.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"paired: {len(before)} values before, {len(after)} after; expected as many, and at least one")
    changes = [b - a for a, b in zip(before, after, strict=True)]
    n = len(changes)
    centre = sum(changes) / (n + 2)
    half = Z * sqrt((sum(d * d for d in changes) + 1) / (n + 2) - centre**2) / sqrt(n + 2)
    return Difference(sum(changes) / n, max(-1.0, centre - half), min(1.0, centre + half), _sign_flip(changes), n)


def _sign_flip(changes: Sequence[float]) -> float:
    """Share of all 2^n sign patterns whose sum is at least as far from 0 as the one observed."""
    fractions = [Fraction(d).limit_denominator(1000) for d in changes]
    unit = lcm(*(f.denominator for f in fractions))
    if unit > GRID:
        size = [abs(d) for d in changes if d]
        rng, observed = Random(0), abs(sum(changes)) - 1e-9
        hits = sum(abs(sum(s if rng.random() < 0.5 else -s for s in size)) >= observed for _ in range(FLIPS))
        return (hits + 1) / (FLIPS + 1)
    steps = [int(f * unit) for f in fractions if f]
    ways = {0: 1}
    for step in steps:
        grown: Counter[int] = Counter()
        for total, count in ways.items():
            grown[total + step] += count
            grown[total - step] += count
        ways = grown
    far = sum(count for total, count in ways.items() if abs(total) >= abs(sum(steps)))
    return far / (1 << len(steps))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k samples is right, estimated without bias from c right ones among n (arXiv 2107.03374, eq. 1)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: n {n}, c {c}, k {k}; expected 0 <= c <= n and 1 <= k <= n")
    return 1.0 - comb(n - c, k) / comb(n, k)


def majority(answers: Sequence[str | None], passed: Sequence[bool]) -> float:
    """Whether the answer that most samples give is right (majority@k), whatever the order of the samples.

    None stands for no answer and has no vote; 0 where nobody has one. An answer is right where most samples that give it passed (as many as
    not: 1/2): "50%" and "50" vote for one answer, and only the first is right where a share of 0.5 was asked for. Of answers given equally
    often each counts alike, as if one of them were drawn.
    """
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, passed, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(right)
    most = max(map(len, votes.values()), default=0)
    winners = [sum(rights) for rights in votes.values() if len(rights) == most]
    return sum(1.0 if 2 * right > most else 0.5 if 2 * right == most else 0.0 for right in winners) / len(winners) if winners else 0.0


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Area under the ROC curve: how likely a right one scores above a wrong one, ties half (Mann and Whitney 1947); NaN without both."""
    right = sum(labels)
    pairs = right * (len(labels) - right)
    order = sorted(range(len(scores)), key=scores.__getitem__)
    ranks, start = 0.0, 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        ranks += (start + end + 1) / 2 * sum(labels[i] for i in order[start:end])
        start = end
    return (ranks - right * (right + 1) / 2) / pairs if pairs else float("nan")


class _Tries(NamedTuple):
    """One problem of an evaluation: how many samples, passed on the first try, passed within two, the errors of each try, its scores."""

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
            errors = [[str(e) for e in problem.get(key) or () if e is not None] for key in ("first_error", "second_error")]
            scores = {str(name): [float(x) for x in values if x is not None] for name, values in problem.get("scores", {}).items()}
            within = sum(a or b for a, b in zip(first, second, strict=True))
            found[str(problem["id"])] = _Tries(len(first), sum(first), within, errors[0], errors[1], scores)
        if len(found) != len(row["problems"]) or not found or any(t.samples == 0 for t in found.values()):
            raise ValueError("expected problems with an id of their own and at least one sample each")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        label = row.get("label")
        raise UserError(f"evaluation {label!r}: not a row of evals.jsonl ({type(error).__name__}: {error}); evaluate again") from error
    return found


def summarise(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of evals.jsonl says, every share as an Interval.

    first: passed at once. second: passed within two tries. fixed: share of the failed first tries that the retry mends; second and
    fixed are None for a single try, fixed also where nothing failed. pass_at_k: {k: Interval} over first tries, k = 1 .. samples.
    first_errors, second_errors: {kind: count}, commonest first. scores: {name: Interval} of the metrics.SCORES that the row has, over the
    problems that have them; counted: {name: how many of the problems x samples have it}. UserError for a row that is none.
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
        "second": ratio_interval([t.second for t in problems], [t.samples for t in problems]) if two else None,
        "fixed": ratio_interval([t.second - t.first for t in failed], [t.samples - t.first for t in failed]) if two and failed else None,
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
    """Evaluations made alike in runs of several seeds as one row, `runs` of them: a problem's samples are those of all runs.

    So intervals go over problems and keep the draws of all seeds together. UserError where the problems or the settings differ.
    """

    def way(row: Mapping[str, Any]) -> tuple[Any, ...]:
        ids = sorted(str(problem["id"]) for problem in row["problems"])
        return ids, row.get("tries", 1), row.get("temperature"), row.get("changed")

    first, *others = rows
    if any(way(row) != way(first) for row in others):
        raise UserError(f"evaluation {first.get('label')!r}: the runs' rows differ in problems or settings, expected equal ones to pool")
    problems = []
    for problem in first["problems"]:
        same = [next(p for p in row["problems"] if p["id"] == problem["id"]) for row in rows]
        pooled = {key: [x for p in same for x in p[key]] for key, value in problem.items() if isinstance(value, list)}
        names = dict.fromkeys(name for p in same for name in p.get("scores", {}))
        scores = {name: [x for p in same for x in p.get("scores", {}).get(name, [None] * len(p["first"]))] for name in names}
        problems.append({"id": problem["id"], **pooled} | ({"scores": scores} if scores else {}))
    return {**first, "samples": sum(row.get("samples", 1) for row in rows), "runs": len(rows), "problems": problems}


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Difference | None]:
    """Two rows of evals.jsonl, paired over the problems they share: first, second, fixed over the problems that failed in both, and every
    share among their scores (f1, em, ...; see COUNTS for those that are none) over the problems that have it in both.

    None where the two have nothing to compare.
    """
    left, right = _tries(before), _tries(after)
    common = [(left[name], right[name]) for name in left if name in right]
    failed = [(a, b) for a, b in common if a.first < a.samples and b.first < b.samples]
    two = before.get("tries", 1) == after.get("tries", 1) == 2

    def fixed(t: _Tries) -> float:
        return (t.second - t.first) / (t.samples - t.first)

    return {
        "first": paired([a.first / a.samples for a, _ in common], [b.first / b.samples for _, b in common]) if common else None,
        "second": paired([a.second / a.samples for a, _ in common], [b.second / b.samples for _, b in common]) if common and two else None,
        "fixed": paired([fixed(a) for a, _ in failed], [fixed(b) for _, b in failed]) if failed and two else None,
    } | {name: _compare_scores(name, common) for name in dict.fromkeys(name for a, _ in common for name in a.scores) if name not in COUNTS}


def _compare_scores(name: str, pairs: Sequence[tuple[_Tries, _Tries]]) -> Difference | None:
    both = [(a.scores[name], b.scores[name]) for a, b in pairs if a.scores.get(name) and b.scores.get(name)]
    return paired([sum(a) / len(a) for a, _ in both], [sum(b) / len(b) for _, b in both]) if both else None
