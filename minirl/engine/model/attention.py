"""Attention for tokens that share prefixes: one function, registered with transformers'
AttentionInterface.

A micro-batch is ONE packed row of bundles, each `[prefix | completion 1 | ... | completion G]`. The
prefix attends to itself causally, a completion to the prefix and to itself causally. Invariant:
every token sees exactly the tokens it would see in a plain row of its own, at the same positions,
so log-probabilities and gradients are those of plain rows up to rounding.

The layout reaches the function as the keyword `layout` of `model(...)`. Without it the function is
stock attention over the mask it is given, with the query heads that share a key head seen as a
longer query, so that keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from minirl.engine.cpu import attention as cpu_attention

NAME = "minirl"
# Families whose attention is plain softmax attention through the interface, with or without sliding
# windows.
FAMILIES = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "gemma2", "gemma3", "gemma3_text"}
)


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

    @property
    def grid(self) -> tuple[int, int]:
        """Completions, and the length of the longest."""
        return len(self.lengths), max(self.lengths)

    @classmethod
    def of(cls, prefix: int, lengths: Sequence[int], device: torch.device) -> Bundle:
        """The bundle of these lengths, with its index tensors on `device`."""
        width = max(lengths)
        place = torch.cat([torch.arange(n) + i * width for i, n in enumerate(lengths)])
        take = torch.zeros(len(lengths) * width, dtype=torch.int64)
        take[place] = torch.arange(len(place))
        return cls(prefix, tuple(lengths), take.to(device), place.to(device))


@dataclass(slots=True)
class Cached:
    """B rows of T new tokens at `positions` (B, T), each looking at its own cached keys 0 .. width
    - 1."""

    positions: Tensor
    width: int
    biases: dict[int | None, Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, heads: int, shared: int, dtype: torch.dtype) -> Tensor:
        """What hides all cached keys behind each new token, added to the scores of its query heads,
        (B, heads, shared * T, width).

        heads: key heads, or 1 to have it broadcast over them; shared: query heads of each, which
        stand as one longer query.
        """
        if window not in self.biases:
            behind = self.positions[:, None, None, :, None] - torch.arange(
                self.width, device=self.positions.device
            )
            mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
            rows, _, _, length, width = mask.shape
            mask = mask.expand(rows, heads, shared, length, width).reshape(
                rows, heads, shared * length, width
            )
            self.biases[window] = cpu_attention.bias(mask, dtype)
        return self.biases[window]


@dataclass(frozen=True, slots=True)
class Layout:
    """The bundles of one packed row, in order; what their masks add to scores is made once for all
    layers of a kind, and kept for the backward pass once."""

    bundles: tuple[Bundle, ...]
    biases: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def bias(
        self, prefix: int, width: int, window: int | None, shared: int, like: Tensor
    ) -> Tensor:
        """What hides from each of `width` queries after the prefix all keys behind it, (shared *
        width, prefix + width) of `like`'s kind.

        shared: query heads of a key head, which stand as one longer query.
        """
        key = (prefix, width, window)
        if key not in self.biases:
            query = torch.arange(prefix, prefix + width, device=like.device)[:, None]
            seen = torch.arange(prefix + width, device=like.device)[None, :]
            mask = seen <= query if window is None else (seen <= query) & (query - seen < window)
            room = -(prefix + width) % row_multiple(like.device)
            padded = F.pad(cpu_attention.bias(mask, like.dtype), (0, room)).repeat(shared, 1)
            self.biases[key] = padded[:, : prefix + width]
        return self.biases[key]


def supports(config: Any) -> bool:
    """Whether a model's every layer can share a prefix, by its config."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return (
        text.model_type in FAMILIES
        and kinds <= {"full_attention", "sliding_attention"}
        and not _is_bidirectional(text)
    )


