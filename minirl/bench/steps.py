"""Whole steps: sample, score, learn. Ours beside TRL's GRPOTrainer.

Invariant: both sides train a model of their own, loaded alike, on the same prompts, groups and
lengths, with the same rewards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from minirl.bench.against_trl import by_turns_with_trl, missing, version
from minirl.bench.measure import Measurement, Spread, rates, timed
from minirl.bench.rollouts import grpo_step, r3_step
from minirl.bench.setup import Bench
from minirl.bench.updates import MEGA
from minirl.episode import Episode, regroup
from minirl.rollout import Sampler

STEPS: dict[str, Callable[[Bench, Sampler], list[Episode]]] = {
    "GRPO step": grpo_step,
    "R3 step": r3_step,
}


def measure_steps(bench: Bench) -> list[Measurement]:
    """Completions a second of a whole step; on CUDA its peak memory too. Without TRL: ours alone,
    and why."""
    if bench.options.step_tokens is not None:
        prompt, new = bench.options.step_tokens
        bench = bench.resized(replace(bench.sizes, prompt_tokens=(prompt, prompt), new_tokens=new))
    without = missing()
    found = []
    for what, episodes in STEPS.items():
        step, rows = our_step(bench, episodes), bench.sizes.rows
        _forget_peak(bench)
        timed(step, bench.device)  # warms up, and has the machine's memory for itself
        ours_peak = _peak_mb(bench)
        if without:
            runs = [timed(step, bench.device) for _ in range(bench.options.repeats)]
            theirs, theirs_peak, against = None, None, without
        else:
            rollout = episodes if episodes is r3_step else None
            runs, others, theirs_peak = by_turns_with_trl(bench, step, rollout)
            theirs, against = rates(others), f"TRL {version()}"
        note = f"{rows} completions in {rows / rates(runs).median:.3g} s" + (
            f", TRL in {rows / theirs.median:.3g} s" if theirs else ""
        )
        found.append(Measurement("step", what, "completions/s", rates(runs), theirs, against, note))
        if ours_peak is not None:
            trl_peak = None if theirs_peak is None else Spread((theirs_peak,))
            found.append(
                Measurement(
                    "step", f"{what}, peak memory", "MB", Spread((ours_peak,)), trl_peak, against
                )
            )
    return found


def our_step(
    bench: Bench, episodes: Callable[[Bench, Sampler], list[Episode]]
) -> Callable[[], float]:
    """One step as the loop makes it; returns how many completions it trained on."""
    sampler, learner = bench.sampler(), bench.learner()

    def step() -> float:
        sampler.reset()
        groups = regroup(episodes(bench, sampler), bench.sizes.group)
        sampler.reset()  # as a session does: on a GPU the cache's memory is the learner's now
        stats = learner.update(groups)
        if stats["dead"] or stats["trained_tokens"] != bench.sizes.rows * bench.sizes.new_tokens:
            raise RuntimeError(
                f"expected {bench.sizes.rows} completions of {bench.sizes.new_tokens} trained"
                f" tokens, got {stats}"
            )
        return float(bench.sizes.rows)

    return step


def _forget_peak(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)


def _peak_mb(bench: Bench) -> float | None:
    """Most megabytes of tensors since `_forget_peak`, weights included; None on a CPU, where nobody
    counts along."""
    return (
        torch.cuda.max_memory_allocated(bench.device) / MEGA
        if bench.device.type == "cuda"
        else None
    )
