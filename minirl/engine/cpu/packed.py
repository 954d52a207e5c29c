"""Weights kept in the layout that a CPU's matrix kernels want, while they do not change.

`torch.nn.functional.linear` brings the weight into that layout at every call. Kept in it, a decode
step's products took 0.45 (8 rows) and 0.6 (64 rows) of the time in bf16, and a third in float32
(SmolLM2-135M's shapes, 2 AVX512-BF16 cores). Invariant: a product with a packed weight is that of
`linear`, up to the order of its sums. If torch lacks the kernels, nothing is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

# Packed weights stand beside the plain ones, which learning needs: not for models that fill memory.
MOST_BYTES = 2**31


def fits(weights: Sequence[Tensor]) -> bool:
    """Whether these weights can be packed here, and are not too large to be held twice."""
    size = sum(w.numel() * w.element_size() for w in weights)
    can_be = all(w.device.type == "cpu" and works(w.dtype) for w in weights)
    return bool(weights) and size <= MOST_BYTES and can_be


@cache
def works(dtype: torch.dtype) -> bool:
    """Whether this build of torch has its compiler's packed products for this type, and they are
    right."""
    try:
        x = torch.arange(64).view(2, 32).to(dtype)
        weight = torch.arange(512).view(16, 32).remainder(7).to(dtype)
        return torch.equal(product(x, pack(weight, 2)), torch.nn.functional.linear(x, weight))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def pack(weight: Tensor, rows: int) -> Tensor:
    """A weight (out, in) for `product`, laid out for inputs of some `rows` rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return packed


def product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear(x, weight, bias), (..., in) -> (..., out), without a gradient."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out
