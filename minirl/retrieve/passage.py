"""Passages, and the one interface of everything that finds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Passage:
    """What a search finds; `title` may be empty. `id` is the source's own, else the passage's
    number in the corpus, from 0."""

    title: str
    text: str
    id: str = ""


class Passages(Protocol):
    """Passages by number: a list, or rows of a file that is mapped into memory."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: int, /) -> Passage: ...
    def __iter__(self) -> Iterator[Passage]: ...


class Retriever(Protocol):
    """The one interface of them all; whatever has this method can stand in, such as a dense
    retriever."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The best `k` (>= 1) passages for each query, best first; fewer, or none, where no more
        match."""
