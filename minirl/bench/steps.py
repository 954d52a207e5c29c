"""Whole steps: sample, score, learn. Ours beside TRL's GRPOTrainer.

Invariant: both sides train a model of their own, loaded alike, on the same prompts, groups and
lengths, with the same rewards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from minirl.bench.against_trl import by_turns_with_trl, missing, version
from minirl.bench.measure import MEGA, Measurement, Spread, peak_bytes, rates, timed
from minirl.bench.rollouts import Play, grpo_step, r3_step
from minirl.bench.setup import Bench, problems_of
from minirl.episode import regroup

STEPS: dict[str, Play] = {"GRPO step": grpo_step, "R3 step": r3_step}


def measure_steps(bench: Bench) -> list[Measurement]:
    """Completions a second of a whole step; on CUDA its peak memory too. Without TRL: ours alone,
    and why."""
    if bench.options.step_tokens is not None:
        prompt, new = bench.options.step_tokens
        sizes = replace(bench.sizes, prompt_tokens=(prompt, prompt), new_tokens=new)
        bench = replace(bench, sizes=sizes, problems=problems_of(bench.chat, sizes))
    without, rows = missing(), bench.sizes.rows
    found = []
    for what, episodes in STEPS.items():
        step = our_step(bench, episodes)
        peak = None
        if bench.device.type == "cuda":  # while its memory is ours alone
            peak = peak_bytes(step, bench.device) / MEGA
        else:
            step()  # to warm up
        if without:
            runs = [timed(step, bench.device) for _ in range(bench.options.repeats)]
            theirs, trl_peak, against = None, None, without
        else:
            rollout = episodes if episodes is r3_step else None
            runs, others, trl_peak = by_turns_with_trl(bench, step, rollout)
            theirs, against = rates(others), f"TRL {version()}"
        ours = rates(runs)
        note = f"{rows} completions in {rows / ours.median:.3g} s"
        if theirs:
            note += f", TRL in {rows / theirs.median:.3g} s"
        found.append(Measurement("step", what, "completions/s", ours, theirs, against, note))
        if peak is not None:
            spread = None if trl_peak is None else Spread((trl_peak,))
            what = f"{what}, peak memory"
            found.append(Measurement("step", what, "MB", Spread((peak,)), spread, against))
    return found


def our_step(bench: Bench, episodes: Play) -> Callable[[], float]:
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
