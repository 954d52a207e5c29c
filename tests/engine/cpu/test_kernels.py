"""The compiled kernels against the formulas in float64, and the door that lets nothing else in."""

from __future__ import annotations

import logging
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from tiny import byte_tokenizer, save_tiny
from torch import Tensor

from minirl import recipe
from minirl.chat import Chat
from minirl.engine.cpu import attention as cpu_attention
from minirl.engine.cpu import compiled, kernels, norm
from minirl.engine.cpu.compiled import array
from minirl.engine.model import load as models
from minirl.engine.model.device import prepare
from minirl.engine.model.policy import Policy
from minirl.engine.sample.live import LiveSampler
from minirl.episode import Ask

prepare()  # numba takes torch's threads
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float32: 1e-5}


@njit
def rounded(x: Any, like: Any, out: Any) -> None:
    for i in range(len(x)):
        out[i] = kernels.narrow(x[i], like)


@njit
def powers(x: Any, out: Any) -> None:
    for i in range(len(x)):
        out[i] = kernels.exp2(x[i])


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    """Random bits, so every exponent and both zeros; ties, infinities and NaN. Catches: truncation,
    a NaN whose bits carry over."""
    rng = np.random.default_rng(0)
    bits = np.concatenate(
        [
            rng.integers(0, 2**32, 100_000, dtype=np.uint32),
            np.arange(0x3F80_0000, 0x3F83_0000, 0x4000, dtype=np.uint32),
        ]
    )
    bits = np.concatenate(
        [
            bits,
            np.array(
                [0x7F7F_FFFF, 0x7F80_0000, 0xFF80_0000, 0x7FFF_FFFF, 0x7F80_0001, 0, 0x8000_0000],
                np.uint32,
            ),
        ]
    )
    numbers = bits.view(np.float32)
    out = torch.empty(len(bits), dtype=torch.bfloat16)
    rounded(numbers, np.uint16(0), array(out))
    expected = torch.from_numpy(numbers.copy()).bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(out[kept].view(torch.int16), expected[kept].view(torch.int16))


def test_powers_of_two() -> None:
    x = np.concatenate([np.linspace(-126, 0, 100_001), [-1e30, -127.0, -200.0, -0.0]]).astype(
        np.float32
    )
    out = np.empty_like(x)
    powers(x, out)
    exact = np.exp2(x[:100_001].astype(np.float64))
    assert np.max(np.abs(out[:100_001] / exact - 1)) < 3e-7
    assert out[100_001:].tolist() == [2.0**-126] * 3 + [1.0]


