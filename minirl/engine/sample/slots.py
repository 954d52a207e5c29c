"""Slots: the keys and values of live conversations, one slot each, in one preallocated tensor.

Plugged into stock transformers models as their cache. Invariant: slot s holds the keys and values
of exactly `tokens[s]`, at positions 0 .. len - 1; what stands behind is garbage that no mask shows.
Whoever updates the weights must call `clear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from minirl.engine.backend import Backend

ROUND = 64  # capacities are multiples of this many tokens


class Slots(Cache):  # type: ignore[misc]
    """At most `most` slots of equal capacity, which grows as it is asked to. Set `rows` and
    `positions` (by `aim`) before a forward pass.

    budget_tokens bounds slots x capacity: as capacity grows there are fewer slots, and the least
    recently used conversations are forgotten.
    keeps_memory: the memory stays as it is from one rollout to the next, on a GPU too.
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
        super().__init__(layers=[])
        self.most = most
        self.keeps_memory = keeps_memory
        self.budget_tokens = budget_tokens
        self.device = device
        self._backend = backend
        self._layers = layers
        self._spare: list[
            Tensor
        ] = []  # memory for keys and for values that stays from one rollout to the next
        self._rows: slice | Tensor = slice(0, 0)
        self._index = torch.zeros(0, 1, dtype=torch.int64)  # the same rows as numbers, (B, 1)
        self._positions = torch.zeros(0, 0, dtype=torch.int64)
        self._width = 0
        self._blocks: list[
            Tensor
        ] = []  # keys and values, each (layers, slots, key heads, capacity, head size)
        self.clear()

    def clear(self) -> None:
        """Forget every conversation. On a GPU the memory goes too, unless it is to be kept:
        learning needs it between two rollouts."""
        if not self.keeps_memory or not self._blocks:
            self.count, self.capacity = self.most, 0
            self._blocks = []
            if self.device.type == "cuda":
                self._spare = []
        self.tokens: list[list[int]] = [[] for _ in range(self.count)]
        self._used = [
            0
        ] * self.count  # when each slot was last given away or left, for evicting the oldest
        self._clock = 0

    @property
    def memory(self) -> tuple[int, ...]:
        """Where and in which shape keys and values stand; () before the first forward pass."""
        return tuple(
            number for block in self._blocks for number in (block.data_ptr(), *block.shape)
        )

    def room(self, length: int) -> int:
        """How many slots there can be when each must hold `length` tokens; at least one."""
        capacity = max(self.capacity, -(-length // ROUND) * ROUND)
        return min(self.count, max(1, (self.budget_tokens or self.count * capacity) // capacity))

    def reserve(self, length: int, live: int) -> None:
        """Make every slot hold at least `length` tokens; the first `live` slots, at most
        `room(length)`, are kept whatever it costs."""
        if length <= self.capacity:
            return
        count = self.room(length)
        if live > count:
            raise RuntimeError(
                f"reserve: {live} live slots, expected at most room({length}) = {count}"
            )
        self.capacity = -(-length // ROUND) * ROUND
        idle = sorted(
            range(live, self.count), key=lambda slot: (not self.tokens[slot], -self._used[slot])
        )
        kept = [*range(live), *sorted(idle[: count - live])]
        self.count = count
        self.tokens, self._used = (
            [self.tokens[slot] for slot in kept],
            [self._used[slot] for slot in kept],
        )
        if not any(self.tokens):
            self._blocks = []
        for which in range(
            len(self._blocks)
        ):  # one after the other: keys and values, old and new at once are twice the cache
            self._move(which, kept)

    def _move(self, which: int, kept: Sequence[int]) -> None:
        """Give the keys (0) or values (1) of the slots `kept` the present capacity: in the memory
        they have, where it is large enough."""
        old = self._blocks[which]
        heads, size = old.shape[2], old.shape[4]
        is_in_place = (
            self._spare[which].numel() >= self._layers * self.count * heads * self.capacity * size
        )
        if not is_in_place:
            self._spare[which] = old.new_zeros(0)  # in use by the old block, which is read here
        new = self._make(which, old, heads=heads, size=size)
        # A layer's new place may lie over its own old one and those of layers that have moved
        # already, never over one that has not.
        grows = new[0].numel() > old[0].numel()
        for layer in reversed(range(self._layers)) if grows else range(self._layers):
            held = old[layer].clone() if is_in_place else old[layer]
            for slot, source in enumerate(kept):
                length = len(self.tokens[slot])
                new[layer, slot, :, :length] = held[source, :, :length]
        self._blocks[which] = new

    def _make(self, which: int, like: Tensor, *, heads: int, size: int) -> Tensor:
        """Empty keys (0) or values (1)."""
        shape = self._layers, self.count, heads, self.capacity, size
        wanted = self._layers * self.count * heads * self.capacity * size
        if self._spare[which].numel() < wanted:
            self._spare[which] = like.new_zeros(0)  # before the new memory is taken
            self._spare[which] = like.new_zeros(wanted)
        memory = self._spare[which][:wanted]
        return self._backend.view_keys(memory, shape) if which == 0 else memory.view(shape)

    def aim(self, rows: slice | Tensor, positions: Tensor, width: int) -> None:
        """Where the next forward pass writes, positions (B, T) of slots `rows` (B), and how many
        keys it reads."""
        self._rows, self._positions, self._width = rows, positions, width
        index = (
            torch.arange(rows.start, rows.stop, device=self.device)
            if isinstance(rows, slice)
            else rows
        )
        self._index = index[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """transformers' hook: stores (B, K, T, D) and returns all keys and values of these rows,
        (B, K, width, D)."""
        if not self._blocks:
            self._spare = self._spare or [key_states.new_zeros(0), key_states.new_zeros(0)]
            self._blocks = [
                self._make(which, key_states, heads=key_states.shape[1], size=key_states.shape[3])
                for which in (0, 1)
            ]
        keys, values = (block[layer_idx] for block in self._blocks)
        keys[self._index, :, self._positions] = key_states.transpose(1, 2)
        values[self._index, :, self._positions] = value_states.transpose(1, 2)
        return keys[self._rows, :, : self._width], values[self._rows, :, : self._width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Never used for positions, which are always given; models ask all the same."""
        return 0

    def copy(self, source: int, target: int, length: int) -> None:
        """Fork: `target` becomes the first `length` tokens of `source`."""
        for block in self._blocks * (source != target):
            block[:, target, :, :length] = block[:, source, :, :length]
        self.tokens[target] = self.tokens[source][:length]

    def swap(self, a: int, b: int) -> None:
        """Exchange two slots."""
        length = max(len(self.tokens[a]), len(self.tokens[b]))
        for block in self._blocks * (a != b):
            kept = block[:, a, :, :length].clone()
            block[:, a, :, :length] = block[:, b, :, :length]
            block[:, b, :, :length] = kept
        self.tokens[a], self.tokens[b] = self.tokens[b], self.tokens[a]
        self._clock += 1
        self._used[a], self._used[b] = self._used[b], self._clock

    def bring(self, tokens: Sequence[int], row: int) -> None:
        """Make slot `row`, the first that is not being decoded, hold the longest prefix of `tokens`
        that any slot holds.

        At most all tokens but the last, which must be computed for its logits.
        """
        source, length = self.longest_prefix(tokens)
        if source >= row and length == len(self.tokens[source]):
            self.swap(source, row)  # the conversation itself goes on
        else:
            moved = self.vacate(row, keep=source)
            self.copy(moved, row, length)
        del self.tokens[row][len(tokens) - 1 :]

    def vacate(self, row: int, keep: int = -1) -> int:
        """Empty slot `row` by moving the least recently used conversation behind it there and
        forgetting that.

        Slot `keep` is spared where another can be had; returns where its conversation then is.
        """
        idle = range(row, self.count)
        victim = min(idle, key=lambda s: (s == keep, bool(self.tokens[s]), self._used[s]))
        self.swap(victim, row)
        moved = {row: victim, victim: row}.get(keep, keep)
        if moved != row:
            self.tokens[row] = []
        return moved

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The slot that shares the longest prefix with `tokens`, and its length; the lowest slot
        among equals."""
        best, slot = 0, 0
        tokens = list(tokens)  # a list never equals a tuple
        for s, held in enumerate(self.tokens):
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
