"""LoRA layers while the weights stand still: packed products against the layers' own, on every
family."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, save_tiny, tiny_model
from torch import nn

from minirl import recipe
from minirl.engine.cpu import Cpu, packed
from minirl.engine.model import load as models
from minirl.engine.model import lora
from minirl.engine.model.head import Head

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(
    not packed.works(torch.float32), reason="this build of torch has no packed products"
)


def stirred(folder: Path, arch: str = "llama", dtype: str = "fp32", **settings: Any) -> Any:
    """A model whose adapter does something."""
    save_tiny(folder, arch)
    model = models.load_model(
        recipe.Model(name=str(folder), dtype=dtype, **settings), device=CPU
    ).model
    stir(model, 0)
    return model


def stir(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(24).view(2, 12)).logits
    return out


def inside(model: Any, fixed: lora.FixedLora) -> torch.Tensor:
    with fixed:
        return logits(model)


@needs_packing
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_layers_compute_what_plain_ones_do(arch: str, tmp_path: Path) -> None:
    """Catches: siblings' outputs in the wrong order, a scaling left out or taken twice, a bias
    lost, B of one layer under another."""
    model = stirred(tmp_path, arch)
    layers = [module for module in model.modules() if isinstance(module, lora.LeanLora)]
    fixed = lora.FixedLora(model, rows=4, backend=Cpu())
    own, off = logits(model), None
    with model.disable_adapter():
        off = logits(model)
    with fixed:
        assert all(layer.fixed.joint(layer) is not None for layer in layers)
        torch.testing.assert_close(logits(model), own, atol=2e-5, rtol=1e-5)
        with model.disable_adapter():
            assert torch.equal(logits(model), off)
    assert all(layer.fixed is None for layer in layers)
    assert (own - off).abs().max() > 0.05
    assert torch.equal(logits(model), own)


@needs_packing
def test_layers_with_one_input_are_one_product(tmp_path: Path) -> None:
    model = stirred(tmp_path, lora={"targets": "all-linear"})
    sizes = [len(joint.layers) for joint in lora.FixedLora(model, rows=4, backend=Cpu()).joints]
    depth = model.get_base_model().config.num_hidden_layers
    assert sorted(sizes) == sorted([3, 1, 2, 1] * depth)  # q k v, o, gate up, down
    some = stirred(tmp_path / "some", lora={"targets": ["q_proj", "v_proj"]})
    joints = lora.FixedLora(some, rows=4, backend=Cpu()).joints
    assert [len(joint.layers) for joint in joints] == [1] * (2 * depth)


@needs_packing
def test_new_weights_are_taken_after_clear_alone(tmp_path: Path) -> None:
    model = stirred(tmp_path)
    fixed = lora.FixedLora(model, rows=4, backend=Cpu())
    before = inside(model, fixed)
    stir(model, 1)
    assert torch.equal(inside(model, fixed), before)
    fixed.clear()
    torch.testing.assert_close(inside(model, fixed), logits(model), atol=2e-5, rtol=1e-5)
    assert (logits(model) - before).abs().max() > 0.05


@needs_packing
def test_another_adapter_or_a_merged_one_is_not_served_by_what_was_packed(tmp_path: Path) -> None:
    model = stirred(tmp_path)
    fixed = lora.FixedLora(model, rows=4, backend=Cpu())
    own = inside(model, fixed)
    model.add_adapter("other", model.peft_config["default"])
    with model.disable_adapter():
        off = logits(model)
    with fixed:
        model.set_adapter("other")
        assert torch.equal(logits(model), off)  # a fresh adapter has B = 0
        model.set_adapter("default")
        model.merge_adapter()
        torch.testing.assert_close(logits(model), own, atol=1e-4, rtol=1e-4)


@needs_packing
def test_siblings_that_are_given_different_inputs_compute_each_its_own(tmp_path: Path) -> None:
    model = stirred(tmp_path)
    attention = model.get_base_model().model.layers[0].self_attn
    q, k = attention.q_proj, attention.k_proj
    torch.manual_seed(0)
    one, two = torch.randn(3, q.in_features), torch.randn(3, q.in_features)
    with torch.no_grad():
        wanted = [q(one), k(two), k(one), q(two)]
        with lora.FixedLora(model, rows=4, backend=Cpu()):
            found = [q(one), k(two), k(one), q(two)]
            one.mul_(2)  # the same tensor, written over: the first of the siblings computes anew
            torch.testing.assert_close(q(one), 2 * wanted[0], atol=1e-5, rtol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_nothing_is_packed_where_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        lora.FixedLora(stirred(tmp_path / "a", quantize="nf4"), rows=4, backend=Cpu()).joints == []
    )  # 4-bit layers are not plain ones
    dora = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    lora.lean_lora(dora)
    assert lora.FixedLora(dora, rows=4, backend=Cpu()).joints == []
    model = stirred(tmp_path / "b")
    monkeypatch.setattr(packed, "MOST_BYTES", 1000)
    fixed = lora.FixedLora(model, rows=4, backend=Cpu())
    assert fixed.joints == []
    assert torch.equal(inside(model, fixed), logits(model))


def test_held_factors_stand_where_they_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, too, where a cast is the master itself. Catches: a CUDA graph that goes on with a
    master that has moved."""
    monkeypatch.setattr(packed, "MOST_BYTES", 0)
    model = stirred(tmp_path)
    fixed = lora.FixedLora(model, rows=4, backend=Cpu())
    before = inside(model, fixed)
    held = [factor for pair in fixed._factors.values() for factor in pair]
    places = [factor.data_ptr() for factor in held]
    masters = [p for p in model.parameters() if p.requires_grad]
    assert len(held) == len(masters) > 0
    assert not set(places) & {p.data_ptr() for p in masters}
    for p in masters:
        p.data = p.data * 1.5  # in another place, as `bare` and the KL reference do
    fixed.clear()
    after = inside(model, fixed)
    assert [factor.data_ptr() for factor in held] == places
    torch.testing.assert_close(after, logits(model), atol=1e-5, rtol=1e-5)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_product_is_linear(dtype: torch.dtype) -> None:
    if not packed.works(dtype):
        pytest.skip("this build of torch has no packed products of this type")
    torch.manual_seed(0)
    weight, bias = torch.randn(70, 50).to(dtype), torch.randn(70).to(dtype)
    for rows in (1, 3, 64, 200):
        x = torch.randn(2, rows, 50).to(dtype)
        found = packed.product(x, packed.pack(weight, 64), bias)
        wanted = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(
            found.double(), wanted, atol=1e-4 if dtype == torch.float32 else 0.15, rtol=1e-2
        )


def test_a_torch_without_the_operators_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(packed, "pack", gone)
    assert not packed.works.__wrapped__(torch.float32)
    monkeypatch.setattr(packed, "pack", lambda weight, rows: weight)
    monkeypatch.setattr(
        packed, "product", lambda x, weight: x @ weight.t() + 1
    )  # one that is there but wrong
    assert not packed.works.__wrapped__(torch.float32)


@needs_packing
def test_the_head_is_packed_for_sampling_and_plain_for_learning() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 40, bias=False).requires_grad_(False)
    head = Head(linear, SimpleNamespace(logit_scale=0.5), Cpu())
    hidden = torch.randn(3, 16, requires_grad=True)
    plain = head.logits(hidden)
    head.pack(3)
    with torch.no_grad():
        torch.testing.assert_close(head.logits(hidden), plain, atol=1e-6, rtol=1e-6)
    assert head._packed is not None
    head.logits(hidden).sum().backward()  # packed products have no gradient
    torch.testing.assert_close(hidden.grad, 0.5 * linear.weight.sum(0).expand(3, 16))
