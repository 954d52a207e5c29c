"""Attention for tokens that share prefixes: one function, registered with transformers'
AttentionInterface.

A micro-batch is ONE packed row of bundles, each `[prefix | completion 1 | ... | completion G]`. The
prefix attends to itself causally, a completion to the prefix and to itself causally. Invariant:
every token sees exactly the tokens it would see in a plain row of its own, at the same positions,
so log-probabilities and gradients are those of plain rows up to rounding.

The layout reaches the function as the keyword `layout` of `model(...)`. Without it the function is
stock attention over the mask it is given. Either way the query heads that share a key head stand
one after the other as one longer query, so that keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minirl.engine.backend import LIBRARY, Backend

NAME = "minirl"
# Families whose attention is plain softmax attention through the interface, with or without sliding
# windows.
FAMILIES = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "gemma2", "gemma3", "gemma3_text"}
)


def supports(config: Any) -> bool:
    """Whether every layer of a model can share a prefix, by its config."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return (
        text.model_type in FAMILIES
        and kinds <= {"full_attention", "sliding_attention"}
        and not getattr(text, "use_bidirectional_attention", False)
    )


def stock_attention(config: Any) -> str:
    """The library's own attention for a model: sdpa, which has no soft cap on scores (Gemma 2) and
    refuses such models."""
    is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if is_capped else "sdpa"


