"""SwiGLU as one function against the library's own, on every family; and what it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, save_tiny
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from minirl import recipe
from minirl.engine.lean import is_lean
from minirl.engine.model import gated
from minirl.engine.model import load as models

CPU = torch.device("cpu")
OTHERS = {"gemma2", "gemma3_text", "phi3"}  # GELU; gate and up in one projection


def library_mlp(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return LlamaMLP(
        LlamaConfig(hidden_size=24, num_attention_heads=2, intermediate_size=64, mlp_bias=True)
    ).to(dtype)


def with_gradients(module: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    grads = torch.autograd.grad(
        out,
        [x, *module.parameters()],
        torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype),
    )
    return [out.detach(), *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_the_library_s(dtype: torch.dtype) -> None:
    """To the bit. Catches: the gradients of gate and up exchanged, an input written over."""
    stock, lean = library_mlp(dtype), library_mlp(dtype)
    assert gated.lean_gates(lean) == 1
    x = (torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    before = x.clone()
    for ours, theirs in zip(with_gradients(lean, x), with_gradients(stock, x), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(x, before)
    with torch.no_grad():
        assert torch.equal(lean(x), stock(x))


def test_a_worked_example() -> None:
    """g = 1, u = 3, dy = 2: s = 0.731059, y = 3 s = 2.193176; d up = 2 s = 1.462117, d gate = 6 s
    (1 + 1 - s) = 5.566023."""
    gate, up = (torch.tensor([value], requires_grad=True) for value in (1.0, 3.0))
    out = gated._Gated.apply(gate, up)
    out.backward(torch.tensor([2.0]))
    torch.testing.assert_close(
        [out.item(), up.grad.item(), gate.grad.item()],
        [2.193176, 1.462117, 5.566023],
        atol=2e-6,
        rtol=0,
    )


def test_two_wide_tensors_are_kept_where_the_library_keeps_three() -> None:
    def kept(module: Any) -> int:
        """Different tensors of the inner width that the activation keeps for its gradient."""
        found: list[Tensor] = []
        x = torch.randn(7, 24, requires_grad=True)
        module.down_proj = torch.nn.Identity()

        def keep(t: Tensor) -> Tensor:
            found.extend([t] if t.shape == (7, 64) else [])
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            module(x)
        return len({t.data_ptr() for t in found})

    stock, lean = library_mlp(), library_mlp()
    gated.lean_gates(lean)
    assert (kept(stock), kept(lean)) == (3, 2)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_model_s_mlps_are_taken_where_they_are_this_formula(arch: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, arch)
    model = models.load_model(recipe.Model(name=str(tmp_path), dtype="fp32"), device=CPU).model
    mlps = [module for module in model.modules() if type(module).__name__.endswith("MLP")]
    assert mlps
    assert [module for module in mlps if is_lean(module)] == ([] if arch in OTHERS else mlps)


def test_other_formulas_stay() -> None:
    class Halved(LlamaMLP):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    class Clipped(LlamaMLP):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clamp(max=self.limit))

    config = LlamaConfig(hidden_size=24, num_attention_heads=2, intermediate_size=64)
    other = LlamaMLP(config)
    other.act_fn = torch.nn.GELU()
    for module in (Halved(config), Clipped(config), other, torch.nn.Linear(2, 2)):
        assert gated.lean_gates(module) == 0
