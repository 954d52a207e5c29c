"""Intervals, paired tests and pass@k against numbers worked out by hand."""

from __future__ import annotations

from itertools import combinations, product
from math import isnan
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirl.errors import UserError
from minirl.record.evals import compare, pool, summarise
from minirl.record.statistics import (
    Z,
    auc,
    cluster_interval,
    majority,
    mean_interval,
    paired,
    pass_at_k,
    ratio_interval,
    wilson,
)


def test_wilson_against_textbook_values() -> None:
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(50, 100) == pytest.approx((0.4038315, 0.5961685), abs=1e-6)
    # At 0 of n the upper bound is z^2 / (n + z^2).
    assert wilson(0, 20) == pytest.approx((0.0, 3.841459 / 23.841459), abs=1e-7)
    assert wilson(20, 20) == pytest.approx((1 - 3.841459 / 23.841459, 1.0), abs=1e-7)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson(3, 2)


def test_cluster_interval_is_wilson_for_single_samples() -> None:
    assert cluster_interval([1.0] * 8 + [0.0] * 2)[1:] == pytest.approx(wilson(8, 10))
    assert cluster_interval([0.0] * 20) == (0.0, *wilson(0, 20))


def test_clusters_count_as_much_as_they_tell() -> None:
    # 4 samples of each of 10 problems that go all one way are worth 10 samples, not 40 ...
    assert cluster_interval([1.0] * 6 + [0.0] * 4, samples=4)[1:] == pytest.approx(wilson(6, 10))
    # ... samples that scatter within problems alone are worth all 40 and no more ...
    assert cluster_interval([0.5] * 10, samples=4)[1:] == pytest.approx(wilson(20, 40))
    assert cluster_interval([0.5] * 8 + [0.25, 0.75], samples=4)[1:] == pytest.approx(
        wilson(20, 40)
    )
    # ... and where all passed, each problem counts once.
    assert cluster_interval([1.0] * 10, samples=4)[1:] == pytest.approx(wilson(10, 10))
    # By hand: means 1, .5, .5, 0 have variance 0.125; 0.25 / (0.125 / 4) = 8 effective samples.
    assert cluster_interval([1.0, 0.5, 0.5, 0.0], samples=4)[1:] == pytest.approx(wilson(4, 8))


def test_ratio_weighs_by_trials() -> None:
    assert ratio_interval([1, 0], [1, 3]).value == 0.25
    # By hand: residuals 1 - 0.25 and 0 - 0.75, variance 2 * 0.5625 / 16; size 0.1875 / 0.0703125 =
    # 8/3.
    assert ratio_interval([1, 0], [1, 3])[1:] == pytest.approx(wilson(0.25 * 8 / 3, 8 / 3))
    with pytest.raises(ValueError, match="no trials"):
        ratio_interval([], [])


def test_interval_covers_the_truth() -> None:
    """Clustered data with a wide spread between problems: about 95 % of the intervals must hold the
    true mean."""
    rng, hits = Random(7), 0
    for _ in range(400):
        chances = [rng.betavariate(0.5, 1.0) for _ in range(60)]  # mean 1/3
        found = cluster_interval([sum(rng.random() < c for _ in range(4)) / 4 for c in chances], 4)
        hits += found.low <= 1 / 3 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_paired_is_mcnemar_for_single_samples() -> None:
    result = paired([0] * 5 + [1, 0, 1, 1], [1] * 5 + [0, 0, 1, 1])
    assert result.value == pytest.approx(4 / 9)
    assert result.problems == 9
    # 5 better, 1 worse of 6 discordant: 2 * (C(6,0) + C(6,1)) / 2^6.
    assert result.p == pytest.approx(14 / 64)
    # Agresti-Min: centre 4 / 11, variance (6 + 1) / 11 - (4 / 11)^2.
    half = 1.959963984540054 * ((7 / 11 - 16 / 121) / 11) ** 0.5
    assert result[1:3] == pytest.approx((4 / 11 - half, 4 / 11 + half))