def install(model: Any) -> str:
    """Let a supported model compute its attention here, with and without a layout; the name of the
    library's own way that it came with."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if model.config._attn_implementation != NAME:
        model.stock_attention = model.config._attn_implementation
        model.set_attn_implementation(NAME)
    stock: str = model.stock_attention
    return stock


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
    **_: Any,
) -> tuple[Tensor, None]:
    """The interface's function: query (B, H, T, D), key and value (B, K, T', D) with H a multiple
    of K; returns (B, T, H, D).

    With a layout attention_mask is ignored (and B is 1 where it is packed). Without: a bool mask
    (B, 1, T, T'), or None for causal.
    """
    if isinstance(layout, Cached):
        out = _cached(query, key, value, layout, scaling, sliding_window, softcap)
    elif layout is not None:
        out = _shared(query, key, value, layout, scaling, sliding_window, softcap)
    elif attention_mask is None and softcap is None:
        out = _unmasked(query, key, value, scaling, causal=query.shape[2] > 1)
    else:
        if attention_mask is None:
            size = (query.shape[2], key.shape[2])
            attention_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril(
                size[1] - size[0]
            )
        shared = query.shape[1] // key.shape[1]
        # The rows of heads that share a key head stand one after the other; a single row is
        # broadcast.
        mask = (
            attention_mask.repeat(*(1,) * (attention_mask.dim() - 2), shared, 1)
            if query.shape[2] > 1
            else attention_mask
        )
        out = _masked(query, key, value, mask, scaling, softcap)
    return out.transpose(1, 2).contiguous(), None


def _shared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    sizes = [size for bundle in layout.bundles for size in (bundle.prefix, sum(bundle.lengths))]
    pieces = [torch.split(x, sizes, dim=2) for x in (query, key, value)]
    out: list[Tensor] = []
    for i, bundle in enumerate(layout.bundles):
        prefix_q, prefix_k, prefix_v = (piece[2 * i] for piece in pieces)
        if bundle.prefix:
            out.append(_causal(prefix_q, prefix_k, prefix_v, layout, scaling, window, softcap))
        q, k, v = (_to_grid(piece[2 * i + 1], bundle) for piece in pieces)
        count, width = bundle.grid
        if bundle.prefix:
            k = torch.cat([prefix_k.expand(count, -1, -1, -1), k], dim=2)
            v = torch.cat([prefix_v.expand(count, -1, -1, -1), v], dim=2)
        # A padded place stands after every real one of its row, so causality alone hides it.
        bias = layout.bias(bundle.prefix, width, window, q.shape[1] // k.shape[1], q)
        out.append(_from_grid(_masked(q, k, v, bias, scaling, softcap), bundle))
    return torch.cat(out, dim=2)


def _cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Cached,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    batch, heads, length, size = query.shape
    shared = heads // key.shape[1]
    if softcap is not None or key.stride(-1) == 1:
        return _masked(
            query, key, value, layout.bias(window, 1, shared, query.dtype), scaling, softcap
        )
    scale = size**-0.5 if scaling is None else scaling
    query = query.reshape(batch, key.shape[1], shared * length, size)
    if (
        length == 1
        and (out := cpu_attention.decode(query, key, value, layout.positions, window, scale))
        is not None
    ):
        return out.view(batch, heads, length, size)
    bias = layout.bias(window, key.shape[1], shared, query.dtype).flatten(0, 1)
    return cpu_attention.attention(query, key, value, bias, scale).reshape(
        batch, heads, length, size
    )


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    if softcap is None and (window is None or window >= q.shape[2]) and not cpu_attention.serves(q):
        return _unmasked(q, k, v, scaling, causal=True)
    return _masked(
        q, k, v, layout.bias(0, q.shape[2], window, q.shape[1] // k.shape[1], q), scaling, softcap
    )


def _unmasked(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, *, causal: bool
) -> Tensor:
    if not shares_heads(query.device, query.dtype):
        key, value = (
            x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value)
        )
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=scaling, enable_gqa=True
    )


def shares_heads(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library's fast kernels let query heads share a key head. Of CUDA's only flash
    attention does, from Ampere on and in half precision; without it the library falls back to a
    kernel that holds all scores in float32."""
    return device.type != "cuda" or (
        dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device)[0] >= 8
    )


def row_multiple(device: torch.device) -> int:
    """Of how many numbers the rows of a bias are multiples. CUDA's kernels want 16 bytes, and would
    copy a whole bias in every layer."""
    return 8 if device.type == "cuda" else 1


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Softmax attention; the query heads of a key head stand one after the other as one query of
    shared * T.

    mask: which keys are seen (bool), or what is added to the scores; (shared * T, T') or (B, 1,
    shared * T, T').
    """
    batch, heads, length, size = query.shape
    shared = heads // key.shape[1]
    query = query.reshape(batch, key.shape[1], shared * length, size)
    if (
        softcap is None
        and mask.dim() == 2
        and mask.dtype == query.dtype
        and cpu_attention.serves(query)
    ):
        out = cpu_attention.attention(
            query, key, value, mask, size**-0.5 if scaling is None else scaling
        )
    elif softcap is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:
        scores = (query @ key.transpose(-1, -2)).float() * (
            size**-0.5 if scaling is None else scaling
        )
        # A padded row sees nothing: the least number, not minus infinity, keeps it from becoming
        # NaN.
        scores = softcap * torch.tanh(scores / softcap)
        scores = (
            scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            if mask.dtype == torch.bool
            else scores + mask
        )
        out = torch.softmax(scores, dim=-1).to(query.dtype) @ value
    return out.reshape(batch, heads, length, size)


def _to_grid(x: Tensor, bundle: Bundle) -> Tensor:
    """Packed completions (1, H, C, D) as (G, H, R, D)."""
    count, width = bundle.grid
    grid: Tensor = _Rearrange.apply(x, bundle.take, bundle.place)
    return grid.view(x.shape[1], count, width, x.shape[3]).transpose(0, 1)


def _from_grid(x: Tensor, bundle: Bundle) -> Tensor:
    """(G, H, R, D) as packed completions (1, H, C, D)."""
    flat = x.transpose(0, 1).reshape(1, x.shape[1], -1, x.shape[3])
    packed: Tensor = _Rearrange.apply(flat, bundle.place, bundle.take)
    return packed


class _Rearrange(torch.autograd.Function):
    """x[:, :, forward], whose gradient is gathered by `backward` in place of a scatter: the two
    undo each other on all real tokens, and what stands in padded places reaches nothing, so its
    gradient is dropped (into the grid) or zero (out of it)."""

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


def _is_bidirectional(text: Any) -> bool:
    return bool(getattr(text, "use_bidirectional_attention", False))
