"""Scorer: how likely a model thinks one reply against another, from its own logits; nothing is
sampled.

Invariant: prompts of one group share their common prefix like the completions of any group (see
batch.py), and the numbers are those that the model gives each prompt alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from minirl.engine.model.batch import Row
from minirl.engine.model.policy import Policy

MICRO_TOKENS = 8192


class Scorer:
    """See `judge.Chances`. inside: a context in which the policy computes as the judging model
    (without its adapter, say)."""

    def __init__(
        self,
        policy: Policy,
        *,
        pad: int,
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._policy = policy
        self._pad = pad
        self._inside = inside

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[tuple[int, ...]],
        options: tuple[tuple[int, ...], tuple[int, ...]],
        groups: Sequence[int],
    ) -> list[float]:
        """P(options[0]) / (P(options[0]) + P(options[1])) after each prompt, at temperature 1."""
        rows = [
            Row(
                (*prompt, *option),
                (False,) * len(prompt) + (True,) * len(option),
                (0.0,) * (len(prompt) + len(option)),
                0.0,
                0.0,
                n,
                group,
            )
            for n, (prompt, group, option) in enumerate(
                (p, g, o) for p, g in zip(prompts, groups, strict=True) for o in options
            )
        ]
        total = torch.zeros(len(rows), device=self._policy.device)
        with self._inside():
            for batch in self._policy.batches(rows, MICRO_TOKENS, pad=self._pad):
                logprobs, _ = self._policy.logprobs(batch, temperature=1.0)
                total.index_add_(0, batch.episode, logprobs.float())
        chances: list[float] = torch.sigmoid(total[0::2] - total[1::2]).tolist()
        return chances
