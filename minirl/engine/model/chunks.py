"""Chunks: a sequence cut where its cost would exceed a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def chunks(
    items: Iterable[Item], cost: Callable[[list[Item]], int], budget: int
) -> Iterator[list[Item]]:
    """Lists of consecutive items, each as long as its `cost` allows; an item beyond the budget goes
    alone."""
    chunk: list[Item] = []
    for item in items:
        if chunk and cost([*chunk, item]) > budget:
            yield chunk
            chunk = []
        chunk.append(item)
    if chunk:
        yield chunk
