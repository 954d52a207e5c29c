"""The curves of a report: coordinates of small SVG charts over all steps of all stages.

Invariant: a number that is missing or not finite leaves a gap, never a wrong point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from math import ceil, floor, log10
from typing import Any, NamedTuple

from minirl.record.evals import Row, summarise
from minirl.record.measures import MEASURES, Measure
from minirl.record.report.rows import Rows, is_number

Point = tuple[float, float]
AREA = {"width": 360, "height": 190, "left": 44, "right": 350, "top": 12, "bottom": 168}
"""The picture, and where the plot stands in it."""
SMOOTHED = 30
"""A line of more points is drawn faintly under its running mean."""


class Series(NamedTuple):
    """One line of a chart in its own units."""

    name: str
    runs: list[list[Point]]  # without a break
    band: Sequence[tuple[float, float, float]] = ()  # x, low, high


class Line(NamedTuple):
    """One line of a chart in the picture's units; a path is SVG's `points`."""

    number: int  # of its colour
    name: str
    band: str
    raw: list[str]
    paths: list[str]
    dots: list[tuple[str, str, str]]  # x, y, value


class Chart(NamedTuple):
    """One chart as the template writes it; numbers as text."""

    title: str
    ticks: list[tuple[str, str]]  # y, label
    borders: list[str]  # x of each border between stages
    steps: list[tuple[str, int]]  # x, label
    lines: list[Line]


def draw_charts(rows: Mapping[str, Rows]) -> list[Chart]:
    """The charts that have any number: held-out ones first, steps in the order of the run. rows:
    those of metrics, timings and evals."""
    metrics, evals = [_with_dead_share(row) for row in rows["metrics"]], rows["evals"]
    borders = [
        number
        for number, (a, b) in enumerate(pairwise(metrics), start=1)
        if a.get("stage") != b.get("stage")
    ]
    place = {(row.get("stage"), row.get("step")): n for n, row in enumerate(metrics, start=1)}
    titles = dict.fromkeys(m.curve for m in MEASURES if m.curve)
    groups = [(title, [m for m in MEASURES if m.curve == title]) for title in titles]
    steps = [_steps_before(row, metrics) for row in evals]
    summaries = [{**summary, **summary["scores"]} for summary in map(summarise, evals)]
    charts = []
    for title, measures in groups:
        series = [_held_out_series(m, steps, summaries) for m in measures]
        top = 1.0 if all(m.kind == "fraction" for m in measures) else None
        charts.append(_draw(f"{title}, held out", series, len(metrics), borders, top, dots=True))
    for title, measures in groups:
        series = [
            _step_series(m, rows["timings"] if m.source == "timing" else metrics, place)
            for m in measures
        ]
        evaluated = any(m.source in ("outcome", "score") for m in measures)
        where = ", in training" if evaluated else ""
        charts.append(_draw(title + where, series, len(metrics), borders))
    return [chart for chart in charts if chart is not None]


def _with_dead_share(row: Row) -> Row:
    dead, groups = row.get("dead"), row.get("groups")
    if is_number(dead) and is_number(groups) and groups:
        return {**row, "dead_share": dead / groups}
    return row


def _steps_before(evaluation: Row, metrics: Rows) -> float:
    """How many steps the run had made when it was evaluated."""
    done = (evaluation.get("stage", 0), evaluation.get("step", 0))
    return float(sum((row.get("stage", 0), row.get("step", 0)) < done for row in metrics))


def _held_out_series(measure: Measure, steps: Sequence[float], summaries: Rows) -> Series:
    found = [
        (x, interval)
        for x, summary in zip(steps, summaries, strict=True)
        if (interval := summary.get(measure.key)) is not None
    ]
    points = [(x, interval.value) for x, interval in found]
    band = [(x, interval.low, interval.high) for x, interval in found]
    return Series(measure.label, [points] if points else [], band)


def _step_series(measure: Measure, rows: Rows, place: Mapping[tuple[Any, Any], int]) -> Series:
    """A run of points for each stage."""
    points = [
        (row.get("stage"), (float(x), float(row[measure.key])))
        for row in rows
        if (x := place.get((row.get("stage"), row.get("step")))) and is_number(row.get(measure.key))
    ]
    runs = groupby(points, key=lambda pair: pair[0])
    return Series(measure.label, [[point for _, point in run] for _, run in runs])


def _draw(
    title: str,
    series: Sequence[Series],
    steps: int,
    borders: Sequence[int],
    top: float | None = None,
    *,
    dots: bool = False,
) -> Chart | None:
    """One chart; None when there is no point. top: the end of the axis; dots: mark each point."""
    values = [y for line in series for run in line.runs for _, y in run]
    if not values:
        return None
    if top is None:
        top = max(*values, *(high for line in series for *_, high in line.band), 0.0)
    marked = ticks(min(0.0, *values), top)
    low, high = marked[0], marked[-1]

    left, bottom = AREA["left"], AREA["bottom"]
    width, height = AREA["right"] - left, bottom - AREA["top"]

    def place(x: float, y: float) -> tuple[str, str]:
        across, up = width * x / max(1, steps), height * (y - low) / (high - low)
        return f"{left + across:.1f}", f"{bottom - up:.1f}"

    return Chart(
        title,
        ticks=[(place(0, tick)[1], f"{tick:.4g}") for tick in marked],
        borders=[place(border + 0.5, low)[0] for border in borders],
        steps=[(place(step, low)[0], step) for step in sorted({0, steps // 2, steps})],
        lines=[
            _draw_line(number, line, place, dots=dots)
            for number, line in enumerate(series, start=1)
            if line.runs
        ],
    )


def _draw_line(
    number: int, line: Series, place: Callable[[float, float], tuple[str, str]], *, dots: bool
) -> Line:
    """A run of one point is a dot; a long one gets a running mean."""

    def path(points: Sequence[Point]) -> str:
        return " ".join(",".join(place(x, y)) for x, y in points)

    most = float("inf") if dots else SMOOTHED
    curves = [_running_mean(run) if len(run) > most else run for run in line.runs if len(run) > 1]
    outline = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in line.band[::-1]]
    marked = [point for run in line.runs if dots or len(run) == 1 for point in run]
    return Line(
        number,
        line.name,
        band=path(outline) if len(line.band) > 1 else "",
        raw=[path(run) for run in line.runs if len(run) > most],
        paths=[path(run) for run in curves],
        dots=[(*place(x, y), f"{y:.4g}") for x, y in marked],
    )


def _running_mean(points: Sequence[Point]) -> list[Point]:
    mean, keep, smooth = points[0][1], 1 - 20 / len(points), []
    for x, y in points:
        mean = keep * mean + (1 - keep) * y
        smooth.append((x, mean))
    return smooth


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose both ends."""
    high = high if high > low else low + (abs(low) or 1.0)
    span = high - low
    unit = 10.0 ** floor(log10(span / 4))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if span / (unit * m) <= 5)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]
