"""How LoRA layers compute: in the model's dtype, from float32 masters; and faster still while the
weights stand still.

Invariant: the output is peft's own up to rounding, base(x) + scaling * B A x; gradients on A and B
are float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from minirl.engine.backend import Backend
from minirl.engine.lean import Lean, swap
from minirl.engine.model.adapter import ADAPTER

# Layers that are given the same input, in the order of their calls.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def lean_lora(model: nn.Module) -> int:
    """Let every plain LoRA layer compute here; returns how many layers were changed.

    peft casts the input up to the adapter's float32, which on a bf16 CPU makes a training step 1.2
    to 1.3 times as long. Layers with DoRA, a LoRA bias or dropout keep peft's own.
    """
    return swap(model, LeanLora, _is_plain)


class LeanLora(Lean):
    """A LoRA layer that casts its factors to the input's dtype. Disabled, merged or with another
    adapter it computes as in peft.

    fixed: what holds the weights while they stand still, else None.
    """

    fixed: FixedLora | None = None
    base_layer: nn.Linear  # or bitsandbytes' subclass of it
    lora_A: nn.ModuleDict  # noqa: N815
    lora_B: nn.ModuleDict  # noqa: N815
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.disable_adapters or self.merged or self.active_adapters != [ADAPTER]:
            peft: Tensor = super().forward(x)
            return peft
        joint = None if self.fixed is None else self.fixed.joint(self)
        if joint is not None and x.dtype == joint.dtype:
            return joint(self, x)
        a, b = self.factors(x.dtype) if self.fixed is None else self.fixed.factors(self, x.dtype)
        result: Tensor = self.base_layer(x)
        low, scaling = F.linear(x, a), self.scaling[ADAPTER]
        if type(self.base_layer) is nn.Linear or not torch.is_grad_enabled():
            # Into the base's output, scaled on the way: a second result and a pass over both cost
            # as much as the product.
            result.flatten(0, -2).addmm_(low.flatten(0, -2), b.t(), alpha=scaling)
            return result
        # Autograd refuses to write to bitsandbytes' outputs.
        return torch.add(result, F.linear(low, b), alpha=scaling)

    def masters(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), float32."""
        a: Tensor = self.lora_A[ADAPTER].weight  # type: ignore[assignment]
        b: Tensor = self.lora_B[ADAPTER].weight  # type: ignore[assignment]
        return a, b

    def factors(self, dtype: torch.dtype, *, copy: bool = False) -> tuple[Tensor, Tensor]:
        """A and B in the compute dtype."""
        a, b = self.masters()
        return a.to(dtype, copy=copy), b.to(dtype, copy=copy)


class FixedLora:
    """Context for sampling: no gradients, and weights that do not change. Whoever changes them must
    `clear` it.

    LoRA factors are cast once, not at every token: that cost a decode step more than their
    products. Where the backend gains by it, base and factors are packed together.
    rows: of a usual forward pass.
    """

    def __init__(self, model: nn.Module, rows: int, backend: Backend) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, LeanLora)]
        self._factors: dict[LeanLora, tuple[Tensor, Tensor]] = {}
        groups = [group for group in _siblings(model) if _can_join(group)]
        if not backend.fits([layer.base_layer.weight for group in groups for layer in group]):
            groups = []
        self.joints = [Joint(group, rows, backend) for group in groups]
        self._joint_of = {layer: joint for joint in self.joints for layer in joint.layers}
        self._is_stale = True

    def clear(self) -> None:
        """The weights have changed."""
        self._is_stale = True

    def __enter__(self) -> None:
        if self._is_stale:
            for layer, held in self._factors.items():
                for copy, master in zip(held, layer.masters(), strict=True):
                    copy.copy_(master)  # where they stand: a CUDA graph goes by their addresses
            for joint in self.joints:
                joint.pack()
        for layer in self._layers:
            layer.fixed = self
        self._is_stale = False

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            layer.fixed = None
        for joint in self.joints:
            joint.forget()

    def joint(self, layer: LeanLora) -> Joint | None:
        """The products that `layer` has a part in; None if it computes alone."""
        return self._joint_of.get(layer)

    def factors(self, layer: LeanLora, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Copies of A and B that stay where they are, in float32 too."""
        if layer not in self._factors:
            self._factors[layer] = layer.factors(dtype, copy=True)
        return self._factors[layer]


class Joint:
    """Layers with the same input x, as two products: low = x A^T for all of them, then [x, low] [W,
    scaling * B]^T. So the sums of base and adapter are rounded once, not twice.

    The first of them computes for all, and hands the others their parts.
    """

    def __init__(self, layers: Sequence[LeanLora], rows: int, backend: Backend) -> None:
        self.layers = list(layers)
        self._rows, self._backend = rows, backend
        bases = [layer.base_layer for layer in layers]
        self.dtype = bases[0].weight.dtype
        self._sizes = [len(base.weight) for base in bases]
        self._bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases])
        self._handed: dict[LeanLora, tuple[Tensor, Tensor]] = {}  # the input and the layer's part

    def pack(self) -> None:
        """Take the layers' present weights."""
        factors = [layer.masters() for layer in self.layers]
        a = torch.cat([a for a, _ in factors])
        pairs = zip(self.layers, factors, strict=True)
        b = torch.block_diag(*(b * layer.scaling[ADAPTER] for layer, (_, b) in pairs))
        weights = torch.cat([layer.base_layer.weight for layer in self.layers])
        both = torch.cat([weights, b.to(self.dtype)], dim=1)
        self._up = self._backend.pack(both, self._rows, self._bias)
        self._down = self._backend.pack(a.to(self.dtype), self._rows)

    def forget(self) -> None:
        """Let go of parts that nobody has taken."""
        self._handed.clear()

    def __call__(self, layer: LeanLora, x: Tensor) -> Tensor:
        """The output of `layer`, (..., in) -> (..., out)."""
        given, part = self._handed.pop(layer, (None, x))
        if given is x:
            return part
        out = self._up(torch.cat([x, self._down(x)], dim=-1))
        parts = dict(zip(self.layers, torch.split(out, self._sizes, dim=-1), strict=True))
        if layer is self.layers[0]:
            self._handed = {other: (x, parts[other]) for other in self.layers[1:]}
        return parts[layer]


def _siblings(model: nn.Module) -> Iterator[list[LeanLora]]:
    """A model's lean LoRA layers, those with the same input together."""
    for module in model.modules():
        children = {n: child for n, child in module.named_children() if isinstance(child, LeanLora)}
        for names in SIBLINGS:
            if all(name in children for name in names):
                yield [children.pop(name) for name in names]
        for child in children.values():
            yield [child]


def _can_join(layers: Sequence[LeanLora]) -> bool:
    bases = [layer.base_layer for layer in layers]
    return (
        all(type(base) is nn.Linear for base in bases)
        and len({base.bias is None for base in bases}) == 1
    )


def _is_plain(layer: nn.Module) -> bool:
    if not isinstance(layer, LoraLayer):
        return False
    dropouts, factors = layer.lora_dropout.values(), layer.lora_B.values()
    has_dropout = any(isinstance(dropout, nn.Dropout) and dropout.p > 0 for dropout in dropouts)
    has_bias = any(factor.bias is not None for factor in factors)
    return isinstance(layer.get_base_layer(), nn.Linear) and not (
        layer.lora_variant or has_dropout or has_bias
    )
