"""bf16 attention on a CPU against the same in float64: values and gradients, whole and in
chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minirl.engine.cpu import attention as cpu_attention

SHAPES = [
    (1, 2, 6, 6, 8),
    (5, 3, 12, 20, 16),
    (2, 1, 1, 7, 8),
]  # rows, heads, queries, keys, head size


def tensors(shape: tuple[int, int, int, int, int]) -> list[Tensor]:
    rows, heads, queries, keys, size = shape
    torch.manual_seed(0)
    return [
        torch.randn(rows, heads, n, size).bfloat16().requires_grad_() for n in (queries, keys, keys)
    ]


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    scores = (query @ key.transpose(-1, -2)) * scale
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1) @ value


def bias_of(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf).bfloat16()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 300, 2**20])
def test_values_and_gradients_are_those_of_softmax_attention(
    shape: tuple[int, int, int, int, int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a scale left out of one gradient, chunks that overlap, the mask turned round, a
    gradient of q under k."""
    monkeypatch.setattr(cpu_attention, "CHUNK_SCORES", chunk)
    inputs, (_, _, queries, keys, _) = tensors(shape), shape
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    found, wanted = (
        cpu_attention.attention(*inputs, bias_of(mask), 0.3),
        reference(*doubles, mask, 0.3),
    )
    grad = torch.randn(found.shape).bfloat16()
    found.backward(grad)
    wanted.backward(grad.double())
    assert error(found.detach(), wanted.detach()) < 0.01
    for one, other in zip(inputs, doubles, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert error(one.grad, other.grad) < 0.015


def test_it_is_about_as_far_from_float64_as_the_library_s_kernel() -> None:
    inputs = tensors((4, 3, 60, 90, 32))
    mask = torch.ones(60, 90, dtype=torch.bool).tril(30)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    reference(*doubles, mask, 32**-0.5).sum().backward()
    errors = []
    for ours in (True, False):
        for x in inputs:
            x.grad = None
        bias = bias_of(mask)
        out = (
            cpu_attention.attention(*inputs, bias, 32**-0.5)
            if ours
            else torch.nn.functional.scaled_dot_product_attention(*inputs, mask)
        )
        out.sum().backward()
        errors.append(
            [
                error(x.grad, d.grad)
                for x, d in zip(inputs, doubles, strict=True)
                if x.grad is not None and d.grad is not None
            ]
        )
    assert all(mine < 2.5 * theirs for mine, theirs in zip(*errors, strict=True)), (
        errors
    )  # of some 0.2 %: half a bf16 step


def test_what_is_hidden_gets_no_gradient_at_all() -> None:
    query, key, value = tensors((2, 2, 4, 9, 8))
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[:, 5:] = False
    cpu_attention.attention(query, key, value, bias_of(mask), 0.5).sum().backward()
    assert key.grad is not None
    assert value.grad is not None
    assert not key.grad[:, :, 5:].any()
    assert not value.grad[:, :, 5:].any()
    assert key.grad[:, :, :5].any()


@pytest.mark.parametrize("chunk", [1, 300, 2**20])
def test_rows_may_see_different_keys(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a row's bias under another row, or under one head alone."""
    monkeypatch.setattr(cpu_attention, "CHUNK_SCORES", chunk)
    query, key, value = (x.detach() for x in tensors((4, 3, 5, 9, 8)))
    mask = torch.rand(4, 1, 5, 9) < 0.5
    mask[..., 0] = True
    with torch.no_grad():
        found = cpu_attention.attention(query, key, value, bias_of(mask), 0.5)
    assert error(found, reference(query.double(), key.double(), value.double(), mask, 0.5)) < 0.01
