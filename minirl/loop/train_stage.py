"""The train stage: play, learn, log, evaluate, save.

Invariant: a step depends on the weights, the optimizer's state and its own number; a checkpoint
holds the first two.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minirl.engine.learn.learner import Learner
from minirl.engine.model.tensors import read_tensors
from minirl.episode import Group, Problem
from minirl.errors import UserError
from minirl.io.files import write_folder
from minirl.loop.log import evaluate_policy, log_step
from minirl.loop.problems import draw_problems, find_problems, roll_out
from minirl.loop.session import Interrupted, Session
from minirl.loop.step_scores import StepScorer, score_groups
from minirl.methods import method_of
from minirl.methods.demonstrate import demonstrate
from minirl.recipe import Filter, Train
from minirl.recipe.own import label_of
from minirl.record.metrics import EpisodeStats, average
from minirl.record.state import Position
from minirl.rollout import seed_of

LEARNER_TENSORS, LEARNER_STATE = "learner.safetensors", "learner.json"
Numbers = dict[str, float]


def train_stage(s: Session, index: int, stage: Train) -> None:
    """Run the stage's steps that are still to do."""
    if not stage.steps or _filter_kept_nothing(s, index):
        s.run.advance(Position(index + 1, 0))
        return
    learner = _open_learner(s, index, stage)
    problems = find_problems(s, index, stage)
    scorer = None if stage.judge is None else StepScorer(s, stage.judge, stage.method)
    first = s.run.position.step
    label = f"{index} train {label_of(stage.method)} ({stage.learner.loss})"
    s.progress.stage(label, stage.steps, first)
    for step in range(first, stage.steps):
        torch.manual_seed(seed_of(s.recipe.seed, index, step))
        groups, numbers, times = _play_step(
            s, index, step, stage, problems, scorer, check=step == first
        )
        began = time.monotonic()
        stats = learner.update(groups)
        times["learn_s"] = time.monotonic() - began
        times["learn_tps"] = stats["trained_tokens"] / times["learn_s"]
        episodes = [e for group in groups for e in group.episodes][: s.recipe.save.episodes]
        log_step(s, {"stage": index, "step": step} | numbers | stats, times, episodes)
        _end_step(s, index, step, stage, learner)


def _filter_kept_nothing(s: Session, index: int) -> bool:
    is_filtered = index > 0 and isinstance(s.recipe.stages[index - 1], Filter)
    if not is_filtered or s.run.kept(index - 1):
        return False
    s.progress.say(
        f"WARNING: stages[{index}]: the filter before it kept nothing; nothing is trained"
    )
    return True


def _play_step(
    s: Session,
    index: int,
    step: int,
    stage: Train,
    problems: Sequence[Problem],
    scorer: StepScorer | None,
    *,
    check: bool,
) -> tuple[list[Group], Numbers, Numbers]:
    """A step's groups with their rewards, its numbers and its times."""
    seed, temperature = f"{index}/{step}", s.recipe.sampling.temperature
    drawn, counts = draw_problems(s, index, step, stage, problems)
    groups = roll_out(
        s, seed, method_of(stage), drawn, stage.group, check=check, temperature=temperature
    )
    sampled = len(groups)
    if stage.facts.shows_gold:
        groups += roll_out(s, f"{seed}/shown", demonstrate, drawn, 1, check=False, temperature=1.0)
    times = s.player.take_times()
    if scorer is not None:
        began = time.monotonic()
        groups, verdicts = score_groups(s, stage, groups, scorer)
        counts |= verdicts
        times["judge_s"] = time.monotonic() - began
    # Means over what was sampled: a group that was only shown says nothing about the policy.
    facts = s.gather([[EpisodeStats.of(e) for e in group.episodes] for group in groups[:sampled]])
    return groups, average([f for group in facts for f in group]) | counts, times


def _end_step(s: Session, index: int, step: int, stage: Train, learner: Learner) -> None:
    """Evaluate and save where the recipe says so, at the end of the stage, and before stopping."""
    done, label, score = step + 1, f"{index}-{label_of(stage.method)}", None
    is_last = done == stage.steps
    if is_last or (s.recipe.eval.every and done % s.recipe.eval.every == 0):
        label = label if is_last else f"{label}@{done}"
        score = evaluate_policy(s, label, stage=index, step=done)
    is_asked = s.asked_to_stop()
    if is_last:
        s.run.checkpoint(Position(index + 1, 0), s.policy.save, score=score)
    elif is_asked or score is not None or done % s.recipe.save.every == 0:
        s.run.checkpoint(
            Position(index, done), lambda folder: _save(s, learner, folder), score=score
        )
    if is_asked:
        raise Interrupted


def _open_learner(s: Session, index: int, stage: Train) -> Learner:
    """The stage's learner, with the optimizer's state and the KL reference that a resumed run
    left."""
    sampling = s.recipe.sampling
    learner = Learner(
        s.policy,
        stage.learner,
        s.accelerator,
        steps=stage.steps,
        limit_tokens=stage.facts.trained_tokens(sampling)
        + sampling.attempt_tokens * stage.train_all,
        temperature=sampling.temperature,
        pad=s.chat.tokenizer.pad_token_id,
    )
    reference, weights = s.run.reference(index), s.run.weights()
    if s.run.position.step == 0:
        if s.accelerator.is_main_process:
            write_folder(reference, s.policy.save)
        s.policy.freeze_reference()
        return learner
    assert weights is not None  # a step above 0 is only ever recorded together with weights
    s.policy.load(reference)
    s.policy.freeze_reference()
    s.policy.load(weights)
    learner.load_state(read_tensors(weights / LEARNER_TENSORS), _read_json(weights / LEARNER_STATE))
    return learner


def _save(s: Session, learner: Learner, folder: Path) -> None:
    s.policy.save(folder)
    tensors, plain = learner.state()
    save_file(tensors, folder / LEARNER_TENSORS)
    (folder / LEARNER_STATE).write_text(json.dumps(plain))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); bring it back, or start again with another --out"
        ) from error