def test_paired_without_change_is_not_certain() -> None:
    result = paired([1, 0, 1], [1, 0, 1])
    assert (result.value, result.p) == (0.0, 1.0)
    assert result.low == pytest.approx(-result.high)
    assert result.high > 0.3


def test_sign_flip_equals_enumeration() -> None:
    rng = Random(3)
    before = [rng.randrange(9) / 8 for _ in range(10)]
    after = [min(1.0, b + rng.randrange(3) / 8) for b in before]
    changes = [round(8 * (b - a)) for a, b in zip(before, after, strict=True)]
    far = sum(
        abs(sum(s * d for s, d in zip(signs, changes, strict=True))) >= abs(sum(changes))
        for signs in product((1, -1), repeat=10)
    )
    assert paired(before, after).p == pytest.approx(far / 2**10)


def test_sign_flip_by_chance_agrees_with_the_exact_one() -> None:
    before, after = [0.0] * 9 + [1.0] * 3, [1.0] * 9 + [0.0] * 3
    # 9 against 3: |sum| >= 6 in 2 * (1 + 12 + 66 + 220) of 2^12 patterns, |sum| = 6 in 2 * 220 of
    # them.
    assert paired(before, after).p == pytest.approx(598 / 4096)
    # A thirteenth change of 1/997 lies on no coarse grid, so flips are drawn; it halves the ties.
    drawn = paired([*before, 0.0], [*after, 1 / 997])
    assert drawn.p == pytest.approx((158 + 220) / 4096, abs=0.006)
    assert drawn == paired([*before, 0.0], [*after, 1 / 997])


def test_sign_flip_holds_its_level() -> None:
    rng = Random(5)
    draws = [
        paired([rng.randrange(2) for _ in range(40)], [rng.randrange(2) for _ in range(40)]).p
        for _ in range(400)
    ]
    assert sum(p <= 0.05 for p in draws) / 400 <= 0.07


def test_pass_at_k_is_the_share_of_subsets_with_a_success() -> None:
    for n, c, k in [(5, 2, 3), (6, 1, 2), (4, 0, 2), (4, 4, 1), (5, 3, 5), (5, 3, 3)]:
        subsets = list(combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="n 3, c 1, k 4"):
        pass_at_k(3, 1, 4)


@pytest.mark.parametrize(
    ("answers", "passed", "right"),
    [
        (["3", "5", "5"], [0, 1, 1], 1.0),
        (["3", "5", "5"], [1, 0, 0], 0.0),
        (["3", "5", "5", "3"], [0, 1, 1, 0], 0.5),  # two answers tie, and one of them is right
        (["1", "2", "3"], [0, 0, 1], 1 / 3),
        (["5", "3", "3", "5", "3"], [1, 0, 0, 1, 0], 0.0),
        ([None, None, "4"], [0, 0, 1], 1.0),  # no answer has no vote, however many give none
        ([None, None], [0, 0], 0.0),
        ([], [], 0.0),
        # "50%" and "50" are one answer, of which only the first states 0.5: most of those who give
        # it are right, or wrong, or neither.
        (["50", "50", "50"], [1, 0, 1], 1.0),
        (["50", "50", "50"], [1, 0, 0], 0.0),
        (["50", "50", "0.5"], [1, 0, 1], 0.5),
    ],
)
def test_majority(answers: list[str | None], passed: list[int], right: float) -> None:
    assert majority(answers, [bool(x) for x in passed]) == right


