"""The output head against plain log-softmax: values and gradients, in float32 and where bf16 would
cancel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from minirl.engine.model.head import Head


def head_of(dtype: torch.dtype, vocabulary: int = 512, size: int = 64, **config: float) -> Head:
    torch.manual_seed(0)
    linear = nn.Linear(size, vocabulary, bias=False, dtype=torch.float32).requires_grad_(False)
    return Head(linear.to(dtype), SimpleNamespace(**config))


def plain(
    weight: Tensor, hidden: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    return logprobs.gather(-1, target[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_values_and_gradients_are_those_of_log_softmax(entropy_grad: bool) -> None:
    """Catches: temperature missing from the value or the gradient, a chunk border off by one, the
    entropy's sign."""
    head = head_of(torch.float32)
    hidden = torch.randn(200, 64, requires_grad=True)
    target = torch.randint(512, (200,))
    upstream = torch.randn(200)
    found, entropy = head.logprobs(
        hidden, target, temperature=0.7, entropy=True, entropy_grad=entropy_grad
    )
    assert entropy is not None
    expected, spread = plain(head.linear.weight, hidden, target, 0.7)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(entropy, spread)
    (gradient,) = torch.autograd.grad(
        (found * upstream).sum() + (entropy.sum() if entropy_grad else 0.0), hidden
    )
    (wanted,) = torch.autograd.grad(
        (expected * upstream).sum() + (spread.sum() if entropy_grad else 0.0), hidden
    )
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_a_sure_token_keeps_its_gradient_in_bf16() -> None:
    """Catches W[target] - p W formed in bf16, which is all rounding where p is near 1."""
    head = head_of(torch.bfloat16, size=128)
    target = torch.arange(64)
    direction = head.linear.weight.float()[target]
    hidden = (
        (direction * 30.0).bfloat16().requires_grad_()
    )  # far along the target's own row: p close to 1
    found, _ = head.logprobs(hidden, target, temperature=1.0, entropy=False, entropy_grad=False)
    assert 0.9 < found.exp().median() < 0.99999
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(
        plain(head.linear.weight.double(), exact, target, 1.0)[0].sum(), exact
    )
    error = (gradient.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.median() < 0.05


def test_scales_and_soft_caps() -> None:
    hidden = torch.randn(3, 64)
    raw = head_of(torch.float32).logits(hidden)
    torch.testing.assert_close(head_of(torch.float32, logit_scale=0.25).logits(hidden), raw * 0.25)
    torch.testing.assert_close(head_of(torch.float32, logits_scaling=4.0).logits(hidden), raw / 4.0)
    torch.testing.assert_close(
        head_of(torch.float32, final_logit_softcapping=2.0).logits(hidden),
        2.0 * torch.tanh(raw / 2.0),
    )
