"""Shared prefixes against plain rows: the same log-probabilities and gradients, on every family
that is supported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest
import torch
from tiny import ARCHITECTURES, byte_tokenizer, save_tiny
from torch import Tensor

from minirl import recipe
from minirl.chat import Chat
from minirl.engine import cuda
from minirl.engine.cuda import Cuda
from minirl.engine.model import attention
from minirl.engine.model import load as models
from minirl.engine.model.batch import Batch, Row, collate, collate_plain, pack, pack_plain
from minirl.engine.model.policy import Policy
from minirl.engine.sample.live import LiveSampler
from minirl.episode import Ask, Completion

WINDOWED = ("qwen2", "mistral", "gemma2", "gemma3_text")
CASES = [(arch, {}) for arch in ARCHITECTURES] + [
    (arch, {"sliding_window": 8}) for arch in WINDOWED
]


def rows_of(rng: Random) -> list[Row]:
    """Three groups of four: a long prefix, a longer one, and rows that share a single token."""
    rows = []
    for group, shared in enumerate((20, 37, 1)):
        prefix = [rng.randrange(256) for _ in range(shared)]
        for _ in range(4):
            length = rng.randrange(3, 25)
            tokens = prefix + [rng.randrange(256) for _ in range(length)]
            mask = [False] * shared + [rng.random() < 0.7 for _ in range(length - 1)] + [True]
            rows.append(
                Row(
                    tuple(tokens),
                    tuple(mask),
                    (0.0,) * len(tokens),
                    rng.gauss(0, 1),
                    1 / 50,
                    len(rows),
                    group,
                )
            )
    return rows


def strangers(rng: Random) -> list[Row]:
    """Six rows of six problems, with one system prompt of 20 tokens; what they train begins in
    it."""
    system, rows = [rng.randrange(256) for _ in range(20)], []
    for number in range(6):
        tokens = system + [rng.randrange(256) for _ in range(rng.randrange(8, 30))]
        mask = [False] * 18 + [True] * (len(tokens) - 18)
        rows.append(
            Row(
                tuple(tokens),
                tuple(mask),
                (0.0,) * len(tokens),
                rng.gauss(0, 1),
                1 / 50,
                number,
                number,
            )
        )
    return rows


def both(policy: Policy, batches: Iterable[Batch]) -> tuple[dict[int, list[float]], Tensor]:
    """Log-probabilities by episode, and the gradient of their weighted sum."""
    for p in policy.trainable.values():
        p.grad = None
    found: dict[int, list[float]] = {}
    for batch in batches:
        logprobs, _ = policy.logprobs(batch, temperature=0.7)
        (logprobs * batch.advantages * batch.weights).sum().backward()
        for episode, value in zip(batch.episode.tolist(), logprobs.tolist(), strict=True):
            found.setdefault(episode, []).append(value)
    return found, torch.cat(
        [p.grad.flatten() for p in policy.trainable.values() if p.grad is not None]
    )


def loaded(
    folder: Path, arch: str, dtype: Literal["fp32", "bf16"] = "fp32", **overrides: Any
) -> models.LoadedModel:
    save_tiny(folder, arch, **overrides)
    model = models.load_model(recipe.Model(name=str(folder), dtype=dtype), 0, torch.device("cpu"))
    torch.manual_seed(1)
    for name, p in model.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("make", [rows_of, strangers])
@pytest.mark.parametrize(("arch", "overrides"), CASES)
def test_shared_prefixes_equal_plain_rows(
    arch: str,
    overrides: dict[str, Any],
    make: Callable[[Random], list[Row]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: prefix not causal, a completion that sees another or not all of its prefix,
    positions that start at 0, a window ignored."""
    model = loaded(tmp_path, arch, **overrides)
    rows = make(Random(0))
    with monkeypatch.context() as patch:
        patch.setattr(attention, "supports", lambda config: False)
        plain = Policy(model.model, model.device, model.dtype)
    assert model.model.get_base_model().config._attn_implementation in ("sdpa", "eager")
    expected, gradient = both(
        plain, [collate_plain(c, pad=258, device=model.device) for c in pack_plain(rows, 100)]
    )

    shared = Policy(model.model, model.device, model.dtype)
    assert shared.shares_prefixes
    for budget in (10**6, 60):  # all in one pass; groups cut to fit
        found, other = both(
            shared, [collate(bundles, model.device) for bundles in pack(rows, budget)]
        )
        assert found.keys() == expected.keys()
        for episode, values in found.items():
            assert values == pytest.approx(expected[episode], abs=1e-4)
        assert (other - gradient).norm() / gradient.norm() < 1e-5
    # Without a layout the installed function is stock attention.
    found, other = both(
        shared, [collate_plain(c, pad=258, device=model.device) for c in pack_plain(rows, 100)]
    )
    assert [found[e] for e in sorted(found)] == [
        pytest.approx(expected[e], abs=1e-4) for e in sorted(expected)
    ]
    assert (other - gradient).norm() / gradient.norm() < 1e-5


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bf16_is_as_near_to_float32_as_plain_rows_are(arch: str, tmp_path: Path) -> None:
    """Log-probabilities and gradients of the layout, and the sampler's log-probabilities, in bf16
    against the same weights in float32.

    Catches: scores, softmax or sums in a narrower type than plain rows' own.
    """
    exact, rounded = loaded(tmp_path / "a", arch), loaded(tmp_path / "b", arch, "bf16")
    for name, p in exact.model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.bfloat16().float()
    reference, policy = (
        Policy(model.model, model.device, model.dtype) for model in (exact, rounded)
    )
    rows = [replace(r, advantage=1.0) for r in rows_of(Random(0))]
    expected, gradient = both(reference, reference.batches(rows, 10**6, pad=258))
    with policy.plain_attention():
        plain, plain_gradient = both(
            policy,
            [collate_plain(c, pad=258, device=policy.device) for c in pack_plain(rows, 10**6)],
        )
    shared, shared_gradient = both(policy, policy.batches(rows, 10**6, pad=258))

    def distance(found: dict[int, list[float]]) -> float:
        return (
            torch.cat(
                [(torch.tensor(found[e]) - torch.tensor(expected[e])).abs() for e in expected]
            )
            .mean()
            .item()
        )

    assert 0 < distance(shared) < 1.5 * distance(plain)
    assert (shared_gradient - gradient).norm() < 1.5 * (plain_gradient - gradient).norm()

    sampler = LiveSampler(policy, Chat(byte_tokenizer(), eos=[]), rows=len(rows))
    for r in rows:
        sampler.add(r.episode, Ask(r.tokens, 24, 0.7, (), r.episode))
    drawn: dict[int, Completion] = {}
    while len(drawn) < len(rows):
        drawn |= sampler.poll()
    again = [
        replace(
            r,
            tokens=r.tokens + c.tokens,
            mask=(False,) * r.length + (True,) * len(c.tokens),
            old=(0.0,) * r.length + c.logprobs,
        )
        for r, c in ((r, drawn[r.episode]) for r in rows)
    ]
    batch = collate_plain(again, pad=258, device=policy.device)
    with torch.no_grad():
        true, _ = reference.logprobs(batch, temperature=0.7)
        with policy.plain_attention():
            scored, _ = policy.logprobs(batch, temperature=0.7)
    assert (batch.old - true).abs().mean() < 1.5 * (scored - true).abs().mean()


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    policy, rows = Policy(model.model, model.device, model.dtype), rows_of(Random(2))
    expected, gradient = both(policy, policy.batches(rows, 300, pad=258))
    base = model.model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    model.model.train()
    found, other = both(policy, policy.batches(rows, 300, pad=258))
    assert found == expected
    torch.testing.assert_close(other, gradient)


