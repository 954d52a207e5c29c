"""Episodes as HTML: turn by turn, the trained tokens marked.

Invariant: which episodes are shown goes by their place in the run alone; none is picked.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from minirl.record.report.html import Rows, text

EPISODES_EACH = 3
MOST_SHOWN = 300  # characters of a part: an answer may be a whole reply


def episodes_html(episodes: Rows) -> str:
    """The first few episodes of the first and last evaluation, and of the first and last logged
    step of each stage: none is picked."""
    chosen: dict[tuple[str, Any, Any], list[Mapping[str, Any]]] = {}
    for row in episodes:
        chosen.setdefault(
            (str(row.get("label", "")), row.get("stage"), row.get("step")), []
        ).append(row)
    keys = list(chosen)
    evaluated = [key for key in keys if key[0] not in ("", "train")]
    wanted = {*evaluated[:1], *evaluated[-1:]}
    for _, run in groupby((key for key in keys if key not in evaluated), key=lambda key: key[1]):
        steps = list(run)
        wanted |= {steps[0], steps[-1]}
    shown = "".join(
        one_episode_html(row)
        for key in keys
        if key in wanted
        for row in chosen[key][:EPISODES_EACH]
    )
    if not shown:
        return ""
    legend = (
        '<span class="turn trained">trained tokens</span><span class="turn sampled">sampled, not'
        " trained</span>"
    )
    legend += '<span class="turn given">given: prompts, requests</span>'
    note = (
        f"The first {EPISODES_EACH} of the first and last evaluation, and of the first and last"
        " step of each stage; none was picked."
    )
    return (
        f'<section><h2>Episodes</h2><div class="legend">{legend}</div>{shown}<p'
        f' class="note">{note}</p></section>'
    )


def one_episode_html(row: Mapping[str, Any]) -> str:
    """One episode, its turns one below the other."""
    turns, texts = row.get("turns") or [], row.get("texts") or []
    parts = {name: value for name, value in (row.get("parts") or {}).items() if value is not None}
    marks = [f"{text(name)} {_mark(value)}" for name, value in parts.items()]
    reward = row.get("reward")
    told = "not scored" if reward is None else f"reward {text(f'{reward:.3g}')}"
    tag = (
        f"{text(row.get('label', ''))} · stage {text(row.get('stage', '?'))}, step"
        f" {text(row.get('step', '?'))}"
    )
    lines = []
    for number, turn in enumerate(turns):
        kind = (
            "trained"
            if turn.get("trained")
            else "sampled"
            if turn.get("logprobs") is not None
            else "given"
        )
        count = len(turn.get("tokens") or [])
        said_text = (
            text(texts[number])
            if number < len(texts)
            else '<span class="note">no text was stored</span>'
        )
        name = f'<span class="kind">{text(turn.get("kind", ""))} · {count} tokens</span>'
        lines.append(f'<div class="turn {kind}">{name}<div class="text">{said_text}</div></div>')
    problem = text((row.get("problem") or {}).get("id", ""))
    summary = (
        f'<span class="tag">{tag}</span><b>{problem}</b> ·'
        f" {told}{''.join(f' · {mark}' for mark in marks)}"
    )
    return f"<details><summary>{summary}</summary>{''.join(lines)}</details>"


def _mark(value: Any) -> str:
    if isinstance(value, bool):
        return '<span class="up">yes</span>' if value else '<span class="down">no</span>'
    return text(f"{value:.3g}" if isinstance(value, float) else str(value)[:MOST_SHOWN])
