"""The one loop: stages of steps that play, learn, log and save.

Invariant: what a step does is a function of the recipe, the weights and the step's number, so a run
that was killed and taken up again writes the same bytes as one that was not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from safetensors.torch import save_file

from minirl import recipe
from minirl.engine.learn.learner import Learner
from minirl.engine.learn.reward_model import RewardModel, Sample
from minirl.engine.model.adapter import adapter_state, check_adapter, save_adapter
from minirl.engine.model.policy import Policy
from minirl.engine.model.tensors import read_tensors
from minirl.errors import UserError
from minirl.io.files import write_folder
from minirl.loop.collect_stage import collect_stage
from minirl.loop.filter_stage import filter_stage, source_of
from minirl.loop.problems import drawn, played, problems_of
from minirl.loop.session import Interrupted, Session, interruptible, open_session
from minirl.loop.step_scores import StepScorer, rewarded
from minirl.methods import method_of, use_own
from minirl.methods.demonstrate import demonstrate
from minirl.recipe.own import label_of
from minirl.record.metrics import EpisodeStats, average
from minirl.record.progress import Progress
from minirl.record.report import write_report
from minirl.record.run import Run
from minirl.record.state import Position
from minirl.rollout import seed_of
from minirl.tasks import Task

LEARNER_TENSORS, LEARNER_STATE = "learner.safetensors", "learner.json"


def train(
    node: recipe.Recipe,
    folder: Path,
    progress: Progress | None = None,
    *,
    task: Task | None = None,
    method: Callable[..., Any] | None = None,
) -> Path:
    """Run a recipe in a folder to its end, from wherever that folder stands; the folder of the
    final adapter.

    task, method: your own, for a recipe with `task: {name: own}` and `method: own`; the same again
    when the run is taken up again. (A recipe can name a file in their place.)

    Raises UserError for what the user can mend, Interrupted after a Ctrl-C once the step in hand is
    saved.
    """
    use_own(node, method)
    if missing := sorted(
        set(node.track) - {str(name) for name in get_available_trackers()}
    ):  # accelerate would leave it out silently
        raise UserError(
            f"track: got {missing[0]!r}, which is not installed; `pip install {missing[0]}` or take"
            " it out of the list"
        )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=list(node.track) or None,
        project_dir=str(folder),
    )
    alone = [
        index for index, stage in enumerate(node.stages) if isinstance(stage, recipe.RewardModel)
    ]
    if alone and accelerator.num_processes > 1:
        raise UserError(
            f"stages[{alone[0]}]: a reward model is trained by one process; run the recipe without"
            " `accelerate launch`"
        )
    if accelerator.is_main_process:
        run = Run.open(folder, node)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        run = Run.open(folder, node, main=False)
    with run, progress or Progress(quiet=not accelerator.is_main_process) as shown:
        if run.finished:
            shown.say(f"{folder}: finished already; use another --out to run again")
            return folder / "adapter"
        _check_paths(node, run.position.stage)
        session = open_session(node, run, accelerator, shown, task)
        try:
            with interruptible(session):
                _run_stages(session)
            _finish(session)
        finally:
            accelerator.end_training()  # trackers write out what they still hold
    return folder / "adapter"


def _check_paths(node: recipe.Recipe, stage: int) -> None:
    """Raises UserError for what the stages from `stage` on will need of other runs and is not
    there; before any model is loaded."""
    check_adapter(node.model)
    for index in range(stage, len(node.stages)):
        one = node.stages[index]
        if isinstance(one, recipe.Filter) and one.source is not None:
            source_of(one.source, f"stages[{index}].source: {one.source}")


def _run_stages(s: Session) -> None:
    if s.run.position == Position(0, 0) and s.recipe.eval.start and s.run.weights() is None:
        score = s.evaluate("start", stage=0, step=0)
        s.run.checkpoint(Position(0, 0), s.policy.save, score=score)
        if s.asked_to_stop():
            raise Interrupted
    for index in range(s.run.position.stage, len(s.recipe.stages)):
        stage = s.recipe.stages[index]
        if isinstance(stage, recipe.Collect):
            collect_stage(s, index, stage)
        elif isinstance(stage, recipe.Filter):
            filter_stage(s, index, stage)
        elif isinstance(stage, recipe.RewardModel):
            _train_reward_model(s, index, stage)
        elif not stage.steps:
            s.run.advance(Position(index + 1, 0))
        else:
            _train(s, index, stage)


def _train(s: Session, index: int, stage: recipe.Train) -> None:
    """A stage's steps, with its evaluations and checkpoints."""
    if (
        index
        and isinstance(s.recipe.stages[index - 1], recipe.Filter)
        and not s.run.kept(index - 1)
    ):
        s.progress.say(
            f"WARNING: stages[{index}]: the filter before it kept nothing; nothing is trained"
        )
        s.run.advance(Position(index + 1, 0))
        return
    learner = _learner(s, index, stage)
    problems = problems_of(s, index, stage)
    method, judge = (
        method_of(stage),
        None if stage.judge is None else StepScorer(s, stage.judge, stage.method),
    )
    label = f"{index}-{label_of(stage.method)}"
    s.progress.stage(
        f"{index} train {label_of(stage.method)} ({stage.learner.loss})",
        stage.steps,
        s.run.position.step,
    )
    began_at = s.run.position.step
    for step in range(began_at, stage.steps):
        torch.manual_seed(seed_of(s.recipe.seed, index, step))
        began, before = time.monotonic(), s.sampler.tokens
        now, tried = drawn(s, index, step, stage, problems)
        groups = played(
            s,
            f"{index}/{step}",
            method,
            now,
            stage.group,
            check=step == began_at,
            temperature=s.recipe.sampling.temperature,
        )
        tries = len(groups)
        if stage.facts.shows_gold:
            groups += played(
                s,
                f"{index}/{step}/shown",
                demonstrate,
                now,
                1,
                check=False,
                temperature=1.0,
            )
        if judge is not None:
            groups, opinions = rewarded(s, stage, groups, judge)
            tried |= opinions
        sampled = time.monotonic()
        stats = learner.update(groups)
        learned = time.monotonic()
        facts = s.gather(
            [[EpisodeStats.of(e) for e in group.episodes] for group in groups[:tries]]
        )  # not of what was only shown
        row = (
            {"stage": index, "step": step}
            | average([f for group in facts for f in group])
            | tried
            | stats
        )
        times = {"sample_s": sampled - began, "learn_s": learned - sampled}
        times |= {
            "sample_tps": (s.sampler.tokens - before) / times["sample_s"],
            "learn_tps": stats["trained_tokens"] / times["learn_s"],
        }
        s.log(row, times, [e for group in groups for e in group.episodes][: s.recipe.save.episodes])
        last = step + 1 == stage.steps
        score = None
        if last or (s.recipe.eval.every and (step + 1) % s.recipe.eval.every == 0):
            score = s.evaluate(label if last else f"{label}@{step + 1}", stage=index, step=step + 1)
        stop = s.asked_to_stop()
        if last:
            s.run.checkpoint(Position(index + 1, 0), s.policy.save, score=score)
        elif stop or score is not None or (step + 1) % s.recipe.save.every == 0:
            s.run.checkpoint(
                Position(index, step + 1),
                lambda folder: _save(s.policy, learner, folder),
                score=score,
            )
        if stop:
            raise Interrupted


