"""What a GPU would refuse or wait for, found without one: the engine on torch's `meta` device.

A tensor of another device raises there as it does on a GPU, and so does reading a value back, which
on a GPU waits for all that was asked.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted import Scripted, talk_of
from tiny import byte_tokenizer, save_tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minirl import recipe
from minirl.chat import Chat
from minirl.engine.learn.objective import objective
from minirl.engine.model import load as models
from minirl.engine.model.batch import Row, collate, pack
from minirl.engine.model.lora import FixedLora
from minirl.engine.model.policy import Policy
from minirl.engine.sample.draw import pick
from minirl.engine.sample.kv_cache import KVCache
from minirl.engine.sample.runner import ModelRunner
from minirl.episode import Completion, Problem, Verdict
from minirl.loop.player import Player
from minirl.rollout import Play, Talk

META = torch.device("meta")
VIEWS = (
    "view",
    "transpose",
    "unsqueeze",
    "expand",
    "slice",
    "select",
    "detach",
    "permute",
    "::t",
    "split",
    "alias",
    "squeeze",
    "as_strided",
)


class Kernels(TorchDispatchMode):
    """Counts the operations inside it that are no mere views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.count += not any(name in function.name() for name in VIEWS)
        return function(*args, **(kwargs or {}))


def policy_on_meta(folder: Path, **overrides: Any) -> Policy:
    save_tiny(folder, "qwen2", **overrides)
    loaded = models.load_model(recipe.Model(name=str(folder), dtype="fp16"), 0, torch.device("cpu"))
    return Policy(loaded.model.to(META), META, loaded.dtype)


def runner_of(policy: Policy, count: int, budget_tokens: int | None = None) -> ModelRunner:
    layers = policy.model.get_base_model().config.num_hidden_layers
    return ModelRunner(policy, KVCache(layers, count, META, policy.backend, budget_tokens))


def rows_of_a_group() -> list[Row]:
    shared, mask = tuple(range(20)), (False,) * 20
    return [
        Row((*shared, *range(i, 2 * i)), (*mask, *(True,) * i), (0.0,) * (20 + i), 1.0, 0.1, i, 0)
        for i in (5, 6, 9)
    ]


@torch.no_grad()
def test_sampling_stays_on_its_device(tmp_path: Path) -> None:
    policy = policy_on_meta(tmp_path)
    runner = runner_of(policy, 6)
    cache = runner.cache
    cache.reserve(40, 0)
    with FixedLora(policy.model, 6, policy.backend):
        runner.prefill({(1,) * 16: [0], (2,) * 12: [1, 2]})
        logits = runner.decode([1, 2, 3])
        chosen, logprobs = pick(logits, [1.0] * 3, torch.rand(3, device=META))
        cache.fork(0, 3, 9)
        cache.swap(0, 3)
        cache.reserve(100, 4)
        assert runner.decode([1] * 4).shape == logits[:1].expand(4, -1).shape
    tensors = (chosen, logprobs, logits, *cache._blocks)
    assert {tensor.device for tensor in tensors} == {META}


@torch.no_grad()
def test_a_step_of_decoding_is_few_kernels(tmp_path: Path) -> None:
    """A GPU waits for its host while these are launched, in every layer, for every token. Counted
    with a CPU's norms and attention spelled out. Catches: masks made again in every layer, factors
    cast again at every token."""
    counts = []
    for layers in (2, 3):
        policy = policy_on_meta(tmp_path / str(layers), num_hidden_layers=layers)
        runner = runner_of(policy, 4)
        runner.cache.reserve(40, 0)
        with FixedLora(policy.model, 4, policy.backend):
            runner.prefill({(1,) * 16: [0, 1, 2, 3]})
            with Kernels() as kernels:
                runner.decode([1] * 4)
        counts.append(kernels.count)
    assert counts[1] - counts[0] <= 66


@pytest.mark.parametrize(
    "loss", ["grpo", "dapo"]
)  # what gspo needs (unique) has no shape before it is computed
def test_learning_stays_on_its_device(loss: str, tmp_path: Path) -> None:
    policy = policy_on_meta(tmp_path)
    node = recipe.Learner.model_validate({"loss": loss, "entropy": 0.01})
    (bundles,) = pack(rows_of_a_group(), 10**6)
    policy.freeze_reference()
    policy.model.train()
    batch = collate(bundles, META)
    loss, _ = objective(
        policy, node, batch, temperature=0.9, experience=None, measure_mismatch=True
    )
    loss.backward()
    assert {
        (p.grad.device, p.grad.dtype) for p in policy.trainable.values() if p.grad is not None
    } == {(META, torch.float32)}


@torch.no_grad()
def test_a_growing_cache_is_never_there_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old keys are let go before new values are made. Catches: a T4 that runs out of memory when a
    longer prompt comes."""
    policy = policy_on_meta(tmp_path)
    runner = runner_of(policy, 6, budget_tokens=1500)
    cache = runner.cache
    cache.reserve(100, 0)
    runner.prefill({(1,) * 16: [0, 1]})
    keys, make, seen = weakref.ref(cache._blocks[0].untyped_storage()), cache._make, []

    def watched(which: int, like: Tensor) -> Tensor:
        seen.append((which, keys() is None))
        return make(which, like)

    monkeypatch.setattr(cache, "_make", watched)
    cache.reserve(200, 2)
    assert (cache.count, cache.capacity) == (5, 256)
    assert seen == [(0, False), (1, True)]


def test_the_cache_is_given_back_before_anybody_learns() -> None:
    """Catches: keys and values of a finished rollout that stay on a GPU through the update,
    gigabytes of them."""
    chat, said = Chat(byte_tokenizer()), list[str]()

    def answer(talk: Talk) -> Play:
        yield from talk.ask("attempt", max_tokens=8, trained=True)
        return talk.end(Verdict(1.0, True))

    class Watched(Scripted):
        tokens = 0

        def poll(self) -> list[tuple[int, Completion]]:
            said.append("poll")
            return super().poll()

        def reset(self) -> None:
            said.append("reset")

    progress: Any = SimpleNamespace(sampling=lambda done, of: None)
    player = Player(Watched(chat, lambda text, ask: "yes"), progress)  # type: ignore[arg-type]
    talks = [talk_of(Problem(f"p{i}", "Why?", None), chat) for i in range(3)]
    assert len(player.play([answer(talk) for talk in talks])) == 3
    assert said == ["reset", *["poll"] * (len(said) - 2), "reset"]
    assert "poll" in said
