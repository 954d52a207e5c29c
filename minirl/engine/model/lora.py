"""How LoRA layers compute: in the model's dtype, from float32 masters; and faster still while the
weights stand still.

Invariant: the output is peft's own up to rounding, base(x) + scaling * B A x; gradients on A and B
are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from minirl.engine.cpu.packed import fits, pack, product

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)  # layers that are given the same input, in the order of their calls


def lean_lora(model: nn.Module) -> int:
    """Let every plain LoRA layer compute in the dtype of its input, from float32 masters; returns
    how many layers were changed.

    peft casts the input up to the adapter's float32, which on a bf16 CPU makes a training step 1.2
    to 1.3 times as long. Gradients on A and B stay float32. Disabled, switched and merged adapters
    behave as in peft; layers with DoRA, a LoRA bias or dropout keep peft's own.
    """
    changed = 0
    for module in model.modules():
        if isinstance(module, LoraLayer) and _is_plain(module):
            module.held = module.joint = None
            module.forward = MethodType(lean_forward, module)
            changed += 1
    return changed


class FixedLora:
    """Inside it, no gradients, and LoRA layers keep what they need from one forward to the next:
    the casts of small factors cost a decode step more than their products. On a CPU base and
    factors are packed together. Whoever changes the weights must `clear` it.

    rows: of a usual forward pass.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        self._layers: list[Any] = [module for module in model.modules() if hasattr(module, "held")]
        self._held: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in self._layers]
        self._joints = _joints(model, rows)
        self._is_stale = True

    def clear(self) -> None:
        """The weights have changed. The copies are brought up to date where they stand: a CUDA
        graph goes by their addresses."""
        self._is_stale = True

    def __enter__(self) -> None:
        for layer, held in zip(self._layers, self._held, strict=True):
            layer.held = held
            for name, (a, b) in held.items() if self._is_stale else ():
                a.copy_(layer.lora_A[name].weight)
                b.copy_(layer.lora_B[name].weight)
        for joint in self._joints:
            if self._is_stale:
                joint.pack()
            for layer in joint.layers:
                layer.joint = joint
        self._is_stale = False

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            layer.held = layer.joint = None
        for joint in self._joints:
            joint.forget()


class Joint:
    """Layers with the same input x, as two products: low = x A^T for all of them, then [x, low] [W,
    scaling * B]^T, in packed weights.

    So the sums of base and adapter are rounded once, not twice.
    """

    def __init__(self, layers: Sequence[Any], rows: int) -> None:
        self.layers = list(layers)
        self._rows = rows
        self._down = self._up = torch.empty(0)
        self._sizes = [layer.get_base_layer().weight.shape[0] for layer in layers]
        biases = [layer.get_base_layer().bias for layer in layers]
        self._bias = None if all(bias is None for bias in biases) else torch.cat(biases)
        self._name = ""
        self._out: tuple[Tensor, ...] = ()
        self._x: Tensor | None = None

    def pack(self) -> None:
        """Take the layers' present weights."""
        self._name = self.layers[0].active_adapters[0]
        weights = torch.cat([layer.get_base_layer().weight for layer in self.layers])
        scaled = [
            layer.lora_B[self._name].weight * layer.scaling[self._name] for layer in self.layers
        ]
        b: Tensor = torch.block_diag(*scaled)
        a = torch.cat([layer.lora_A[self._name].weight for layer in self.layers])
        self._up = pack(torch.cat([weights, b.to(weights.dtype)], dim=1), self._rows)
        self._down = pack(a.to(weights.dtype), self._rows)

    def forget(self) -> None:
        """Let go of the last input and outputs."""
        self._x, self._out = None, ()

    def serves(self, layer: Any) -> bool:
        """Whether what was packed is what `layer` now computes."""
        return not (layer.disable_adapters or layer.merged) and list(layer.active_adapters) == [
            self._name
        ]

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        """What `layer` makes of x, (..., in) -> (..., out). The first of the layers computes for
        all."""
        index = next(i for i, one in enumerate(self.layers) if one is layer)
        if index == 0 or self._x is not x:
            both = torch.cat([x, product(x, self._down)], dim=-1)
            out = product(both, self._up, self._bias)
            self._x, self._out = x, torch.split(out, self._sizes, dim=-1)
        return self._out[index]


def lean_forward(self: Any, x: Tensor) -> Tensor:
    """peft's LoRA forward, (..., in) -> (..., out), with the two small products in the dtype of
    x."""
    if (
        self.joint is not None
        and self.joint.serves(self)
        and x.dtype == self.base_layer.weight.dtype
    ):
        out: Tensor = self.joint(self, x)
        return out
    linear = nn.functional.linear
    result: Tensor = self.base_layer(x)
    if self.disable_adapters or self.merged:
        return result
    for name in self.active_adapters:
        if name in self.lora_A:
            a, b = _factors(self, name, x.dtype)
            low = linear(x, a)
            if type(self.base_layer) is nn.Linear or not torch.is_grad_enabled():
                # Into the base's output, scaled on the way: a second result and a pass over both
                # cost as much as the product.
                result.flatten(0, -2).addmm_(low.flatten(0, -2), b.t(), alpha=self.scaling[name])
            else:  # autograd refuses to write to bitsandbytes' outputs
                result = torch.add(result, linear(low, b), alpha=self.scaling[name])
    return result


def _joints(model: nn.Module, rows: int) -> list[Joint]:
    """The joints of a model's plain LoRA layers over plain linear ones; none where these cannot be
    packed."""
    groups: list[list[Any]] = []
    for module in model.modules():
        children = {
            name: child for name, child in module.named_children() if hasattr(child, "held")
        }
        for names in SIBLINGS:
            if len(found := [children[name] for name in names if name in children]) == len(names):
                groups.append(found)
                children = {name: child for name, child in children.items() if name not in names}
        groups += [[child] for child in children.values()]
    groups = [group for group in groups if _can_join(group)]
    return (
        [Joint(group, rows) for group in groups]
        if fits([layer.get_base_layer().weight for group in groups for layer in group])
        else []
    )


def _can_join(layers: Sequence[Any]) -> bool:
    bases = [layer.get_base_layer() for layer in layers]
    biased = {base.bias is not None for base in bases}
    return (
        all(type(base) is nn.Linear for base in bases)
        and len(biased) == 1
        and all(len(layer.active_adapters) == 1 for layer in layers)
    )


def _is_plain(layer: LoraLayer) -> bool:
    has_dropout = any(
        isinstance(dropout, nn.Dropout) and dropout.p > 0 for dropout in layer.lora_dropout.values()
    )
    has_bias = any(linear.bias is not None for linear in layer.lora_B.values())
    return isinstance(layer.get_base_layer(), nn.Linear) and not (
        layer.lora_variant or has_dropout or has_bias
    )


def _factors(layer: Any, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B in the compute dtype; kept between forwards inside FixedLora."""
    held: dict[str, tuple[Tensor, Tensor]] | None = layer.held
    if held is not None and name in held:
        return held[name]
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if held is None:
        return a.to(dtype), b.to(dtype)
    held[name] = (
        a.to(dtype, copy=True),
        b.to(dtype, copy=True),
    )  # of their own in float32 too: a graph remembers where they stand
    return held[name]