def _train_reward_model(s: Session, index: int, stage: recipe.RewardModel) -> None:
    """Train a reward model on what the collect stage before has kept, to the run's folder
    reward_model; all of it or nothing is done."""
    s.progress.stage(f"{index} reward model", stage.epochs)
    problems = sorted(
        {e.problem.id for e in s.run.kept(index - 1)},
        key=lambda name: seed_of(s.recipe.seed, index, name),
    )
    held_out = set(problems[: round(stage.held_out * len(problems))])
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for episode in s.run.kept(index - 1):
        parts[episode.problem.id in held_out].append(
            Sample(episode.tokens, bool(episode.parts["first"]))
        )
    model = RewardModel.fresh(
        s.recipe.model, adapter_state(s.policy.model), s.recipe.seed, s.policy.device
    )
    began = time.monotonic()

    def log(row: dict[str, float]) -> None:
        s.log({"stage": index, **row}, {"learn_s": time.monotonic() - began})

    facts = model.fit(parts[0], parts[1], stage, s.recipe.seed, log, s.asked_to_stop)
    if facts is not None:
        write_folder(s.run.folder / "reward_model", lambda folder: model.save(folder, facts))
        s.run.advance(Position(index + 1, 0))
    if s.asked_to_stop():
        raise Interrupted


def _learner(s: Session, index: int, stage: recipe.Train) -> Learner:
    """The stage's learner, with the optimizer's state and the KL reference as a resumed run left
    them."""
    sampling = s.recipe.sampling
    limit = stage.facts.trained_tokens(sampling) + sampling.attempt_tokens * stage.train_all
    learner = Learner(
        s.policy,
        stage.learner,
        s.accelerator,
        steps=stage.steps,
        limit_tokens=limit,
        temperature=sampling.temperature,
        pad=s.chat.tokenizer.pad_token_id,
    )
    reference, weights = s.run.reference(index), s.run.weights()
    if s.run.position.step == 0:
        if s.accelerator.is_main_process:
            write_folder(reference, s.policy.save)
        s.policy.freeze_reference()
    else:
        assert weights is not None  # a step above 0 is only ever recorded together with weights
        s.policy.load(reference)
        s.policy.freeze_reference()
        s.policy.load(weights)
        learner.load_state(
            read_tensors(weights / LEARNER_TENSORS), _read_json(weights / LEARNER_STATE)
        )
    return learner


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); bring it back, or start again with another --out"
        ) from error


def _save(policy: Policy, learner: Learner, folder: Path) -> None:
    policy.save(folder)
    tensors, plain = learner.state()
    save_file(tensors, folder / LEARNER_TENSORS)
    (folder / LEARNER_STATE).write_text(json.dumps(plain))


def _export(policy: Policy, folder: Path) -> None:
    save_adapter(policy.model, folder)
    if policy.value_head is not None:
        policy.value_head.save(folder)


def _finish(s: Session) -> None:
    """The adapter for plain peft (with the value head beside it, where there is one), the mark that
    all is done, and the report."""
    if s.accelerator.is_main_process:
        write_folder(s.run.folder / "adapter", lambda folder: _export(s.policy, folder))
    s.run.advance(Position(len(s.recipe.stages), 0), finished=True)
    if (
        s.accelerator.is_main_process
    ):  # a report that cannot be written is told, and leaves the run finished
        s.progress.say(f"report: {write_report(s.run.folder)}")
