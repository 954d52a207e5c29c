"""Which language model is trained, and its adapter."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from minirl.recipe.base import Dtype, Frozen


class Lora(Frozen):
    """A LoRA adapter (arXiv 2106.09685)."""

    rank: PositiveInt = 16
    """Rank of the two factors."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Module names that get an adapter; "all-linear" is every linear layer but the output head."""


class Model(Frozen):
    """Which language model, and how it is held in memory."""

    name: str
    """A hub id, a local folder, or `smollm2-135m` (the embedded default, which needs no hub)."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """bitsandbytes quantisation of the frozen base weights."""
    template: Literal["chat", "plain"] = "chat"
    """chat: the model's own chat template. plain: a transcript of user and assistant, for base
    models."""
    dtype: Dtype = "auto"
    """What the model computes in; auto takes the fastest that the device does well."""
    lora: Lora = Lora()
    """The adapter that is trained."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    adapter: str | None = None
    """Folder of a peft adapter to start from, e.g. `runs/a/adapter`."""
