"""What only a GPU needs, behind one door: `prepare` the process once, `install` each model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minirl.engine.backend import Backend


def prepare() -> None:
    """The process's settings: no attention by cuDNN, the library's first choice on Hopper and
    Blackwell. It plans anew for every shape (0.4 s), and here nearly every pass has its own."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def install(model: nn.Module) -> Backend:
    """How the engine computes on a GPU. No module is exchanged yet: the library's own serve."""
    return Cuda()


class Cuda(Backend):
    """The library's kernels, with their inputs as these want them."""

    bias_multiple = 8  # 16 bytes; the kernels would copy any other bias whole, in every layer

    def unmasked(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, is_causal: bool
    ) -> Tensor | None:
        if not shares_heads(query):
            shared = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
        return super().unmasked(query, key, value, scale, is_causal=is_causal)


def shares_heads(query: Tensor) -> bool:
    """Whether query heads may share a key head: only in flash attention, from Ampere on and in half
    precision. The library would fall back to a kernel that holds all scores in float32."""
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )
