"""The optimizer of a stage, its learning rate, and its state as flat tensors that safetensors can
hold.

Invariant: a gradient that is not finite moves no weight and no moment; it is counted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from minirl.errors import UserError
from minirl.recipe import Learner

VALUE = "value."  # prefix of the names of the value optimizer's tensors


class Optimizer:
    """The adapter's optimizer, the value head's under PPO, and the float16 loss scaler of both.

    half: whether the model computes in float16. skipped: steps whose gradient was not finite.
    """

    def __init__(
        self,
        learner: Learner,
        parameters: list[torch.nn.Parameter],
        value_parameters: list[torch.nn.Parameter],
        device: torch.device,
        *,
        half: bool,
    ) -> None:
        self.grad_clip = learner.grad_clip
        self.parameters = parameters
        self.value_parameters = value_parameters
        self.adapter = build(learner, parameters, device)
        self.value_head: torch.optim.Optimizer | None = None
        if value_parameters:  # few numbers, worth float32 whatever the adapter's optimizer is
            self.value_head = torch.optim.AdamW(
                value_parameters, lr=learner.value_lr, betas=learner.betas, weight_decay=0.0
            )
        self.skipped = 0
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        # The scaler starts to exist with its first loss; a process with only dead groups has none.
        self.scaler.scale(torch.zeros((), device=device))

    def set_rate(self, rate: float) -> None:
        """Set the adapter's learning rate; the value head's is constant."""
        for group in self.adapter.param_groups:
            group["lr"] = rate

    def zero_gradients(self) -> None:
        """Start a new gradient."""
        for optimizer in self._optimizers():
            optimizer.zero_grad(set_to_none=False)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient."""
        self.scaler.scale(loss).backward()

    def step(self, accelerator: Accelerator, *, value_only: bool = False) -> float:
        """Sum the gradient over processes, clip it and step; the adapter's norm before clipping,
        0.0 if the step was skipped.

        The adapter's and the value head's gradients are clipped apart, so that a bad value does not
        shrink the policy's step; neither steps if one of the two is not finite. With value_only the
        adapter stays as it is, moments and weight decay included.
        """
        self._reduce_gradients(accelerator)
        optimizers = self._optimizers()
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        parts = [self.parameters, self.value_parameters][: len(optimizers)]
        norms = [torch.nn.utils.clip_grad_norm_(part, self.grad_clip).item() for part in parts]
        is_finite = all(map(math.isfinite, norms))
        if is_finite:
            for optimizer in optimizers[value_only:]:
                self.scaler.step(optimizer)
        else:
            self.skipped += 1
            self.zero_gradients()
        self.scaler.update()
        return norms[0] if is_finite else 0.0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values that a resumed run needs."""
        tensors, plain = flatten(self.adapter)
        if self.value_head is not None:  # torch's AdamW: its state is tensors alone
            tensors |= {VALUE + name: value for name, value in flatten(self.value_head)[0].items()}
        return tensors, {
            "optimizer": plain,
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Load tensors and values that `state` gave."""
        values = {name: value for name, value in tensors.items() if name.startswith(VALUE)}
        own = {name: tensor for name, tensor in tensors.items() if name not in values}
        unflatten(self.adapter, own, plain["optimizer"])
        if self.value_head is not None:
            values = {name.removeprefix(VALUE): value for name, value in values.items()}
            unflatten(self.value_head, values, {})
        self.scaler.load_state_dict(plain["scaler"])
        self.skipped = plain["skipped"]

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.adapter] if self.value_head is None else [self.adapter, self.value_head]

    def _reduce_gradients(self, accelerator: Accelerator) -> None:
        parameters = [*self.parameters, *self.value_parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
            pieces = flat.split([p.numel() for p in parameters])
            gradients = [
                piece.view_as(p).clone() for p, piece in zip(parameters, pieces, strict=True)
            ]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient


def build(
    learner: Learner, parameters: list[torch.nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer that a recipe names. Raises UserError for one that this device cannot run."""
    common: dict[str, Any] = {
        "lr": learner.lr,
        "betas": learner.betas,
        "weight_decay": learner.weight_decay,
    }
    if learner.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **common)
    if device.type != "cuda":
        raise UserError(
            f"learner.optimizer: got {learner.optimizer!r}, which needs a CUDA GPU; on"
            f" {device.type} expected 'adamw'"
        )
    import bitsandbytes as bnb

    kinds = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    optimizer: torch.optim.Optimizer = kinds[learner.optimizer](parameters, **common)
    return optimizer


def learning_rate(learner: Learner, update: int, planned: int) -> float:
    """The adapter's rate at an update, counted from 0, of `planned` ones; 0.0 at negative updates,
    in which only a value head learns."""
    rising = math.ceil(round(learner.warmup * planned, 9))  # 0.07 * 100 is a little more than 7
    if update < 0:
        return 0.0
    if update < rising:
        return learner.lr * (update + 1) / rising
    progress = (update - rising) / max(1, planned - rising)
    if learner.schedule == "constant":
        return learner.lr
    if learner.schedule == "linear":
        return learner.lr * (1.0 - progress)
    return learner.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


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
