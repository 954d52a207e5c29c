"""Draw: how every sampler draws a token, and when a reply ends.

Invariant: sampling is exact (temperature, no top-k, no top-p) and a draw depends on its row's
logits and its own uniform number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

from minirl.chat import Chat
from minirl.episode import Ask, Completion, Finish
from minirl.errors import UserError

BLOCK = 256  # tokens of the vocabulary whose probabilities are summed together
# How far back a stop string is looked for: it ends at the newest token, and a token has at least a
# byte.
TAIL_TOKENS = 12


@dataclass(slots=True)
class Reply:
    """An ask that is being answered. uniforms: the numbers that decide its tokens."""

    key: int
    ask: Ask
    uniforms: list[float] = field(init=False)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None

    def __post_init__(self) -> None:
        self.uniforms = uniforms(self.ask)

    def append(self, token: int, logprob: float, chat: Chat) -> None:
        """Take a drawn token, and see whether it ends the reply."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in chat.eos or (self.ask.stop and stops(chat, self.tokens, self.ask.stop)):
            self.finish = "stop"
        elif len(self.tokens) >= self.ask.max_tokens:
            self.finish = "length"

    def completion(self, chat: Chat) -> tuple[int, Completion]:
        """The ask's key and the answer, once it has ended."""
        assert self.finish is not None
        text = chat.text(self.tokens)
        return self.key, Completion(tuple(self.tokens), tuple(self.logprobs), text, self.finish)


def draw(replies: Sequence[Reply], logits: Tensor, uniform: Tensor, chat: Chat) -> Tensor:
    """Give each reply that goes on its next token, drawn from logits (B, V) by uniform (B,); the
    tokens, (B,). Raises UserError if the logits are not finite."""
    chosen, logprobs = pick(logits, [reply.ask.temperature for reply in replies], uniform)
    check_finite(found := logprobs.tolist())
    for reply, token, logprob in zip(replies, chosen.tolist(), found, strict=True):
        if reply.finish is None:
            reply.append(token, logprob, chat)
    return chosen


def uniforms(ask: Ask) -> list[float]:
    """An ask's stream of uniform numbers in [0, 1), one a token, from its own seed."""
    stream: list[float] = torch.rand(
        ask.max_tokens, generator=torch.Generator().manual_seed(ask.seed)
    ).tolist()
    return stream


def pick(logits: Tensor, temperature: Sequence[float], uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens drawn from softmax(logits / temperature) by inverting its distribution function, and
    their log-probabilities.

    logits (B, V) float32, temperature B numbers where 0 is greedy, uniform (B,) in [0, 1); returns
    (B,) int64 and (B,) float32. A greedy token's log-probability is that at temperature 1. The
    function is inverted in two steps, first over blocks of tokens and then within one: a running
    sum over the whole vocabulary costs as much as all the rest.
    """
    if set(temperature) - {0.0, 1.0}:
        divisors = torch.tensor([t or 1.0 for t in temperature], device=logits.device)
        logits = logits / divisors[:, None]
    largest = logits.amax(dim=-1, keepdim=True)
    weights = (logits - largest).exp_()
    if short := -weights.shape[-1] % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, short))
    blocks = weights.view(len(weights), -1, BLOCK)  # (B, V / BLOCK, BLOCK)
    running = blocks.sum(-1).cumsum(-1)
    block, before = _invert(running, uniform[:, None] * running[:, -1:])
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(-1)
    token, _ = _invert(inside, uniform[:, None] * running[:, -1:] - before)
    # Clamped for logits that are not finite, which the caller rejects.
    chosen = (block * BLOCK + token).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
    if not all(temperature):
        is_greedy = torch.tensor([t == 0 for t in temperature], device=logits.device)
        chosen = torch.where(is_greedy, logits.argmax(-1), chosen)
    total = (largest + running[:, -1:].log()).squeeze(-1)
    return chosen, logits.gather(-1, chosen[:, None]).squeeze(-1) - total


def _invert(running: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Where each running sum (B, N) first exceeds its point (B, 1), and the sum before that place;
    both (B, 1)."""
    total = running[:, -1:]
    # Strictly below the total: a draw that was rounded up would fall on a token of probability 0.
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(running, point, right=True).clamp_(max=running.shape[-1] - 1)
    return found, torch.where(found > 0, running.gather(-1, (found - 1).clamp_(min=0)), 0.0)


def check_finite(logprobs: Sequence[float]) -> None:
    """Raises UserError if a model's logits overflowed in half precision."""
    if not all(map(isfinite, logprobs)):
        raise UserError(
            "the model's logits are not finite; expected numbers: set model.dtype=bf16 or fp32"
            " (fp16 overflows on some models)"
        )


def stops(chat: Chat, tokens: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether the newest token completes a stop string. Text is only looked at: the ids stay as
    they were sampled."""
    width = max(TAIL_TOKENS, *(len(text.encode()) for text in stop))
    tail = chat.text(tokens[-width:], special=True)
    before = chat.text(tokens[-width:-1], special=True)
    return any(tail.count(text) > before.count(text) for text in stop)
