"""Optimizers: what each recipe word builds, and a state that goes through a file without loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minirl.engine.learn import optim
from minirl.errors import UserError
from minirl.recipe import Learner

CPU = torch.device("cpu")
NODE = Learner(lr=0.05, betas=(0.8, 0.95), weight_decay=0.1)


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def step(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    for p in weights:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def test_adamw_takes_its_numbers_from_the_recipe() -> None:
    """Catches: a number that the optimizer does not get. First AdamW step: w * (1 - lr * decay) -
    lr * g / (|g| + 1e-8)."""
    weight = torch.nn.Parameter(torch.tensor([2.0, -2.0]))
    optimizer = optim.build(NODE, [weight], CPU)
    weight.grad = torch.tensor([0.5, -3.0])
    optimizer.step()
    # 2 * (1 - 0.05 * 0.1) - 0.05 = 1.94; -2 * 0.995 + 0.05 = -1.94
    assert weight.tolist() == pytest.approx([1.94, -1.94])
    weight.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    # m = 0.8 * (0.2 * 0.5) + 0.2 * 1 = 0.28, over 1 - 0.8**2 = 0.36: 0.777778; v = 0.95 * (0.05 *
    # 0.25) + 0.05 = 0.061875, over 1 - 0.95**2 = 0.0975: 0.634615, root 0.796628. 1.94 * 0.995 -
    # 0.05 * 0.777778 / 0.796628 = 1.881483
    assert weight[0].item() == pytest.approx(1.881483, abs=1e-5)


def test_state_through_a_file_continues_bitwise(tmp_path: Path) -> None:
    """Catches: a moment or the step count lost, moments given to the wrong parameter, a tensor cast
    on the way."""
    weights = parameters()
    optimizer = optim.build(NODE, weights, CPU)
    for number in range(3):
        step(optimizer, weights, number)
    tensors, plain = optim.flatten(optimizer)
    save_file(tensors, tmp_path / "o.safetensors")
    other = [torch.nn.Parameter(p.detach().clone()) for p in weights]
    restored = optim.build(NODE, other, CPU)
    optim.unflatten(restored, load_file(tmp_path / "o.safetensors"), json.loads(json.dumps(plain)))
    for number in range(3, 6):
        step(optimizer, weights, number)
        step(restored, other, number)
    assert all(torch.equal(a, b) for a, b in zip(weights, other, strict=True))
    ours, theirs = optim.flatten(optimizer)[0], optim.flatten(restored)[0]
    assert sorted(ours) == [
        f"{number}.{name}" for number in (0, 1) for name in ("exp_avg", "exp_avg_sq", "step")
    ]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_flat_state_is_a_copy() -> None:
    """Catches: a view of live state, which later steps would change under a checkpoint being
    written."""
    weights = parameters()
    optimizer = optim.build(NODE, weights, CPU)
    step(optimizer, weights, 0)
    tensors, _ = optim.flatten(optimizer)
    before: dict[str, Tensor] = {name: t.clone() for name, t in tensors.items()}
    step(optimizer, weights, 1)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_state_before_the_first_step_is_empty_and_loads() -> None:
    """Catches: a resume that fails when every group so far was dead."""
    fresh = optim.build(NODE, parameters(), CPU)
    assert optim.flatten(fresh) == ({}, {})
    weights, twin = parameters(), parameters()
    restored = optim.build(NODE, weights, CPU)
    optim.unflatten(restored, {}, {})
    straight = optim.build(NODE, twin, CPU)
    step(restored, weights, 0)
    step(straight, twin, 0)
    assert all(torch.equal(a, b) for a, b in zip(weights, twin, strict=True))


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_bitsandbytes_optimizers_are_refused_on_a_cpu_in_one_line(name: str) -> None:
    """Catches: a silent AdamW, a traceback from inside bitsandbytes at the first step."""
    with pytest.raises(UserError) as caught:
        optim.build(Learner(optimizer=name), parameters(), CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert all(
        word in message for word in ("learner.optimizer", repr(name), "CUDA", "on cpu", "'adamw'")
    )


@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW32bit"])
def test_bitsandbytes_state_survives_a_checkpoint(kind: str) -> None:
    """Catches: bitsandbytes' own state_dict, which hides tensors where JSON cannot hold them. Their
    steps run on a CPU too."""
    import bitsandbytes as bnb

    def stepped(steps: int, restore_after: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 128))
        optimizer = getattr(bnb.optim, kind)([weight], lr=0.01)
        for step in range(steps):
            if step == restore_after:
                tensors, plain = optim.flatten(optimizer)
                optimizer = getattr(bnb.optim, kind)([weight], lr=0.01)
                optim.unflatten(optimizer, tensors, json.loads(json.dumps(plain)))
            weight.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return weight.detach()

    assert torch.equal(stepped(4, 2), stepped(4, None))
