"""Agreement: the distance of the sampler's and the shared-prefix layout's log-probabilities from
those of plain rows.

Measured on a few episodes at the first step of every stage and after every resume. Invariant: both
sides are of the same tokens of the same episodes, and the plain side is padded rows through the
library's own attention. It only measures; its caller acts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minirl.engine.model.batch import Row, collate, collate_plain, pack, row
from minirl.engine.model.policy import Policy
from minirl.episode import Group

GROUPS = 2  # that are compared
EPISODES = 2  # of each group: two share their prefix
# Largest mean distance that rounding explains, in nats a token. A wrong mask, position or weight is
# ten times as far off.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True, slots=True)
class Agreement:
    """Mean distances from plain rows in nats a token; None if there was nothing to compare."""

    sampler: float | None
    layout: float | None
    limit: float

    def holds(self, value: float | None) -> bool:
        """Whether rounding explains a distance; it never explains NaN."""
        return value is None or value <= self.limit


@torch.no_grad()
def measure_agreement(
    policy: Policy, groups: Sequence[Group], *, temperature: float, pad: int
) -> Agreement:
    """Compare log-probabilities of trained tokens; `temperature` is that of sampling."""
    rows, sampled = _some_rows(groups)
    limit = LIMITS[policy.dtype]
    if not rows:
        return Agreement(None, None, limit)
    with policy.plain_attention():
        batch = collate_plain(rows, pad=pad, device=policy.device)
        plain, _ = policy.logprobs(batch, temperature=temperature)
    layout = None
    if policy.shares_prefixes:
        (bundles,) = pack(rows, budget_tokens=sum(r.length for r in rows))
        packed = collate(bundles, policy.device)
        shared, _ = policy.logprobs(packed, temperature=temperature)
        layout = _distance(shared[packed.episode.argsort(stable=True)], plain)
    return Agreement(_distance(batch.old, plain) if sampled else None, layout, limit)


def _some_rows(groups: Sequence[Group]) -> tuple[list[Row], bool]:
    """A few rows, numbered in order, and whether all their trained tokens were sampled."""
    rows: list[Row] = []
    sampled = True
    for number, group in enumerate(groups[:GROUPS]):
        for episode in [e for e in group.episodes if e.trained_tokens][:EPISODES]:
            rows.append(row(episode, advantage=0.0, weight=0.0, number=len(rows), group=number))
            sampled &= all(turn.sampled for turn in episode.turns if turn.trained)
    return rows, sampled and bool(rows)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())
