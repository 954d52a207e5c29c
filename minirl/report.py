"""report.html: one file that shows what a run did, readable without a network, a GPU or torch.

Invariant: everything that comes from a run (model output above all) is escaped before it enters the page, and the page may run no
script and fetch nothing. A run that has barely begun makes a shorter report, never an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby, pairwise
from math import ceil, floor, isfinite, log10
from pathlib import Path
from string import Template
from typing import Any

from minirl import recipe as recipes
from minirl.errors import UserError
from minirl.rundir import read_rows, standing, write_file
from minirl.statistics import Difference, Interval, compare, summarise

Rows = Sequence[Mapping[str, Any]]
Point = tuple[float, float]

SHARES = (("first", "First try"), ("second", "Within two tries"), ("fixed", "Failures fixed by the retry"))
CURVES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("metrics", "Reward", (("reward", "mean"),)),
    ("metrics", "Solved in training", (("first", "first try"), ("second", "second try"))),
    ("metrics", "KL to the reference", (("kl", "KL"),)),
    ("metrics", "Entropy", (("entropy", "nats a token"),)),
    ("metrics", "Groups without signal", (("dead_share", "share"),)),
    ("metrics", "Trained tokens an episode", (("length", "tokens"),)),
    ("metrics", "Loss", (("loss", "loss"),)),
    ("metrics", "Gradient norm", (("grad_norm", "before clipping"),)),
    ("metrics", "Clipped tokens", (("clip", "share"),)),
    ("metrics", "Sampler against learner", (("mismatch_kl", "KL"),)),
    ("timings", "Tokens a second", (("sample_tps", "sampling"), ("learn_tps", "learning"))),
    ("timings", "Seconds a step", (("sample_s", "sampling"), ("learn_s", "learning"))),
)
"""Which file, title, and up to three columns with their names; a chart without numbers is left out."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 44, 10, 12, 22
EPISODES_EACH = 3


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run folder and return its path. Raises UserError if the folder holds no run or a damaged one."""
    folder = Path(folder)
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder}: no recipe.yaml in it; expected the folder of a run")
    recipe = recipes.load(folder / "recipe.yaml")
    position, finished = standing(folder)
    rows = {name: read_rows(folder / f"{name}.jsonl") for name in ("metrics", "timings", "evals", "episodes")}
    versions = read_rows(folder / "versions.jsonl")
    done = finished or position.stage >= len(recipe.stages)
    where = "all stages done" if done else f"at stage {position.stage} of {len(recipe.stages)}, step {position.step}"
    facts = [("model", recipe.model.name), ("task", recipe.task.name), ("seed", str(recipe.seed)), ("state", where)]
    body = [
        _evaluations(rows["evals"]),
        _curves(rows),
        _episodes(rows["episodes"]),
        _totals(rows),
        _about((folder / "recipe.yaml").read_text(encoding="utf-8"), versions),
    ]
    here = Path(__file__)
    page = Template(here.with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=_text(folder.resolve().name),
        style=here.with_suffix(".css").read_text(encoding="utf-8"),
        facts=" · ".join(f"{name} <b>{_text(value)}</b>" for name, value in facts),
        body="\n".join(part for part in body if part),
    )
    write_file(folder / "report.html", page)
    return folder / "report.html"


def _text(value: Any) -> str:
    """Escaped for HTML text and attributes; what cannot be written as UTF-8 or shown becomes a replacement mark."""
    plain = str(value).encode("utf-8", "replace").decode()
    return escape("".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "\ufffd" for c in plain))


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table of ready-made cells; the first of each row is its heading. `head` may be empty."""
    lines = ["<tr><th>" + row[0] + "</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in body]
    titles = f"<thead><tr>{''.join(f'<th>{title}</th>' for title in head)}</tr></thead>" if head else ""
    return f'<div class="table"><table>{titles}<tbody>{"".join(lines)}</tbody></table></div>'


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _share(found: Interval | None) -> str:
    """A share with its interval, as text and as a bar from 0 to 1."""
    if found is None:
        return "<small>none</small>"
    x = [2 + 126 * value for value in found]
    bar = f'<line class="track" x1="2" x2="128" y1="6" y2="6" stroke-width="2"/><line class="range" x1="{x[1]:.1f}" x2="{x[2]:.1f}" '
    bar += f'y1="6" y2="6" stroke-width="4" stroke-linecap="round"/><circle class="dot" cx="{x[0]:.1f}" cy="6" r="3.5"/>'
    span = f"{100 * found.low:.1f} to {100 * found.high:.1f}"
    return f'{_percent(found.value)} <small>{span}</small><svg class="bar" viewBox="0 0 130 12" aria-hidden="true">{bar}</svg>'


def _points(found: Difference) -> str:
    tone = "up" if found.low > 0 else "down" if found.high < 0 else ""
    span = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return f'<span class="{tone}">{100 * found.value:+.1f} points</span> <small>{span}</small>'


def _p(found: Difference) -> str:
    return "p &lt; 0.0001" if found.p < 1e-4 else f"p = {found.p:.4f}" if found.p < 0.1 else f"p = {found.p:.2f}"


def _evaluations(evals: Rows) -> str:
    """Cards, the table of shares, paired differences, errors and pass@k."""
    if not evals:
        return '<section><h2>Held-out problems</h2><p class="note">No evaluation yet.</p></section>'
    said = [summarise(row) for row in evals]
    # Rows made in another way (other tries, samples or temperature) stand in the table but are not compared.
    ways = [(s["tries"], s["samples"], s["temperature"]) for s in said]
    alike = [i for i, way in enumerate(ways) if way == ways[-1]]
    last, start = alike[-1], alike[0]
    earlier = [i for i in alike if said[i]["stage"] != said[last]["stage"] or said[i]["label"] == "start"]
    before = earlier[-1] if earlier else start
    shown = list(dict.fromkeys((start, before, last)))
    table = _table(
        ["Evaluation", "Step", "Problems", *(title for _, title in SHARES)],
        [
            [_text(s["label"]), str(s["step"]), f"{s['problems']} <small>x {s['samples']}</small>", *(_share(s[key]) for key, _ in SHARES)]
            for s in said
        ],
    )
    temperature = said[last]["temperature"]
    note = "Each share with its 95 % interval (Wilson, at the effective sample size of problems). "
    note += "Greedy decoding." if temperature == 0 else f"Sampled at temperature {_text(temperature)}."
    parts = [_cards(evals, said, start, last), "<h2>Held-out problems</h2>", table, f'<p class="note">{note}</p>']
    pairs = [(i, last) for i in dict.fromkeys((before, start)) if i != last]
    parts += [_differences(evals, pairs)] if pairs else []
    parts += [_errors([said[i] for i in shown]), _pass_at_k([said[i] for i in shown])]
    return "<section>" + "\n".join(part for part in parts if part) + "</section>"


def _cards(evals: Rows, said: Sequence[dict[str, Any]], start: int, last: int) -> str:
    changes = compare(evals[start], evals[last])
    cards = []
    for key, title in SHARES:
        now, then, change = said[last][key], said[start][key], changes[key]
        if now is None:
            continue
        big = _percent(now.value) if start == last or then is None else f"<span>{_percent(then.value)} →</span> {_percent(now.value)}"
        sure = f"{_points(change)}, {_p(change)}" if start != last and change is not None else "at start"
        cards.append(f'<div class="card"><div class="name">{title}</div><div class="big">{big}</div><div class="sure">{sure}</div></div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _differences(evals: Rows, pairs: Sequence[tuple[int, int]]) -> str:
    lines = []
    for old, new in pairs:
        changes = compare(evals[old], evals[new])
        found = [changes[key] for key, _ in SHARES]
        cells = ["" if c is None else f"{_points(c)}<br><small>{_p(c)}, {c.problems} problems</small>" for c in found]
        lines.append([f"{_text(evals[new].get('label'))} against {_text(evals[old].get('label'))}", *cells])
    note = "Paired over problems: 95 % interval, and p of a sign-flip test (McNemar's exact test for single samples). "
    note += "“Fixed” is compared on the problems whose first try failed in both evaluations."
    return f'<h3>What changed</h3>{_table(["", *(title for _, title in SHARES)], lines)}<p class="note">{note}</p>'


def _errors(said: Sequence[dict[str, Any]]) -> str:
    """Counts of each error kind, in the evaluations that matter."""
    tries = [(key, title) for key, title in (("first_errors", "first try"), ("second_errors", "second try")) if any(s[key] for s in said)]
    kinds = dict.fromkeys(kind for key, _ in tries for s in said for kind in s[key])
    head = ["Error", *(f"{_text(s['label'])}, {title}" for s in said for _, title in tries)]
    lines = [[_text(kind), *(str(s[key].get(kind, 0)) for s in said for key, _ in tries)] for kind in kinds]
    return f"<h3>How tries fail</h3>{_table(head, lines)}" if lines else ""


def _pass_at_k(said: Sequence[dict[str, Any]]) -> str:
    most = min(s["samples"] for s in said)
    if most < 2:
        return ""
    ks = sorted({2**i for i in range(most.bit_length())} | {most})
    lines = [[_text(s["label"]), *(_share(s["pass_at_k"][k]) for k in ks)] for s in said]
    return f"<h3>pass@k, first tries</h3>{_table(['Evaluation', *(f'k = {k}' for k in ks)], lines)}"


def _curves(rows: Mapping[str, Rows]) -> str:
    """Small charts over all steps of all stages, in the order they were made."""
    metrics = [{**row, **_dead_share(row)} for row in rows["metrics"]]
    place = {(row.get("stage"), row.get("step")): number for number, row in enumerate(metrics, start=1)}
    borders = [number for number, (a, b) in enumerate(pairwise(metrics), start=1) if a.get("stage") != b.get("stage")]
    charts = [_held_out_chart(rows["evals"], metrics, borders)]
    for source, title, columns in CURVES:
        placed = [(place.get((row.get("stage"), row.get("step"))), row) for row in (metrics if source == "metrics" else rows["timings"])]
        lines = []
        for key, name in columns:
            found = [(row.get("stage"), (float(x), float(row[key]))) for x, row in placed if x and _finite(row.get(key))]
            lines.append((name, [[point for _, point in run] for _, run in groupby(found, key=lambda pair: pair[0])]))
        charts.append(_chart(title, lines, len(metrics), borders))
    drawn = "".join(charts)
    note = "Over all steps; dotted lines stand between stages, thick lines are running means."
    return f'<section><h2>Curves</h2><div class="charts">{drawn}</div><p class="note">{note}</p></section>' if drawn else ""


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def _dead_share(row: Mapping[str, Any]) -> dict[str, float]:
    dead, groups = row.get("dead"), row.get("groups")
    return {"dead_share": dead / groups} if _finite(dead) and _finite(groups) and groups else {}


def _held_out_chart(evals: Rows, metrics: Rows, borders: Sequence[int]) -> str:
    """The evaluations over the steps that came before each, with their intervals."""
    lines, bands = [], []
    said = [summarise(row) for row in evals]
    for key, name in (("first", "first try"), ("second", "two tries"), ("fixed", "fixed")):
        points, band = [], []
        for row, summary in zip(evals, said, strict=True):
            done = (row.get("stage", 0), row.get("step", 0))
            x = float(sum((m.get("stage", 0), m.get("step", 0)) < done for m in metrics))
            if (found := summary[key]) is not None:
                points.append((x, found.value))
                band.append((x, found.low, found.high))
        lines.append((name, [points] if points else []))
        bands.append(band)
    return _chart("Held-out", lines, len(metrics), borders, bands=bands, top=1.0)


def _chart(
    title: str,
    lines: Sequence[tuple[str, list[list[Point]]]],
    steps: int,
    borders: Sequence[int],
    *,
    bands: Sequence[Sequence[tuple[float, float, float]]] = (),
    top: float | None = None,
) -> str:
    """One chart as inline SVG; each line is a name and its unbroken runs of points. Empty text when there is no point."""
    values = [y for _, runs in lines for run in runs for _, y in run]
    if not values:
        return ""
    ticks = _ticks(min(0.0, *values), max(*values, *(h for band in bands for *_, h in band), 0.0) if top is None else top)
    low, high = ticks[0], ticks[-1]

    def at(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / max(1, steps)
        return f"{across:.1f},{HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low):.1f}"

    marks = []
    for tick in ticks:
        x, y = at(0, tick).split(",")
        marks.append(f'<line class="grid" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{float(y) + 3.5:.1f}" text-anchor="end">{tick:.4g}</text>')
    for border in borders:
        x = at(border + 0.5, low).split(",")[0]
        marks.append(f'<line class="border" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for step in {0, steps // 2, steps} if steps > 1 else {0, steps}:
        marks.append(f'<text x="{at(step, low).split(",")[0]}" y="{HEIGHT - 6}" text-anchor="middle">{step}</text>')
    for number, band in enumerate(bands, start=1):
        outline = [at(x, h) for x, _, h in band] + [at(x, lo) for x, lo, _ in reversed(band)]
        marks += [f'<polygon class="band s{number}" points="{" ".join(outline)}"/>'] if len(band) > 1 else []
    for number, (_, runs) in enumerate(lines, start=1):
        marks += [mark for run in runs for mark in _run(run, number, at, dots=bool(bands))]
    key = "".join(f'<i class="s{n}"></i>{name}' for n, (name, runs) in enumerate(lines, start=1) if runs)
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(marks)}</svg>'
    return f'<figure class="chart"><figcaption>{title}<span class="key">{key}</span></figcaption>{picture}</figure>'


def _run(points: Sequence[Point], number: int, at: Any, *, dots: bool) -> list[str]:
    """A line; over 30 points a faint one under its running mean; points as dots where they are few."""
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
            marks.append(f'<circle class="point s{number}" cx="{cx}" cy="{cy}" r="3"><title>{y:.4g}</title></circle>')
    return marks


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose both ends."""
    high = high if high > low else low + (abs(low) or 1.0)
    span = high - low
    unit = 10.0 ** floor(log10(span / 4))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if span / (unit * m) <= 5)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def _episodes(episodes: Rows) -> str:
    """The first few episodes of the first and last evaluation, and of the first and last logged step of each stage: none is picked."""
    chosen: dict[tuple[str, Any, Any], list[Mapping[str, Any]]] = {}
    for row in episodes:
        chosen.setdefault((str(row.get("label", "")), row.get("stage"), row.get("step")), []).append(row)
    keys = list(chosen)
    evaluated = [key for key in keys if key[0] not in ("", "train")]
    wanted = {*evaluated[:1], *evaluated[-1:]}
    for _, run in groupby((key for key in keys if key not in evaluated), key=lambda key: key[1]):
        steps = list(run)
        wanted |= {steps[0], steps[-1]}
    shown = "".join(_episode(row) for key in keys if key in wanted for row in chosen[key][:EPISODES_EACH])
    if not shown:
        return ""
    legend = '<span class="turn trained">trained tokens</span><span class="turn sampled">sampled, not trained</span>'
    legend += '<span class="turn given">given: prompts, requests</span>'
    note = f"The first {EPISODES_EACH} of the first and last evaluation, and of the first and last step of each stage; none was picked."
    return f'<section><h2>Episodes</h2><div class="legend">{legend}</div>{shown}<p class="note">{note}</p></section>'


def _episode(row: Mapping[str, Any]) -> str:
    turns, texts = row.get("turns") or [], row.get("texts") or []
    parts = {name: value for name, value in (row.get("parts") or {}).items() if value is not None}
    marks = [f"{_text(name)} {_mark(value)}" for name, value in parts.items()]
    reward = row.get("reward")
    told = "not scored" if reward is None else f"reward {_text(f'{reward:.3g}')}"
    tag = f"{_text(row.get('label', ''))} · stage {_text(row.get('stage', '?'))}, step {_text(row.get('step', '?'))}"
    lines = []
    for number, turn in enumerate(turns):
        kind = "trained" if turn.get("trained") else "sampled" if turn.get("logprobs") is not None else "given"
        count = len(turn.get("tokens") or [])
        text = _text(texts[number]) if number < len(texts) else '<span class="note">no text was stored</span>'
        name = f'<span class="kind">{_text(turn.get("kind", ""))} · {count} tokens</span>'
        lines.append(f'<div class="turn {kind}">{name}<div class="text">{text}</div></div>')
    problem = _text((row.get("problem") or {}).get("id", ""))
    summary = f'<span class="tag">{tag}</span><b>{problem}</b> · {told}{"".join(f" · {mark}" for mark in marks)}'
    return f"<details><summary>{summary}</summary>{''.join(lines)}</details>"


def _mark(value: Any) -> str:
    if isinstance(value, bool):
        return '<span class="up">yes</span>' if value else '<span class="down">no</span>'
    return _text(f"{value:.3g}" if isinstance(value, float) else value)


def _totals(rows: Mapping[str, Rows]) -> str:
    """What the run has cost so far."""

    def total(name: str, key: str) -> float:
        return float(sum(row[key] for row in rows[name] if _finite(row.get(key))))

    hours = [(title, total("timings", key)) for key, title in (("sample_s", "sampling"), ("learn_s", "learning"), ("eval_s", "evaluating"))]
    counts = [(title, total("metrics", key)) for key, title in (("sampled", "tokens sampled"), ("trained_tokens", "tokens trained"))]
    last = {row.get("stage"): row["skipped"] for row in rows["metrics"] if _finite(row.get("skipped"))}
    lines = [[title, f"{seconds / 60:,.1f} min"] for title, seconds in hours if seconds]
    lines += [[title, f"{count:,.0f}"] for title, count in counts if count]
    lines += [["steps skipped (gradient not finite)", f"{sum(last.values()):,.0f}"]] if last else []
    return f"<section><h2>Cost</h2>{_table([], lines)}</section>" if lines else ""


def _about(recipe: str, versions: Rows) -> str:
    latest = versions[-1] if versions else {}
    lines = [[_text(name), _text(value)] for name, value in latest.items()]
    more = f'<p class="note">The run was taken up under other versions {len(versions) - 1} time(s); versions.jsonl has them all.</p>'
    made = f"<details><summary>Versions</summary>{_table([], lines)}{more if len(versions) > 1 else ''}</details>" if lines else ""
    return f"<section><h2>Recipe</h2><details><summary>The resolved recipe</summary><pre>{_text(recipe)}</pre></details>{made}</section>"
