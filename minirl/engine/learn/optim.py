"""Optimizers: torch's AdamW or bitsandbytes' smaller ones, their rate, and their state as flat
tensors that safetensors can hold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minirl.errors import UserError
from minirl.recipe import Learner


def build(
    node: Learner, parameters: list[torch.nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer a recipe names. Raises UserError for one that this device cannot run."""
    common: dict[str, Any] = {"lr": node.lr, "betas": node.betas, "weight_decay": node.weight_decay}
    if node.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **common)
    if device.type != "cuda":
        raise UserError(
            f"learner.optimizer: got {node.optimizer!r}, which needs a CUDA GPU; on {device.type}"
            " expected 'adamw'"
        )
    import bitsandbytes as bnb

    kinds = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    optimizer: torch.optim.Optimizer = kinds[node.optimizer](parameters, **common)
    return optimizer


def build_value(node: Learner, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW of the value head, whose few numbers are worth float32 whatever the adapter's optimizer
    is."""
    return torch.optim.AdamW(parameters, lr=node.value_lr, betas=node.betas, weight_decay=0.0)


def learning_rate(node: Learner, update: int, planned: int) -> float:
    """The adapter's rate at an update, counted from 0, of so many planned; 0.0 before the first,
    while only a value head learns."""
    rising = math.ceil(round(node.warmup * planned, 9))  # 0.07 * 100 is a little more than 7
    if update < 0:
        return 0.0
    if update < rising:
        return node.lr * (update + 1) / rising
    progress = (update - rising) / max(1, planned - rising)
    if node.schedule == "constant":
        return node.lr
    if node.schedule == "linear":
        return node.lr * (1.0 - progress)
    return node.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of every parameter: its tensors under "number.name", its plain values as numbers of the
    same name."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    # torch's own view: bitsandbytes overrides it and hides its tensors one level deeper.
    for number, state in torch.optim.Optimizer.state_dict(optimizer)["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu().contiguous().clone()
            else:
                plain[f"{number}.{name}"] = value
    return tensors, plain


def unflatten(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    """What `flatten` gave, back in an optimizer over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *plain.items()]:
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
