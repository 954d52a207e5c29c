"""The device: which one, in what dtype it computes, and what process and model need there.

Invariant: whatever minirl sets for a whole process is set by `prepare`, once.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from minirl.engine import cpu, cuda
from minirl.engine.backend import LIBRARY, Backend
from minirl.engine.model import attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device() -> torch.device:
    """The current CUDA device, else the CPU. Apple's MPS is passed over: bitsandbytes and the dtype
    rules are untested there."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of a recipe's word; of "auto" the fastest that the device computes in hardware.

    CUDA: bf16 from compute capability 8 (Ampere) on, else fp16 (a T4 has no bf16). CPU: bf16 with
    AVX512-BF16 or AMX, else fp32.
    """
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    has = torch.cpu.get_capabilities()
    is_fast = device.type == "cpu" and (has.get("avx512_bf16") or has.get("amx_bf16"))
    return torch.bfloat16 if is_fast else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """A recipe's word for a dtype."""
    return next(name for name, value in DTYPES.items() if value is dtype)


@cache
def prepare() -> None:
    """Set what is set for the whole process: the device's own settings, our attention under its
    name, and silence of transformers over a live display (errors and the bars of real downloads
    stay). Loading a model calls it; a second call does nothing."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # this hides the hub's bars as well
    enable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    AttentionInterface.register(attention.NAME, attention.attend)
    AttentionMaskInterface.register(attention.NAME, sdpa_mask)
    if pick_device().type == "cuda":
        cuda.prepare()
    else:
        cpu.prepare()


def install(model: nn.Module, device: torch.device) -> Backend:
    """Let a model compute as its device does best, and give the backend for what is no module."""
    doors = {"cpu": cpu.install, "cuda": cuda.install}
    return doors[device.type](model) if device.type in doors else LIBRARY