def test_a_shared_prefix_is_computed_once(tmp_path: Path) -> None:
    """Catches: bundling switched off. Eight completions of 5 tokens after 100 shared ones are 140
    tokens, not 840."""
    rows = [
        Row(
            (*range(100), 200 + i, *range(4)),
            (False,) * 100 + (True,) * 5,
            (0.0,) * 105,
            1.0,
            1.0,
            i,
            0,
        )
        for i in range(8)
    ]
    ((bundle,),) = pack(rows, 10**6)
    assert (bundle.prefix, bundle.cost) == (100, 140)
    batch = collate([bundle], torch.device("cpu"))
    assert batch.tokens.shape == (1, 192)  # 140 filled up to a multiple of 64
    assert batch.before[:6].tolist() == [
        99,
        100,
        101,
        102,
        103,
        99,
    ]  # a completion's first token is predicted at the prefix's last
    assert batch.positions[0, 98:107].tolist() == [98, 99, 100, 101, 102, 103, 104, 100, 101]


def test_different_problems_share_a_system_prompt() -> None:
    """Catches: sharing looked for inside groups alone, as SFT has none. 20 + 4 * 15 tokens, not 4 *
    35; cut by the budget, once a cut."""
    rows = [
        Row(
            (*range(20), 100 + i, *range(14)),
            (False,) * 20 + (True,) * 15,
            (0.0,) * 35,
            1.0,
            1.0,
            i,
            i,
        )
        for i in range(4)
    ]
    ((bundle,),) = pack(rows, 10**6)
    assert (bundle.prefix, bundle.cost) == (20, 80)
    assert [(b.prefix, b.cost) for bundles in pack(rows, 70) for b in bundles] == [
        (20, 50),
        (20, 50),
    ]
    short = [
        Row((*range(15), 100 + i, 7), (False,) * 15 + (True,) * 2, (0.0,) * 17, 1.0, 1.0, i, i)
        for i in range(4)
    ]
    assert [b.prefix for bundles in pack(short, 10**6) for b in bundles] == [0]


def test_what_cuda_needs_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of biases filled up, keys repeated for every query head. Catches: places behind the last
    key that are seen, heads in another order, a slice that is copied whole again."""
    model = loaded(tmp_path, "qwen2")
    policy, rows = Policy(model.model, model.device, model.dtype), rows_of(Random(0))
    expected, gradient = both(policy, policy.batches(rows, 300, pad=258))
    biases: list[Tensor] = []

    class Watched(Cuda):
        def attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
            biases.append(args[0])
            return super().attention(query, key, value, *args)

    monkeypatch.setattr(cuda, "shares_heads", lambda query: False)
    policy.backend = Watched()
    found, other = both(policy, policy.batches(rows, 300, pad=258))
    assert found.keys() == expected.keys()
    for episode, values in found.items():
        assert values == pytest.approx(expected[episode], abs=1e-5)
    torch.testing.assert_close(other, gradient)
    assert {bias.stride(0) % 8 for bias in biases} == {0}
    assert any(bias.shape[1] % 8 for bias in biases)


@pytest.mark.parametrize(
    ("capability", "dtype", "shares"),
    [
        ((7, 5), torch.float16, False),
        ((8, 9), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
    ],
)
def test_where_heads_may_share_keys(
    capability: Any, dtype: torch.dtype, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cuda.shares_heads(torch.empty(1, dtype=dtype, device="meta")) is shares


def test_what_is_supported() -> None:
    from transformers import AutoConfig

    assert attention.supports(AutoConfig.for_model("qwen2"))
    assert not attention.supports(AutoConfig.for_model("mamba"))
    assert not attention.supports(
        AutoConfig.for_model(
            "llama", layer_types=["full_attention", "linear_attention"], num_hidden_layers=2
        )
    )
