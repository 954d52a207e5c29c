"""Intervals, paired tests, pass@k, majority@k and AUC.

Invariant: pure functions, random only by a fixed seed, so a report made again says the same. The
unit of evidence is the problem, never the sample: many samples of one problem are one cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import comb, isnan, lcm, sqrt
from random import Random
from typing import NamedTuple

Z = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""
GRID = 200
"""Differences that are multiples of 1/GRID or coarser get the exact test."""
FLIPS = 20_000
"""Sign flips drawn where the exact test would be too large."""


class Interval(NamedTuple):
    """A share or a mean with its 95 % interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of after - before over `problems` problems, its 95 % interval, and the two-sided p
    of no difference."""

    value: float
    low: float
    high: float
    p: float
    problems: int


def wilson(successes: float, n: float) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927). n: may be an effective, fractional sample size;
    n = 0 gives (0, 1). ValueError unless 0 <= successes <= n."""
    if not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    # The bounds at 0 and 1 are exact; rounding would leave 1e-17 there.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == n else min(1.0, centre + half)


def ratio_interval(successes: Sequence[float], trials: Sequence[float]) -> Interval:
    """Share of successes among trials, one entry a problem: Wilson's interval at the effective
    sample size.

    That size is the number of independent trials with the same variance as the ratio has between
    problems (linearised), at most the number of trials; where every trial went the same way it is
    Kish's (sum n)^2 / sum n^2, i.e. a problem's trials count as one. With one trial a problem it is
    Wilson's interval itself, and unlike a bootstrap it does not collapse at 0 or 1. ValueError
    without trials.
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
    """`ratio_interval` of problems that each have `samples` trials with this mean."""
    return ratio_interval(
        [mean * samples for mean in per_problem_means], [samples] * len(per_problem_means)
    )


def mean_interval(per_problem_means: Sequence[float]) -> Interval:
    """Mean over problems of any number, with its normal 95 % interval; of no width for a single
    problem."""
    n = len(per_problem_means)
    centre = sum(per_problem_means) / n
    squares = sum((value - centre) ** 2 for value in per_problem_means)
    half = Z * sqrt(squares / (n * (n - 1))) if n > 1 else 0.0
    return Interval(centre, centre - half, centre + half)


def paired(before: Sequence[float], after: Sequence[float]) -> Difference:
    """Compare two evaluations problem by problem (values in [0, 1], same order).

    p: sign-flip test of the summed differences, exact where they lie on a grid of 1/200 or coarser
    (with single samples this is McNemar's exact test), else from 20,000 seeded flips. Interval:
    adjusted Wald for matched pairs (Agresti and Min 2005: half a pair in every cell), which does
    not collapse when nothing changed. ValueError for unequal or no problems.
    """
    if len(before) != len(after) or not before:
        raise ValueError(
            f"paired: got {len(before)} values before, {len(after)} after; expected equal numbers"
        )
    changes = [b - a for a, b in zip(before, after, strict=True)]
    n = len(changes)
    centre = sum(changes) / (n + 2)
    half = Z * sqrt((sum(d * d for d in changes) + 1) / (n + 2) - centre**2) / sqrt(n + 2)
    return Difference(
        sum(changes) / n, max(-1.0, centre - half), min(1.0, centre + half), _sign_flip(changes), n
    )


def _sign_flip(changes: Sequence[float]) -> float:
    """Share of all 2^n sign patterns whose sum is at least as far from 0 as the one observed."""
    fractions = [Fraction(d).limit_denominator(1000) for d in changes]
    unit = lcm(*(f.denominator for f in fractions))
    if unit > GRID:
        size = [abs(d) for d in changes if d]
        rng, observed = Random(0), abs(sum(changes)) - 1e-9
        hits = sum(
            abs(sum(s if rng.random() < 0.5 else -s for s in size)) >= observed
            for _ in range(FLIPS)
        )
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
    """Unbiased estimate from c right samples of n that at least one of k is right (arXiv
    2107.03374, eq. 1)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: n {n}, c {c}, k {k}; expected 0 <= c <= n and 1 <= k <= n")
    return 1.0 - comb(n - c, k) / comb(n, k)


def majority(answers: Sequence[str | None], passed: Sequence[bool]) -> float:
    """Whether the answer that most samples give is right (majority@k): 0 to 1, whatever the order
    of the samples.

    An answer None has no vote; without any vote the result is 0. An answer is right if most of the
    samples that give it passed, and half right if just half did: "50%" and "50" vote for one
    answer, but only one of them may pass. Answers given equally often count as the mean of them.
    """
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, passed, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(right)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    winners = [sum(rights) for rights in votes.values() if len(rights) == most]
    marks = [1.0 if 2 * right > most else 0.5 if 2 * right == most else 0.0 for right in winners]
    return sum(marks) / len(winners)


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Area under the ROC curve: how likely a right item scores above a wrong one, a tie counting
    half (Mann and Whitney 1947). NaN without both kinds, or if a score is NaN."""
    right = sum(labels)
    pairs = right * (len(labels) - right)
    if not pairs or any(map(isnan, scores)):
        return float("nan")
    order = sorted(range(len(scores)), key=scores.__getitem__)
    ranks, start = 0.0, 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        ranks += (start + end + 1) / 2 * sum(labels[i] for i in order[start:end])
        start = end
    return (ranks - right * (right + 1) / 2) / pairs
