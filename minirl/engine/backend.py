"""Backend: the operations that devices carry out in different ways, here by torch's own functions.
engine/cpu and engine/cuda override what they do better.

Invariant: whichever backend computes, the values are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class Backend:
    """How a device computes. query is (B, K, S, D): S numbers the queries of one key head; key and
    value are (B, K, T, D)."""

    prefill_tokens = 8192  # most padded tokens of one prefill pass
    chunk_logits = 2**25  # logits alive at once: 128 MiB in float32, and as much for probabilities
    bias_multiple = 1  # attention biases are rows of a multiple of this many numbers

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
    ) -> Tensor:
        """softmax(scale * Q K^T + bias) V, (B, K, S, D). bias: (S, T) or (B, 1, S, T), numbers or a
        bool mask of the keys that are seen; every query sees one."""
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)

    def unmasked(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, is_causal: bool
    ) -> Tensor | None:
        """Attention of a query (B, H, S, D) to all keys, or to those before each of its tokens;
        None where `attention` with a bias is faster. H is a multiple of K."""
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale, enable_gqa=True
        )

    def view_keys(self, memory: Tensor, shape: Sequence[int]) -> Tensor:
        """Flat memory as a cache of keys, (..., T, D), in whatever order of memory serves best."""
        return memory.view(*shape)

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Whether `pack` makes products with these weights faster, and there is room for it."""
        return False

    def pack(self, weight: Tensor, rows: int, bias: Tensor | None = None) -> Product:
        """x -> x weight^T + bias without a gradient, (..., in) -> (..., out), for inputs of some
        `rows` rows. The weight is copied, in whatever layout serves best."""
        weight = weight.detach().clone()
        return lambda x: F.linear(x, weight, bias)


LIBRARY = Backend()
