"""Losses: values, gradients and clipping against numbers worked out by hand; and what each preset
resolves to."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from minirl.engine.learn.losses import kl_k3, nll, policy_loss, value_loss
from minirl.recipe import Learner

LN2 = math.log(2.0)
RATIOS = (0.5, 0.9, 1.0, 1.5)
WEIGHTS = (0.1, 0.2, 0.3, 0.4)


def evaluate(
    ratios: tuple[float, ...],
    advantages: tuple[float, ...],
    weights: tuple[float, ...],
    low: float | None,
    high: float | None,
    episode: tuple[int, ...] | None = None,
) -> tuple[float, list[float], list[bool]]:
    """Loss, its gradient in each token's log-probability, and which tokens were clipped; old
    log-probabilities of -3."""
    old = torch.full((len(ratios),), -3.0, dtype=torch.float64)
    logprobs = (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    loss, clipped = policy_loss(
        logprobs,
        old,
        torch.tensor(advantages, dtype=torch.float64),
        torch.tensor(weights, dtype=torch.float64),
        clip_low=low,
        clip_high=high,
        episode=None if episode is None else torch.tensor(episode),
    )
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad.tolist(), clipped.tolist()


def test_positive_advantage_is_clipped_above_only() -> None:
    """Catches: max for min, a clip that also holds small ratios, the sign of the loss, weights left
    out."""
    loss, gradient, clipped = evaluate(RATIOS, (2.0,) * 4, WEIGHTS, 0.2, 0.2)
    # gains: min(1.0, 1.6) = 1; 1.8; 2; min(3.0, 2.4) = 2.4. -(0.1 * 1 + 0.2 * 1.8 + 0.3 * 2 + 0.4 *
    # 2.4) = -2.02
    assert loss == pytest.approx(-2.02)
    # -weight * advantage * ratio where not clipped: -0.1 * 2 * 0.5, -0.2 * 2 * 0.9, -0.3 * 2 * 1, 0
    assert gradient == pytest.approx([-0.1, -0.36, -0.6, 0.0])
    assert clipped == [False, False, False, True]


def test_negative_advantage_is_clipped_below_only() -> None:
    """Catches: a clip that lets go of a token whose advantage is negative and whose ratio is
    high."""
    loss, gradient, clipped = evaluate(RATIOS, (-2.0,) * 4, WEIGHTS, 0.2, 0.2)
    # gains: min(-1.0, -1.6) = -1.6; -1.8; -2; min(-3.0, -2.4) = -3. 0.1 * 1.6 + 0.2 * 1.8 + 0.3 * 2
    # + 0.4 * 3 = 2.32
    assert loss == pytest.approx(2.32)
    assert gradient == pytest.approx([0.0, 0.36, 0.6, 1.2])
    assert clipped == [True, False, False, False]


def test_clip_range_is_asymmetric() -> None:
    """Catches: one number used for both sides, the two swapped."""
    # Range [0.95, 1.6]: 1.5 is inside, 1.7 is not; 0.9 is below.
    loss, gradient, clipped = evaluate(
        (1.5, 1.7, 0.9, 0.96), (1.0, 1.0, -1.0, -1.0), (1.0,) * 4, 0.05, 0.6
    )
    assert loss == pytest.approx(-1.5 - 1.6 + 0.95 + 0.96)
    assert gradient == pytest.approx([-1.5, 0.0, 0.0, 0.96])
    assert clipped == [False, True, True, False]


@pytest.mark.parametrize(
    ("low", "high", "loss", "gradient", "clipped"),
    [
        (None, 0.2, -1.2 + 0.1, [0.0, 0.1], [True, False]),  # 0.1 is not held at 0.8
        (0.2, None, -5.0 + 0.8, [-5.0, 0.0], [False, True]),  # 5 is not held at 1.2
        (None, None, -5.0 + 0.1, [-5.0, 0.1], [False, False]),
        (0.0, 0.0, -1.0 + 1.0, [0.0, 0.0], [True, True]),  # 0 is a range, not "no clipping"
    ],
)
def test_no_clipping_on_one_side_or_both(
    low: float | None, high: float | None, loss: float, gradient: list[float], clipped: list[bool]
) -> None:
    """Catches: None taken for 0 or for a default, 0 taken for None."""
    got = evaluate((5.0, 0.1), (1.0, -1.0), (1.0, 1.0), low, high)
    assert got[0] == pytest.approx(loss)
    assert got[1] == pytest.approx(gradient)
    assert got[2] == clipped


def test_at_ratio_one_the_gradient_is_plain_policy_gradient() -> None:
    """Catches: minimum's split gradient at a tie (half of it lost), anything counted as clipped."""
    loss, gradient, clipped = evaluate(
        (1.0, 1.0, 1.0), (2.0, -3.0, 0.0), (0.5, 0.25, 0.25), 0.2, 0.2
    )
    assert loss == pytest.approx(-(0.5 * 2.0 - 0.25 * 3.0))
    assert gradient == pytest.approx([-1.0, 0.75, 0.0])
    assert clipped == [False, False, False]