@given(
    st.lists(st.tuples(st.sampled_from(["1", "2", "3", None]), st.booleans()), max_size=12),
    st.randoms(use_true_random=False),
)
def test_majority_does_not_depend_on_the_order(
    samples: list[tuple[str | None, bool]], rng: Random
) -> None:
    """Catches: the verdict of the sample that came first, a tie that goes to the answer given
    first."""
    shuffled = rng.sample(samples, len(samples))
    found = majority([answer for answer, _ in samples], [passed for _, passed in samples])
    assert majority([answer for answer, _ in shuffled], [passed for _, passed in shuffled]) == found
    if all(passed for answer, passed in samples if answer is not None):
        assert found == float(any(answer is not None for answer, _ in samples))


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()), max_size=15))
def test_auc_is_the_share_of_pairs_in_order(cases: list[tuple[float, bool]]) -> None:
    right, wrong = ([score for score, label in cases if label is kind] for kind in (True, False))
    pairs = [1.0 if r > w else 0.5 if r == w else 0.0 for r in right for w in wrong]
    found = auc([score for score, _ in cases], [label for _, label in cases])
    assert found == pytest.approx(sum(pairs) / len(pairs)) if pairs else found != found
    assert isnan(
        auc([*(score for score, _ in cases), float("nan")], [*(label for _, label in cases), True])
    ), "and comes to an end"


def evaluation(
    first: list[list[int]], second: list[list[int | None]], tries: int = 2, **more: Any
) -> dict[str, Any]:
    problems = [
        {
            "id": f"p{i}",
            "first": f,
            "second": s,
            "first_error": [None if x else "missed_target" for x in f],
            "second_error": [None if x else "wrong_numbers" for x in s],
        }
        for i, (f, s) in enumerate(zip(first, second, strict=True))
    ]
    row = {
        "label": "start",
        "stage": 0,
        "step": 0,
        "tries": tries,
        "samples": len(first[0]),
        "temperature": 0.0,
    }
    return row | {"problems": problems} | more


def test_summary_of_two_tries() -> None:
    row = evaluation([[1, 0], [0, 0], [1, 1]], [[1, 1], [0, 0], [1, 1]])
    said = summarise(row)
    assert said["first"].value == pytest.approx(3 / 6)
    assert said["second"].value == pytest.approx(4 / 6)
    assert said["fixed"].value == pytest.approx(1 / 3)
    assert said["pass_at_k"][1] == pytest.approx(said["first"])
    assert said["pass_at_k"][2].value == pytest.approx(
        2 / 3
    )  # the first problem passes with one of its two samples
    assert said["first_errors"] == {"missed_target": 3}
    assert said["second_errors"] == {"wrong_numbers": 2}
    assert (said["problems"], said["samples"], said["label"]) == (3, 2, "start")


def test_summary_of_a_single_try_and_of_no_failure() -> None:
    said = summarise(evaluation([[1], [0]], [[None], [None]], tries=1))
    assert said["second"] is None
    assert said["fixed"] is None
    assert said["first"].value == 0.5
    assert summarise(evaluation([[1], [1]], [[1], [1]]))["fixed"] is None


def test_second_null_after_a_pass_counts_as_passed() -> None:
    said = summarise(evaluation([[1], [0]], [[None], [None]]))
    assert said["second"].value == 0.5
    assert said["fixed"].value == 0.0


def test_compare_pairs_by_id() -> None:
    before = evaluation([[0], [0], [1], [0]], [[0], [1], [1], [0]])
    after = evaluation([[0], [1], [1], [0]], [[1], [1], [1], [1]])
    after["problems"] = after["problems"][::-1]
    result = compare(before, after)
    assert result["first"] is not None
    assert result["first"].value == 0.25
    assert result["second"] is not None
    assert result["second"].value == 0.5
    assert result["second"].p == 0.5
    # Only p0 and p3 failed in both: neither was fixed before, both are after.
    assert result["fixed"] is not None
    assert (result["fixed"].value, result["fixed"].problems) == (1.0, 2)
    assert compare(before, evaluation([[1]], [[None]], tries=1))["second"] is None
    after["problems"] = [{**p, "id": "x" + p["id"]} for p in after["problems"]]
    assert compare(before, after) == {"first": None, "second": None, "fixed": None}


@pytest.mark.parametrize(
    "problems",
    [[], [{"id": "a"}], [{"id": "a", "first": []}], [3], [{"id": "a", "first": [1]}] * 2, None],
)
def test_rows_that_are_no_evaluation(problems: Any) -> None:
    with pytest.raises(UserError, match="evaluation 'start': not a row of evals"):
        summarise({"label": "start", "tries": 1, "problems": problems})


