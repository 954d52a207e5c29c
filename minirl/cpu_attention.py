"""Softmax attention in bf16 on a CPU, written out: scores, softmax and both products as matrix kernels, some rows at a time.

The library's own kernel multiplies in float32 there and takes about twice as long, forward and backward. Scores are computed again in the
backward pass, so nothing of their size is kept. Invariant: values and gradients are those of softmax(scale * Q K^T) V under the mask, up
to bf16 rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_SCORES = 2**20  # scores alive at once, 2 MiB: what follows finds them in the cache


def serves(query: Tensor) -> bool:
    """Whether this is the faster way: on a CPU that multiplies bf16 in hardware (models.pick_dtype chooses the type by that)."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query (B, H, T, D), key and value (B, H, T', D), mask (T, T') bool: which keys a query sees, at least one. Returns (B, H, T, D)."""
    bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    out: Tensor = _Attention.apply(query, key, value, bias, scale)  # type: ignore[no-untyped-call]
    return out


def _chunks(query: Tensor, key: Tensor) -> list[slice]:
    each = max(1, CHUNK_SCORES // (query.shape[1] * query.shape[2] * key.shape[2]))
    return [slice(start, start + each) for start in range(0, query.shape[0], each)]


def _probabilities(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    rows, heads, length, _ = query.shape
    # Scale and mask come with the product: each would be another pass over the scores.
    scores = torch.baddbmm(
        bias.expand(rows * heads, -1, -1), query.flatten(0, 1), key.flatten(0, 1).transpose(-1, -2), beta=1.0, alpha=scale
    )
    return torch.softmax(scores, dim=-1).view(rows, heads, length, -1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, bias)
        ctx.scale = scale
        return torch.cat([_probabilities(query[c], key[c], bias, scale) @ value[c] for c in _chunks(query, key)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        query, key, value, bias = ctx.saved_tensors
        parts = []
        for c in _chunks(query, key):
            p = _probabilities(query[c], key[c], bias, ctx.scale)  # (b, H, T, T')
            p_grad = grad[c] @ value[c].transpose(-1, -2)
            # d softmax: p * (dp - sum(dp * p)), in one kernel with float32 sums
            s_grad = torch.ops.aten._softmax_backward_data(p_grad, p, -1, p.dtype).mul_(ctx.scale)
            parts.append((s_grad @ key[c], s_grad.transpose(-1, -2) @ query[c], p.transpose(-1, -2) @ grad[c]))
        of_query, of_key, of_value = (torch.cat(part) for part in zip(*parts, strict=True))
        return of_query, of_key, of_value, None, None
