"""BM25 over bm25s: words, the index, and the best passages of a query.

Invariant: passages rank by score, and equal scores by their number in the corpus, with numba and
without; a passage that shares no word with the query is never found; documents that were added
score as if they had been there from the start.
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

# Raise the number whenever `words` changes what it makes of a text.
WORDS_VERSION = 1
MAX_WORD_CHARS = 64
NUMBA: bool = bm25s.NUMBA_AVAILABLE
_WORD = re.compile(r"[^\W_]+")
# They match nearly everything, so a query only spends time on them. "s" is what is left of a
# possessive.
_STOP_WORDS = frozenset((*STOPWORDS_EN, "s"))

logging.getLogger("bm25s").setLevel(
    logging.WARNING
)  # it sets itself to DEBUG and tells of every index that is built


def words(text: str) -> list[str]:
    """The words of a text, in order: runs of letters and digits, without case, accents and other
    marks. No stemming: it gained nothing."""
    if not text.isascii():
        text = "".join(
            char
            for char in unicodedata.normalize("NFKD", text)
            if unicodedata.category(char)[0] != "M"
        )
    return _WORD.findall(text.casefold())


def query_words(query: str, limit: int) -> list[str]:
    """The words that a query is scored by: its first `limit` ones without stop words, unless it has
    no others ("To be or not to be")."""
    found = words(query[: MAX_WORD_CHARS * limit])[:limit]
    return [word for word in found if word not in _STOP_WORDS] or found


class Bm25:
    """An index over passages in memory, or mapped into it. Not for use while another thread
    adds."""

    def __init__(self, passages: Passages, index: Any, node: Bm25Retriever) -> None:
        """index: the bm25s.BM25 over `passages`; see `build` and `load`."""
        self.passages = passages
        self._index = index
        self._node = node
        if NUMBA:
            index.activate_numba_scorer()

    @classmethod
    def build(cls, passages: Sequence[Passage], node: Bm25Retriever) -> Bm25:
        """Index `passages` (title `node.title_weight` times, then text). Raises UserError where
        there is nothing to find in them."""
        vocabulary: dict[str, int] = {}
        documents = [
            [
                vocabulary.setdefault(word, len(vocabulary))
                for word in words(passage.title) * node.title_weight + words(passage.text)
            ]
            for passage in passages
        ]
        if not vocabulary:
            raise UserError(
                f"retriever: got {len(passages)} passages without a single word from"
                f" {', '.join(node.sources)}, expected text to search; see that `sources`, and the"
                " columns `title` and `text`, name it"
            )
        index = bm25s.BM25(k1=node.k1, b=node.b, method="lucene")
        index.index((documents, vocabulary), create_empty_token=False, show_progress=False)
        return cls(passages, index, node)

    @classmethod
    def load(cls, folder: Path, node: Bm25Retriever) -> Bm25:
        """What `save` wrote, its arrays and passages mapped, not read. Raises OSError or ValueError
        for a damaged folder."""
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
        return cls(passages, index, node)

    def save(self, folder: Path) -> None:
        """Write the index and the passages into an existing folder."""
        self._index.save(folder, show_progress=False)
        store(self.passages, folder)

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The best `k` passages that share a word with each query, best first, lowest number first
        among equals."""
        return [[self.passages[number] for number, _ in ranked] for ranked in self.rank(queries, k)]

    def rank(self, queries: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """(number of the passage, BM25 score > 0) of the best `k` >= 1 passages for each query; k
        may exceed the corpus."""
        return [
            self._rank(self._index.get_tokens_ids(query_words(query, self._node.query_words)), k)
            for query in queries
        ]

    def add(self, passages: Sequence[Passage]) -> None:
        """Put passages behind the others and index all anew: every score depends on every document.
        The cache is left as it is."""
        grown = Bm25.build([*self.passages, *passages], self._node)
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