def test_scores_are_summarised_over_the_problems_that_have_them() -> None:
    scores = [
        {"f1": [1.0], "searches": [2.0], "recall": [None]},
        {"f1": [0.5], "searches": [4.0], "recall": [0.5]},
        {"f1": [0.0]},
    ]
    problems = [{"id": str(n), "first": [0], "scores": found} for n, found in enumerate(scores)]
    found = summarise({"label": "start", "problems": problems})["scores"]
    assert found["f1"].value == pytest.approx(0.5)
    assert found["f1"].low < 0.2 < 0.8 < found["f1"].high
    assert found["recall"] == ratio_interval([0.5], [1])
    # Two problems, standard deviation sqrt(2), standard error 1.
    assert found["searches"] == pytest.approx((3.0, 3.0 - Z, 3.0 + Z))
    assert mean_interval([7.0]) == (7.0, 7.0, 7.0)
    assert summarise({"label": "start", "problems": [{"id": "p", "first": [1]}]})["scores"] == {}


def test_runs_of_several_seeds_are_pooled_by_problem() -> None:
    """More seeds are more draws of the same problems: equal ones leave the interval as wide as it
    was."""

    def run(*f1: float | None) -> dict[str, Any]:
        scores = [
            {} if value is None else {"scores": {"f1": [value], "searches": [2 * value]}}
            for value in f1
        ]
        problems = [
            {"id": str(n), "first": [int(n == 0)], "first_error": [None], **found}
            for n, found in enumerate(scores)
        ]
        return {
            "label": "adapter",
            "tries": 1,
            "samples": 1,
            "temperature": 0.0,
            "changed": [],
            "problems": problems,
        }

    first, second = run(1.0, 0.5, 0.0, None), run(0.0, 0.5, 0.5, 0.5)
    second["problems"].reverse()
    both = pool([first, second])
    assert (both["samples"], both["runs"], both["label"]) == (2, 2, "adapter")
    assert both["problems"][3] == {
        "id": "3",
        "first": [0, 0],
        "first_error": [None] * 2,
        "scores": {"f1": [None, 0.5], "searches": [None, 1.0]},
    }
    found = summarise(both)
    assert found["first"].value == 0.25
    assert found["scores"]["f1"] == ratio_interval([1.0, 1.0, 0.5, 0.5], [2, 2, 2, 1])
    assert found["scores"]["searches"] == mean_interval([1.0, 1.0, 0.5, 1.0])
    assert found["counted"]["f1"] == 7
    alike = [run(1.0, 0.0, 0.0, 1.0)] * 2
    for name, interval in summarise(alike[0])["scores"].items():
        assert summarise(pool(alike))["scores"][name] == pytest.approx(interval)
    for other in (
        run(1.0),
        run(*[0.0] * 4) | {"temperature": 1.0},
        run(*[0.0] * 4) | {"changed": ["a=1"]},
    ):
        with pytest.raises(
            UserError, match="evaluation 'adapter': the runs' rows differ in problems or settings"
        ):
            pool([first, other])


def test_compare_pairs_the_scores_that_are_shares() -> None:
    before, after = (
        evaluation([[0], [0], [0]], [[None]] * 3, tries=1),
        evaluation([[1], [0], [0]], [[None]] * 3, tries=1),
    )
    for row, f1, searches in ((before, (0.25, 0.5, 0.0), 2.0), (after, (1.0, 0.5, 0.5), 5.0)):
        for problem, value in zip(row["problems"], f1, strict=True):
            problem["scores"] = {"f1": [value], "searches": [searches]}
    del after["problems"][2]["scores"]["f1"]
    result = compare(before, after)
    assert "searches" not in result, "a number that is no share has no place in [0, 1]"
    assert result["f1"] is not None
    assert (result["f1"].value, result["f1"].problems) == (0.375, 2)  # 0.75 and 0
    assert result["f1"].p == 1.0  # one pair that changed says nothing
