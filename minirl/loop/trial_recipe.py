"""The recipe that an evaluation after a run follows: the run's own, or another's with the run's
model.

Invariant: the model is the run's own, whatever else is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from minirl.errors import UserError
from minirl.recipe import Recipe, cpu_form, load


def read_recipe(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run folder."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(
            f"{folder}: no recipe.yaml there; expected a run folder, e.g. runs/r3_countdown"
        )
    return load(path, overrides)


def trial_recipe(
    folder: Path, task: Path | None, overrides: Sequence[str], method: str | None
) -> Recipe:
    """The recipe to evaluate a run by. task: another recipe, which then stands in for the run's
    own in all but the model, in its form for this machine like any recipe."""
    overrides = [*overrides, *([f"eval.method={method}"] if method else [])]
    if task is None:
        return read_recipe(folder, overrides)
    other = load(task if torch.cuda.is_available() else cpu_form(task), overrides)
    return other.model_copy(update={"model": read_recipe(folder).model})


def sampling_recipe(
    folder: Path, task: Path | None, overrides: Sequence[str], method: str | None
) -> Recipe:
    """The same for several samples of a problem: with the temperature of training in place of 0,
    at which all samples would be equal."""
    without = [text for text in overrides if not text.startswith(("eval.samples=", "eval.vote="))]
    single = trial_recipe(folder, task, without, method)
    if single.eval.temperature == 0:
        overrides = [f"eval.temperature={single.sampling.temperature}", *overrides]
    return trial_recipe(folder, task, overrides, method)
