"""Whether torch sees a GPU on this machine, and why it does not see one that is there."""

from __future__ import annotations

import os
from pathlib import Path

import torch

DRIVER = Path("/proc/driver/nvidia/version")


def has_gpu() -> bool:
    """Whether torch sees a CUDA GPU."""
    return torch.cuda.is_available()


def unseen_gpu() -> str | None:
    """Why torch does not see the GPU of a machine with NVIDIA's driver; None if there is no driver
    or the GPU is hidden on purpose."""
    if not DRIVER.exists() or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    words = (word for word in DRIVER.read_text().split() if word[:1].isdigit() and "." in word)
    driver = next(words, "of unknown version")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return (
        f"an NVIDIA driver ({driver}) is here, but torch {torch.__version__}, {built}, sees no GPU:"
        " this would run on the CPU; install a torch build that fits the driver"
        " (https://pytorch.org/get-started/locally), or a newer driver"
    )
