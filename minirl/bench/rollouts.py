"""Rollouts: the live sampler beside `generate`, on the same episodes.

`generate` twice, where the model computes in half precision: at its best, with the adapter cast to
the model's type; and on the model as peft trains it, with a float32 adapter. Invariant: all sides
sample exactly the same number of tokens, turn by turn, because every length is decided beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from random import Random

import torch

from minirl.bench.generate import Generate, stock
from minirl.bench.measure import Measurement, by_turns, rates
from minirl.bench.setup import WORDS, Bench
from minirl.episode import Ask, Completion, Episode, Problem, Verdict
from minirl.methods.reflect import failed, reflect
from minirl.methods.single import single
from minirl.recipe import Sampling
from minirl.rollout import Sampler, Talk, play
from minirl.tasks import Task

FAIL = Task("bench", (), (), lambda problem, text: Verdict(0.0, False, {"error_kind": "scripted"}))
"""A task whose every attempt fails, so that every R3 episode has its three turns."""
GENERATE, AS_TRAINED = "generate", "generate, float32 adapter as in training"
Plan = Sequence[tuple[int, str]]
"""Tokens to sample in each turn, and the text told after it (none after the last)."""
Play = Callable[[Bench, Sampler], list[Episode]]
"""Plays the episodes of a step against a sampler."""


def measure_rollouts(bench: Bench) -> list[Measurement]:
    """Sampled tokens a second, each kind of episode."""
    rows, new = bench.sizes.rows, bench.sizes.new_tokens
    live = bench.sampler()
    generate = Generate(bench.policy.model.get_base_model(), bench.chat, bench.device, rows=rows)
    kinds: dict[str, Play] = {
        f"single turn, {new} new": partial(planned, plans=[[(new, "")]] * rows),
        f"single turn, {uneven(new)[0]}-{new} new": partial(planned, plans=uneven_plans(bench)),
        f"R3, 3 turns of {new}": r3_from_scratch,
        "search-like, 1-4 uneven turns": partial(planned, plans=search_plans(bench)),
    }
    adapters = {GENERATE: bench.policy.dtype}
    if bench.policy.dtype != torch.float32:
        adapters[AS_TRAINED] = torch.float32

    def ours(episodes: Play) -> float:
        live.reset()
        return sampled(episodes(bench, live))

    def theirs(episodes: Play, dtype: torch.dtype) -> float:
        with stock(bench.policy, bench.stock_attention, adapter=dtype):
            return sampled(episodes(bench, generate))

    found = []
    for what, episodes in kinds.items():
        sides = {"ours": partial(ours, episodes)}
        sides |= {name: partial(theirs, episodes, dtype) for name, dtype in adapters.items()}
        runs = by_turns(sides, bench.options.repeats, bench.device)
        counts = {done for side in runs.values() for _, done in side}
        if len(counts) != 1:
            raise RuntimeError(
                f"{what}: got {sorted(counts)} sampled tokens, expected all sides to sample as many"
            )
        note = f"{rows} episodes of {bench.sizes.prompts} prompts, {counts.pop():.0f} tokens"
        rate = rates(runs["ours"])
        found += [
            Measurement("rollout", what, "tokens/s", rate, rates(runs[name]), name, note)
            for name in adapters
        ]
    live.reset()
    return found


def sampled(episodes: Sequence[Episode]) -> int:
    """Tokens sampled in all of them."""
    return sum(episode.sampled_tokens for episode in episodes)


def talks(bench: Bench, problems: Sequence[Problem], each: int) -> list[Talk]:
    """`each` conversations about each problem."""
    new, rows = bench.sizes.new_tokens, bench.sizes.rows
    sampling = Sampling(attempt_tokens=new, reflection_tokens=new, rows=rows)
    return [
        Talk(problem, bench.chat, sampling, temperature=1.0, seed=f"{i}/{k}")
        for i, problem in enumerate(problems)
        for k in range(each)
    ]


def converse(talk: Talk, plan: Plan) -> Generator[Ask, Completion, Episode]:
    """A conversation of planned lengths, all of it trained."""
    for number, (tokens, told) in enumerate(plan):
        yield from talk.ask("attempt", max_tokens=tokens, trained=True)
        if number + 1 < len(plan):
            talk.tell("result", told)
    return talk.end(None)


def planned(bench: Bench, sampler: Sampler, plans: Sequence[Plan]) -> list[Episode]:
    """One conversation a plan, the group's on each prompt."""
    started = talks(bench, bench.problems, bench.sizes.group)
    return play([converse(talk, plan) for talk, plan in zip(started, plans, strict=True)], sampler)


def uneven(new: int) -> range:
    """Lengths from a twelfth of `new` to `new`."""
    return range(max(1, new // 12), new + 1)


def uneven_plans(bench: Bench) -> list[Plan]:
    """One turn each, of evenly drawn lengths; somebody has the longest."""
    rng, lengths = Random(0), uneven(bench.sizes.new_tokens)
    return [[(rng.choice(lengths) if i else lengths[-1], "")] for i in range(bench.sizes.rows)]


def search_plans(bench: Bench) -> list[Plan]:
    """1 to 4 turns of a sixth to two thirds of the new tokens each, with results of some 40 to 120
    words between them."""
    rng, new = Random(1), bench.sizes.new_tokens
    lengths, words = range(max(1, new // 6), max(2, 2 * new // 3)), WORDS.split()

    def told() -> str:
        count = rng.randint(max(1, 5 * new // 12), max(2, 5 * new // 4))
        return " ".join(rng.choices(words, k=count))

    def plan() -> Plan:
        return [(rng.choice(lengths), told()) for _ in range(rng.randint(1, 4))]

    return [plan() for _ in range(bench.sizes.rows)]


def r3_from_scratch(bench: Bench, sampler: Sampler) -> list[Episode]:
    """Attempt, reflection, retry, from every prompt and every member of its group."""
    started = talks(bench, bench.problems, bench.sizes.group)
    return play([reflect(talk, FAIL) for talk in started], sampler)


def grpo_step(bench: Bench, sampler: Sampler) -> list[Episode]:
    """The episodes of a GRPO step: a group of attempts on each prompt, with rewards that differ
    within every group."""
    started = talks(bench, bench.problems, bench.sizes.group)
    return rewarded(play([single(talk, FAIL) for talk in started], sampler))


def r3_step(bench: Bench, sampler: Sampler) -> list[Episode]:
    """The episodes of an R3 step: one failed attempt on each prompt, then a group of reflections
    and retries on each failure."""
    attempts = play([single(talk, FAIL) for talk in talks(bench, bench.problems, 1)], sampler)
    failures = [failed(episode.problem, episode.turns) for episode in attempts]
    started = talks(bench, failures, bench.sizes.group)
    return rewarded(play([reflect(talk, FAIL) for talk in started], sampler))


def rewarded(episodes: Sequence[Episode]) -> list[Episode]:
    """Rewards 0 and 1 by turns: no group is dead, whatever a random model says."""
    return [replace(episode, reward=float(number % 2)) for number, episode in enumerate(episodes)]
