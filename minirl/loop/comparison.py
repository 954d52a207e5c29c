"""Comparisons: the baselines beside search, base model and adapter, of one run or of several seeds.

Invariant: lines that stand in one table were measured on the same problems in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minirl.errors import UserError
from minirl.io.files import read_rows
from minirl.loop.evaluate import SETTINGS
from minirl.loop.trial import Evaluation, open_trial
from minirl.loop.trial_recipe import read_recipe, trial_recipe
from minirl.recipe import METHODS, Recipe, Train
from minirl.record.evals import pool, summarise
from minirl.record.progress import Progress

BASELINES = tuple(name for name, facts in METHODS.items() if facts.uses == ("eval",))
TRAINED = "search"  # what ReSearch trains


def compare_methods(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    task: Path | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """ReSearch's table for a run's data set (arXiv 2503.19470, table 1): the baselines and search
    with the base model, then search with the adapter if the run has made one. Each result is kept
    beside the run. task: another recipe, as for `evaluate_run`.
    """
    changed = [*overrides, *([] if task is None else [f"recipe={task.stem}"])]
    methods = (*BASELINES, TRAINED)
    recipes = {name: trial_recipe(folder, task, overrides, name) for name in methods}
    with progress or Progress() as shown:
        base = open_trial(folder, recipes[TRAINED], shown, base=True)
        evaluations = [base.evaluate(recipes[name], changed, name) for name in methods]
        if task is None:
            evaluations += _read_warm_up(folder, recipes[TRAINED], evaluations[-1].row)
        if (folder / "adapter").is_dir():
            del base
            adapter = open_trial(folder, recipes[TRAINED], shown)
            evaluations.append(adapter.evaluate(recipes[TRAINED], changed, TRAINED))
    return evaluations


def _read_warm_up(folder: Path, recipe: Recipe, alike: dict[str, Any]) -> list[Evaluation]:
    """What the run itself measured after its warm-up, if that was on the problems of `alike`, an
    evaluation of search, and in its way."""
    labels = [
        f"{n}-{stage.method}"
        for n, stage in enumerate(recipe.stages)
        if isinstance(stage, Train) and not stage.facts.samples
    ]
    path = folder / "evals.jsonl"
    rows = read_rows(path) if path.exists() else []
    rows = [row for row in rows if row.get("label") in labels[-1:]]
    own_method = read_recipe(folder).eval.method
    if not rows or own_method not in (None, TRAINED):
        return []
    if alike["changed"] != [f"eval.method={TRAINED}"] or _way(rows[-1]) != _way(alike):
        return []
    row = rows[-1] | {"label": "warm-up", "changed": alike["changed"]}
    return [Evaluation(summarise(row) | {"method": TRAINED}, [], row)]


def _way(row: dict[str, Any]) -> tuple[Any, ...]:
    settings = (row[name] for name in SETTINGS)
    return *settings, [problem["id"] for problem in row["problems"]]


def compare_runs(
    folders: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    task: Path | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """`compare_methods` over runs of one recipe with several seeds, each line pooled over them (see
    `evals.pool`)."""
    _check_alike(folders)
    tables = [
        compare_methods(folder, overrides, task=task, progress=progress) for folder in folders
    ]
    if len(tables) == 1:
        return tables[0]
    by_line = [{(e.summary["label"], e.summary["method"]): e for e in table} for table in tables]
    evaluations = []
    for key, first in by_line[0].items():
        if all(key in lines for lines in by_line):
            row = pool([lines[key].row for lines in by_line])
            summary = summarise(row) | {"method": first.summary["method"]}
            evaluations.append(Evaluation(summary, first.episodes, row))
    return evaluations


def _check_alike(folders: Sequence[Path]) -> None:
    recipes = [read_recipe(folder) for folder in folders]
    seeds = [recipe.seed for recipe in recipes]
    bare = [
        recipe.model_copy(
            update={"seed": 0, "model": recipe.model.model_copy(update={"adapter": None})}
        )
        for recipe in recipes
    ]
    if any(recipe != bare[0] for recipe in bare) or len(set(seeds)) < len(seeds):
        raise UserError(
            f"--table: got {len(folders)} runs with the seeds {', '.join(map(str, seeds))},"
            " expected runs of one recipe that differ in the seed alone"
        )
