"""KVCache: the keys and values of live conversations, one slot each, in one preallocated tensor.

Invariant: slot s holds the keys and values of exactly the tokens that it says it holds, at
positions 0, 1, ...; whatever stands behind them is garbage that no mask shows. Only the cache
changes which tokens a slot holds. Whoever updates the weights must call `clear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from minirl.engine.backend import Backend

ROUND = 64  # capacities are multiples of this many tokens


class KVCache:
    """At most `most` slots of equal capacity, which grows when it is asked to.

    budget_tokens bounds slots x capacity: as capacity grows there are fewer slots, and the least
    recently used conversations are forgotten. keeps_memory: the memory stays as it is from one
    rollout to the next, on a GPU too.
    """

    def __init__(
        self,
        layers: int,
        most: int,
        device: torch.device,
        backend: Backend,
        budget_tokens: int | None = None,
        *,
        keeps_memory: bool = False,
    ) -> None:
        self.most = most
        self.keeps_memory = keeps_memory
        self.budget_tokens = budget_tokens
        self.device = device
        self.backend = backend
        self._layers = layers
        # Memory for keys and for values that stays from one rollout to the next.
        self._spare: list[Tensor] = []
        # Keys and values, each (layers, slots, key heads, capacity, head size).
        self._blocks: list[Tensor] = []
        self.clear()

    def clear(self) -> None:
        """Forget every conversation. On a GPU the memory goes too, unless it is to be kept:
        learning needs it between two rollouts."""
        if not self.keeps_memory or not self._blocks:
            self.count, self.capacity = self.most, 0
            self._blocks = []
            if self.device.type == "cuda":
                self._spare = []
        self._tokens: list[list[int]] = [[] for _ in range(self.count)]
        # When each slot was last given away or left, for evicting the oldest.
        self._used = [0] * self.count
        self._clock = 0

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """A copy of the tokens that each slot holds."""
        return tuple(map(tuple, self._tokens))

    @property
    def memory(self) -> tuple[int, ...]:
        """Address and shape of keys and values; () before the first forward pass."""
        return tuple(
            number for block in self._blocks for number in (block.data_ptr(), *block.shape)
        )

    def length(self, slot: int) -> int:
        """How many tokens a slot holds."""
        return len(self._tokens[slot])

    def room(self, length: int) -> int:
        """How many slots there can be if each must hold `length` tokens; at least one."""
        capacity = max(self.capacity, -(-length // ROUND) * ROUND)
        return min(self.count, max(1, (self.budget_tokens or self.count * capacity) // capacity))

    def reserve(self, length: int, live: int) -> None:
        """Make every slot hold at least `length` tokens. The first `live` slots, at most
        `room(length)`, are kept in any case."""
        if length <= self.capacity:
            return
        count = self.room(length)
        if live > count:
            raise RuntimeError(
                f"reserve: {live} live slots, expected at most room({length}) = {count}"
            )
        self.capacity = -(-length // ROUND) * ROUND
        idle = sorted(
            range(live, self.count), key=lambda slot: (not self._tokens[slot], -self._used[slot])
        )
        kept = [*range(live), *sorted(idle[: count - live])]
        self.count = count
        self._tokens = [self._tokens[slot] for slot in kept]
        self._used = [self._used[slot] for slot in kept]
        if not any(self._tokens):
            self._blocks = []
        # One after the other: keys and values, old and new at once, are twice the cache.
        for which in range(len(self._blocks)):
            self._move(which, kept)

    def find_prefix(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The slot that shares the longest prefix with `tokens`, the lowest among equals, and the
        prefix's length."""
        best, slot = 0, 0
        tokens = list(tokens)  # a list never equals a tuple
        for s, held in enumerate(self._tokens):
            # Cheap refusals first: most slots differ early or cannot beat the best.
            if (
                len(held) <= best
                or held[best] != tokens[min(best, len(tokens) - 1)]
                or held[0] != tokens[0]
            ):
                continue
            length = _common(held, tokens)
            if length > best:
                best, slot = length, s
        return slot, best

    def allocate(self, row: int, tokens: Sequence[int]) -> None:
        """Make slot `row`, the first that is idle, hold the longest prefix of `tokens` that any
        slot holds; never the last token, which must be computed for its logits."""
        source, length = self.find_prefix(tokens)
        if source >= row and length == len(self._tokens[source]):
            self.swap(source, row)  # the conversation itself goes on
        else:
            self.fork(self.evict(row, keep=source), row, length)
        del self._tokens[row][len(tokens) - 1 :]

    def evict(self, row: int, keep: int = -1) -> int:
        """Empty slot `row`, the first that is idle: its conversation takes the place of the least
        recently used one behind it, which is forgotten.

        Slot `keep` is spared if another can be had; returns where its conversation then is.
        """
        idle = range(row, self.count)
        victim = min(idle, key=lambda s: (s == keep, bool(self._tokens[s]), self._used[s]))
        self.swap(victim, row)
        moved = {row: victim, victim: row}.get(keep, keep)
        if moved != row:
            self._tokens[row] = []
        return moved

    def fork(self, source: int, target: int, length: int) -> None:
        """Make slot `target` hold the first `length` tokens of `source`."""
        for block in self._blocks * (source != target):
            block[:, target, :, :length] = block[:, source, :, :length]
        self._tokens[target] = self._tokens[source][:length]

    def swap(self, a: int, b: int) -> None:
        """Exchange two slots."""
        length = max(len(self._tokens[a]), len(self._tokens[b]))
        for block in self._blocks * (a != b):
            kept = block[:, a, :, :length].clone()
            block[:, a, :, :length] = block[:, b, :, :length]
            block[:, b, :, :length] = kept
        self._tokens[a], self._tokens[b] = self._tokens[b], self._tokens[a]
        self._clock += 1
        self._used[a], self._used[b] = self._used[b], self._clock

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        """Say that a forward pass has written `tokens` behind those that the slot holds."""
        self._tokens[slot] += tokens

    def view(self, rows: slice | Tensor, positions: Tensor, width: int) -> KVView:
        """The cache of one forward pass: slots `rows` (B), written at `positions` (B, T), of which
        the first `width` keys are read."""
        return KVView(self, rows, positions, width)

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, (slots, K, capacity, D). The first call of all takes the
        memory, for keys (B, K, T, D) `like` these."""
        if not self._blocks:
            self._spare = self._spare or [like.new_zeros(0), like.new_zeros(0)]
            self._blocks = [self._make(which, like) for which in (0, 1)]
        keys, values = self._blocks
        return keys[number], values[number]

    def _move(self, which: int, kept: Sequence[int]) -> None:
        """Give the keys (0) or values (1) of the slots `kept` the present capacity: in the memory
        they have, if it is large enough."""
        old = self._blocks[which]
        is_in_place = self._spare[which].numel() >= prod(self._shape(old))
        if not is_in_place:
            self._spare[which] = old.new_zeros(0)  # in use by the old block, which is read here
        new = self._make(which, old)
        # A layer's new place may lie over its own old one and those of layers that have moved
        # already, never over one that has not.
        grows = new[0].numel() > old[0].numel()
        for layer in reversed(range(self._layers)) if grows else range(self._layers):
            held = old[layer].clone() if is_in_place else old[layer]
            for slot, source in enumerate(kept):
                length = len(self._tokens[slot])
                new[layer, slot, :, :length] = held[source, :, :length]
        self._blocks[which] = new

    def _shape(self, like: Tensor) -> tuple[int, ...]:
        """(layers, slots, K, capacity, D), for keys or values (..., K, T, D) `like` these."""
        return self._layers, self.count, like.shape[-3], self.capacity, like.shape[-1]

    def _make(self, which: int, like: Tensor) -> Tensor:
        """Empty keys (0) or values (1)."""
        shape = self._shape(like)
        wanted = prod(shape)
        if self._spare[which].numel() < wanted:
            self._spare[which] = like.new_zeros(0)  # before the new memory is taken
            self._spare[which] = like.new_zeros(wanted)
        memory = self._spare[which][:wanted]
        return self.backend.view_keys(memory, shape) if which == 0 else memory.view(shape)


class KVView(Cache):  # type: ignore[misc]
    """The cache as one forward pass of a stock transformers model sees it; see `KVCache.view`."""

    def __init__(self, cache: KVCache, rows: slice | Tensor, positions: Tensor, width: int) -> None:
        super().__init__(layers=[])
        self._cache = cache
        self._rows, self._positions, self._width = rows, positions, width
        self._numbers = torch.arange(cache.count, device=cache.device)[rows, None]  # (B, 1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """transformers' hook: stores (B, K, T, D) and returns all keys and values of these rows,
        (B, K, width, D)."""
        keys, values = self._cache.layer(layer_idx, key_states)
        keys[self._numbers, :, self._positions] = key_states.transpose(1, 2)
        values[self._numbers, :, self._positions] = value_states.transpose(1, 2)
        return keys[self._rows, :, : self._width], values[self._rows, :, : self._width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Never used for positions, which are always given; models ask all the same."""
        return 0


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix, by halving: slices compare in C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
