"""The filter stages of a run as HTML: what each filter keeps, and how far the judge agrees with
rules and outcomes."""

from __future__ import annotations

from minirl import recipe as recipes
from minirl.record.report.chart import is_number
from minirl.record.report.filter_counts import summary
from minirl.record.report.html import Rows, text


def filters_html(recipe: recipes.Recipe, metrics: Rows) -> str:
    """A list for each filter stage that has begun; nothing without one."""
    parts = []
    for index, stage in enumerate(recipe.stages):
        rows = [
            {name: x for name, x in row.items() if is_number(x)}
            for row in metrics
            if row.get("stage") == index
        ]
        if isinstance(stage, recipes.Filter) and rows:
            said = "".join(
                f"<li>{text(line)}</li>" for line in summary(rows, asked=stage.judge is not None)
            )
            done = (
                ""
                if len(rows) == stage.parts
                else f" <small>{len(rows)} of {stage.parts} parts</small>"
            )
            parts.append(f"<h3>Stage {index}, {text(stage.keep)}{done}</h3><ul>{said}</ul>")
    return f"<section><h2>Filters</h2>{''.join(parts)}</section>" if parts else ""
