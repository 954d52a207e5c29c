"""The evaluations of a run as HTML: shares with their intervals, what changed and how sure that is,
errors, pass@k.

Invariant: only evaluations made in the same way (tries, samples, temperature) are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minirl.record.evals import compare, summarise
from minirl.record.measures import MEASURES, OUTCOMES, measure
from minirl.record.report.html import Rows, table, text
from minirl.record.statistics import Difference, Interval

SHARES = tuple((m.key, m.title) for m in OUTCOMES)
SCORES = {m.key: m.title for m in MEASURES if m.source in ("score", "pick")}


def evaluations_html(evals: Rows) -> str:
    """Cards, the table of shares, paired differences, errors and pass@k."""
    if not evals:
        return '<section><h2>Held-out problems</h2><p class="note">No evaluation yet.</p></section>'
    said = [summarise(row) for row in evals]
    # Rows made in another way (other tries, samples or temperature) stand in the table but are not
    # compared.
    ways = [(s["tries"], s["samples"], s["temperature"]) for s in said]
    alike = [i for i, way in enumerate(ways) if way == ways[-1]]
    last, start = alike[-1], alike[0]
    earlier = [
        i for i in alike if said[i]["stage"] != said[last]["stage"] or said[i]["label"] == "start"
    ]
    before = earlier[-1] if earlier else start
    shown = list(dict.fromkeys((start, before, last)))
    shown_table = table(
        ["Evaluation", "Step", "Problems", *(title for _, title in SHARES)],
        [
            [
                text(s["label"]),
                str(s["step"]),
                f"{s['problems']} <small>x {s['samples']}</small>",
                *(_share(s[key]) for key, _ in SHARES),
            ]
            for s in said
        ],
    )
    temperature = said[last]["temperature"]
    note = "Each share with its 95 % interval (Wilson, at the effective sample size of problems). "
    note += (
        "Greedy decoding." if temperature == 0 else f"Sampled at temperature {text(temperature)}."
    )
    parts = [
        _cards(evals, said, start, last),
        "<h2>Held-out problems</h2>",
        shown_table,
        f'<p class="note">{note}</p>',
        _scores(said),
    ]
    parts += [
        _differences([(evals[i], evals[last]) for i in dict.fromkeys((before, start)) if i != last])
    ]
    parts += [_errors([said[i] for i in shown]), _pass_at_k([said[i] for i in shown])]
    return "<section>" + "\n".join(part for part in parts if part) + "</section>"


def later_evaluations_html(evals: Rows, later: Rows) -> str:
    """What `minirl eval` found: its base against its adapter, else against what the run itself
    measured in the same way."""
    if not later:
        return ""
    lines, pairs = [], []
    for row in later:
        s = summarise(row)
        made = "<br>".join(
            [f"temperature {text(s['temperature'])}", *map(text, row.get("changed") or [])]
        )
        cells = [
            f"{s['problems']} <small>x {s['samples']}</small>",
            *(_share(s[key]) for key, _ in SHARES),
        ]
        lines.append([f"{text(s['label'])}<br><small>{made}</small>", *cells])
    for way in dict.fromkeys(map(_way, later)):
        own = [row for row in evals if _way(row) == way]
        found = (
            {"base": own[0], "adapter": own[-1]} if own and own[0].get("label") == "start" else {}
        )
        found |= {str(row.get("label")): row for row in later if _way(row) == way}
        if {"base", "adapter"} <= found.keys() and found["base"] is not found["adapter"]:
            pairs.append((found["base"], found["adapter"]))
    shown_table = table(["Evaluation", "Problems", *(title for _, title in SHARES)], lines)
    shown_table += _scores(
        [
            {**summarise(row), "step": ", ".join(map(text, row.get("changed") or []))}
            for row in later
        ]
    )
    note = (
        "By <code>minirl eval</code>: base is the model as the run found it, adapter its final one."
        " Compared where all settings agree."
    )
    return (
        f"<section><h2>Evaluated afterwards</h2>{shown_table}<p"
        f' class="note">{note}</p>{_differences(pairs)}</section>'
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _share(found: Interval | None) -> str:
    """A share with its interval, as text and as a bar from 0 to 1."""
    if found is None:
        return "<small>none</small>"
    x = [2 + 126 * value for value in found]
    bar = (
        '<line class="track" x1="2" x2="128" y1="6" y2="6" stroke-width="2"/><line class="range"'
        f' x1="{x[1]:.1f}" x2="{x[2]:.1f}" '
    )
    bar += (
        'y1="6" y2="6" stroke-width="4" stroke-linecap="round"/><circle class="dot"'
        f' cx="{x[0]:.1f}" cy="6" r="3.5"/>'
    )
    span = f"{100 * found.low:.1f} to {100 * found.high:.1f}"
    return (
        f'{_percent(found.value)} <small>{span}</small><svg class="bar" viewBox="0 0 130 12"'
        f' aria-hidden="true">{bar}</svg>'
    )


def _points(found: Difference) -> str:
    tone = "up" if found.low > 0 else "down" if found.high < 0 else ""
    span = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return f'<span class="{tone}">{100 * found.value:+.1f} points</span> <small>{span}</small>'


def _p(found: Difference) -> str:
    return (
        "p &lt; 0.0001"
        if found.p < 1e-4
        else f"p = {found.p:.4f}"
        if found.p < 0.1
        else f"p = {found.p:.2f}"
    )


def _cards(evals: Rows, said: Sequence[dict[str, Any]], start: int, last: int) -> str:
    changes = compare(evals[start], evals[last])
    cards = []
    for key, title in SHARES:
        now, then, change = said[last][key], said[start][key], changes[key]
        if now is None:
            continue
        big = (
            _percent(now.value)
            if start == last or then is None
            else f"<span>{_percent(then.value)} →</span> {_percent(now.value)}"
        )
        sure = (
            f"{_points(change)}, {_p(change)}"
            if start != last and change is not None
            else "at start"
        )
        cards.append(
            f'<div class="card"><div class="name">{title}</div><div class="big">{big}</div><div'
            f' class="sure">{sure}</div></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _scores(said: Sequence[dict[str, Any]]) -> str:
    """What the answers of each evaluation are counted by beside right and wrong: searches, votes,
    lucky letters; nothing where none is."""
    names = [name for name in SCORES if any(name in s["scores"] for s in said)]
    lines = [[text(s["label"]), str(s["step"]), *(_score(name, s) for name in names)] for s in said]
    return (
        f"<h3>Answers</h3>{table(['Evaluation', 'Step', *map(SCORES.__getitem__, names)], lines)}"
        if names
        else ""
    )


def _score(name: str, said: Mapping[str, Any]) -> str:
    found: Interval | None = said["scores"].get(name)
    if found is None or measure(name).kind != "count":
        judged = (
            f" <small>{said['counted'].get(name, 0)} of {said['problems'] * said['samples']}"
            " judged</small>"
        )
        return _share(found) + (judged if name == "judged" and found is not None else "")
    return f"{found.value:.4g} <small>{found.low:.4g} to {found.high:.4g}</small>"


def _differences(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """Older and newer rows of evals.jsonl, problem by problem; nothing without a pair."""
    lines = []
    compared = [(old, new, compare(old, new)) for old, new in pairs]
    columns = dict(SHARES) | {
        name: SCORES[name] for name in SCORES if any(changes.get(name) for *_, changes in compared)
    }
    for old, new, changes in compared:
        found = [changes.get(key) for key in columns]
        cells = [
            "" if c is None else f"{_points(c)}<br><small>{_p(c)}, {c.problems} problems</small>"
            for c in found
        ]
        lines.append([f"{text(new.get('label'))} against {text(old.get('label'))}", *cells])
    note = (
        "Paired over problems: 95 % interval, and p of a sign-flip test (McNemar's exact test for"
        " single samples). "
    )
    note += "“Fixed” is compared on the problems whose first try failed in both evaluations."
    shown_table = table(["", *columns.values()], lines)
    return f'<h3>What changed</h3>{shown_table}<p class="note">{note}</p>' if lines else ""


def _way(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """How an evaluation was made; `changed` lists the overrides that `minirl eval` was given."""
    return (
        row.get("tries", 1),
        row.get("samples", 1),
        row.get("temperature"),
        tuple(row.get("changed") or ()),
    )


def _errors(said: Sequence[dict[str, Any]]) -> str:
    """Counts of each error kind, in the evaluations that matter."""
    tries = [
        (key, title)
        for key, title in (("first_errors", "first try"), ("second_errors", "second try"))
        if any(s[key] for s in said)
    ]
    kinds = dict.fromkeys(kind for key, _ in tries for s in said for kind in s[key])
    head = ["Error", *(f"{text(s['label'])}, {title}" for s in said for _, title in tries)]
    lines = [
        [text(kind), *(str(s[key].get(kind, 0)) for s in said for key, _ in tries)]
        for kind in kinds
    ]
    return f"<h3>How tries fail</h3>{table(head, lines)}" if lines else ""


def _pass_at_k(said: Sequence[dict[str, Any]]) -> str:
    most = min(s["samples"] for s in said)
    if most < 2:
        return ""
    ks = sorted({2**i for i in range(most.bit_length())} | {most})
    lines = [[text(s["label"]), *(_share(s["pass_at_k"][k]) for k in ks)] for s in said]
    return f"<h3>pass@k, first tries</h3>{table(['Evaluation', *(f'k = {k}' for k in ks)], lines)}"
