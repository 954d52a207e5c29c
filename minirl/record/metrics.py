"""The means over a step's episodes that metrics.jsonl holds.

Invariant: a mean is over the episodes that have the number; one that no episode has is left out,
never zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from minirl.episode import Episode, Part
from minirl.record.measures import OUTCOMES, SCORES


class EpisodeStats(NamedTuple):
    """The numbers of an episode without its tokens: light enough to send between processes."""

    reward: float | None
    parts: dict[str, Part]
    finish: str
    trained_tokens: int
    sampled_tokens: int

    @classmethod
    def of(cls, episode: Episode) -> EpisodeStats:
        """Take the numbers of this episode."""
        return cls(
            episode.reward,
            episode.parts,
            episode.finish,
            episode.trained_tokens,
            episode.sampled_tokens,
        )


def average(episodes: Sequence[EpisodeStats]) -> dict[str, float]:
    """Means over episodes: the reward, outcomes (share that passed), scores, overlong (share cut by
    the token limit), length (trained tokens); and the sum `sampled` (tokens)."""
    columns: dict[str, list[float]] = {
        "reward": [e.reward for e in episodes if e.reward is not None]
    }
    for measure in OUTCOMES:
        columns[measure.key] = [
            float(bool(e.parts[measure.key])) for e in episodes if measure.key in e.parts
        ]
    for key in SCORES:
        columns[key] = [float(x) for e in episodes if (x := e.parts.get(key)) is not None]
    columns["overlong"] = [float(e.finish == "length") for e in episodes]
    columns["length"] = [float(e.trained_tokens) for e in episodes]
    means = {key: sum(values) / len(values) for key, values in columns.items() if values}
    return means | {"sampled": float(sum(e.sampled_tokens for e in episodes))}
