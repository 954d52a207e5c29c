"""Batch: the one door from episodes to tensors.

Invariant: after this door index t always speaks of token t, and the flat (N,) tensors hold the trained tokens in the order in which
`mask` reads them off. Turns after the last trained one are dropped: their reward is already known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minirl.episode import Episode


@dataclass(frozen=True, slots=True)
class Row:
    """An episode on its way into a batch. weight is that of each of its trained tokens in the step's loss."""

    tokens: tuple[int, ...]
    mask: tuple[bool, ...]
    old: tuple[float, ...]
    advantage: float
    weight: float
    episode: int

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows padded on the right to T tokens, of which N are trained."""

    tokens: Tensor  # (B, T) int64
    present: Tensor  # (B, T) int64, 0 at padding
    mask: Tensor  # (B, T) bool, True at trained tokens
    old: Tensor  # (N,) float32, the sampler's log-probabilities
    advantages: Tensor  # (N,) float32
    weights: Tensor  # (N,) float32
    episode: Tensor  # (N,) int64, the number of each token's episode


def row(episode: Episode, *, advantage: float, weight: float, number: int) -> Row:
    """An episode cut after its last trained token. The first token is never trained: nothing predicts it."""
    mask = episode.mask
    end = max((i for i, trained in enumerate(mask) if trained), default=-1) + 1
    if end == 0 or mask[0]:
        raise ValueError(f"episode of {episode.problem.id}: expected trained tokens after a prompt, got {end} tokens")
    return Row(episode.tokens[:end], mask[:end], episode.logprobs[:end], advantage, weight, number)


def pack(rows: Sequence[Row], budget_tokens: int) -> Iterator[list[Row]]:
    """Micro-batches of rows of like length, at most `budget_tokens` padded tokens each (a longer row goes alone)."""
    chunk: list[Row] = []
    for item in sorted(rows, key=lambda r: (r.length, r.episode)):
        if chunk and (len(chunk) + 1) * item.length > budget_tokens:
            yield chunk
            chunk = []
        chunk.append(item)
    if chunk:
        yield chunk


def collate(rows: Sequence[Row], *, pad: int, device: torch.device) -> Batch:
    """Rows as tensors on `device`."""
    longest = max(r.length for r in rows)
    shape = (len(rows), longest)
    tokens, present = torch.full(shape, pad), torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, r in enumerate(rows):
        tokens[i, : r.length] = torch.tensor(r.tokens)
        present[i, : r.length] = 1
        mask[i, : r.length] = torch.tensor(r.mask)
    trained = [sum(r.mask) for r in rows]
    old = [lp for r in rows for lp, is_trained in zip(r.old, r.mask, strict=True) if is_trained]

    def spread(values: Sequence[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(torch.tensor(trained)).to(device)

    return Batch(
        tokens=tokens.to(device),
        present=present.to(device),
        mask=mask.to(device),
        old=torch.tensor(old).to(device),
        advantages=spread([r.advantage for r in rows]),
        weights=spread([r.weight for r in rows]),
        episode=spread([r.episode for r in rows]),
    )
