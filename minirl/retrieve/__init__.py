"""Retrievers: passages for queries, by BM25 in this process or from a server.

Invariant: a search is a pure function of the corpus, the recipe and the query. The other queries of
its batch, the machine's compiler and the cache on the disk change nothing, ties included.
"""

from __future__ import annotations

from collections.abc import Sequence

from minirl.recipe.retriever import Bm25Retriever, RemoteRetriever
from minirl.retrieve.passage import Passage, Passages, Retriever

__all__ = ["Passage", "Passages", "Retriever", "open_retriever"]


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
