"""What a step's episodes say in numbers: the means that metrics.jsonl holds.

Invariant: a mean is over the episodes that have the number; one that no episode has is left out,
never zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from minirl.episode import Episode, Part

SCORES: tuple[str, ...] = (
    "em",
    "f1",
    "format",
    "recall",
    "searches",
    "response",
    "judged",
    "lucky",
)
SCORES += ("steps", "calls", "errors", "malformed", "answered")
"""What an episode of question answering is counted by: exact match, F1, good form, the share of
gold paragraphs whose title a search has shown (what `result_tokens` cut away is not), searches,
tokens of the whole answer with the results, and a judge's verdict. Of multiple
choice: whether a right letter stands below another value. One of method stepwise: actions, the
tool's replies, its errors, actions that could not be read, and whether an answer was given."""


class Facts(NamedTuple):
    """What is counted of an episode; light enough to send between processes."""

    reward: float | None
    parts: dict[str, Part]
    finish: str
    trained_tokens: int
    sampled_tokens: int

    @classmethod
    def of(cls, episode: Episode) -> Facts:
        """What is counted of this episode."""
        return cls(
            episode.reward,
            episode.parts,
            episode.finish,
            episode.trained_tokens,
            episode.sampled_tokens,
        )


def means(facts: Sequence[Facts]) -> dict[str, float]:
    """reward, first and second (shares that passed), overlong (share cut by the token limit),
    length (trained tokens); sampled is a sum.

    Beside them the SCORES that the episodes have.
    """
    columns: dict[str, list[float]] = {"reward": [f.reward for f in facts if f.reward is not None]}
    for name in ("first", "second"):
        columns[name] = [float(bool(f.parts[name])) for f in facts if name in f.parts]
    for name in SCORES:
        columns[name] = [float(value) for f in facts if (value := f.parts.get(name)) is not None]
    columns["overlong"] = [float(f.finish == "length") for f in facts]
    columns["length"] = [float(f.trained_tokens) for f in facts]
    found = {name: sum(values) / len(values) for name, values in columns.items() if values}
    return found | {"sampled": float(sum(f.sampled_tokens for f in facts))}
