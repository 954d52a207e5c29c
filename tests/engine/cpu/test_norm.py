"""RMSNorm as one function against the library's own, on every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, save_tiny
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from minirl import recipe
from minirl.engine.cpu import norm
from minirl.engine.lean import is_lean
from minirl.engine.model import load as models
from minirl.engine.model.policy import Policy

CPU = torch.device("cpu")
OTHER_FORMULA = {"gemma2", "gemma3_text"}  # 1 + w, all in float32


def library_norm(size: int, dtype: torch.dtype, *, trained: bool = False) -> Any:
    module = LlamaRMSNorm(size, eps=1e-5)
    module.weight = torch.nn.Parameter(
        torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.5, requires_grad=trained
    )
    return module.to(dtype)


def with_gradient(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    (grad,) = torch.autograd.grad(
        out, x, torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    )
    return out.detach(), grad


@pytest.mark.parametrize("shape", [(48,), (1, 48), (3, 5, 48)])
def test_values_and_gradients_are_the_library_s(shape: tuple[int, ...]) -> None:
    stock, lean = library_norm(48, torch.float32), library_norm(48, torch.float32)
    assert norm.lean_norms(lean) == 1
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 3
    before = x.clone()
    for ours, theirs in zip(with_gradient(lean, x), with_gradient(stock, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)
    assert torch.equal(x, before)


def test_a_worked_example() -> None:
    """x = (3, 4), w = (1, 2), eps 0: mean square 12.5, s = 1 / sqrt(12.5) = 0.282843; y =
    (0.848528, 2.262742).

    dy = (1, 0): n = (0.848528, 1.131371), mean(n w dy) = 0.424264, dx = s (1 - 0.36, 0 - 0.48) =
    (0.181019, -0.135765).
    """
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    out = norm._Norm.apply(x, torch.tensor([1.0, 2.0]), 0.0)
    out[0].backward()
    torch.testing.assert_close(out.detach(), torch.tensor([0.848528, 2.262742]), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.grad, torch.tensor([0.181019, -0.135765]), atol=1e-6, rtol=0)


def test_in_bf16_it_is_as_near_to_float32_as_the_library() -> None:
    x = (torch.randn(64, 96, generator=torch.Generator().manual_seed(3)) * 3).bfloat16()
    stock, lean, exact = (
        library_norm(96, torch.bfloat16),
        library_norm(96, torch.bfloat16),
        library_norm(96, torch.bfloat16).float(),
    )
    norm.lean_norms(lean)
    for ours, theirs, right in zip(
        with_gradient(lean, x),
        with_gradient(stock, x),
        with_gradient(exact, x.float()),
        strict=True,
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - right).norm() <= 1.1 * (theirs.float() - right).norm()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_model_s_norms_are_taken_where_they_are_this_formula(arch: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, arch)
    loaded = models.load_model(recipe.Model(name=str(tmp_path), dtype="fp32"), device=CPU)
    model = Policy(loaded.model, loaded.device, loaded.dtype).model
    all_norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    taken = [module for module in all_norms if is_lean(module)]
    assert all_norms
    assert taken == ([] if arch in OTHER_FORMULA else all_norms)


def test_other_formulas_and_trained_weights_stay() -> None:
    class HalvedRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) / 2

    halved = HalvedRMSNorm(16)
    halved.weight.requires_grad_(False)
    assert norm.lean_norms(halved) == 0
    assert norm.lean_norms(library_norm(16, torch.float32, trained=True)) == 0
