"""What a bench is run on: the options, the sizes, and the model that both sides share.

Invariant: both sides get the same prompts, the same lengths and the same weights. Completions have
forced lengths: no token ends one.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, Self

import torch
from accelerate import Accelerator

from minirl import recipe
from minirl.bench.random_weights import write_random_model
from minirl.chat import Chat
from minirl.engine.learn.learner import Learner
from minirl.engine.model import load as models
from minirl.engine.model.device import DTYPES, pick_device, pick_dtype
from minirl.engine.model.policy import Policy
from minirl.engine.sample.live import LiveSampler, open_sampler
from minirl.engine.sample.plain import PlainSampler
from minirl.episode import Problem
from minirl.errors import UserError

SECTIONS = ("rollout", "update", "step", "ceilings")
WORDS = (
    "river stone cloud paper green house light table water apple night cover seven music plant"
    " train story field"
)
GRID = ((64, 256), (128, 128), (256, 64), (512, 64), (256, 256), (1024, 128))


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is sampled and trained. prompt_tokens: of the shortest and the longest prompt. grid:
    prompt and completion tokens of updates."""

    prompts: int = 8
    group: int = 8
    prompt_tokens: tuple[int, int] = (110, 150)
    new_tokens: int = 96
    grid: tuple[tuple[int, int], ...] = GRID

    @property
    def rows(self) -> int:
        """Completions of one step."""
        return self.prompts * self.group


QUICK = Sizes(prompts=2, group=4, prompt_tokens=(70, 90), new_tokens=8, grid=((24, 8), (8, 24)))


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure.

    random_weights: a hub id, a config.json or its folder, in place of `model`. step_tokens: prompt
    and new tokens of whole steps.
    cuda_graphs: as in recipe.Sampling.
    """

    model: str = "smollm2-135m"
    random_weights: str | None = None
    quantize: Literal["none", "nf4", "int8"] = "none"
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    cuda_graphs: bool = False
    sections: tuple[str, ...] = SECTIONS
    repeats: int = 3
    quick: bool = False
    step_tokens: tuple[int, int] | None = None

    @classmethod
    def parse(cls, *, sections: str, step_tokens: str | None, **others: Any) -> Self:
        """Options as the command line has them. Raises UserError for what cannot be run."""
        options = cls(
            sections=tuple(part.strip() for part in sections.split(",")),
            step_tokens=_pair(step_tokens),
            **others,
        )
        for name, value, known in (
            *(("--sections", section, SECTIONS) for section in options.sections),
            ("--quantize", options.quantize, ("none", "nf4", "int8")),
            ("--dtype", options.dtype, ("auto", *DTYPES)),
        ):
            if value not in known:
                raise UserError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        if options.repeats < 1:
            raise UserError(f"--repeats: got {options.repeats}, expected 1 or more")
        return options


@dataclass(frozen=True, slots=True)
class Bench:
    """The opened model and what is asked of it. stock_attention: the implementation that
    transformers chose for it."""

    options: Options
    sizes: Sizes
    model: recipe.Model
    loaded: models.LoadedModel
    policy: Policy
    chat: Chat
    stock_attention: str
    problems: tuple[Problem, ...]

    @property
    def device(self) -> torch.device:
        """Where the model stands."""
        return self.policy.device

    def sampler(self) -> LiveSampler | PlainSampler:
        """A live sampler of as many rows as one step has."""
        return open_sampler(
            self.policy, self.chat, rows=self.sizes.rows, cuda_graphs=self.options.cuda_graphs
        )

    def learner(self, micro_tokens: int | None = None) -> Learner:
        """GRPO without a KL term and with a learning rate too small to change what is measured
        next; no clipping of the gradient."""
        settings: dict[str, Any] = {"beta": 0.0, "lr": 1e-12, "grad_clip": 1e9}
        settings |= {"schedule": "constant", "warmup": 0.0}
        settings |= {} if micro_tokens is None else {"micro_tokens": micro_tokens}
        return Learner(
            self.policy,
            recipe.Learner.model_validate(settings),
            Accelerator(cpu=self.device.type == "cpu"),
            steps=10**6,
            limit_tokens=self.sizes.new_tokens,
            temperature=1.0,
            pad=self.chat.tokenizer.pad_token_id,
        )


def open_bench(options: Options, folder: Path) -> Bench:
    """The model of the options, with a fresh adapter; `folder` takes random weights. Raises
    UserError for what cannot be had."""
    name = options.model
    if options.random_weights is not None:
        device = pick_device()
        dtype = pick_dtype(options.dtype, device)
        name = str(write_random_model(options.random_weights, folder / "model", dtype, device))
    model = recipe.Model(
        name=name,
        quantize=options.quantize,
        dtype=options.dtype,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    loaded = models.load_model(model)
    stock_attention = str(loaded.model.get_base_model().config._attn_implementation)
    chat = Chat(loaded.tokenizer)
    chat.eos = frozenset()
    policy = Policy(loaded.model, loaded.device, loaded.dtype)
    sizes = QUICK if options.quick else Sizes()
    problems = problems_of(chat, sizes)
    return Bench(options, sizes, model, loaded, policy, chat, stock_attention, problems)


def problems_of(chat: Chat, sizes: Sizes) -> tuple[Problem, ...]:
    """Prompts of evenly spread lengths."""
    low, high = sizes.prompt_tokens
    steps = max(1, sizes.prompts - 1)
    return tuple(prompt_of(chat, i, low + (high - low) * i // steps) for i in range(sizes.prompts))


def prompt_of(chat: Chat, seed: int, tokens: int) -> Problem:
    """A problem whose rendered prompt has `tokens` tokens or a word's more (or the bare template's,
    where that is longer)."""
    words = Random(seed).choices(WORDS.split(), k=tokens)

    def problem(count: int) -> Problem:
        return Problem(f"bench/{seed}", f"{seed} " + " ".join(words[:count]), None)

    counts = range(tokens)
    shortest = bisect_left(counts, tokens, key=lambda count: len(chat.prompt(problem(count))))
    return problem(shortest)


def _pair(text: str | None) -> tuple[int, int] | None:
    """ "512/128" -> (512, 128)."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", text.strip())
    if found is None:
        raise UserError(
            f"--step-tokens: got {text!r}, expected prompt and new tokens, e.g. 512/128"
        )
    return int(found[1]), int(found[2])
