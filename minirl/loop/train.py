"""The loop over a recipe's stages.

Invariant: what a step does is a function of the recipe, the weights and the step's number. So a run
that was killed and resumed writes the same bytes as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from minirl.engine.model.adapter import check_adapter, save_adapter
from minirl.engine.model.policy import Policy
from minirl.errors import UserError
from minirl.io.files import write_folder
from minirl.loop.collect_stage import collect_stage
from minirl.loop.filter_stage import filter_stage
from minirl.loop.log import evaluate_policy
from minirl.loop.reward_stage import reward_stage
from minirl.loop.session import Session, interruptible, open_session
from minirl.loop.source import find_source
from minirl.loop.train_stage import train_stage
from minirl.methods import use_own
from minirl.recipe import Collect, Filter, Recipe, RewardModel
from minirl.record.progress import Progress
from minirl.record.report import write_report
from minirl.record.run import Run
from minirl.record.state import Position
from minirl.tasks import Task


def train(
    recipe: Recipe,
    folder: Path,
    progress: Progress | None = None,
    *,
    task: Task | None = None,
    method: Callable[..., Any] | None = None,
) -> Path:
    """Run a recipe in a folder, from wherever the folder stands to the end; the final adapter's
    folder.

    task, method: your own, for a recipe with `task: {name: own}` and `method: own`; give the same
    ones to resume the run. (A recipe can name a file in their place.)

    Raises UserError for a mistake that the user can correct, Interrupted after a Ctrl-C, once the
    current step is saved.
    """
    use_own(recipe, method)
    _check_trackers(recipe)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=list(recipe.track) or None,
        project_dir=str(folder),
    )
    _check_processes(recipe, accelerator)
    is_main = accelerator.is_main_process
    with accelerator.main_process_first():  # it makes the folder
        run = Run.open(folder, recipe, main=is_main)
    with run, progress or Progress(quiet=not is_main) as shown:
        if run.finished:
            shown.say(f"{folder}: finished already; use another --out to run again")
            return folder / "adapter"
        _check_paths(recipe, run.position.stage)
        session = open_session(recipe, run, accelerator, shown, task)
        try:
            with interruptible(session):
                _run_stages(session)
            _finish(session)
        finally:
            accelerator.end_training()  # trackers write out what they still hold
    return folder / "adapter"


def _run_stages(s: Session) -> None:
    if s.run.position == Position(0, 0) and s.recipe.eval.start and s.run.weights() is None:
        score = evaluate_policy(s, "start", stage=0, step=0)
        s.run.checkpoint(Position(0, 0), s.policy.save, score=score)
        s.stop_if_asked()
    for index in range(s.run.position.stage, len(s.recipe.stages)):
        stage = s.recipe.stages[index]
        if isinstance(stage, Collect):
            collect_stage(s, index, stage)
        elif isinstance(stage, Filter):
            filter_stage(s, index, stage)
        elif isinstance(stage, RewardModel):
            reward_stage(s, index, stage)
        else:
            train_stage(s, index, stage)


def _finish(s: Session) -> None:
    """Write the adapter for plain peft, mark the run as finished, write the report.

    A report that cannot be written leaves the run finished.
    """
    if s.accelerator.is_main_process:
        write_folder(s.run.folder / "adapter", lambda folder: _export(s.policy, folder))
    s.run.advance(Position(len(s.recipe.stages), 0), finished=True)
    if s.accelerator.is_main_process:
        s.progress.say(f"report: {write_report(s.run.folder)}")


def _export(policy: Policy, folder: Path) -> None:
    save_adapter(policy.model, folder)
    if policy.value_head is not None:
        policy.value_head.save(folder)


def _check_trackers(recipe: Recipe) -> None:
    """Raise UserError for a tracker that is not installed: accelerate would leave it out
    silently."""
    available = {str(name) for name in get_available_trackers()}
    if missing := sorted(set(recipe.track) - available):
        raise UserError(
            f"track: got {missing[0]!r}, which is not installed; `pip install {missing[0]}` or take"
            " it out of the list"
        )


def _check_processes(recipe: Recipe, accelerator: Accelerator) -> None:
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, RewardModel) and accelerator.num_processes > 1:
            raise UserError(
                f"stages[{index}]: a reward model is trained by one process; run the recipe without"
                " `accelerate launch`"
            )


def _check_paths(recipe: Recipe, first: int) -> None:
    """Raise UserError, before any model is loaded, if the stages from `first` on need something of
    another run that is not there."""
    check_adapter(recipe.model)
    for index, stage in enumerate(recipe.stages[first:], start=first):
        if isinstance(stage, Filter) and stage.source is not None:
            find_source(stage.source, f"stages[{index}].source: {stage.source}")
