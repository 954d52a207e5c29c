"""Credit: each advantage against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirl.engine.learn.credit import (
    advantages,
    explained_variance,
    gae,
    is_dead,
    moments,
    token_rewards,
    whiten,
)
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
    """Catches: the population deviation (n), another epsilon, epsilon inside the root, no
    centring."""
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
    """Catches: None counted as 0, None given the advantage 0.0, advantages that shift to the wrong
    episode."""
    # Scored 2, 0, 1: mean 1, variance (1 + 1 + 0) / 2 = 1, std 1; 1 / 1.000001 = 0.999999000001.
    # (With None as 0 the mean is 0.75.)
    values = credit("grpo", 2.0, None, 0.0, 1.0)
    assert values[1] is None
    assert [v for v in values if v is not None] == pytest.approx(
        [0.999999000001, -0.999999000001, 0.0], rel=1e-11
    )
    assert credit("rloo", 3.0, None, 0.0, 1.0) == [2.5, None, -2.0, -0.5]
    assert credit("dr_grpo", None, 1.0, 0.0) == [None, 0.5, -0.5]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "rloo"])
def test_equal_rewards_give_exactly_zero(loss: str) -> None:
    """Catches: no rule for equal rewards. 3 * 0.1 / 3 is 0.10000000000000002, so a rounded mean is
    not enough."""
    assert credit(loss, 0.1, 0.1, 0.1) == [0.0, 0.0, 0.0]
    assert credit(loss, 0.1, None, 0.1, 0.1) == [0.0, None, 0.0, 0.0]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "rloo"])
def test_a_group_with_one_scored_episode_or_none(loss: str) -> None:
    """Catches: a division by n - 1 = 0, a lone reward taken as its own advantage."""
    assert credit(loss, None, 1.0, None) == [None, 0.0, None]
    assert credit(loss, None, None) == [None, None]


def test_drop_overlong_leaves_cut_episodes_out_of_the_loss_but_in_the_mean() -> None:
    """Catches: no dropping, dropping without being asked, a mean over the episodes that are
    left."""
    group = Group(PROBLEM, (episode(1.0), episode(0.0, "length"), episode(0.0), episode(0.0)))
    values = advantages(group, Learner(loss="dr_grpo", drop_overlong=True))
    assert values == [0.75, None, -0.25, -0.25]  # r - 1/4, not r - 1/3
    assert advantages(group, Learner(loss="dr_grpo")) == [0.75, -0.25, -0.25, -0.25]
    assert advantages(group, Learner(loss="dapo"))[1] is None


def test_an_episode_without_trained_tokens_is_left_out_of_the_loss() -> None:
    """Catches: an advantage for an episode that has nothing to train (it would count in the
    denominators)."""
    group = Group(PROBLEM, (episode(1.0), episode(0.0, trained=False)))
    assert advantages(group, Learner(loss="dr_grpo")) == [0.5, None]
    assert advantages(group, Learner(loss="nll")) == [1.0, None]


def test_under_nll_every_episode_counts_one() -> None:
    """Catches: nll that looks at rewards."""
    assert credit("nll", None, 0.0, 1.0) == [1.0, 1.0, 1.0]


def test_under_ppo_every_scored_episode_takes_part() -> None:
    """Catches: episodes of equal rewards dropped as a dead group, None trained, drop_overlong not
    heard."""
    assert credit("ppo", 0.0, None, 0.0) == [1.0, None, 1.0]
    group = Group(PROBLEM, (episode(1.0), episode(0.0, "length"), episode(0.0, trained=False)))
    assert advantages(group, Learner(loss="ppo")) == [1.0, 1.0, None]
    assert advantages(group, Learner(loss="ppo", drop_overlong=True)) == [1.0, None, None]


@pytest.mark.parametrize(
    ("values", "dead"),
    [
        ([], True),
        ([None], True),
        ([0.0, None, -0.0], True),
        ([-1.0, 1.0], False),
        ([0.0, 1e-12], False),
        ([float("nan")], False),
    ],
)
def test_is_dead(values: list[float | None], dead: bool) -> None:
    """Catches: the sum of advantages (always 0 for a centred group), a tolerance, None taken for a
    signal."""
    assert is_dead(values) is dead


@given(REWARDS)
def test_rloo_is_dr_grpo_times_n_over_n_minus_1(rewards: list[float]) -> None:
    """Catches: any slip in either. r - (S - r) / (n - 1) = (n r - S) / (n - 1) = n / (n - 1) * (r -
    S / n)."""
    factor = len(rewards) / (len(rewards) - 1)
    assert credit("rloo", *rewards) == pytest.approx(
        [factor * (v or 0.0) for v in credit("dr_grpo", *rewards)], abs=1e-12
    )


@given(REWARDS)
def test_grpo_advantages_have_mean_0_and_deviation_1(rewards: list[float]) -> None:
    """Catches: a baseline or a scale of anything but the group itself."""
    values = [v for v in credit("grpo", *rewards) if v is not None]
    assert sum(values) == pytest.approx(0.0, abs=1e-9)
    variance = sum(v * v for v in values) / (len(values) - 1)
    assert variance == pytest.approx(
        0.0 if len(set(rewards)) == 1 else 1.0, abs=1e-4
    )  # epsilon / std, twice


def test_token_rewards_by_hand() -> None:
    """Catches: the penalty's sign, reference and policy swapped, the score at the first token or at
    every one, the last penalty lost."""
    # -0.1 * (-1 - -2) = -0.1; -0.1 * (-3 - -2) = 0.1; -0.1 * (-1 - -1.5) + 1 = 0.95
    assert token_rewards(1.0, [-1.0, -3.0, -1.0], [-2.0, -2.0, -1.5], 0.1) == pytest.approx(
        [-0.1, 0.1, 0.95]
    )
    assert token_rewards(0.3, [-1.0, -3.0], [-2.0, -2.0], 0.0) == [0.0, 0.3]
    assert token_rewards(0.3, [-1.0], [-1.0], 5.0) == [0.3]


def test_gae_by_hand() -> None:
    """Catches: lambda and gamma swapped, a value after the end, an advantage that starts at the
    wrong side, returns without values."""
    # deltas: 0 + 0.9 * 0.5 - 0.2 = 0.25; 0 + 0.9 * 0.8 - 0.5 = 0.22; 1 + 0 - 0.8 = 0.2. gamma *
    # lambda = 0.45. A3 = 0.2; A2 = 0.22 + 0.45 * 0.2 = 0.31; A1 = 0.25 + 0.45 * 0.31 = 0.3895
    found, returns = gae([0.0, 0.0, 1.0], [0.2, 0.5, 0.8], gamma=0.9, lam=0.5)
    assert found == pytest.approx([0.3895, 0.31, 0.2])
    assert returns == pytest.approx([0.5895, 0.81, 1.0])
    assert gae([], [], 1.0, 0.95) == ([], [])


def test_gae_at_its_two_ends() -> None:
    """Catches: lambda 0 that is not the one-step error, lambda 1 that is not the return less the
    value."""
    rewards, values = [-0.1, 0.2, 1.0], [0.3, -0.4, 0.6]
    assert gae(rewards, values, 1.0, 0.0)[0] == pytest.approx(
        [-0.1 - 0.4 - 0.3, 0.2 + 0.6 + 0.4, 1.0 - 0.6]
    )
    found, returns = gae(rewards, values, 1.0, 1.0)
    assert returns == pytest.approx([1.1, 1.2, 1.0])  # whatever the values are
    assert found == pytest.approx([0.8, 1.6, 0.4])
    assert gae(rewards, [0.0] * 3, 0.5, 1.0)[1] == pytest.approx([-0.1 + 0.5 * 0.7, 0.2 + 0.5, 1.0])


@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=12),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_gae_is_its_written_out_sum(
    pairs: list[tuple[float, float]], gamma: float, lam: float
) -> None:
    """Catches: any slip in the recursion. Eq. 16 of arXiv 1506.02438, term by term."""
    rewards, values = [r for r, _ in pairs], [v for _, v in pairs]
    after = [*values[1:], 0.0]
    deltas = [r + gamma * a - v for r, a, v in zip(rewards, after, values, strict=True)]
    expected = [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]
    assert gae(rewards, values, gamma, lam)[0] == pytest.approx(expected, abs=1e-9)


def test_whitening_by_hand() -> None:
    """Catches: the sample's deviation (n - 1), no centring, a division by zero."""
    assert whiten([1.0, 3.0, 1.0, 3.0]) == pytest.approx(
        [-1.0, 1.0, -1.0, 1.0], abs=1e-5
    )  # mean 2, deviation 1 (by n - 1: 1.1547)
    # mean 2; squares 1 + 1 + 1 + 9 + 4 = 16; variance 16 / 5; deviation 1.788854
    assert whiten([1.0, 3.0, 1.0, 5.0, 0.0]) == pytest.approx(
        [-0.559017, 0.559017, -0.559017, 1.677051, -1.118034], abs=2e-6
    )
    assert whiten([0.25, 0.25]) == [0.0, 0.0]
    assert whiten([7.0]) == [0.0]
    assert whiten([]) == []