def test_a_token_with_advantage_zero_is_never_clipped() -> None:
    """Catches: "outside the range" counted as clipped where the clip changed nothing."""
    assert evaluate((0.1, 9.0), (0.0, 0.0), (1.0, 1.0), 0.2, 0.2) == (
        0.0,
        [0.0, 0.0],
        [False, False],
    )


# Two episodes mixed in one flat tensor, with numbers that are neither sorted nor dense.
EPISODE = (7, 3, 7, 3, 3)
SEQUENCE_RATIOS = (2.0, 0.5, 1.0, 0.5, 2.0)
SEQUENCE_ADVANTAGES = (1.0, -1.0, 1.0, -1.0, -1.0)
SEQUENCE_WEIGHTS = (0.25, 1 / 6, 0.25, 1 / 6, 1 / 6)  # 1 / (2 episodes * tokens of the episode)


def test_sequence_ratio_is_the_geometric_mean_of_its_own_episode() -> None:
    """Catches: the arithmetic mean, the product, one mean over the whole tensor."""
    loss, gradient, clipped = evaluate(
        SEQUENCE_RATIOS, SEQUENCE_ADVANTAGES, SEQUENCE_WEIGHTS, None, None, EPISODE
    )
    first = math.sqrt(2.0)  # (2 * 1) ** (1 / 2)
    second = 0.5 ** (1 / 3)  # (0.5 * 0.5 * 2) ** (1 / 3) = 0.7937
    assert loss == pytest.approx(-0.5 * first + 0.5 * second)
    # d loss / d log p_k = -(sum of the episode's weights, 1/2) * advantage * ratio / (its tokens)
    a, b = -0.5 * first / 2, 0.5 * second / 3
    assert gradient == pytest.approx([a, b, a, b, b])
    assert clipped == [False] * 5


def test_sequence_ratio_is_clipped_as_a_whole() -> None:
    """Catches: a clip at the tokens' own ratios under a sequence ratio."""
    # 1.414 is above 1.2 with advantage +1: held at 1.2, no gradient. 0.794 is above 0.7: free,
    # though two tokens stand at 0.5.
    loss, gradient, clipped = evaluate(
        SEQUENCE_RATIOS, SEQUENCE_ADVANTAGES, SEQUENCE_WEIGHTS, 0.3, 0.2, EPISODE
    )
    second = 0.5 ** (1 / 3)
    assert loss == pytest.approx(-0.5 * 1.2 + 0.5 * second)
    assert gradient == pytest.approx([0.0, second / 6, 0.0, second / 6, second / 6])
    assert clipped == [True, False, True, False, False]


