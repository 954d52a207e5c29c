"""BM25 over bm25s: words, the index, and the best passages of a query.

Invariant: passages rank by score, and by their number in the corpus where scores are equal, with
and without numba; a passage that shares no word with the query is not found; added documents score
as if they had been there from the start.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN

from minirl.errors import UserError
from minirl.recipe.retriever import Bm25Retriever
from minirl.retrieve.passage import Passage, Passages
from minirl.retrieve.store import Stored, store

# Raise this number with every change of `words`.
WORDS_VERSION = 1
MAX_WORD_CHARS = 64
NUMBA: bool = bm25s.NUMBA_AVAILABLE
_WORD = re.compile(r"[^\W_]+")
# They match nearly everything and cost time. "s" is the rest of a possessive.
_STOP_WORDS = frozenset((*STOPWORDS_EN, "s"))

# bm25s sets itself to DEBUG and reports every index that it builds.
logging.getLogger("bm25s").setLevel(logging.WARNING)


def words(text: str) -> list[str]:
    """The words of a text in order: runs of letters and digits, without case, accents and other
    marks. No stemming: it brought no gain."""
    if not text.isascii():
        text = "".join(
            char
            for char in unicodedata.normalize("NFKD", text)
            if unicodedata.category(char)[0] != "M"
        )
    return _WORD.findall(text.casefold())


def query_words(query: str, limit: int) -> list[str]:
    """The words that a query is scored by: its first `limit` words, without stop words unless there
    are no others ("To be or not to be")."""
    found = words(query[: MAX_WORD_CHARS * limit])[:limit]
    return [word for word in found if word not in _STOP_WORDS] or found


class Bm25:
    """An index over passages, in memory or mapped from files. Do not search while another thread
    adds passages."""

    def __init__(self, passages: Passages, index: Any, retriever: Bm25Retriever) -> None:
        """index: the bm25s.BM25 over `passages`; see `build` and `load`."""
        self.passages = passages
        self._index = index
        self._retriever = retriever
        if NUMBA:
            index.activate_numba_scorer()

    @classmethod
    def build(cls, passages: Sequence[Passage], retriever: Bm25Retriever) -> Bm25:
        """Index `passages` (the title `title_weight` times, then the text). Raises UserError if
        they hold no word."""
        vocabulary: dict[str, int] = {}
        documents = [
            [
                vocabulary.setdefault(word, len(vocabulary))
                for word in words(passage.title) * retriever.title_weight + words(passage.text)
            ]
            for passage in passages
        ]
        if not vocabulary:
            raise UserError(
                f"retriever: got {len(passages)} passages without a single word from"
                f" {', '.join(retriever.sources)}, expected text to search; check `sources` and the"
                " columns `title` and `text`"
            )
        index = bm25s.BM25(k1=retriever.k1, b=retriever.b, method="lucene")
        index.index((documents, vocabulary), create_empty_token=False, show_progress=False)
        return cls(passages, index, retriever)

    @classmethod
    def load(cls, folder: Path, retriever: Bm25Retriever) -> Bm25:
        """The index that `save` wrote, mapped from its files. Raises OSError or ValueError for a
        damaged folder."""
        index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        passages = Stored(folder)
        if index.scores["num_docs"] != len(passages):
            raise ValueError(
                f"{index.scores['num_docs']} documents in the index, {len(passages)} passages"
            )
        # Plain arrays over the mapped bytes: slices of a memmap object are slow, and numba compiles
        # for arrays.
        for name in ("data", "indices", "indptr"):
            index.scores[name] = np.asarray(index.scores[name])
        return cls(passages, index, retriever)

    def save(self, folder: Path) -> None:
        """Write the index and the passages into an existing folder."""
        self._index.save(folder, show_progress=False)
        store(self.passages, folder)

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The best `k` passages for each query, best first; all of them share a word with it."""
        return [[self.passages[number] for number, _ in ranked] for ranked in self.rank(queries, k)]

    def rank(self, queries: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """(number of the passage, BM25 score > 0) of the best `k` >= 1 passages for each query."""
        limit = self._retriever.query_words
        return [
            self._rank(self._index.get_tokens_ids(query_words(query, limit)), k)
            for query in queries
        ]

    def add(self, passages: Sequence[Passage]) -> None:
        """Append passages and index all anew: every score depends on every document. The cache
        stays as it is."""
        grown = Bm25.build([*self.passages, *passages], self._retriever)
        self.passages, self._index = grown.passages, grown._index

    def _rank(self, ids: list[int], k: int) -> list[tuple[int, float]]:
        if not ids:
            return []
        scores = self._index.get_scores_from_ids(ids)
        # bm25s' own selection leaves the order of equal scores to its partition or heap.
        least = np.partition(scores, -k)[-k] if k < len(scores) else 0
        found = np.flatnonzero(scores >= least if least > 0 else scores)
        best = found[np.argsort(-scores[found], kind="stable")[:k]]
        return list(zip(best.tolist(), scores[best].tolist(), strict=True))
