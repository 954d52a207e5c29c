"""Ceilings: what the machine does at best, and how much of it the decode step and the update reach.

Invariant: a ceiling is measured in the same run, by turns with what is held against it, on the
model's own matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from minirl.bench.measure import GIGA, MEGA, Measurement, Spread, by_turns, rates
from minirl.bench.rollouts import planned, sampled
from minirl.bench.setup import Bench
from minirl.bench.updates import variants

COPY_BYTES, QUICK_COPY_BYTES = 2**29, 2**24
FEW = 8  # new tokens of the shorter of the two rollouts whose difference is the decode step


def measure_ceilings(bench: Bench) -> list[Measurement]:
    """Bandwidth; the decode step against its bandwidth and matmul floors; the update against the
    matmul ceiling."""
    read, copy = bandwidths(bench)
    return [
        Measurement("ceilings", "memory, reading", "GB/s", read, note="a sum over float32"),
        Measurement("ceilings", "memory, copying", "GB/s", copy, note="bytes read and written"),
        *decode(bench, max(read.median, copy.median)),
        update(bench),
    ]


def bandwidths(bench: Bench) -> tuple[Spread, Spread]:
    """GB/s of reading and of copying a block far larger than any cache."""
    size = QUICK_COPY_BYTES if bench.options.quick else COPY_BYTES
    source = torch.ones(size // 4, device=bench.device)
    target = torch.empty_like(source)

    def read() -> float:
        source.sum()
        return size / GIGA

    def copy() -> float:
        target.copy_(source)
        return 2 * size / GIGA

    runs = by_turns({"read": read, "copy": copy}, max(3, bench.options.repeats), bench.device)
    return rates(runs["read"]), rates(runs["copy"])


def decode(bench: Bench, gigabytes_per_s: float) -> list[Measurement]:
    """Milliseconds of one decode step of all rows, from two rollouts that differ in nothing but the
    number of steps."""
    rows, new = bench.sizes.rows, bench.sizes.new_tokens
    few = min(FEW, max(1, new // 2))
    live = bench.sampler()

    def rollout(tokens: int) -> Callable[[], float]:
        def run() -> float:
            live.reset()
            return sampled(planned(bench, live, [[(tokens, "")]] * rows))

        return run

    matrices = products(bench, rows)
    sides = {"short": rollout(few), "long": rollout(new), "matrices": matrices}
    runs = by_turns(sides, bench.options.repeats, bench.device)
    live.reset()
    pairs = zip(runs["long"], runs["short"], strict=True)
    step = Spread(tuple(1e3 * (long - short) / (new - few) for (long, _), (short, _) in pairs))
    floor = Spread(tuple(1e3 * seconds for seconds, _ in runs["matrices"]))
    length = sum(bench.sizes.prompt_tokens) / 2 + (few + new) / 2
    weights, cache = weight_bytes(bench), kv_bytes(bench, rows, length)
    bandwidth = Spread((1e3 * (weights + cache) / gigabytes_per_s / GIGA,))
    what = f"decode step, {rows} rows"
    read = f"weights {weights / MEGA:,.0f} MB + keys and values {cache / MEGA:,.0f} MB"
    read += f" at {gigabytes_per_s:.1f} GB/s"
    alone = "the model's matrices alone, without attention and adapter"
    return [
        Measurement("ceilings", what, "ms", step, bandwidth, "bandwidth floor", read),
        Measurement("ceilings", what, "ms", step, floor, "matmul floor", alone),
    ]


def update(bench: Bench) -> Measurement:
    """TFLOP/s of an update (forward and backward through the frozen matrices; adapters and
    attention not counted) against matmuls alone."""
    prompt, completion = bench.sizes.grid[min(2, len(bench.sizes.grid) - 1)]
    group = bench.sizes.group
    shared = bench.policy.shares_prefixes
    tokens = prompt + group * completion if shared else group * (prompt + completion)
    *inner, head = matrices_of(bench)
    body = sum(m.in_features * m.out_features for m in inner)
    logits = group * completion * head.in_features * head.out_features
    flops = 4.0 * (tokens * body + logits)
    ours = variants(bench, prompt, completion)["ours"]

    def work() -> float:
        ours()
        return flops / 1e12

    sides = {"ours": work, "matrices": products(bench, tokens)}
    runs = by_turns(sides, bench.options.repeats, bench.device)
    what = f"update {prompt}/{completion}, {tokens} tokens computed"
    note = "the model's matrices alone, forward, in the compute dtype"
    ours_rate, ceiling = rates(runs["ours"]), rates(runs["matrices"])
    return Measurement("ceilings", what, "TFLOP/s", ours_rate, ceiling, "matmul ceiling", note)


def products(bench: Bench, rows: int) -> Callable[[], float]:
    """One forward product of `rows` rows with every matrix of the model and its head, in the
    model's order; returns TFLOP."""
    matrices = matrices_of(bench)
    widths = {m.in_features for m in matrices}
    inputs = {w: torch.randn(rows, w, device=bench.device).to(bench.policy.dtype) for w in widths}

    @torch.no_grad()
    def run() -> float:
        for matrix in matrices:
            matrix(inputs[matrix.in_features])
        return 2.0 * rows * sum(m.in_features * m.out_features for m in matrices) / 1e12

    return run


def matrices_of(bench: Bench) -> list[nn.Linear]:
    """The base model's linear layers, the output head last."""
    base = bench.policy.model.get_base_model()
    head = base.get_output_embeddings()
    inner = [
        m
        for name, m in base.named_modules()
        if isinstance(m, nn.Linear) and "lora_" not in name and m is not head
    ]
    return [*inner, head]


def weight_bytes(bench: Bench) -> float:
    """Bytes of all weights that a decode step reads: the matrices, and the adapter in the compute
    dtype."""
    base = sum(p.numel() * p.element_size() for m in matrices_of(bench) for p in m.parameters())
    adapter = sum(p.numel() for p in bench.policy.trainable.values())
    return float(base + adapter * bench.policy.dtype.itemsize)


def kv_bytes(bench: Bench, rows: int, length: float) -> float:
    """Bytes of the keys and values of `rows` conversations of `length` tokens."""
    text = bench.policy.model.get_base_model().config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    numbers = 2 * rows * length * text.num_hidden_layers * heads * size
    return float(numbers * bench.policy.dtype.itemsize)
