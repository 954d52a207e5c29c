"""The value head: its numbers, its files, and that it is no part of the adapter that plain peft
loads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_learner import open_policy, same_bits, stir, weights

from minirl.engine.model.adapter import save_adapter
from minirl.engine.model.policy import Policy
from minirl.engine.model.value_head import FILE, ValueHead
from minirl.errors import UserError
from minirl.loop.train import _export

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_tiny(tmp_path_factory.mktemp("tiny")))


def filled(size: int = 2) -> ValueHead:
    head = ValueHead(size, CPU)
    head.weight.data.copy_(torch.arange(1.0, size + 1.0)[None])
    head.bias.data.fill_(0.5)
    return head


def stirred(folder: str) -> Policy:
    policy = open_policy(folder)
    stir(policy, 1)
    head = policy.add_value_head()
    head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    head.bias.data.fill_(0.25)
    return policy


def test_a_value_by_hand() -> None:
    """Catches: a sum in place of the mean, states that are not put on one size, no bias."""
    # rms of (3, 4) is sqrt(25 / 2) = 3.5355; (1 * 3 + 2 * 4) / 3.5355 / 2 + 1/2 = 2.0556.
    # That of (0, -2) is 1.4142; -4 / 1.4142 / 2 + 1/2 = -0.9142.
    states = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, -2.0]])
    expected = [11 / math.sqrt(12.5) / 2 + 0.5] * 2 + [0.5 - math.sqrt(2.0)]
    assert filled()(states).tolist() == pytest.approx(expected, rel=1e-6)
    assert filled()(torch.zeros(1, 2)).tolist() == [0.5]


def test_it_starts_at_zero_and_leaves_the_random_generator_alone() -> None:
    """Catches: random first values (noise in the first advantages), a stage whose sampling depends
    on whether a head was made."""
    before = torch.get_rng_state()
    head = ValueHead(64, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = head(states)
    assert values.tolist() == [0.0] * 5
    values.sum().backward()
    assert states.grad is not None
    assert not states.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_in_float32_whatever_the_trunk_does(dtype: torch.dtype) -> None:
    """Catches: a head in half precision, where values near 1 come in steps of 0.008. Masters and
    gradients are float32."""
    head = filled(64)
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = head(states)
    assert values.dtype == torch.float32
    assert torch.equal(values, head(states.float()))
    values.sum().backward()
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32


def test_one_step_of_adamw_moves_a_value_by_about_twice_the_learning_rate_at_most() -> None:
    """Catches: a head whose speed depends on the size of a model or of its states."""
    for size, scale in ((32, 1.0), (2048, 30.0)):
        states = scale * torch.randn(1, size, generator=torch.Generator().manual_seed(size))
        head = ValueHead(size, CPU)
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.01, weight_decay=0.0)
        head(states).sum().backward()
        optimizer.step()
        assert (
            0.015 < -head(states).item() < 0.0205
        )  # the bias moves by 0.01, the weights by 0.01 * mean|state| / rms, about 0.008


def test_a_policy_saves_and_loads_its_head_in_place(folder: str, tmp_path: Path) -> None:
    """Catches: a head that is not saved, new parameters on loading (the optimizer would go on
    training the old ones)."""
    policy = stirred(folder)
    policy.save(tmp_path)
    other = open_policy(folder)
    other.load(tmp_path)
    assert other.value_head is not None
    kept = list(other.value_head.parameters())
    for p in kept:
        p.data.zero_()
    other.load(tmp_path)
    assert all(a is b for a, b in zip(kept, other.value_head.parameters(), strict=True))
    assert same_bits(
        dict(other.value_head.named_parameters()), dict(policy.add_value_head().named_parameters())
    )
    assert same_bits(weights(other), weights(policy))


def test_a_policy_without_a_head_saves_none(folder: str, tmp_path: Path) -> None:
    """Catches: a head made by loading or saving; the head counted among the adapter's weights or
    the reference's."""
    policy = open_policy(folder)
    policy.save(tmp_path)
    assert not (tmp_path / FILE).exists()
    policy.load(tmp_path)
    assert policy.value_head is None
    names = set(policy.trainable)
    policy.add_value_head()
    assert set(policy.trainable) == names
    assert policy.add_value_head() is policy.value_head


def test_the_final_folder_holds_the_head_and_loads_with_plain_peft(
    folder: str, tmp_path: Path
) -> None:
    """Catches: value weights inside the adapter's file, a folder that peft refuses, a head that is
    left behind."""
    policy = stirred(folder)
    _export(policy, tmp_path)
    plain = PeftModel.from_pretrained(tiny.tiny_model(), tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(
            plain(input_ids=ids).logits, policy.model(input_ids=ids).logits, atol=1e-5
        )
    assert not any("value" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    other = open_policy(folder)
    other.load_value_head(tmp_path)
    assert other.value_head is not None
    assert same_bits(
        dict(other.value_head.named_parameters()), dict(policy.add_value_head().named_parameters())
    )
    save_adapter(policy.model, tmp_path / "bare")
    fresh = open_policy(folder)
    fresh.load_value_head(tmp_path / "bare")
    assert fresh.value_head is None


def test_another_models_head_is_refused(tmp_path: Path) -> None:
    """Catches: a shape error of torch in place of one line for the user; a torn file."""
    filled(4).save(tmp_path)
    with pytest.raises(
        UserError,
        match=r"value_head.safetensors: got shape \(1, 4\) for weight, expected \(1, 2\)",
    ):
        filled(2).load(tmp_path)
    save_file({"weight": torch.zeros(1, 2)}, tmp_path / FILE)
    with pytest.raises(UserError, match="another model's"):
        filled(2).load(tmp_path)
    (tmp_path / FILE).write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        filled(2).load(tmp_path)
