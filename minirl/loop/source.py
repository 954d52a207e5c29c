"""The source of a filter stage: the trajectories of another run.

Invariant: they are accepted only if this run could have made them itself: same model, task, tool
and base weights, and none about a problem that this run holds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minirl.engine.model import load as models
from minirl.episode import Episode
from minirl.errors import UserError
from minirl.io.files import read_rows
from minirl.loop.session import Session
from minirl.recipe import METHODS, Collect, Filter, Recipe, load
from minirl.recipe.methods import USUAL
from minirl.record.state import read_note, read_state


def read_trajectories(s: Session, index: int, stage: Filter) -> list[Episode]:
    """The trajectories that a filter reads: those of the collect stage before it, or those of its
    source."""
    if stage.source is None:
        return s.run.kept(index - 1)
    folder, where = Path(stage.source).expanduser(), f"stages[{index}].source: {stage.source}"
    other, number = find_source(stage.source, where)
    _check_settings(s, other, where)
    _check_weights(s, folder, where)
    path = folder / "kept" / f"{number}.jsonl"
    rows: list[dict[str, Any]] = read_rows(path, growing=False)
    episodes = [Episode.from_json(row, f"{path}:{line}") for line, row in enumerate(rows, start=1)]
    _check_problems(s, episodes, where)
    check_unchanged(s.run.kept(index), episodes, where)
    return episodes


def find_source(source: str, where: str) -> tuple[Recipe, int]:
    """The recipe of a run with trajectories, and the number of its last stage that collected them.
    Raises UserError if there is no such stage, or it is not finished."""
    folder = Path(source).expanduser()
    if not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{where} is no run folder, expected one with a finished stepwise collect stage; run"
            " its recipe first"
        )
    other = load(folder / "recipe.yaml")
    numbers = [
        number
        for number, stage in enumerate(other.stages)
        if isinstance(stage, Collect) and METHODS.get(stage.method, USUAL).makes_states
    ]
    if not numbers or read_state(folder).position.stage <= numbers[-1]:
        raise UserError(
            f"{where} has no finished stepwise collect stage; run its recipe to the end of one"
        )
    return other, numbers[-1]


def _check_settings(s: Session, other: Recipe, where: str) -> None:
    own = s.recipe
    settings: list[tuple[str, Any, Any]] = [
        ("model.name", other.model.name, own.model.name),
        ("model.template", other.model.template, own.model.template),
        ("task.name", other.task.name, own.task.name),
    ]
    theirs, ours = other.sampling.stepwise, own.sampling.stepwise
    settings += [
        (f"sampling.stepwise.{name}", getattr(theirs, name), getattr(ours, name))
        for name in type(ours).model_fields
    ]
    for name, got, expected in settings:
        if got != expected:
            raise UserError(
                f"{where} has trajectories made with {name} {got!r}, expected {expected!r}; take"
                f" another run, or set {name}"
            )


def _check_weights(s: Session, folder: Path, where: str) -> None:
    got = read_note(folder / "model.json", "weights").get("weights")
    expected = models.fingerprint(s.policy.model)
    if got != expected:
        raise UserError(
            f"{where} has trajectories of other base weights (got {str(got)[:8]}, expected"
            f" {expected[:8]}); load the copy of the model that run had, in the same dtype and"
            " quantisation"
        )


def _check_problems(s: Session, episodes: Sequence[Episode], where: str) -> None:
    train, held_out = ({p.prompt for p in part} for part in (s.task.train, s.task.held_out))
    for problem in (e.problem for e in episodes):
        if problem.prompt not in train:
            fault = "holds out" if problem.prompt in held_out else "does not know"
            raise UserError(
                f"{where} has a trajectory about problem {problem.id!r}, which this run {fault},"
                " expected training problems of its own; give both runs the same task.source,"
                " task.test_source, task.train and task.held_out"
            )


def check_unchanged(kept: Sequence[Episode], episodes: Sequence[Episode], where: str) -> None:
    """Raise UserError if a filter that was stopped halfway has kept a trajectory that its source
    no longer has."""
    if not {e.tokens for e in kept} <= {e.tokens for e in episodes}:
        raise UserError(
            f"{where} no longer has what this filter kept of it before it was stopped, so that run"
            " was made anew since; start again with another --out"
        )
