"""What BM25 costs: the synthetic corpus follows Zipf's law, and the figures are of the index."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from minirl.bench import retrieval
from minirl.recipe.retriever import Bm25Retriever
from minirl.retrieve.bm25 import Bm25


def test_paragraphs_follow_zipfs_law_and_queries_find_their_own_paragraph() -> None:
    """Catches: words drawn evenly, queries of frequent words (slow) or of none that stand anywhere
    (free)."""
    passages = list(retrieval.paragraphs(2000))
    assert passages[:50] == list(retrieval.paragraphs(50))
    counts = Counter(word for passage in passages for word in passage.text.split())
    harmonic = sum(1 / rank for rank in range(1, retrieval.VOCABULARY + 1))
    for rank in (1, 2, 10):  # 160,000 words: w0 is expected 12,500 times
        expected = 2000 * retrieval.PARAGRAPH_WORDS / rank / harmonic
        assert abs(counts[f"w{rank - 1}"] - expected) < 5 * math.sqrt(expected)
    queries = list(retrieval.queries(2000))
    assert len(queries) == retrieval.QUERIES
    words = [int(word[1:]) for query in queries for word in query.split()]
    assert min(words) >= retrieval.STOP_WORDS
    found = Bm25.build(passages, Bm25Retriever(kind="bm25", cache=False)).search(queries, 1)
    own = sum(best == [passage] for best, passage in zip(found, passages, strict=False))
    assert own > 0.95 * len(queries)


@pytest.mark.slow
def test_the_figures_are_those_of_the_index() -> None:
    passages = list(retrieval.paragraphs(2000))
    held = np.ones(2**26)  # 512 MB: a child that inherited its parent's peak would measure nothing
    figures = retrieval.one_round(2000)
    del held
    assert set(figures) == set(retrieval.LINES)
    assert min(figures["index"], figures["open again"], figures["search"]) > 0
    # Each posting is two numbers of four bytes, and most words stand once in a paragraph.
    postings = sum(len(set(passage.text.split())) for passage in passages)
    assert figures["on the disk"] * 1e6 > 8 * postings
    assert figures["memory after searches"] > 1
