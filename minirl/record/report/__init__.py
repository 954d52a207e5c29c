"""report.html: one file that shows what a run did, readable without a network, a GPU or torch.

Invariant: everything that comes from a run (model output above all) is escaped before it enters the
page, and the page may run no script and fetch nothing. A run that has barely begun makes a shorter
report, never an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from minirl import recipe as recipes
from minirl.errors import UserError
from minirl.io.files import write_file
from minirl.record.closed_run import LATER, read_position
from minirl.record.report.chart import curves, is_number
from minirl.record.report.episodes import episodes_html, one_episode_html
from minirl.record.report.evaluations import evaluations_html, later_evaluations_html
from minirl.record.report.filters import filters_html
from minirl.record.report.html import Rows, table, text
from minirl.record.report.shapes import rows_of

PAGE, STYLE = (Path(__file__).with_name(name) for name in ("page.html", "page.css"))


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run folder and return its path. Raises UserError if the folder holds
    no run or a damaged one."""
    folder = Path(folder)
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder}: no recipe.yaml in it; expected the folder of a run")
    recipe = recipes.load(folder / "recipe.yaml")
    position, finished = read_position(folder)
    rows = {name: rows_of(folder, name) for name in ("metrics", "timings", "evals", "episodes")}
    versions = rows_of(folder, "versions")
    done = finished or position.stage >= len(recipe.stages)
    where = (
        "all stages done"
        if done
        else f"at stage {position.stage} of {len(recipe.stages)}, step {position.step}"
    )
    facts = [
        ("model", recipe.model.name),
        ("task", recipe.task.name),
        ("seed", str(recipe.seed)),
        ("state", where),
    ]
    body = [
        evaluations_html(rows["evals"]),
        later_evaluations_html(rows["evals"], rows_of(folder, Path(LATER).stem)),
        filters_html(recipe, rows["metrics"]),
        curves(rows),
        episodes_html(rows["episodes"]),
        _totals(rows),
        _about((folder / "recipe.yaml").read_text(encoding="utf-8"), versions),
    ]
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=text(folder.resolve().name),
        style=STYLE.read_text(encoding="utf-8"),
        facts=" · ".join(f"{name} <b>{text(value)}</b>" for name, value in facts),
        body="\n".join(part for part in body if part),
    )
    try:
        write_file(folder / "report.html", page)
    except OSError as error:
        raise UserError(
            f"{folder / 'report.html'}: cannot be written ({error}); copy the folder to where you"
            " can write"
        ) from error
    return folder / "report.html"


def episode_html(row: Mapping[str, Any]) -> str:
    """One row of episodes.jsonl as HTML for a notebook: unfolded, trained tokens coloured."""
    return _frame(
        one_episode_html(row).replace("<details>", "<details open>", 1),
        height_px=160 + 70 * len(row.get("turns") or []),
    )


def curves_html(folder: str | Path) -> str:
    """The report's curves as HTML for a notebook."""
    return _frame(
        curves({name: rows_of(Path(folder), name) for name in ("metrics", "timings", "evals")}),
        height_px=900,
    )


def _frame(html: str, *, height_px: int) -> str:
    """A page of its own inside a notebook's, so that neither's style, nor anything a model wrote,
    reaches the other."""
    page = f"<style>{STYLE.read_text(encoding='utf-8')}</style><main>{html}</main>"
    return (
        f'<iframe sandbox srcdoc="{escape(page)}" style="width: 100%; height: {height_px}px;'
        ' border: 0"></iframe>'
    )


def _totals(rows: Mapping[str, Rows]) -> str:
    """What the run has cost so far."""

    def total(name: str, key: str) -> float:
        return float(sum(row[key] for row in rows[name] if is_number(row.get(key))))

    hours = [
        (title, total("timings", key))
        for key, title in (
            ("sample_s", "sampling"),
            ("learn_s", "learning"),
            ("eval_s", "evaluating"),
        )
    ]
    counts = [
        (title, total("metrics", key))
        for key, title in (("sampled", "tokens sampled"), ("trained_tokens", "tokens trained"))
    ]
    last = {
        row.get("stage"): row["skipped"] for row in rows["metrics"] if is_number(row.get("skipped"))
    }
    lines = [[title, f"{seconds / 60:,.1f} min"] for title, seconds in hours if seconds]
    lines += [[title, f"{count:,.0f}"] for title, count in counts if count]
    lines += [["steps skipped (gradient not finite)", f"{sum(last.values()):,.0f}"]] if last else []
    return f"<section><h2>Cost</h2>{table([], lines)}</section>" if lines else ""


def _about(recipe: str, versions: Rows) -> str:
    latest = versions[-1] if versions else {}
    lines = [[text(name), text(value)] for name, value in latest.items()]
    more = (
        f'<p class="note">The run was taken up under other versions {len(versions) - 1} time(s);'
        " versions.jsonl has them all.</p>"
    )
    made = (
        f"<details><summary>Versions</summary>{table([], lines)}{more if len(versions) > 1 else ''}</details>"
        if lines
        else ""
    )
    return (
        "<section><h2>Recipe</h2><details><summary>The resolved"
        f" recipe</summary><pre>{text(recipe)}</pre></details>{made}</section>"
    )
