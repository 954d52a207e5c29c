"""Retrievers: passages for queries, by BM25 in this process or from a server.

Invariant: a search is a pure function of the corpus, the recipe and the query. The other queries of
its batch, the machine's compiler and the cache on the disk change nothing, ties included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from minirl.recipe.retriever import Bm25Retriever, RemoteRetriever


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


def open_retriever(
    node: Bm25Retriever | RemoteRetriever, context: Sequence[Passage] = ()
) -> Retriever:
    """The retriever that a recipe names.

    context: the paragraphs that come with the task's problems, in order and with repeats; the
    source `context` stands for them. Raises UserError for passages that cannot be had or read, and
    for an empty corpus. A server is not asked before the first search.
    """
    if isinstance(node, RemoteRetriever):
        from minirl.retrieve.remote import Remote

        return Remote(node)
    from minirl.retrieve import cache, corpora

    return cache.open_index(lambda: corpora.read(node, context), node)
