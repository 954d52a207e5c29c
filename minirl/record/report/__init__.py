"""report.html: one file that shows what a run did, readable without a network, a GPU or torch.

Invariant: the page runs no script and fetches nothing, and everything in it that comes from a run
is escaped (`render`). A run that has barely begun makes a shorter report, never an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from minirl import recipe as recipes
from minirl.errors import UserError
from minirl.io.files import write_file
from minirl.record.evals import LATER, Row
from minirl.record.measures import MEASURES, OUTCOMES
from minirl.record.report.chart import AREA, draw_charts
from minirl.record.report.episodes import EPISODES_EACH, choose_episodes, show_episode
from minirl.record.report.evaluations import show_evaluations, show_later_evaluations
from minirl.record.report.filters import show_filters
from minirl.record.report.render import render
from minirl.record.report.rows import Rows, is_number, read_checked
from minirl.record.state import read_state


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run folder and return its path. Raises UserError if the folder holds
    no run or a damaged one."""
    folder = Path(folder)
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder}: no recipe.yaml in it; expected the folder of a run")
    recipe = recipes.load(folder / "recipe.yaml")
    rows = {name: read_checked(folder, name) for name in ("metrics", "timings", "evals")}
    later = read_checked(folder, Path(LATER).stem)
    page = render(
        "page.html",
        title=folder.resolve().name,
        facts=_facts(folder, recipe),
        outcomes=OUTCOMES,
        own=show_evaluations(rows["evals"]),
        later=show_later_evaluations(rows["evals"], later),
        filters=show_filters(recipe, rows["metrics"]),
        charts=draw_charts(rows),
        area=AREA,
        episodes=[show_episode(e) for e in choose_episodes(read_checked(folder, "episodes"))],
        episodes_each=EPISODES_EACH,
        costs=_costs(rows),
        recipe=(folder / "recipe.yaml").read_text(encoding="utf-8"),
        versions=read_checked(folder, "versions"),
    )
    path = folder / "report.html"
    try:
        write_file(path, page)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error}); copy the folder to where you can write"
        ) from error
    return path


def episode_html(row: Row) -> str:
    """One row of episodes.jsonl as HTML for a notebook: unfolded, trained tokens coloured."""
    page = render("fragment.html", name="episode.html", episode=show_episode(row), open=True)
    return render("frame.html", page=page, height_px=160 + 70 * len(row.get("turns") or []))


def curves_html(folder: str | Path) -> str:
    """The report's curves as HTML for a notebook."""
    rows = {name: read_checked(Path(folder), name) for name in ("metrics", "timings", "evals")}
    page = render("fragment.html", name="curves.html", charts=draw_charts(rows), area=AREA)
    return render("frame.html", page=page, height_px=900)


def _facts(folder: Path, recipe: recipes.Recipe) -> list[tuple[str, str]]:
    state, stages = read_state(folder), len(recipe.stages)
    where = f"at stage {state.position.stage} of {stages}, step {state.position.step}"
    if state.finished or state.position.stage >= stages:
        where = "all stages done"
    return [
        ("model", recipe.model.name),
        ("task", recipe.task.name),
        ("seed", str(recipe.seed)),
        ("state", where),
    ]


def _costs(rows: Mapping[str, Rows]) -> list[tuple[str, str]]:
    """What the run has cost so far: minutes, tokens, and steps lost."""

    def total(name: str, key: str) -> float:
        return float(sum(row[key] for row in rows[name] if is_number(row.get(key))))

    costs = []
    for measure in MEASURES:
        if measure.kind == "seconds" and (seconds := total("timings", measure.key)):
            costs.append((measure.label, f"{seconds / 60:,.1f} min"))
        if measure.kind == "tokens" and (tokens := total("metrics", measure.key)):
            costs.append((measure.label, f"{tokens:,.0f}"))
    skipped = {  # counted from the start of each stage
        row.get("stage"): row["skipped"] for row in rows["metrics"] if is_number(row.get("skipped"))
    }
    if skipped:
        costs.append(("steps skipped (gradient not finite)", f"{sum(skipped.values()):,.0f}"))
    return costs
