"""report.html: one file that shows what a run did, readable without a network, a GPU or torch.

Invariant: everything that comes from a run (model output above all) is escaped before it enters the page, and the page may run no
script and fetch nothing. A run that has barely begun makes a shorter report, never an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from minirl import recipe as recipes
from minirl.chart import curves, is_number
from minirl.errors import UserError
from minirl.files import read_rows, write_file
from minirl.rundir import LATER, standing
from minirl.statistics import COUNTS, Difference, Interval, compare, summarise

Rows = Sequence[Mapping[str, Any]]

SHARES = (("first", "First try"), ("second", "Within two tries"), ("fixed", "Failures fixed by the retry"))
SCORES = {
    "em": "Exact match",
    "f1": "F1",
    "judged": "Judged right",
    "format": "Good form",
    "recall": "Gold paragraphs found",
    "searches": "Searches",
    "response": "Tokens, results included",
    "majority": "Majority of the samples",
    "reranked": "Best sample by reward model",
    "lucky": "Right letters below another value",
    "steps": "Actions",
    "calls": "Tool calls",
    "errors": "Tool errors",
    "malformed": "Unreadable actions",
    "answered": "Answered",
}
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
        _later_evaluations(rows["evals"], read_rows(folder / LATER)),
        curves(rows),
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
    try:
        write_file(folder / "report.html", page)
    except OSError as error:
        raise UserError(f"{folder / 'report.html'}: cannot be written ({error}); copy the folder to where you can write") from error
    return folder / "report.html"


def episode_html(row: Mapping[str, Any]) -> str:
    """One row of episodes.jsonl as HTML for a notebook: unfolded, trained tokens coloured."""
    return _frame(_episode(row).replace("<details>", "<details open>", 1), height_px=160 + 70 * len(row.get("turns") or []))


def curves_html(folder: str | Path) -> str:
    """The report's curves as HTML for a notebook."""
    return _frame(curves({name: read_rows(Path(folder) / f"{name}.jsonl") for name in ("metrics", "timings", "evals")}), height_px=900)


def _frame(html: str, *, height_px: int) -> str:
    """A page of its own inside a notebook's, so that neither's style, nor anything a model wrote, reaches the other."""
    page = f"<style>{Path(__file__).with_suffix('.css').read_text(encoding='utf-8')}</style><main>{html}</main>"
    return f'<iframe sandbox srcdoc="{escape(page)}" style="width: 100%; height: {height_px}px; border: 0"></iframe>'


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
    parts = [_cards(evals, said, start, last), "<h2>Held-out problems</h2>", table, f'<p class="note">{note}</p>', _scores(said)]
    parts += [_differences([(evals[i], evals[last]) for i in dict.fromkeys((before, start)) if i != last])]
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


def _scores(said: Sequence[dict[str, Any]]) -> str:
    """What the answers of each evaluation are counted by beside right and wrong: searches, votes, lucky letters; nothing where none is."""
    names = [name for name in SCORES if any(name in s["scores"] for s in said)]
    lines = [[_text(s["label"]), str(s["step"]), *(_score(name, s["scores"].get(name)) for name in names)] for s in said]
    return f"<h3>Answers</h3>{_table(['Evaluation', 'Step', *map(SCORES.__getitem__, names)], lines)}" if names else ""


def _score(name: str, found: Interval | None) -> str:
    if found is None or name not in COUNTS:
        return _share(found)
    return f"{found.value:.4g} <small>{found.low:.4g} to {found.high:.4g}</small>"


def _differences(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """Older and newer rows of evals.jsonl, problem by problem; nothing without a pair."""
    lines = []
    compared = [(old, new, compare(old, new)) for old, new in pairs]
    columns = dict(SHARES) | {name: SCORES[name] for name in SCORES if any(changes.get(name) for *_, changes in compared)}
    for old, new, changes in compared:
        found = [changes.get(key) for key in columns]
        cells = ["" if c is None else f"{_points(c)}<br><small>{_p(c)}, {c.problems} problems</small>" for c in found]
        lines.append([f"{_text(new.get('label'))} against {_text(old.get('label'))}", *cells])
    note = "Paired over problems: 95 % interval, and p of a sign-flip test (McNemar's exact test for single samples). "
    note += "“Fixed” is compared on the problems whose first try failed in both evaluations."
    table = _table(["", *columns.values()], lines)
    return f'<h3>What changed</h3>{table}<p class="note">{note}</p>' if lines else ""


def _later_evaluations(evals: Rows, later: Rows) -> str:
    """What `minirl eval` found: its base against its adapter, else against what the run itself measured in the same way."""
    if not later:
        return ""
    lines, pairs = [], []
    for row in later:
        s = summarise(row)
        made = "<br>".join([f"temperature {_text(s['temperature'])}", *map(_text, row.get("changed") or [])])
        cells = [f"{s['problems']} <small>x {s['samples']}</small>", *(_share(s[key]) for key, _ in SHARES)]
        lines.append([f"{_text(s['label'])}<br><small>{made}</small>", *cells])
    for way in dict.fromkeys(map(_way, later)):
        own = [row for row in evals if _way(row) == way]
        found = {"base": own[0], "adapter": own[-1]} if own and own[0].get("label") == "start" else {}
        found |= {str(row.get("label")): row for row in later if _way(row) == way}
        if len(found) == 2 and found["base"] is not found["adapter"]:
            pairs.append((found["base"], found["adapter"]))
    table = _table(["Evaluation", "Problems", *(title for _, title in SHARES)], lines)
    table += _scores([{**summarise(row), "step": ", ".join(map(_text, row.get("changed") or []))} for row in later])
    note = "By <code>minirl eval</code>: base is the model as the run found it, adapter its final one. Compared where all settings agree."
    return f'<section><h2>Evaluated afterwards</h2>{table}<p class="note">{note}</p>{_differences(pairs)}</section>'


def _way(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """How an evaluation was made; `changed` lists the overrides that `minirl eval` was given."""
    return row.get("tries", 1), row.get("samples", 1), row.get("temperature"), tuple(row.get("changed") or ())


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
        return float(sum(row[key] for row in rows[name] if is_number(row.get(key))))

    hours = [(title, total("timings", key)) for key, title in (("sample_s", "sampling"), ("learn_s", "learning"), ("eval_s", "evaluating"))]
    counts = [(title, total("metrics", key)) for key, title in (("sampled", "tokens sampled"), ("trained_tokens", "tokens trained"))]
    last = {row.get("stage"): row["skipped"] for row in rows["metrics"] if is_number(row.get("skipped"))}
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