def cache(
    rng: Random, rows: int, heads: int, capacity: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values (rows, heads, capacity, size) as kv_cache.py holds them: keys by column."""
    torch.manual_seed(rng.randrange(2**31))
    keys = torch.randn(rows, heads, size, capacity).to(dtype).transpose(-1, -2)
    return keys, torch.randn(rows, heads, capacity, size).to(dtype)


def reference(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None, scale: float
) -> Tensor:
    behind = positions[:, None, None, :] - torch.arange(keys.shape[2])
    seen = (behind >= 0) & (behind < (window or keys.shape[2]))
    scores = (query.double() @ keys.double().transpose(-1, -2) * scale).masked_fill(
        ~seen, -torch.inf
    )
    return torch.softmax(scores, -1) @ values.double().nan_to_num()


SHAPES = [(1, 1, 1, 4), (3, 2, 3, 16), (5, 1, 8, 64), (2, 3, 1, 80), (4, 2, 3, 96)]


@settings(max_examples=120, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from(SHAPES),
    st.sampled_from([None, 1, 7, 50]),
)
@torch.no_grad()
def test_attention_of_one_new_token(
    rng: Random,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    window: int | None,
) -> None:
    """Rows of all lengths, alone and in a wider cache. What stands behind a row's own keys is NaN:
    none of it may count."""
    rows, heads, shared, size = shape
    capacity = rng.choice([16, 64, 128])
    everything = cache(rng, rows + 1, heads, capacity, size, dtype)
    keys, values = (block[:rows] for block in everything)
    positions = torch.tensor([[rng.randrange(capacity)] for _ in range(rows)])
    for row, (last,) in enumerate(positions.tolist()):
        keys[row, :, last + 1 :], values[row, :, last + 1 :] = torch.nan, torch.nan
    query, scale = 2 * torch.randn(rows, heads, shared, size).to(dtype), 0.2
    width = int(positions.max()) + 1
    found = cpu_attention.decode(
        query, keys[:, :, :width], values[:, :, :width], positions, window, scale
    )
    alone = cpu_attention.decode(
        query[-1:], keys[-1:, :, :width], values[-1:, :, :width], positions[-1:], window, scale
    )
    assert found is not None
    assert alone is not None
    assert found.dtype == dtype
    expected = reference(query, keys, values, positions, window, scale)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=HALF_ULP[dtype])
    assert torch.equal(alone[0], found[-1]), (
        "a row's attention is its own, whatever stands beside it"
    )


@torch.no_grad()
def test_what_the_kernel_does_not_know_is_left_to_the_library() -> None:
    keys, values = cache(Random(0), 2, 1, 16, 8, torch.float32)
    query, positions = torch.randn(2, 1, 3, 8), torch.tensor([[3], [5]])
    assert cpu_attention.decode(query, keys, values, positions, None, 1.0) is not None
    assert cpu_attention.decode(query, keys.contiguous(), values, positions, None, 1.0) is None, (
        "keys by row"
    )
    assert (
        cpu_attention.decode(
            query,
            keys,
            values.transpose(-1, -2).contiguous().transpose(-1, -2),
            positions,
            None,
            1.0,
        )
        is None
    )
    assert (
        cpu_attention.decode(query[..., :6], keys[..., :6], values[..., :6], positions, None, 1.0)
        is None
    )
    assert (
        cpu_attention.decode(query.half(), keys.half(), values.half(), positions, None, 1.0) is None
    )
    with torch.enable_grad():
        assert cpu_attention.decode(query, keys, values, positions, None, 1.0) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_norms_are_those_of_the_formula(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = (1 + torch.randn(576) / 4).to(dtype)
    for shape in ((64, 1, 576), (3, 5, 576), (1, 576)):
        x = (torch.randn(*shape) * 10 ** torch.randn(*shape[:-1], 1)).to(dtype)
        compiled_ = norm.rms_norm(x, weight, 1e-6)
        assert compiled_.shape == x.shape
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "_kernels", lambda: None)
            plain = norm.rms_norm(x, weight, 1e-6)
        assert not torch.equal(compiled_, torch.zeros_like(x))
        torch.testing.assert_close(compiled_, plain, rtol=2 * HALF_ULP[dtype], atol=1e-7)
        if dtype == torch.bfloat16:
            assert (compiled_ == plain).float().mean() > 0.999, "rounded in the same places"
    strided = torch.randn(6, 576).to(dtype)[::2]
    assert torch.equal(
        norm.rms_norm(strided, weight, 1e-6), norm.rms_norm(strided.clone(), weight, 1e-6)
    )


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_completions_are_the_same_with_and_without(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = models.load_model(recipe.Model(name=str(save_tiny(tmp_path, family)), dtype="fp32"))
    policy, chat = Policy(loaded.model, loaded.device, loaded.dtype), Chat(byte_tokenizer(), eos=[])
    for p in (p for name, p in policy.trainable.items() if ".lora_B." in name):
        torch.nn.init.normal_(p, std=0.1)
    asks = [
        Ask(tuple(b"What is it? " * (n % 3 + 1) + bytes([65 + n])), 20, 1.0, seed=n)
        for n in range(7)
    ]

    def answers() -> list[Any]:
        sampler = LiveSampler(policy, chat, rows=4)
        for key, ask in enumerate(asks):
            sampler.add(key, ask)
        found: dict[int, Any] = {}
        while len(found) < len(asks):
            found |= dict(sampler.poll())
        return [found[key] for key in range(len(asks))]

    calls: list[int] = []
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: calls.append(attend(*args)))
    fast = answers()
    assert calls, "the kernels were used"
    monkeypatch.setattr(compiled, "_kernels", lambda: None)
    plain = answers()
    assert [a.tokens for a in fast] == [a.tokens for a in plain]
    for a, b in zip(fast, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda patch: patch.setattr("numba.threading_layer", lambda: "workqueue"),
            "they run on other threads than torch",
        ),
        (
            lambda patch: patch.setattr(kernels, "rms_norm", lambda *_: None),
            "or not as they should",
        ),
        (
            lambda patch: patch.setattr("numba.config.DISABLE_JIT", True),
            "they run on other threads than torch, or",
        ),
        (
            lambda patch: patch.setattr(kernels, "rms_norm", _no_layer),
            "left out (No threading layer could be loaded.)",
        ),
        (lambda patch: patch.setattr("importlib.util.find_spec", lambda name: None), None),
    ],
)
def test_kernels_that_would_not_serve_are_left_out(
    change: Any, said: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches: a pool of threads beside torch's on the same cores (slower than no kernel), and a
    crash where numba is half there."""
    x = torch.ones(1, 4)
    compiled._kernels.cache_clear()
    try:
        with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="minirl"):
            change(patch)
            assert compiled.kernels(x) is None
        assert [
            record.message.startswith("numba's kernels are left out") for record in caplog.records
        ] == [True] * (said is not None)
        assert said is None or said in caplog.text
    finally:
        compiled._kernels.cache_clear()
    assert compiled.kernels(x) is kernels
    assert compiled.kernels(x.half()) is None
    assert compiled.kernels(torch.empty(1, 4, device="meta")) is None


def _no_layer(*_: Any) -> None:
    raise ValueError("No threading layer could be loaded.\nHINT: ...")