def test_sequence_gradient_matches_finite_differences() -> None:
    """Catches: a gradient that stays with the token's own term (the same only while weights and
    advantages are the episode's); float64."""
    generator = torch.Generator().manual_seed(0)
    episode = torch.tensor([4, 4, 0, 9, 0, 4, 0, 9])
    old, advantages, weights = (
        torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(3)
    )

    def loss(logprobs: Tensor) -> Tensor:
        return policy_loss(
            logprobs, old, advantages, weights, clip_low=0.2, clip_high=0.3, episode=episode
        )[0]

    start = old + 0.3 * torch.randn(8, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, (start.requires_grad_(),))


def test_k3_by_hand() -> None:
    """Catches: the two arguments swapped (values or gradient), the k1 and k2 estimates."""
    logprobs = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    kl = kl_k3(logprobs, torch.tensor([-1.0 + LN2, -1.0 - LN2, -1.0], dtype=torch.float64))
    # d = ln 2: 2 - ln 2 - 1 = 0.306853; d = -ln 2: 1/2 + ln 2 - 1 = 0.193147; d = 0: 0
    assert kl.tolist() == pytest.approx([0.306853, 0.193147, 0.0], abs=1e-6)
    kl.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-1.0, 0.5, 0.0])  # 1 - exp(d)


def test_k3_is_never_negative_and_right_for_tiny_differences() -> None:
    """Catches: exp(d) - d - 1 in float32, which is off by up to 1e-7 and often negative where
    policies nearly agree."""
    size = torch.logspace(-9, 1, 4001, dtype=torch.float64)
    difference = torch.cat([-size, size]).float()
    kl = kl_k3(torch.zeros_like(difference), difference)
    assert (kl >= 0).all()
    exact = torch.expm1(difference.double()) - difference.double()
    near = difference.abs() > 1e-5
    assert torch.allclose(kl[near].double(), exact[near], rtol=0.02, atol=0.0)
    assert kl_k3(torch.tensor([-2.5]), torch.tensor([-2.5])).item() == 0.0


def test_nll_by_hand() -> None:
    """Catches: a mean in place of the weighted sum, the sign."""
    logprobs = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    loss = nll(logprobs, torch.tensor([0.5, 0.25, 0.25]))
    assert loss.item() == 0.5 + 0.5 + 1.0
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-0.5, -0.25, -0.25]


def test_value_loss_by_hand() -> None:
    """Catches: min for max, a clip around the return in place of the old value, the half left out,
    a gradient where the clip holds."""
    values = torch.tensor([0.5, 0.9, 0.1, 0.9, 1.0], requires_grad=True)
    old = torch.tensor([0.4, 0.4, 0.4, 0.4, 1.0])
    returns = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    weights = torch.tensor([0.2, 0.2, 0.2, 0.3, 0.1])
    loss, clipped = value_loss(values, old, returns, weights, clip=0.2)
    # 1: inside, 0.5^2. 2: held at 0.6, 0.4^2 > 0.1^2. 3: held at 0.2, 0.8^2 < 0.9^2. 4: held at
    # 0.6, 0.6^2 < 0.9^2. 5: exact.
    assert loss.item() == pytest.approx(0.5 * (0.2 * 0.25 + 0.2 * 0.16 + 0.2 * 0.81 + 0.3 * 0.81))
    assert clipped.tolist() == [False, True, False, False, False]
    loss.backward()
    assert values.grad is not None
    # weight * (value - return), and 0 where the value had gone its 0.2 towards the return
    assert values.grad.tolist() == pytest.approx([-0.1, 0.0, -0.18, 0.27, 0.0], abs=1e-7)


def test_value_loss_without_a_clip_is_half_the_squared_error() -> None:
    """Catches: None taken for 0 (nothing would ever be learnt) or for the default."""
    values = torch.tensor([0.9, -3.0], requires_grad=True)
    loss, clipped = value_loss(
        values, torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.5]), clip=None
    )
    assert loss.item() == pytest.approx(0.5 * (0.5 * 0.01 + 0.5 * 16.0))
    assert clipped.tolist() == [False, False]
    loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-0.05, -2.0])


