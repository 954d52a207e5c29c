"""The cache: what is held stays, whatever grows, moves, is forked or evicted."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minirl.engine.backend import LIBRARY
from minirl.engine.sample.kv_cache import KVCache


def cache_of(*conversations: tuple[int, ...]) -> KVCache:
    """One layer whose key at each place is the token there."""
    cache = KVCache(1, len(conversations), torch.device("cpu"), LIBRARY)
    cache.reserve(10, live=0)
    for row, tokens in enumerate(conversations):
        if tokens:
            write(cache, row, tokens)
    return cache


def write(cache: KVCache, row: int, tokens: tuple[int, ...]) -> None:
    """A forward pass over `tokens`, behind what the row holds."""
    start = cache.length(row)
    positions = torch.arange(start, start + len(tokens))[None]
    values = torch.tensor(tokens, dtype=torch.float32)[None, None, :, None]
    cache.view(torch.tensor([row]), positions, start + len(tokens)).update(values, values, 0)
    cache.extend(row, tokens)


def check(cache: KVCache) -> None:
    """The invariant: the keys are those of the tokens."""
    keys, _ = cache.layer(0, torch.zeros(1, 1, 1, 1))
    for row, tokens in enumerate(cache.tokens):
        assert keys[row, 0, : len(tokens), 0].tolist() == [float(token) for token in tokens]


def test_a_fork_is_a_prefix_of_its_source() -> None:
    cache = cache_of((1, 2, 3, 4), (9,))
    cache.fork(0, 1, 3)
    write(cache, 1, (7, 8))
    assert cache.tokens == ((1, 2, 3, 4), (1, 2, 3, 7, 8))
    check(cache)


def test_a_conversation_that_goes_on_moves_to_its_row() -> None:
    """Row 0 is live. Catches: a copy in place of a move, the last token taken as computed."""
    cache = cache_of((1, 2), (5, 6), (3, 4, 5), ())
    cache.allocate(1, (3, 4, 5, 6))
    assert cache.tokens == ((1, 2), (3, 4, 5), (5, 6), ())
    cache.allocate(1, (3, 4, 5))
    assert cache.tokens[1] == (3, 4)
    check(cache)


def test_a_shared_prefix_is_forked_and_the_oldest_evicted() -> None:
    """Catches: the source evicted, a live row changed, a prefix that is not the longest."""
    cache = cache_of((1, 2, 3), (5, 6), (7, 8))
    cache.swap(1, 1)  # used last
    cache.allocate(1, (1, 2, 9))
    assert cache.tokens == ((1, 2, 3), (1, 2), (5, 6))
    check(cache)


def test_evict_spares_a_slot_if_another_can_be_had() -> None:
    cache = cache_of((1,), (2,), (3,))
    assert cache.evict(1, keep=1) == 2
    assert cache.tokens == ((1,), (), (2,))
    check(cache)


def test_a_copy_of_the_tokens_cannot_change_the_cache() -> None:
    """Only the cache itself writes its tokens."""
    cache = cache_of((1, 2))
    assert isinstance(cache.tokens[0], tuple)
    assert cache.find_prefix([1, 2, 3]) == (0, 2)
    assert cache.find_prefix((4,)) == (0, 0)


def test_a_longer_conversation_evicts_the_one_not_used_for_longest() -> None:
    cache = KVCache(1, 4, torch.device("cpu"), LIBRARY, budget_tokens=4 * 64)
    cache.reserve(10, live=0)
    for row, tokens in enumerate(([1, 2], [3, 4], [5, 6], [7, 8])):
        view = cache.view(torch.tensor([row]), torch.tensor([[0, 1]]), 2)
        view.update(torch.full((1, 1, 2, 4), float(row)), torch.full((1, 1, 2, 4), row + 0.5), 0)
        cache.extend(row, tokens)
    cache._used = [9, 3, 8, 7]
    cache.reserve(100, live=1)  # two slots of 128: the live one, and the idle one used last
    assert cache.tokens == ((1, 2), (5, 6))
    keys, values = cache._blocks
    assert keys[0, :, 0, 0, 0].tolist() == [0.0, 2.0]
    assert values[0, :, 0, 1, 3].tolist() == [0.5, 2.5]
    with pytest.raises(RuntimeError, match=r"2 live slots, expected at most room\(200\) = 1"):
        cache.reserve(200, live=2)


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([None, 5 * 64, 9 * 64]))
def test_growing_moves_what_is_held_and_nothing_else(rng: Random, budget: int | None) -> None:
    """Three layers in one memory, grown and shrunk in place or anew, twice. Catches: a layer laid
    over one that is still to be moved."""
    layers, heads, size = 3, 2, 4
    cache = KVCache(layers, 4, torch.device("cpu"), LIBRARY, budget_tokens=budget)

    def written(tokens: tuple[int, ...], layer: int, which: int) -> Tensor:  # (heads, T, size)
        return (
            torch.tensor(tokens)[None, :, None]
            + torch.tensor([1000.0, 2000.0])[:, None, None] * (layer + 1)
            + 0.5 * which
        )

    for _ in range(2):
        cache.clear()
        for length in sorted(rng.choices(range(1, 400), k=3)):
            cache.reserve(length, live=0)
            for row in rng.sample(range(cache.count), rng.randint(1, cache.count)):
                cache.fork(row, row, 0)
                cache.extend(row, [rng.randrange(900) for _ in range(rng.randint(1, length))])
                positions = torch.arange(cache.length(row))[None]
                view = cache.view(torch.tensor([row]), positions, positions.shape[1])
                for layer in range(layers):
                    keys, values = (
                        written(cache.tokens[row], layer, which).expand(heads, -1, size)[None]
                        for which in (0, 1)
                    )
                    view.update(keys, values, layer)
            for which, block in enumerate(cache._blocks):
                for row, tokens in enumerate(cache.tokens):
                    for layer in range(layers if tokens else 0):
                        expected = written(tokens, layer, which).expand(heads, -1, size)
                        assert torch.equal(block[layer, row, :, : len(tokens)], expected)


def test_growing_where_there_is_room_takes_no_memory() -> None:
    """Catches: pages that the kernel clears again, and a second cache, at every longer turn of
    every rollout."""
    cache = KVCache(2, 4, torch.device("cpu"), LIBRARY)
    places = []
    for _ in range(2):
        cache.clear()
        for length in (50, 100, 300):
            cache.reserve(length, live=0)
            view = cache.view(torch.tensor([0]), torch.tensor([[0]]), 1)
            for layer in range(2):
                view.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), layer)
            cache.fork(0, 0, 0)
            cache.extend(0, [1])
            places.append(cache.memory[0])
    assert places[2:] == [places[2]] * 4, "from the longest on it stays where it is"
