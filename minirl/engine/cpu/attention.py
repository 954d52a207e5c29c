"""Softmax attention on a CPU, written out: scores, softmax and both products as matrix kernels,
some rows at a time.

The library's own kernel multiplies bf16 in float32 there and takes about twice as long, forward and
backward; and it would copy cached keys, which stand by column. Scores are computed again in the
backward pass, so nothing of their size is kept. Invariant: values and gradients are those of
softmax(scale * Q K^T) V under the mask, up to bf16 rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_SCORES = 2**20  # scores alive at once, 2 MiB: what follows finds them in the cache


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """query (B, H, T, D), key and value (B, H, T', D); returns (B, H, T, D).

    bias: added to the scores, (T, T'), or (B, 1, T, T') where the rows' masks differ. Every query
    must see a key.
    """
    if not torch.is_grad_enabled():
        return _forward(query, key, value, bias, scale)
    out: Tensor = _Attention.apply(query, key, value, bias, scale)
    return out


def _forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    parts = [_probabilities(query, key, bias, scale, c) @ value[c] for c in _chunks(query, key)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunks(query: Tensor, key: Tensor) -> list[slice]:
    each = max(1, CHUNK_SCORES // (query.shape[1] * query.shape[2] * key.shape[2]))
    return [slice(start, start + each) for start in range(0, query.shape[0], each)]


def _probabilities(query: Tensor, key: Tensor, bias: Tensor, scale: float, c: slice) -> Tensor:
    query, key = query[c], key[c]
    rows, heads, length, _ = query.shape
    bias = bias if bias.dim() == 2 else bias[c].expand(-1, heads, -1, -1).flatten(0, 1)
    # Scale and mask come with the product: each would be another pass over the scores.
    columns = key.flatten(0, 1).transpose(-1, -2)
    bias = bias.expand(rows * heads, -1, -1)
    scores = torch.baddbmm(bias, query.flatten(0, 1), columns, beta=1.0, alpha=scale)
    return torch.softmax(scores, dim=-1).view(rows, heads, length, -1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, bias)
        ctx.scale = scale
        return _forward(query, key, value, bias, scale)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, bias = ctx.saved_tensors
        parts = []
        for c in _chunks(query, key):
            p = _probabilities(query, key, bias, ctx.scale, c)  # (b, H, T, T')
            p_grad = grad[c] @ value[c].transpose(-1, -2)
            # d softmax: p * (dp - sum(dp * p)), in one kernel with float32 sums
            s_grad = torch.ops.aten._softmax_backward_data(p_grad, p, -1, p.dtype).mul_(ctx.scale)
            of_key = s_grad.transpose(-1, -2) @ query[c]
            parts.append((s_grad @ key[c], of_key, p.transpose(-1, -2) @ grad[c]))
        of_query, of_key, of_value = (torch.cat(part) for part in zip(*parts, strict=True))
        return of_query, of_key, of_value, None, None
