"""Credit: each advantage against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirl.credit import advantages, is_dead
from minirl.episode import Episode, Group, Problem, Turn
from minirl.recipe import Learner

PROBLEM = Problem("p", "?", None)
REWARDS = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), min_size=2, max_size=8)


def episode(reward: float | None, finish: str = "stop", trained: bool = True) -> Episode:
    turns = (Turn("prompt", (1, 2)), Turn("attempt", (3, 4, 5), (-0.5, -1.0, -1.5), trained))
    return Episode(PROBLEM, turns, reward, finish=finish)


def credit(loss: Any, *rewards: float | None) -> list[float | None]:
    return advantages(Group(PROBLEM, tuple(episode(r) for r in rewards)), Learner(loss=loss))


def test_grpo_divides_by_the_sample_standard_deviation_plus_1e_6() -> None:
    """Catches: the population deviation (n), another epsilon, epsilon inside the root, no centring."""
    # mean 1/4; squares 9/16 + 3 * 1/16 = 3/4; sample variance 3/4 / 3 = 1/4; std 1/2.
    # (1 - 1/4) / 0.500001 = 1.499997000006; (0 - 1/4) / 0.500001 = -0.499999000002.
    # (By n the std is 0.4330 and the first advantage 1.732.)
    expected = [1.499997000006, -0.499999000002, -0.499999000002, -0.499999000002]
    assert credit("grpo", 1.0, 0.0, 0.0, 0.0) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("loss", ["dapo", "gspo"])
def test_dapo_and_gspo_share_grpos_advantage(loss: str) -> None:
    """Catches: a preset that changes the baseline or the scale."""
    assert credit(loss, 1.0, 0.0, 0.0, 0.0) == credit("grpo", 1.0, 0.0, 0.0, 0.0)


def test_dr_grpo_only_centres() -> None:
    """Catches: a division by the deviation where the preset has none."""
    assert credit("dr_grpo", 1.0, 0.0, 0.0, 0.0) == [0.75, -0.25, -0.25, -0.25]  # r - 1/4


def test_rloo_takes_the_mean_of_the_others() -> None:
    """Catches: a baseline that includes the episode itself, n in place of n - 1."""
    # 3 - (0 + 1) / 2 = 2.5; 0 - (3 + 1) / 2 = -2; 1 - (3 + 0) / 2 = -0.5.
    assert credit("rloo", 3.0, 0.0, 1.0) == [2.5, -2.0, -0.5]


def test_reinforce_takes_the_reward_itself() -> None:
    """Catches: any baseline; the equal-rewards rule applied where nothing is subtracted."""
    assert credit("reinforce", 1.0, 0.0, None, -0.5) == [1.0, 0.0, None, -0.5]
    assert credit("reinforce", 1.0, 1.0) == [1.0, 1.0]


def test_not_scored_stays_none_and_is_outside_the_mean() -> None:
    """Catches: None counted as 0, None given the advantage 0.0, advantages that shift to the wrong episode."""
    # Scored 2, 0, 1: mean 1, variance (1 + 1 + 0) / 2 = 1, std 1; 1 / 1.000001 = 0.999999000001. (With None as 0 the mean is 0.75.)
    values = credit("grpo", 2.0, None, 0.0, 1.0)
    assert values[1] is None
    assert [v for v in values if v is not None] == pytest.approx([0.999999000001, -0.999999000001, 0.0], rel=1e-11)
    assert credit("rloo", 3.0, None, 0.0, 1.0) == [2.5, None, -2.0, -0.5]
    assert credit("dr_grpo", None, 1.0, 0.0) == [None, 0.5, -0.5]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "rloo"])
def test_equal_rewards_give_exactly_zero(loss: str) -> None:
    """Catches: no rule for equal rewards. 3 * 0.1 / 3 is 0.10000000000000002, so a rounded mean is not enough."""
    assert credit(loss, 0.1, 0.1, 0.1) == [0.0, 0.0, 0.0]
    assert credit(loss, 0.1, None, 0.1, 0.1) == [0.0, None, 0.0, 0.0]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "rloo"])
def test_a_group_with_one_scored_episode_or_none(loss: str) -> None:
    """Catches: a division by n - 1 = 0, a lone reward taken as its own advantage."""
    assert credit(loss, None, 1.0, None) == [None, 0.0, None]
    assert credit(loss, None, None) == [None, None]


def test_drop_overlong_leaves_cut_episodes_out_of_the_loss_but_in_the_mean() -> None:
    """Catches: no dropping, dropping without being asked, a mean over the episodes that are left."""
    group = Group(PROBLEM, (episode(1.0), episode(0.0, "length"), episode(0.0), episode(0.0)))
    values = advantages(group, Learner(loss="dr_grpo", drop_overlong=True))
    assert values == [0.75, None, -0.25, -0.25]  # r - 1/4, not r - 1/3
    assert advantages(group, Learner(loss="dr_grpo")) == [0.75, -0.25, -0.25, -0.25]
    assert advantages(group, Learner(loss="dapo"))[1] is None


def test_an_episode_without_trained_tokens_is_left_out_of_the_loss() -> None:
    """Catches: an advantage for an episode that has nothing to train (it would count in the denominators)."""
    group = Group(PROBLEM, (episode(1.0), episode(0.0, trained=False)))
    assert advantages(group, Learner(loss="dr_grpo")) == [0.5, None]
    assert advantages(group, Learner(loss="nll")) == [1.0, None]


def test_under_nll_every_episode_counts_one() -> None:
    """Catches: nll that looks at rewards."""
    assert credit("nll", None, 0.0, 1.0) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "dead"),
    [([], True), ([None], True), ([0.0, None, -0.0], True), ([-1.0, 1.0], False), ([0.0, 1e-12], False), ([float("nan")], False)],
)
def test_is_dead(values: list[float | None], dead: bool) -> None:
    """Catches: the sum of advantages (always 0 for a centred group), a tolerance, None taken for a signal."""
    assert is_dead(values) is dead


@given(REWARDS)
def test_rloo_is_dr_grpo_times_n_over_n_minus_1(rewards: list[float]) -> None:
    """Catches: any slip in either. r - (S - r) / (n - 1) = (n r - S) / (n - 1) = n / (n - 1) * (r - S / n)."""
    factor = len(rewards) / (len(rewards) - 1)
    assert credit("rloo", *rewards) == pytest.approx([factor * (v or 0.0) for v in credit("dr_grpo", *rewards)], abs=1e-12)


@given(REWARDS)
def test_grpo_advantages_have_mean_0_and_deviation_1(rewards: list[float]) -> None:
    """Catches: a baseline or a scale of anything but the group itself."""
    values = [v for v in credit("grpo", *rewards) if v is not None]
    assert sum(values) == pytest.approx(0.0, abs=1e-9)
    variance = sum(v * v for v in values) / (len(values) - 1)
    assert variance == pytest.approx(0.0 if len(set(rewards)) == 1 else 1.0, abs=1e-4)  # epsilon / std, twice
