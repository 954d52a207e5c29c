"""The corpus of a task: its retriever, opened at the first search.

Invariant: a task whose questions are never searched for (the baseline without retrieval, SFT on answers alone) builds no index.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from minirl.recipe.retriever import Bm25Retriever, RemoteRetriever
from minirl.retrieve import Passage, Retriever, open_retriever

log = logging.getLogger(__name__)


class Corpus:
    """A retriever over what `node` names; `pooled` are the (title, text) of the task's own paragraphs.

    note: what is logged of a corpus that takes their place, given its titles.
    """

    def __init__(
        self, node: Bm25Retriever | RemoteRetriever, pooled: Sequence[tuple[str, str]], note: Callable[[Sequence[str]], str]
    ) -> None:
        self._node = node
        self._pooled = pooled
        self._note = note
        self._opened: Retriever | None = None

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """See `Retriever.search`. The first one raises UserError where the passages cannot be had."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened.search(queries, k)

    def _open(self) -> Retriever:
        opened = open_retriever(self._node, [Passage(*pair) for pair in self._pooled])
        if isinstance(self._node, Bm25Retriever) and self._node.sources != ("context",):
            log.info("retriever: %s", self._note([passage.title for passage in opened.passages]))  # type: ignore[attr-defined]
        return opened