@dataclass(frozen=True, slots=True)
class Rule:
    """How a layer's scores are made, and by whom. window: keys that a token sees, itself included;
    None for all. softcap: scores s become softcap * tanh(s / softcap) (Gemma 2)."""

    scale: float
    window: int | None
    softcap: float | None
    backend: Backend

    def attention(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Softmax attention of query (B, H, T, D) to key and value (B, K, T', D), H = shared * K.

        bias: a bool mask of the keys that are seen, or numbers added to the scores; (shared * T,
        T') or (B, 1, shared * T, T').
        """
        longer = query.reshape(len(query), key.shape[1], -1, query.shape[3])
        if self.softcap is None:
            out = self.backend.attention(longer, key, value, bias, self.scale)
        else:
            scores = (longer @ key.transpose(-1, -2)).float() * self.scale
            scores = self.softcap * torch.tanh(scores / self.softcap)
            # A padded row sees nothing: the least number, not minus infinity, keeps it from NaN.
            least = torch.finfo(scores.dtype).min
            is_mask = bias.dtype == torch.bool
            scores = scores.masked_fill(~bias, least) if is_mask else scores + bias
            out = torch.softmax(scores, dim=-1).to(query.dtype) @ value
        return out.reshape(query.shape)

    def unmasked(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """Causal attention without a bias; None where it takes one."""
        length = query.shape[2]
        if self.softcap is not None or (self.window is not None and self.window < length):
            return None
        return self.backend.unmasked(query, key, value, self.scale, is_causal=length > 1)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A shared prefix of `prefix` tokens and its completions of `lengths` tokens, packed one after
    the other.

    take: for each of the G * R places of a padded grid (R the longest completion) the packed
    completion token that stands there, or 0;
    place: for each packed completion token its place in the grid.
    """

    prefix: int
    lengths: tuple[int, ...]
    take: Tensor  # (G * R,) int64
    place: Tensor  # (sum of lengths,) int64

    @classmethod
    def of(cls, prefix: int, lengths: Sequence[int], device: torch.device) -> Bundle:
        """The bundle of these lengths, with its index tensors on `device`."""
        width = max(lengths)
        place = torch.cat([torch.arange(n) + i * width for i, n in enumerate(lengths)])
        take = torch.zeros(len(lengths) * width, dtype=torch.int64)
        take[place] = torch.arange(len(place))
        return cls(prefix, tuple(lengths), take.to(device), place.to(device))

    def to_grid(self, x: Tensor) -> Tensor:
        """Packed completions (1, H, C, D) as (G, H, R, D)."""
        grid: Tensor = _Rearrange.apply(x, self.take, self.place)
        count, width = len(self.lengths), max(self.lengths)
        return grid.view(x.shape[1], count, width, x.shape[3]).transpose(0, 1)

    def from_grid(self, x: Tensor) -> Tensor:
        """(G, H, R, D) as packed completions (1, H, C, D)."""
        flat = x.transpose(0, 1).reshape(1, x.shape[1], -1, x.shape[3])
        packed: Tensor = _Rearrange.apply(flat, self.place, self.take)
        return packed


@dataclass(frozen=True, slots=True)
class Layout:
    """The bundles of one packed row, in order. Biases are made once for all layers of a kind, and
    autograd keeps each once."""

    bundles: tuple[Bundle, ...]
    biases: dict[Any, Tensor] = field(default_factory=dict)

    def attend(self, rule: Rule, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(1, H, T, D), where query is (1, H, T, D) and key and value are (1, K, T, D)."""
        sizes = [size for bundle in self.bundles for size in (bundle.prefix, sum(bundle.lengths))]
        pieces = [torch.split(x, sizes, dim=2) for x in (query, key, value)]
        out: list[Tensor] = []
        for i, bundle in enumerate(self.bundles):
            prefix_q, prefix_k, prefix_v = (piece[2 * i] for piece in pieces)
            if bundle.prefix:
                alone = rule.unmasked(prefix_q, prefix_k, prefix_v)
                if alone is None:
                    bias = self.bias(0, bundle.prefix, rule, prefix_q, prefix_k)
                    alone = rule.attention(prefix_q, prefix_k, prefix_v, bias)
                out.append(alone)
            q, k, v = (bundle.to_grid(piece[2 * i + 1]) for piece in pieces)
            if bundle.prefix:
                k = torch.cat([prefix_k.expand(len(k), -1, -1, -1), k], dim=2)
                v = torch.cat([prefix_v.expand(len(v), -1, -1, -1), v], dim=2)
            # A padded place stands after every real one of its row: causality alone hides it.
            bias = self.bias(bundle.prefix, q.shape[2], rule, q, k)
            out.append(bundle.from_grid(rule.attention(q, k, v, bias)))
        return torch.cat(out, dim=2)

    def bias(self, prefix: int, width: int, rule: Rule, query: Tensor, key: Tensor) -> Tensor:
        """0 for the keys up to each of `width` queries after the prefix, minus infinity for later
        ones and those outside the window; (shared * width, prefix + width)."""
        shared, window = query.shape[1] // key.shape[1], rule.window
        multiple = rule.backend.bias_multiple
        made_for = (prefix, width, window, shared, multiple, query.dtype)
        if made_for not in self.biases:
            at = torch.arange(prefix, prefix + width, device=query.device)[:, None]
            bias = _bias(at - torch.arange(prefix + width, device=query.device), window, query)
            padded = F.pad(bias, (0, -(prefix + width) % multiple)).repeat(shared, 1)
            self.biases[made_for] = padded[:, : prefix + width]
        return self.biases[made_for]


@dataclass(slots=True)
class Cached:
    """B rows of T new tokens at `positions` (B, T), each looking at its own cached keys 0 .. width
    - 1."""

    positions: Tensor
    width: int
    biases: dict[Any, Tensor] = field(default_factory=dict)

    def attend(self, rule: Rule, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, H, T, D), where query is (B, H, T, D) and key and value are (B, K, width, D)."""
        return rule.attention(query, key, value, self.bias(rule, query, key))

    def bias(self, rule: Rule, query: Tensor, key: Tensor) -> Tensor:
        """0 for the cached keys up to each new token, minus infinity for later ones and those
        outside the window; (B, 1, shared * T, width)."""
        shared = query.shape[1] // key.shape[1]
        made_for = (rule.window, shared, query.dtype)
        if made_for not in self.biases:
            keys = torch.arange(self.width, device=query.device)
            bias = _bias(self.positions[:, None, :, None] - keys, rule.window, query)
            self.biases[made_for] = bias.repeat(1, 1, shared, 1)
        return self.biases[made_for]


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: Layout | Cached | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    backend: Backend = LIBRARY,
    **_: Any,
) -> tuple[Tensor, None]:
    """The interface's function: query (B, H, T, D), key and value (B, K, T', D) with H a multiple
    of K; returns (B, T, H, D).

    With a layout attention_mask is ignored (and B is 1 where it is packed). Without: a bool mask
    (B, 1, T, T'), or None for causal.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is not None:
        rule = Rule(scale, sliding_window, softcap, backend)
        out = layout.attend(rule, query, key, value)
    else:  # the mask has the window in it
        out = _plain(Rule(scale, None, softcap, backend), query, key, value, attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _plain(rule: Rule, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        out = rule.unmasked(query, key, value)
        if out is not None:
            return out
        size = (query.shape[2], key.shape[2])
        mask = torch.ones(size, dtype=torch.bool, device=query.device).tril(size[1] - size[0])
    if query.shape[2] > 1:  # a single query's mask is broadcast over the heads
        mask = mask.repeat(*(1,) * (mask.dim() - 2), query.shape[1] // key.shape[1], 1)
    return rule.attention(query, key, value, mask)


def _bias(behind: Tensor, window: int | None, like: Tensor) -> Tensor:
    """0 for keys that are 0 .. window - 1 places behind, else minus infinity."""
    mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    bias = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill_(~mask, -torch.inf)


class _Rearrange(torch.autograd.Function):
    """x[:, :, forward], whose gradient is gathered by `backward` in place of a scatter: the two
    undo each other on all real tokens. Padded places reach nothing, so their gradient is dropped
    (into the grid) or zero (out of it)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        ctx.backward_index, ctx.forward_index, ctx.length = backward, forward, x.shape[2]
        return x.index_select(2, forward)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        out = grad.index_select(2, ctx.backward_index)
        if len(ctx.forward_index) < ctx.length:  # out of the grid: padded places fed nothing
            padded = torch.ones(ctx.length, dtype=torch.bool, device=grad.device)
            padded[ctx.forward_index] = False
            out = out.masked_fill(padded[:, None], 0.0)
        return out, None, None