# baseline, scale, ratio, aggregate, clip_low, clip_high, beta, drop_overlong
PRESETS: dict[str, tuple[Any, ...]] = {
    "grpo": ("mean", "std", "token", "sequence", 0.2, 0.2, 0.001, False),
    "dr_grpo": ("mean", "none", "token", "constant", 0.2, 0.2, 0.001, False),
    "dapo": ("mean", "std", "token", "token", 0.2, 0.28, 0.0, True),
    "gspo": ("mean", "std", "sequence", "sequence", 3e-4, 4e-4, 0.001, False),
    "rloo": ("leave_one_out", "none", "token", "constant", 0.2, 0.2, 0.001, False),
    "reinforce": ("none", "none", "token", "sequence", None, None, 0.0, False),
    "ppo": ("none", "none", "token", "sequence", 0.2, 0.2, 0.05, False),
    "nll": ("mean", "std", "token", "token", 0.2, 0.2, 0.0, False),
}
SWITCHES = (
    "baseline",
    "scale",
    "ratio",
    "aggregate",
    "clip_low",
    "clip_high",
    "beta",
    "drop_overlong",
)


@pytest.mark.parametrize("loss", PRESETS)
def test_a_preset_is_the_documented_numbers(loss: Any) -> None:
    """Catches: a changed preset, a new preset without a line here."""
    node = Learner(loss=loss)
    assert tuple(getattr(node, name) for name in SWITCHES) == PRESETS[loss]
    assert set(PRESETS) == set(get_args(Learner.model_fields["loss"].annotation))
    assert Learner() == Learner(loss="grpo")


@pytest.mark.parametrize(
    ("loss", "explicit"),
    [
        ("dapo", {"clip_high": 0.2, "beta": 0.04, "drop_overlong": False}),
        ("gspo", {"clip_low": 0.1, "ratio": "token"}),
        ("reinforce", {"clip_high": 5.0, "beta": 0.01}),
        ("dr_grpo", {"scale": "std", "aggregate": "sequence"}),
        ("grpo", {"clip_low": None, "beta": 0.0}),
    ],
)
def test_an_explicit_number_overrides_the_preset(loss: Any, explicit: dict[str, Any]) -> None:
    """Catches: the preset laid over the user's numbers, an explicit 0 / None / False taken for "not
    given"."""
    node = Learner(loss=loss, **explicit)
    expected = dict(zip(SWITCHES, PRESETS[loss], strict=True)) | explicit
    assert {name: getattr(node, name) for name in SWITCHES} == expected


def test_ppos_numbers_are_refused_where_they_do_nothing() -> None:
    """Catches: a value_coef written beside loss grpo that changes nothing without a word; a group
    baseline beside the value head."""
    node = Learner(loss="ppo")
    paper = {
        "passes": 2,
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "value_coef": 5.0,
        "value_clip": 0.2,
        "value_warmup": 0,
        "value_detach": False,
    }
    paper |= {"value_lambda": 1.0}
    assert {name: getattr(node, name) for name in paper} == paper
    assert not node.penalises_loss
    assert [Learner(beta=0.1).penalises_loss, Learner(beta=0.0).penalises_loss] == [True, False]
    for name, value in {
        "value_lr": 1.0,
        "value_coef": 1.0,
        "value_clip": None,
        "value_detach": True,
        "value_warmup": 3,
        "value_lambda": 0.5,
        "gamma": 0.9,
    }.items():
        with pytest.raises(ValueError, match=f"{name}: got .* which loss 'grpo' does not use"):
            Learner.model_validate({name: value})
        assert getattr(Learner.model_validate({"loss": "ppo", name: value}), name) == value
    with pytest.raises(ValueError, match="baseline: got 'mean', expected none"):
        Learner(loss="ppo", baseline="mean")
    for loss in get_args(Learner.model_fields["loss"].annotation):
        assert Learner.model_validate(Learner(loss=loss).model_dump()) == Learner(
            loss=loss
        )  # a resolved recipe reads back