def test_moments_are_those_of_all_processes() -> None:
    """Catches: a mean of means, a variance about each process's own mean; a process that has
    nothing."""
    shares = [[1.0, 2.0], [], [6.0]]
    rounds = iter(
        [[3.0, 9.0], [9.0, 0.0, 14.0]]
    )  # count and sum of all; then squares about 3: 4 + 1, 0, 9
    assert moments(shares[0], lambda own: next(rounds)[: len(own)]) == (3.0, 3.0)
    board: list[list[float]] = []
    moments(shares[0], lambda own: board.append(own) or [3.0, 9.0][: len(own)])  # type: ignore[func-returns-value]
    assert board == [[2.0, 3.0], [4.0 + 1.0]]
    assert moments([]) == (0.0, 0.0)
    assert moments([1.0, 2.0, 6.0]) == pytest.approx((3.0, 14 / 3))


def test_explained_variance_by_hand() -> None:
    """Catches: numerator and denominator swapped, a constant error counted, a division by zero."""
    assert explained_variance([0.0, 1.0], [0.0, 1.0]) == 1.0
    assert explained_variance([5.0, 6.0], [0.0, 1.0]) == 1.0  # a constant error is no variance
    assert explained_variance([0.5, 0.5], [0.0, 1.0]) == 0.0
    assert (
        explained_variance([1.0, 0.0], [0.0, 1.0]) == -3.0
    )  # errors of -1 and 1: variance 1 over 1/4
    assert explained_variance([1.0, 0.0], [0.5, 0.5]) == 0.0
