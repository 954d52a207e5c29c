"""The output head: log-probabilities of chosen tokens from hidden states, without ever holding the
logits of all positions.

Invariant: values and gradients are those of log_softmax(head(hidden) * scale / temperature),
position by position, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minirl.engine.backend import LIBRARY, Backend, Product

FEWEST_ROWS = 64  # computed together, however large the vocabulary


class Head:
    """A model's output embeddings with what its family does to logits: a scale (Cohere, Granite)
    and a soft cap (Gemma 2)."""

    def __init__(self, linear: Any, config: Any, backend: Backend = LIBRARY) -> None:
        self.linear = linear
        self.backend = backend
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        divisor = getattr(config, "logits_scaling", 1.0)
        self.scale: float = getattr(config, "logit_scale", None) or 1.0 / divisor
        is_bare = type(linear) is nn.Linear and linear.bias is None
        self._is_plain = is_bare and not linear.weight.requires_grad and self.softcap is None
        self._packed: Product | None = None

    def pack(self, rows: int) -> None:
        """Where the backend gains by it, let `logits` without a gradient be computed from packed
        weights, laid out for some `rows` rows."""
        if self._packed is None and self._is_plain and self.backend.fits([self.linear.weight]):
            self._packed = self.backend.pack(self.linear.weight, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits in float32, (..., V), of hidden states (..., D)."""
        if self._packed is not None and not torch.is_grad_enabled():
            logits = self._packed(hidden).float()
        else:
            logits = self.linear(hidden).float()
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logprobs(
        self,
        hidden: Tensor,
        target: Tensor,
        *,
        temperature: float,
        entropy: bool,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each target under logits / temperature, (N,) float32, from hidden (N,
        D); and with `entropy` the entropy, (N,), which carries a gradient only with
        `entropy_grad`."""
        parts: list[tuple[Tensor, Tensor]] = []
        size = max(FEWEST_ROWS, self.backend.chunk_logits // self.linear.weight.shape[0])
        for h, t in zip(torch.split(hidden, size), torch.split(target, size), strict=True):
            if self._is_plain and not entropy_grad:
                factor = self.scale / temperature
                parts.append(_Chosen.apply(h, t, self.linear.weight, factor, entropy))
            elif torch.is_grad_enabled() and h.requires_grad:
                args = h, t, temperature, entropy
                parts.append(checkpoint(self._compute, *args, use_reentrant=False))
            else:
                parts.append(self._compute(h, t, temperature, entropy))
        chosen, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        return chosen, entropies if entropy else None

    def _compute(
        self, hidden: Tensor, target: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(self.logits(hidden) / temperature, dim=-1)  # (n, V)
        chosen = logprobs.gather(-1, target[:, None]).squeeze(-1)
        return chosen, -(logprobs.exp() * logprobs).sum(-1) if entropy else chosen


class _Chosen(torch.autograd.Function):
    """log softmax(factor * W h)[target]. Its gradient, d/dh = factor * (onehot(target) - p) W, is
    computed in the forward pass: (n, D) numbers to keep in place of the (n, V) logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, target: Tensor, weight: Tensor, factor: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:  # (n, D), (n,), (V, D) -> (n,), (n,)
        logits = nn.functional.linear(hidden, weight).float()
        logits = logits if factor == 1.0 else logits.mul_(factor)
        # Every pass over (n, V) numbers counts: the likeliest token gives the sum's logarithm.
        largest = logits.amax(-1, keepdim=True)
        probabilities = torch.softmax(logits, -1)
        total = largest - probabilities.amax(-1, keepdim=True).log()
        chosen = logits.gather(-1, target[:, None]) - total  # (n, 1)
        spread = chosen.new_zeros(len(chosen))
        if entropy:
            spread = total.squeeze(-1) - torch.linalg.vecdot(probabilities, logits)
        if ctx.needs_input_grad[0]:
            # p - 1 of the target by expm1, in float32: p W - W[target] would lose everything to
            # rounding where p is near 1.
            residual = probabilities.scatter_(-1, target[:, None], torch.expm1(chosen))
            ctx.save_for_backward((residual.to(weight.dtype) @ weight).mul_(-factor))
        ctx.mark_non_differentiable(spread)
        return chosen.squeeze(-1), spread

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor, _: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        (direction,) = ctx.saved_tensors
        return grad[:, None].to(direction.dtype) * direction, None, None, None, None
