"""TRL's GRPOTrainer, one whole step at a time, by turns with ours.

TRL gets what it does best here: its own sampling (`generate` over all completions of a step) for
GRPO, `rollout_func` over the same for R3, its fused head, no KL term, one micro-batch a group.
Invariant: every completion has exactly the length that ours has.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback

from minirl.bench.generate import Generate
from minirl.bench.measure import MEGA, synchronize, timed
from minirl.bench.rollouts import Play
from minirl.bench.setup import Bench
from minirl.engine.model import load as models

WANTED = "1.16."
INSTALL = "pip install 'trl>=1.16,<1.17'"
Runs = list[tuple[float, float]]


def version() -> str | None:
    """TRL's version, None where it is not installed."""
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return None


def missing() -> str:
    """Why there is no TRL to measure against; empty where there is."""
    found = version()
    if found is None:
        return f"not installed: {INSTALL}"
    if found.startswith(WANTED):
        return ""
    return f"TRL {found} installed, expected {WANTED}*: {INSTALL}"


def by_turns_with_trl(
    bench: Bench, ours: Callable[[], float], rollout: Play | None
) -> tuple[Runs, Runs, float | None]:
    """(seconds, completions) of our steps and of TRL's, and TRL's peak memory in MB on CUDA.

    rollout: plays a step's episodes against a sampler and goes through `rollout_func`; None lets
    TRL sample by itself.
    """
    turns = Turns(bench, ours)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # TRL's notices about what is experimental
        trainer = _trainer(bench, Path(folder), rollout)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(turns)
        trainer.train()
    del trainer
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return turns.ours_runs, turns.theirs_runs, turns.peak_mb


class Turns(TrainerCallback):  # type: ignore[misc]
    """Times TRL's steps, and ours after each of them; the first round is not counted."""

    def __init__(self, bench: Bench, ours: Callable[[], float]) -> None:
        self.bench, self.ours = bench, ours
        self.ours_runs: Runs = []
        self.theirs_runs: Runs = []
        self.peak_mb: float | None = None
        self._is_cuda = bench.device.type == "cuda"
        self._held_before = torch.cuda.memory_allocated(bench.device) if self._is_cuda else 0
        self._warm = False
        self._began_s = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """TRL's hook: the clock of its step starts."""
        if self._is_cuda and not self._warm:
            torch.cuda.reset_peak_memory_stats(self.bench.device)
        synchronize(self.bench.device)
        self._began_s = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """TRL's hook: its step is over, now ours."""
        synchronize(self.bench.device)
        theirs = time.perf_counter() - self._began_s, float(self.bench.sizes.rows)
        if self._is_cuda and not self._warm:
            peak = torch.cuda.max_memory_allocated(self.bench.device)
            self.peak_mb = (peak - self._held_before) / MEGA  # our own model is not TRL's
        ours = timed(self.ours, self.bench.device)
        if self._warm:
            self.theirs_runs.append(theirs)
            self.ours_runs.append(ours)
        self._warm = True


def _trainer(bench: Bench, folder: Path, rollout: Play | None) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    sizes, lora, tokenizer = bench.sizes, bench.model.lora, copy.deepcopy(bench.loaded.tokenizer)
    tokenizer.padding_side = "left"
    settings = GRPOConfig(
        output_dir=str(folder),
        use_cpu=bench.device.type == "cpu",
        bf16=bench.policy.dtype == torch.bfloat16,
        fp16=bench.policy.dtype == torch.float16,
        max_steps=bench.options.repeats + 1,
        per_device_train_batch_size=sizes.group,
        gradient_accumulation_steps=sizes.prompts,
        num_generations=sizes.group,
        max_completion_length=sizes.new_tokens,
        generation_kwargs={"min_new_tokens": sizes.new_tokens},
        temperature=1.0,
        loss_type="grpo",
        beta=0.0,
        learning_rate=1e-12,
        gradient_checkpointing=bench.options.gradient_checkpointing,
        shuffle_dataset=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths = {len(ids) for ids in completion_ids}
        if lengths != {sizes.new_tokens}:
            raise RuntimeError(
                f"got completions of {sorted(lengths)} tokens from TRL, expected {sizes.new_tokens}"
            )
        return [float(number % 2) for number in range(len(completion_ids))]

    prompts = [{"prompt": [{"role": "user", "content": p.prompt}]} for p in bench.problems]
    return GRPOTrainer(
        model=models.load_model(bench.model).model.unload(),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=lora.targets,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
        rollout_func=None if rollout is None else _rollout_func(bench, rollout),
    )


def _rollout_func(bench: Bench, rollout: Play) -> Callable[[Any, Any], dict[str, Any]]:
    """An R3 rollout for TRL: all before the reflection is the prompt, the reflection the
    completion, and the retry for the reward alone."""

    def run(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        from trl.models import unwrap_model_for_generation

        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
            base, rows = model.get_base_model(), bench.sizes.rows
            episodes = rollout(bench, Generate(base, bench.chat, bench.device, rows=rows))
        if len(episodes) != len(prompts):
            raise RuntimeError(
                f"got {len(prompts)} prompts from TRL, expected one for each of the"
                f" {len(episodes)} completions"
            )
        columns: dict[str, list[list[int]]] = {"prompt_ids": [], "completion_ids": [], "retry": []}
        for episode in episodes:
            turns = episode.turns
            trained = next(i for i, turn in enumerate(turns) if turn.trained)
            columns["prompt_ids"].append([t for turn in turns[:trained] for t in turn.tokens])
            columns["completion_ids"].append([*turns[trained].tokens])
            columns["retry"].append([*turns[-1].tokens])
        return columns | {"logprobs": None}

    return run
