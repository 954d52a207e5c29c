"""The corpus of a task: its retriever, opened when it is needed.

Invariant: a task's own paragraphs are indexed at the first search, so not where nobody searches
(the baseline without retrieval, SFT on answers alone); whatever takes their place is opened at
start, for what it holds is told then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from minirl.recipe.retriever import Bm25Retriever, RemoteRetriever
from minirl.retrieve import Passage, Retriever, open_retriever


class Corpus:
    """A retriever over what `node` names; `pooled` are the (title, text) of the task's own
    paragraphs."""

    def __init__(
        self, node: Bm25Retriever | RemoteRetriever, pooled: Sequence[tuple[str, str]]
    ) -> None:
        self._node = node
        self._pooled = pooled
        self._opened: Retriever | None = None

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """See `Retriever.search`. The first one raises UserError where the passages cannot be
        had."""
        return self._open().search(queries, k)

    def note(self, say: Callable[[Iterable[str], int], str]) -> str:
        """What a user should know of it at start. say: the same of passages at hand, given their
        titles and how many there are.

        Raises UserError where passages other than the task's own cannot be had.
        """
        if isinstance(self._node, RemoteRetriever):
            return (
                f"searches are answered by {self._node.url}; gold paragraphs there: unknown (a"
                " server)"
            )
        if self._node.sources == ("context",):
            return say((title for title, _ in self._pooled), len(self._pooled))
        passages = self._open().passages  # type: ignore[attr-defined]
        return say((passage.title for passage in passages), len(passages))

    def _open(self) -> Retriever:
        if self._opened is None:
            self._opened = open_retriever(self._node, [Passage(*pair) for pair in self._pooled])
        return self._opened
