"""The episodes that the report shows, turn by turn.

Invariant: which episodes are shown goes by their place in the run alone; none is picked.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from minirl.record.evals import Row
from minirl.record.measures import measure
from minirl.record.report.rows import Rows

EPISODES_EACH = 3
MOST_SHOWN = 300  # characters of a part: an answer may be a whole reply


def choose_episodes(episodes: Rows) -> list[Row]:
    """The first few episodes of the first and last evaluation, and of the first and last logged
    step of each stage."""
    by_key: dict[tuple[str, Any, Any], list[Row]] = {}
    for row in episodes:
        key = (str(row.get("label", "")), row.get("stage"), row.get("step"))
        by_key.setdefault(key, []).append(row)
    evaluated = [key for key in by_key if key[0] not in ("", "train")]
    wanted = {*evaluated[:1], *evaluated[-1:]}
    trained = [key for key in by_key if key not in evaluated]
    for _, run in groupby(trained, key=lambda key: key[1]):
        steps = list(run)
        wanted |= {steps[0], steps[-1]}
    return [row for key in by_key if key in wanted for row in by_key[key][:EPISODES_EACH]]


def show_episode(row: Row) -> dict[str, Any]:
    """One row of episodes.jsonl as the template shows it."""
    texts, reward = row.get("texts") or [], row.get("reward")
    parts = (row.get("parts") or {}).items()
    where = f"stage {row.get('stage', '?')}, step {row.get('step', '?')}"
    return {
        "tag": f"{row.get('label', '')} · {where}",
        "problem": (row.get("problem") or {}).get("id", ""),
        "reward": "not scored" if reward is None else f"reward {reward:.3g}",
        "parts": [(measure(key).label, _short(x)) for key, x in parts if x is not None],
        "turns": [
            {
                "kind": turn.get("kind", ""),
                "colour": _colour(turn),
                "tokens": len(turn.get("tokens") or []),
                "text": texts[number] if number < len(texts) else None,
            }
            for number, turn in enumerate(row.get("turns") or [])
        ],
    }


def _colour(turn: Row) -> str:
    if turn.get("trained"):
        return "trained"
    return "given" if turn.get("logprobs") is None else "sampled"


def _short(value: Any) -> str | bool:
    if isinstance(value, bool):
        return value
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:MOST_SHOWN]
