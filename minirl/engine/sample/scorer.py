"""Scorer: how likely a model thinks one reply against another, from its own logits; nothing is
sampled.

Invariant: prompts of one group share their common prefix like the completions of any group (see
batch.py), and the numbers are those that the model gives each prompt alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from minirl.engine.model.batch import Row
from minirl.engine.model.policy import Policy

MICRO_TOKENS = 8192


@dataclass(frozen=True)
class Scorer:
    """See `judge.Chances`. inside: a context in which the policy computes as the judging model
    (without its adapter, say)."""

    policy: Policy
    pad: int
    inside: Callable[[], AbstractContextManager[None]] = nullcontext

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[tuple[int, ...]],
        options: tuple[tuple[int, ...], tuple[int, ...]],
        groups: Sequence[int],
    ) -> list[float]:
        """P(options[0]) / (P(options[0]) + P(options[1])) after each prompt, at temperature 1."""
        rows: list[Row] = []
        for prompt, group in zip(prompts, groups, strict=True):
            for option in options:
                tokens = (*prompt, *option)
                mask = (False,) * len(prompt) + (True,) * len(option)
                rows.append(Row(tokens, mask, (0.0,) * len(tokens), 0.0, 0.0, len(rows), group))
        total = torch.zeros(len(rows), device=self.policy.device)
        with self.inside():
            for batch in self.policy.batches(rows, MICRO_TOKENS, pad=self.pad):
                logprobs, _ = self.policy.logprobs(batch, temperature=1.0)
                total.index_add_(0, batch.episode, logprobs.float())
        chances: list[float] = torch.sigmoid(total[0::2] - total[1::2]).tolist()
        return chances
