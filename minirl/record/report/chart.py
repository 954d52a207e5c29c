"""The curves of a report: small charts as inline SVG, over all steps of all stages.

Invariant: a number that is missing or not finite leaves a gap, never a wrong point, and every title
and name is this file's own text, so nothing here needs escaping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from math import ceil, floor, log10
from typing import Any

from minirl.record.evals import summarise
from minirl.record.measures import MEASURES, Measure

Rows = Sequence[Mapping[str, Any]]
Point = tuple[float, float]

LARGEST = 1e300  # an int may be larger than any float
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 44, 10, 12, 22


def curves(rows: Mapping[str, Rows]) -> str:
    """Small charts over all steps of all stages, in the order they were made."""
    metrics = [{**row, **_dead_share(row)} for row in rows["metrics"]]
    place = {
        (row.get("stage"), row.get("step")): number for number, row in enumerate(metrics, start=1)
    }
    borders = [
        number
        for number, (a, b) in enumerate(pairwise(metrics), start=1)
        if a.get("stage") != b.get("stage")
    ]
    found = [{**said, **said["scores"]} for said in map(summarise, rows["evals"])]
    charts = [_evals_chart(*chart, found, rows["evals"], metrics, borders) for chart in _charts()]
    for title, measures in _charts():
        lines = []
        for measure in measures:
            numbers = [
                (row.get("stage"), (float(x), float(row[measure.key])))
                for row in (rows["timings"] if measure.source == "timing" else metrics)
                if (x := place.get((row.get("stage"), row.get("step"))))
                and is_number(row.get(measure.key))
            ]
            runs = groupby(numbers, key=lambda pair: pair[0])
            lines.append((measure.label, [[point for _, point in run] for _, run in runs]))
        charts.append(_chart(title, lines, len(metrics), borders))
    drawn = "".join(charts)
    note = "Over all steps; dotted lines stand between stages, thick lines are running means."
    return (
        f'<section><h2>Curves</h2><div class="charts">{drawn}</div><p'
        f' class="note">{note}</p></section>'
        if drawn
        else ""
    )


def is_number(value: Any) -> bool:
    """Whether it can be drawn or added up."""
    return isinstance(value, int | float) and abs(value) <= LARGEST


def _dead_share(row: Mapping[str, Any]) -> dict[str, float]:
    dead, groups = row.get("dead"), row.get("groups")
    return {"dead_share": dead / groups} if is_number(dead) and is_number(groups) and groups else {}


def _charts() -> list[tuple[str, list[Measure]]]:
    """The measures by their chart, in the order of the table."""
    titles = dict.fromkeys(m.curve for m in MEASURES if m.curve)
    return [(title, [m for m in MEASURES if m.curve == title]) for title in titles]


def _evals_chart(
    title: str,
    measures: Sequence[Measure],
    found: Sequence[Mapping[str, Any]],
    evals: Rows,
    metrics: Rows,
    borders: Sequence[int],
) -> str:
    """A chart of some numbers of each evaluation over the steps that came before it."""
    lines, bands = [], []
    for measure in measures:
        points, band = [], []
        for row, numbers in zip(evals, found, strict=True):
            done = (row.get("stage", 0), row.get("step", 0))
            x = float(sum((m.get("stage", 0), m.get("step", 0)) < done for m in metrics))
            if (number := numbers.get(measure.key)) is not None:
                points.append((x, number.value))
                band.append((x, number.low, number.high))
        lines.append((measure.label, [points] if points else []))
        bands.append(band)
    top = 1.0 if all(m.kind == "fraction" for m in measures) else None
    return _chart(f"{title}, held out", lines, len(metrics), borders, bands=bands, top=top)


def _chart(
    title: str,
    lines: Sequence[tuple[str, list[list[Point]]]],
    steps: int,
    borders: Sequence[int],
    *,
    bands: Sequence[Sequence[tuple[float, float, float]]] = (),
    top: float | None = None,
) -> str:
    """One chart as inline SVG; each line is a name and its unbroken runs of points. Empty text when
    there is no point."""
    values = [y for _, runs in lines for run in runs for _, y in run]
    if not values:
        return ""
    marked = ticks(
        min(0.0, *values),
        max(*values, *(h for band in bands for *_, h in band), 0.0) if top is None else top,
    )
    low, high = marked[0], marked[-1]

    def at(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / max(1, steps)
        return f"{across:.1f},{HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low):.1f}"

    marks = []
    for tick in marked:
        x, y = at(0, tick).split(",")
        marks.append(f'<line class="grid" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        marks.append(
            f'<text x="{LEFT - 6}" y="{float(y) + 3.5:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    for border in borders:
        x = at(border + 0.5, low).split(",")[0]
        marks.append(f'<line class="border" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for step in {0, steps // 2, steps} if steps > 1 else {0, steps}:
        marks.append(
            f'<text x="{at(step, low).split(",")[0]}" y="{HEIGHT - 6}"'
            f' text-anchor="middle">{step}</text>'
        )
    for number, band in enumerate(bands, start=1):
        outline = [at(x, h) for x, _, h in band] + [at(x, lo) for x, lo, _ in reversed(band)]
        marks += (
            [f'<polygon class="band s{number}" points="{" ".join(outline)}"/>']
            if len(band) > 1
            else []
        )
    for number, (_, runs) in enumerate(lines, start=1):
        marks += [mark for run in runs for mark in _run(run, number, at, dots=bool(bands))]
    key = "".join(
        f'<i class="s{n}"></i>{name}' for n, (name, runs) in enumerate(lines, start=1) if runs
    )
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{title}">{"".join(marks)}</svg>'
    )
    return (
        f'<figure class="chart"><figcaption>{title}<span'
        f' class="key">{key}</span></figcaption>{picture}</figure>'
    )


def _run(points: Sequence[Point], number: int, at: Any, *, dots: bool) -> list[str]:
    """A line; over 30 points a faint one under its running mean; points as dots where they are
    few."""
    marks = []
    path = " ".join(at(x, y) for x, y in points)
    if len(points) > 30 and not dots:
        marks.append(f'<polyline class="curve raw s{number}" points="{path}"/>')
        mean, keep, smooth = points[0][1], 1 - 20 / len(points), []
        for x, y in points:
            mean = keep * mean + (1 - keep) * y
            smooth.append(at(x, mean))
        path = " ".join(smooth)
    if len(points) > 1:
        marks.append(f'<polyline class="curve s{number}" points="{path}"/>')
    if dots or len(points) == 1:
        for x, y in points:
            cx, cy = at(x, y).split(",")
            marks.append(
                f'<circle class="point s{number}" cx="{cx}" cy="{cy}"'
                f' r="3"><title>{y:.4g}</title></circle>'
            )
    return marks


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose both ends."""
    high = high if high > low else low + (abs(low) or 1.0)
    span = high - low
    unit = 10.0 ** floor(log10(span / 4))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if span / (unit * m) <= 5)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]
