"""What only a CPU needs, behind one door: `prepare` the process once, `install` each model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minirl.engine.backend import Backend, Product
from minirl.engine.cpu import attention, packed
from minirl.engine.cpu.allocator import keep_freed_memory
from minirl.engine.cpu.norm import lean_norms


def prepare() -> None:
    """The process's settings: freed memory is kept."""
    keep_freed_memory()


def install(model: nn.Module) -> Backend:
    """Exchange the modules that compute faster here; how the rest of the engine computes."""
    lean_norms(model)
    return Cpu()


class Cpu(Backend):
    """Attention written out as matrix kernels, and packed products."""

    prefill_tokens = 1024  # the padding of larger passes costs more than it saves
    chunk_logits = 2**22  # 16 MiB, which the cache may hold

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
    ) -> Tensor:
        # The library would copy keys that stand by column, and multiply bf16 in float32.
        if key.stride(-1) != 1 or (bias.dim() == 2 and query.dtype == torch.bfloat16):
            return attention.attention(query, key, value, bias, scale)
        return super().attention(query, key, value, bias, scale)

    def unmasked(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, is_causal: bool
    ) -> Tensor | None:
        if query.dtype == torch.bfloat16:
            return None
        return super().unmasked(query, key, value, scale, is_causal=is_causal)

    def view_keys(self, memory: Tensor, shape: Sequence[int]) -> Tensor:
        """By column: one query meets them in a third of the time."""
        *rows, length, size = shape
        return memory.view(*rows, size, length).transpose(-1, -2)

    def fits(self, weights: Sequence[Tensor]) -> bool:
        return packed.fits(weights)

    def pack(self, weight: Tensor, rows: int, bias: Tensor | None = None) -> Product:
        weight = packed.pack(weight, rows)
        return lambda x: packed.product(x, weight, bias)
