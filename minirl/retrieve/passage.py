"""Passages, and the interface of whatever finds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text that a search finds; `title` may be empty. `id` is the source's own, else the
    passage's number in the corpus, from 0."""

    title: str
    text: str
    id: str = ""


class Passages(Protocol):
    """Passages by number: a list, or rows of a file that is mapped into memory."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: int, /) -> Passage: ...
    def __iter__(self) -> Iterator[Passage]: ...


class Retriever(Protocol):
    """Any object with this method is a retriever, such as a dense one."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """At most `k` (>= 1) passages for each query, best first."""
