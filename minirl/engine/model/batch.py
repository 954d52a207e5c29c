"""Batch: the one door from episodes to tensors.

Episodes that begin alike are bundled: their longest common prefix is computed once. Sharing is
discovered from equal token ids, never declared. Turns after the last trained one are dropped: their
reward is already known. Invariant: after this door the flat (N,) tensors hold one entry a trained
token, in the same order, and index t of an episode always speaks of its token t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minirl.engine.model.attention import Bundle, Layout
from minirl.engine.model.chunks import chunks
from minirl.episode import Episode

MIN_SHARED = 16  # tokens; a shorter common prefix is not worth an attention call of its own
ROUND = 64  # packed rows have a multiple of this many tokens: new lengths cost libraries time


@dataclass(frozen=True, slots=True)
class Row:
    """An episode on its way into a batch. old: the sampler's log-probabilities. weight: of each
    trained token in the step's loss. advantage: of all trained tokens, or one for each of them.
    """

    tokens: tuple[int, ...]
    mask: tuple[bool, ...]
    old: tuple[float, ...]
    advantage: float | tuple[float, ...]
    weight: float
    episode: int
    group: int

    @property
    def length(self) -> int:
        """Tokens, prompt included."""
        return len(self.tokens)

    @property
    def trained(self) -> list[int]:
        """The places of the trained tokens."""
        return [t for t, is_trained in enumerate(self.mask) if is_trained]


@dataclass(frozen=True, slots=True)
class Shared:
    """Rows whose first `prefix` tokens are the same."""

    prefix: int
    rows: tuple[Row, ...]

    @property
    def cost(self) -> int:
        """Tokens that are computed."""
        return self.prefix + sum(r.length - self.prefix for r in self.rows)


@dataclass(frozen=True, slots=True)
class Batch:
    """N trained tokens and what predicts them. Packed: B is 1 and `layout` says who sees whom.
    Plain: B rows padded on the right."""

    tokens: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64
    present: Tensor | None  # (B, T) int64, 0 at padding; None where packed
    layout: Layout | None
    before: Tensor  # (N,) int64, the token before each trained one: an index into B * T positions
    target: Tensor  # (N,) int64, the trained tokens
    old: Tensor  # (N,) float32, the sampler's log-probabilities
    advantages: Tensor  # (N,) float32
    weights: Tensor  # (N,) float32
    episode: Tensor  # (N,) int64, the number of each token's episode


def row(
    episode: Episode,
    *,
    advantage: float | Sequence[float],
    weight: float,
    number: int,
    group: int = 0,
) -> Row:
    """An episode cut after its last trained token. advantage: of the episode, or one for each of
    its trained turns. Raises ValueError without trained tokens, or if the first is trained: nothing
    predicts it."""
    mask = episode.mask
    end = max((i for i, trained in enumerate(mask) if trained), default=-1) + 1
    if end == 0 or mask[0]:
        raise ValueError(
            f"episode of {episode.problem.id}: expected trained tokens after a prompt, got {end}"
            " tokens"
        )
    if isinstance(advantage, Sequence):
        lengths = [len(turn.tokens) for turn in episode.turns if turn.trained]
        each = zip(advantage, lengths, strict=True)
        advantage = tuple(value for value, length in each for _ in range(length))
    return Row(
        episode.tokens[:end], mask[:end], episode.logprobs[:end], advantage, weight, number, group
    )


def pack(rows: Sequence[Row], budget_tokens: int) -> Iterator[list[Shared]]:
    """Micro-batches of bundles, at most `budget_tokens` computed tokens each (a longer row goes
    alone)."""
    bundles: list[Shared] = []
    loose: list[Row] = []
    for _, same in groupby(sorted(rows, key=lambda r: (r.group, r.episode)), key=lambda r: r.group):
        members = list(same)
        if prefix := common_prefix(members):
            cut = chunks(members, lambda part: Shared(prefix, tuple(part)).cost, budget_tokens)
            bundles += [Shared(prefix, tuple(part)) for part in cut]
        else:
            loose += members
    # Those of like length together: their attention is padded to the longest. They may still begin
    # alike, with a system prompt.
    for part in pack_plain(loose, budget_tokens):
        bundles.append(Shared(common_prefix(part), tuple(part)))
    return chunks(bundles, lambda chunk: sum(b.cost for b in chunk), budget_tokens)


def pack_plain(rows: Sequence[Row], budget_tokens: int) -> Iterator[list[Row]]:
    """Micro-batches of rows of like length, at most `budget_tokens` padded tokens each (a longer
    row goes alone)."""
    by_length = sorted(rows, key=lambda r: (r.length, r.episode))
    return chunks(by_length, lambda chunk: len(chunk) * chunk[-1].length, budget_tokens)


def common_prefix(rows: Sequence[Row]) -> int:
    """Length of the longest prefix that rows share, which leaves the shortest a token of its own;
    0 for a single row, and where sharing is not worth it."""
    if len(rows) == 1:
        return 0
    sequences = [r.tokens for r in rows]
    first, last = min(sequences), max(sequences)
    limit = min(map(len, sequences)) - 1
    length = next((i for i in range(limit) if first[i] != last[i]), limit)
    return length if length >= MIN_SHARED else 0


def collate(bundles: Sequence[Shared], device: torch.device) -> Batch:
    """Bundles as one packed row on `device`."""
    tokens: list[int] = []
    positions: list[int] = []
    before: list[int] = []
    for bundle in bundles:
        start, prefix = len(tokens), bundle.prefix
        tokens += bundle.rows[0].tokens[:prefix]
        positions += range(prefix)
        for r in bundle.rows:
            shift = len(tokens) - prefix
            tokens += r.tokens[prefix:]
            positions += range(prefix, r.length)
            # The first token of a completion is predicted in the prefix.
            before += [(start if t <= prefix else shift) + t - 1 for t in r.trained]
    layout = [Bundle.of(b.prefix, [r.length - b.prefix for r in b.rows], device) for b in bundles]
    if filler := -len(tokens) % ROUND:  # a row of its own, which nobody sees
        layout.append(Bundle.of(0, [filler], device))
        tokens += [0] * filler
        positions += range(filler)
    return Batch(
        torch.tensor([tokens]).to(device),
        torch.tensor([positions]).to(device),
        None,
        Layout(tuple(layout)),
        torch.tensor(before).to(device),
        *_of_trained([r for bundle in bundles for r in bundle.rows], device),
    )


def collate_plain(rows: Sequence[Row], *, pad: int, device: torch.device) -> Batch:
    """Rows padded on the right, for models whose attention cannot share a prefix."""
    width = max(r.length for r in rows)
    tokens, present = pad_rows([r.tokens for r in rows], pad)
    before = [i * width + t - 1 for i, r in enumerate(rows) for t in r.trained]
    return Batch(
        tokens.to(device),
        torch.arange(width).expand(len(rows), -1).to(device),
        present.to(device),
        None,
        torch.tensor(before).to(device),
        *_of_trained(rows, device),
    )


def pad_rows(rows: Sequence[Sequence[int]], pad: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids padded to the longest row, and 1 where they are present; both (B, T) int64."""
    ids = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    return (
        pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side),
        pad_sequence(ones, batch_first=True, padding_side=side),
    )


def _of_trained(rows: Sequence[Row], device: torch.device) -> list[Tensor]:
    """A batch's tensors from `target` on."""
    trained = [(r, t) for r in rows for t in r.trained]
    lists: list[list[Any]] = [
        [r.tokens[t] for r, t in trained],
        [r.old[t] for r, t in trained],
        [advantage for r in rows for advantage in _advantages(r)],
        [r.weight for r, _ in trained],
        [r.episode for r, _ in trained],
    ]
    return [torch.tensor(values).to(device) for values in lists]


def _advantages(r: Row) -> tuple[float, ...]:
    return r.advantage if isinstance(r.advantage, tuple) else (r.advantage,) * sum(r.mask)
