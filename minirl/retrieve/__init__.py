"""Retrievers: passages for queries, by BM25 in this process or from a server.

Invariant: a search by BM25 depends on the corpus, the recipe and the query alone, ties included:
not on the other queries of its batch, numba or the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from minirl.recipe.retriever import Bm25Retriever, RemoteRetriever
from minirl.retrieve.passage import Passage, Passages, Retriever

__all__ = ["Passage", "Passages", "Retriever", "open_retriever"]


def open_retriever(
    retriever: Bm25Retriever | RemoteRetriever, context: Sequence[Passage] = ()
) -> Retriever:
    """The retriever that a recipe names.

    context: the paragraphs that come with the task's problems, for the source `context`. Raises
    UserError for passages that cannot be read and for an empty corpus. A server is not asked before
    the first search.
    """
    if isinstance(retriever, RemoteRetriever):
        from minirl.retrieve.remote import Remote

        return Remote(retriever)
    from minirl.retrieve import cache, corpora

    return cache.open_index(lambda: corpora.read(retriever, context), retriever)
