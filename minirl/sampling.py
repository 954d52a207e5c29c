"""Sampling: the few exact operations that every sampler shares.

Invariant: sampling is exact (temperature, no top-k, no top-p) and a draw depends on its row's logits and its own uniform number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from minirl.chat import Chat
from minirl.episode import Ask
from minirl.errors import UserError

TAIL_TOKENS = 12  # how far back a stop string is looked for: it ends at the newest token and has at least a byte a token


def uniforms(ask: Ask) -> list[float]:
    """An ask's stream of uniform numbers in [0, 1), one a token, from its own seed."""
    stream: list[float] = torch.rand(ask.max_tokens, generator=torch.Generator().manual_seed(ask.seed)).tolist()
    return stream


def pick(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens drawn from softmax(logits / temperature) by inverting its distribution function, and their log-probabilities.

    logits (B, V) float32, temperature (B,) where 0 is greedy, uniform (B,) in [0, 1); returns (B,) int64 and (B,) float32.
    A greedy token's log-probability is that at temperature 1.
    """
    greedy = temperature == 0
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
    largest = scaled.max(dim=-1, keepdim=True).values
    cumulative = (scaled - largest).exp_().cumsum(-1)
    total = cumulative[:, -1:]
    # Strictly below the total, else a rounded-up draw would fall off the end onto a token of probability zero.
    point = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
    chosen = torch.where(greedy, logits.argmax(-1), drawn) if bool(greedy.any()) else drawn
    return chosen, scaled.gather(-1, chosen[:, None]).squeeze(-1) - (largest + total.log()).squeeze(-1)


def check_finite(logprobs: Sequence[float]) -> None:
    """Raises UserError where a model's logits overflowed: a half-precision model that needs a wider type."""
    if not all(map(isfinite, logprobs)):
        raise UserError("the model's logits are not finite; expected numbers: set model.dtype=bf16 or fp32 (fp16 overflows on some models)")


def stops(chat: Chat, tokens: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether the newest token completes a stop string. Text is only looked at: the ids stay as they were sampled."""
    width = max(TAIL_TOKENS, *(len(text.encode()) for text in stop))
    tail = chat.text(tokens[-width:], special=True)
    before = chat.text(tokens[-width:-1], special=True)
    return any(tail.count(text) > before.count(text) for text in stop)
