"""Retrievers: BM25 against ten lines of its own definition, corpora in every form, the cache, and
servers good and bad."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from minirl.errors import UserError
from minirl.io import http
from minirl.recipe import retriever as nodes
from minirl.recipe.retriever import Bm25Retriever, RemoteRetriever
from minirl.retrieve import Passage, bm25, cache, corpora, open_retriever
from minirl.retrieve.bm25 import Bm25, query_words, words

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not (DATA / "hotpotqa").is_dir(), reason="the data folder ../shared/data is not here"
)
needs_numba = pytest.mark.skipif(not bm25.NUMBA, reason="numba is not installed")
NODE = Bm25Retriever(kind="bm25", cache=False)


@pytest.fixture(autouse=True)
def _numpy_and_a_cache_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(
        bm25, "NUMBA", False
    )  # compiling takes half a second an index; the tests of numba say so
    monkeypatch.setenv("MINIRL_CACHE", str(tmp_path_factory.mktemp("cache")))


def node(**changes: Any) -> Bm25Retriever:
    return Bm25Retriever.model_validate({"kind": "bm25", **changes})


def texts(*contents: str) -> list[Passage]:
    return [Passage("", text, str(number)) for number, text in enumerate(contents)]


def reference(
    documents: Sequence[Sequence[str]], query: Sequence[str], k1: float, b: float
) -> list[float]:
    """BM25 as it is defined (Lucene's idf), in double precision: a score for each document."""
    mean = sum(map(len, documents)) / len(documents)
    counts = [Counter(document) for document in documents]
    holding = {word: sum(word in count for count in counts) for word in query}
    idf = {
        word: math.log(1 + (len(documents) - n + 0.5) / (n + 0.5)) for word, n in holding.items()
    }
    scores = []
    for document, count in zip(documents, counts, strict=True):
        length = k1 * (1 - b + b * len(document) / mean)
        scores.append(
            sum(idf[word] * count[word] / (count[word] + length) for word in query if count[word])
        )
    return scores


def check_against_reference(
    index: Bm25, config: Bm25Retriever, queries: Sequence[str], k: int
) -> int:
    """Each rank has the reference's score; returns for how many queries the numbers are the
    reference's too."""
    documents = [words(p.title) * config.title_weight + words(p.text) for p in index.passages]
    same = 0
    for query, ranked in zip(queries, index.rank(queries, k), strict=True):
        scores = reference(documents, query_words(query, config.query_words), config.k1, config.b)
        best = sorted(
            (n for n, score in enumerate(scores) if score > 0), key=lambda n: (-scores[n], n)
        )[:k]
        assert [score for _, score in ranked] == pytest.approx(
            [scores[n] for n in best], rel=2e-6, abs=1e-7
        )
        assert [scores[n] for n, _ in ranked] == pytest.approx(
            [scores[n] for n in best], rel=2e-6, abs=1e-7
        )
        same += [n for n, _ in ranked] == best
    return same


# --- words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Beatles' album, 1969-70", ["the", "beatles", "album", "1969", "70"]),
        ("Beyoncé ÅNGSTRÖM naïve", ["beyonce", "angstrom", "naive"]),
        ("snake_case 3.14 U.S.", ["snake", "case", "3", "14", "u", "s"]),
        ("Straße ﬁne Ⅳ ①", ["strasse", "fine", "iv", "1"]),
        ("İstanbul I\u0307", ["istanbul", "i"]),
        ("Война и мир; 東京 서울", ["воина", "и", "мир", "東京", *words("서울")]),
        # Vowel signs are marks: without them a word stays one word, the same in query and passage.
        ("हिन्दी", ["हनद"]),
        ("\ud800 \x00 \u2028 !?… 🙂", []),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@given(st.text(max_size=60))
def test_words_of_words_are_the_same_words(text: str) -> None:
    found = words(text)
    assert words(" ".join(found)) == found
    assert all(word and not any(char.isspace() for char in word) for word in found)


@pytest.mark.parametrize(
    ("query", "limit", "expected"),
    [
        ("Who wrote the song?", 9, ["who", "wrote", "song"]),
        ("Abe's wife", 9, ["abe", "wife"]),
        ("To be, or not to be", 9, ["to", "be", "or", "not", "to", "be"]),
        ("one two three four", 2, ["one", "two"]),
        ("the one two", 2, ["one"]),
        (" \n?", 9, []),
    ],
)
def test_words_of_a_query(query: str, limit: int, expected: list[str]) -> None:
    assert query_words(query, limit) == expected


def test_a_query_is_read_no_further_than_its_limit() -> None:
    index = Bm25.build(texts("red apple", "green pear"), node(query_words=3))
    assert index.search(["red red red pear"], 5) == index.search(["red red red"], 5)
    start = time.perf_counter()
    assert [p.id for p in index.search(["red " + "x" * 50_000_000], 5)[0]] == ["0"]
    assert time.perf_counter() - start < 0.5


# --- scores


def hotpotqa(**changes: Any) -> tuple[Bm25, list[dict[str, Any]]]:
    config = node(sources=[str(DATA / "hotpotqa" / "train_corpus.json")], **changes)
    index = open_retriever(config)
    assert isinstance(index, Bm25)
    return index, json.loads((DATA / "hotpotqa" / "train_100.json").read_text())


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("changes", [{}, {"title_weight": 1, "k1": 0.9, "b": 0.4}])
def test_hotpotqa_equals_the_reference(changes: dict[str, Any]) -> None:
    index, rows = hotpotqa(**changes)
    assert (
        check_against_reference(index, node(**changes), [row["question"] for row in rows], 5)
        == len(rows)
        == 100
    )


@needs_data
@pytest.mark.parametrize(("weight", "recall"), [(1, 0.77), (3, 0.79)])
def test_gold_titles_of_hotpotqa_among_the_first_five(weight: int, recall: float) -> None:
    index, rows = hotpotqa(title_weight=weight)
    found = index.search([row["question"] for row in rows], 5)
    gold = [{title for title, _ in row["supporting_facts"]} for row in rows]
    shares = [
        len(g & {p.title for p in passages}) / len(g)
        for g, passages in zip(gold, found, strict=True)
    ]
    assert sum(shares) / len(shares) == pytest.approx(recall)


LETTERS = st.text("abcde ", max_size=12)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    corpus=st.lists(st.tuples(LETTERS, LETTERS), min_size=1, max_size=8).filter(
        lambda rows: any(a.strip() or b.strip() for a, b in rows)
    ),
    queries=st.lists(LETTERS, max_size=4),
    k1=st.floats(0, 3),
    b=st.floats(0, 1),
    weight=st.integers(1, 3),
    k=st.integers(1, 10),
)
def test_any_corpus_equals_the_reference(
    corpus: list[tuple[str, str]], queries: list[str], k1: float, b: float, weight: int, k: int
) -> None:
    config = node(k1=k1, b=b, title_weight=weight)
    index = Bm25.build([Passage(*row) for row in corpus], config)
    check_against_reference(index, config, queries, k)
    assert index.rank(queries, k) == [index.rank([query], k)[0] for query in queries], (
        "the rest of a batch changes nothing"
    )


@pytest.mark.parametrize("numba", [False, pytest.param(True, marks=needs_numba)])
@pytest.mark.parametrize("k", [1, 7, 49, 50, 51, 120, 121, 1000])
def test_equal_scores_rank_by_number(monkeypatch: pytest.MonkeyPatch, numba: bool, k: int) -> None:
    monkeypatch.setattr(bm25, "NUMBA", numba)
    # 120 passages of three kinds in turn, alike word for word within a kind.
    index = _index_of_ties()
    apples, pears = list(range(0, 120, 3)), list(range(1, 120, 3))
    [only, both, first] = index.rank(["apple", "apple pear", "pear apple apple"], k)
    assert [n for n, _ in only] == apples[:k]
    assert len({score for _, score in only}) == 1
    assert [n for n, _ in both] == sorted(apples + pears)[:k]
    assert [n for n, _ in first] == (apples + pears)[:k]


_TIES: dict[bool, Bm25] = {}


def _index_of_ties() -> Bm25:
    if bm25.NUMBA not in _TIES:
        _TIES[bm25.NUMBA] = Bm25.build(texts(*("red apple", "red pear", "red plum") * 40), NODE)
    return _TIES[bm25.NUMBA]


@needs_numba
def test_numba_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(400)]
    weights = [1 / (i + 1) for i in range(400)]
    passages = texts(
        *(" ".join(rng.choices(vocabulary, weights, k=rng.randint(1, 40))) for _ in range(2000))
    )
    queries = [" ".join(rng.choices(vocabulary, weights, k=rng.randint(1, 20))) for _ in range(200)]
    plain = Bm25.build(passages, NODE).rank(queries, 10)
    monkeypatch.setattr(bm25, "NUMBA", True)
    compiled = Bm25.build(passages, NODE)
    assert type(compiled._index._compute_relevance_from_scores).__module__.startswith("numba"), (
        "it is compiled"
    )
    assert compiled.rank(queries, 10) == plain


def test_only_passages_that_share_a_word_are_found() -> None:
    index = Bm25.build(
        [
            Passage("Tea", "hot leaves", "a"),
            Passage("", "cold milk and tea", "b"),
            Passage("To Be", "", "c"),
        ],
        NODE,
    )
    found = index.search(
        [
            "tea",
            "milk",
            "TEA leaves?",
            "coffee",
            "",
            " \t",
            "?!",
            "the",
            "to be",
            "the and",
            "tea " * 99,
        ],
        5,
    )
    assert [[p.id for p in passages] for passages in found] == [
        ["a", "b"],
        ["b"],
        ["a", "b"],
        *[[]] * 5,
        ["c"],
        ["b"],
        ["a", "b"],
    ]
    assert index.search([], 5) == []
    assert found[0][0] == Passage("Tea", "hot leaves", "a")


def test_a_title_counts_as_often_as_it_is_told() -> None:
    passages = [
        Passage("Apple", "a fruit a fruit a fruit"),
        Passage("Fruit", "apple apple a fruit a fruit"),
    ]
    assert [
        Bm25.build(passages, node(title_weight=weight)).rank(["apple"], 1)[0][0][0]
        for weight in (1, 6)
    ] == [1, 0]


def test_added_passages_score_as_if_they_had_been_there() -> None:
    rng = random.Random(1)
    passages = texts(*(" ".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(300)))
    queries = ["a", "b c", "h h a", "new"]
    grown = Bm25.build(passages[:100], NODE)
    before = grown.rank(queries, 50)
    grown.add(passages[100:299])
    grown.add([*passages[299:], Passage("New", "here")])
    assert (
        grown.rank(queries, 50)
        == Bm25.build([*passages, Passage("New", "here")], NODE).rank(queries, 50)
        != before
    )
    assert grown.search(["new"], 5) == [[Passage("New", "here")]]
    grown.add([])
    assert len(grown.passages) == 301


def test_an_added_passage_joins_a_mapped_index(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "c.jsonl", [{"text": "one"}, {"text": "two"}])
    index = open_retriever(node(sources=[path]))
    assert isinstance(index, Bm25)
    index.add([Passage("", "three one", "x")])
    assert [p.id for p in index.search(["one"], 5)[0]] == ["0", "x"]
    again = open_retriever(node(sources=[path]))
    assert [p.id for p in again.search(["one"], 5)[0]] == ["0"], "the cache is as it was"


def test_ten_thousand_random_strings() -> None:
    rng = random.Random(2)
    index = Bm25.build(
        texts(*(" ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(200))), NODE
    )
    ranges = [(0, 128), (0, 0x250), (0, 0x3000), (0, 0x110000), (0xD800, 0xE000)]
    queries = [
        "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60)))
        for _ in range(10_000)
    ]
    found = index.search(queries, 5)
    assert len(found) == 10_000
    assert all(len(passages) <= 5 for passages in found)
    assert sum(map(bool, found)) > 1000, "some of them hold a letter that stands alone"


# --- corpora


def _jsonl(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(*sources: str, **changes: Any) -> list[Passage]:
    return list(corpora.read(node(sources=sources, **changes), changes.pop("context", ())))


ROWS = [
    {"title": "Ä", "text": "one  ", "id": "x1"},
    {"text": ["two.", " Three."], "id": 7},
    {"title": "", "text": "four", "other": 1},
]
PASSAGES = [Passage("Ä", "one", "x1"), Passage("", "two. Three.", "7"), Passage("", "four", "2")]


def test_rows_of_json_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(ROWS))
    assert read(_jsonl(tmp_path / "c.jsonl", ROWS)) == read(str(tmp_path / "c.json")) == PASSAGES
    assert [p.id for p in read(str(tmp_path / "c.json"), str(tmp_path / "c.jsonl"))] == [
        "x1",
        "7",
        "2",
        "x1",
        "7",
        "5",
    ]


def test_rows_of_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"name": ["A", None], "body": ["one", "two"], "n": [3, 4]})
    parquet.write_table(table, tmp_path / "c.parquet")
    found = read(str(tmp_path / "c.parquet"), title="name", text="body", id="n")
    assert found == [Passage("A", "one", "3"), Passage("", "two", "4")]


def test_one_object_of_titles(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(
        b'\xef\xbb\xbf {"A": ["One.", " Two."], "B": "three", "A": "again"}'
    )
    assert read(str(tmp_path / "c.json")) == [
        Passage("A", "One. Two.", "0"),
        Passage("B", "three", "1"),
        Passage("A", "again", "2"),
    ]


def test_the_title_in_the_first_line_of_contents(tmp_path: Path) -> None:
    path = _jsonl(
        tmp_path / "c.jsonl",
        [{"id": "0", "contents": '"A "b" c"\nSome text.'}, {"id": "1", "contents": "Plain\ntext"}],
    )
    rows = [{"title": "", "contents": '"Said"\nhe'}]
    assert read(path, text="contents") == [
        Passage('A "b" c', "Some text.", "0"),
        Passage("", "Plain\ntext", "1"),
    ]
    assert read(_jsonl(tmp_path / "d.jsonl", rows), text="contents") == [
        Passage("", '"Said"\nhe', "0")
    ], "it has its own title"


def test_a_folder_of_plain_text(tmp_path: Path) -> None:
    (tmp_path / "b" / ".git").mkdir(parents=True)
    (tmp_path / "Zoo.txt").write_text("one two\nthree\n\n  \nfour five\n\nsix\n")
    (tmp_path / "b" / "a.md").write_text("word " * 7)
    (tmp_path / "b" / "data.jsonl").write_text('{"title": "T", "text": "x"}\n')
    (tmp_path / "b" / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "b" / "c.pdf").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text(" \n")
    expected = [("Zoo", "one two three", "Zoo.txt#0"), ("Zoo", "four five six", "Zoo.txt#1")]
    expected += [
        ("a", "word word word", "b/a.md#0"),
        ("a", "word word word", "b/a.md#1"),
        ("a", "word", "b/a.md#2"),
        ("T", "x", "5"),
    ]
    assert read(str(tmp_path), words=3) == [Passage(*fields) for fields in expected]
    assert read(str(tmp_path / "Zoo.txt"), words=3) == [Passage(*fields) for fields in expected[:2]]
    assert [p.text for p in read(str(tmp_path / "Zoo.txt"))] == ["one two three four five six"]


@settings(deadline=None)
@given(st.text("a \n", max_size=80), st.integers(1, 9))
def test_no_word_is_lost_in_cutting(text: str, limit: int) -> None:
    cut = list(corpora._cut(text, limit))
    assert " ".join(cut).split() == text.split()
    assert all(1 <= len(part.split()) <= limit for part in cut)


def test_a_context_is_pooled() -> None:
    context = [
        Passage("A", "one"),
        Passage("B", "two", "own"),
        Passage("A", "one"),
        Passage("A", "three"),
    ]
    expected = [Passage("A", "one", "0"), Passage("B", "two", "own"), Passage("A", "three", "2")]
    assert list(corpora.read(NODE, context)) == expected
    retriever = open_retriever(NODE, context)
    assert isinstance(retriever, Bm25)
    assert list(retriever.passages) == expected


def test_a_corpus_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((*args, kwargs))
        return ROWS if args[0] == "owner/name" else [{"text": 5}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert read("owner/name", "owner/name:corpus", split="all")[:3] == PASSAGES
    assert asked == [
        ("owner/name", None, {"split": "all"}),
        ("owner/name", "corpus", {"split": "all"}),
    ]
    with pytest.raises(UserError, match=r"^owner/other \(train\), row 1: text: got 5"):
        read("owner/other")


@needs_data
@pytest.mark.parametrize(
    ("name", "count", "title"),
    [
        ("hotpotqa/train_corpus.json", 994, "Demon Dice"),
        ("musique/train_corpus.json", 1890, "Journal of Mathematical Physics"),
        ("2wikimultihopqa/corpus.json", 6119, "Teutberga"),
    ],
)
def test_the_published_corpora(name: str, count: int, title: str) -> None:
    found = read(str(DATA / name))
    assert (len(found), found[0].title, found[-1].id) == (count, title, str(count - 1))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "c.jsonl",
            '{"text": "a"}\n\n{"title": "b"}\n',
            "c.jsonl, line 3: no column 'text' (got title)",
        ),
        (
            "c.jsonl",
            '{"text": "a"}\n{"text": 5}\n',
            "c.jsonl, line 2: text: got 5, expected a text or a list of sentences",
        ),
        ("c.jsonl", '{"text": ["a", 5]}\n', "c.jsonl, line 1: text: got ['a', 5]"),
        ("c.jsonl", '{"text": null}\n', "c.jsonl, line 1: text: got None"),
        (
            "c.jsonl",
            '{"text": "a", "title": ["b"]}\n',
            "c.jsonl, line 1: title: got ['b'], expected a text",
        ),
        (
            "c.jsonl",
            '{"text": "a", "id": 1.5}\n',
            "c.jsonl, line 1: id: got 1.5, expected a text or a whole number",
        ),
        ("c.jsonl", '{"text": "a", "id": true}\n', "c.jsonl, line 1: id: got True"),
        ("c.jsonl", '{"text": " ", "title": ""}\n', "c.jsonl, line 1: an empty passage"),
        (
            "c.jsonl",
            '{"text": "a \\ud83d"}\n',
            "c.jsonl, line 1: half of a surrogate pair ('\\ud83d')",
        ),
        ("c.jsonl", "{'text': 1}\n", "c.jsonl, line 1: not valid JSON"),
        (
            "c.jsonl",
            '{"text": ' + "[" * 900 + "]" * 900 + "}\n",
            "c.jsonl, line 1: text: got [[[[[[",
        ),
        ("c.json", '[{"text": "a"}, 5]', "c.json, row 2: got a number"),
        ("c.json", '{"A": "a", "B": {"x": "y"}}', "c.json, key 2 ('B'): text: got [('x', 'y')]"),
        (
            "c.json",
            '{"A": "a",\n "B"}',
            "c.json, line 2: not valid JSON (Expecting ':' delimiter at column 5",
        ),
        ("c.json", '{"A": ' + "[" * 100_000, "c.json: not valid JSON"),
        ("c.txt", b"ab\xff", "c.txt: not UTF-8 text (invalid start byte at byte 2)"),
        ("c.parquet", b"PAR1", "c.parquet, row 1: not readable as Parquet"),
        ("c.csv", "a,b", "c.csv: got a file ending in '.csv'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for source in (str(path), str(tmp_path)) if name != "c.csv" else (str(path),):
        with pytest.raises(UserError) as caught:
            read(source)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_source_is_one_line_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for source, said in [
        ("missing.json", "no such file"),
        ("./gone.txt", "cannot be read (No such file"),
        ("folder", "no data in this"),
    ]:
        with pytest.raises(UserError, match=said.replace("(", r"\(")) as caught:
            read(str(tmp_path / source))
        assert "--set task.retriever.sources=[PATH]" in str(caught.value)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("context", [[], [Passage("?", "!"), Passage("", "…")]])
def test_a_corpus_without_words_is_the_users_mistake(cached: bool, context: list[Passage]) -> None:
    with pytest.raises(
        UserError,
        match=(
            f"got {len(context)} passages without a single word from context, expected text to"
            " search"
        ),
    ):
        open_retriever(node(cache=cached), context)


# --- the cache


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the corpora that were indexed, in order."""
    sizes: list[int] = []
    build = Bm25.build.__func__  # type: ignore[attr-defined]

    def counting(cls: type[Bm25], passages: Sequence[Passage], config: Bm25Retriever) -> Bm25:
        sizes.append(len(passages))
        return build(cls, passages, config)  # type: ignore[no-any-return]

    monkeypatch.setattr(Bm25, "build", classmethod(counting))
    return sizes


def opened(config: Bm25Retriever, context: Sequence[Passage] = ()) -> Bm25:
    index = open_retriever(config, context)
    assert isinstance(index, Bm25)
    return index


SOME = [
    Passage("Ähre", "one two", "a"),
    Passage("", "two \u2028 three\n", "b"),
    Passage("x", "three one one", "c"),
]
ASK = ["one", "two three", "ahre", "zero"]


@pytest.mark.parametrize("numba", [False, pytest.param(True, marks=needs_numba)])
def test_a_second_opening_maps_the_index(
    monkeypatch: pytest.MonkeyPatch, built: list[int], numba: bool
) -> None:
    monkeypatch.setattr(bm25, "NUMBA", numba)
    fresh = Bm25.build(SOME, NODE)
    found = [opened(node(), SOME) for _ in range(3)]
    assert built == [3, 3], "one for `fresh`, one for the first opening"
    for index in found:
        assert index.rank(ASK, 5) == fresh.rank(ASK, 5)
        assert index.search(ASK, 5) == fresh.search(ASK, 5)
        assert list(index.passages) == SOME
        scores = index._index.scores
        assert all(
            isinstance(scores[name].base, np.memmap) for name in ("data", "indices", "indptr")
        )
        assert not scores["data"].flags.writeable
    with pytest.raises(IndexError):
        found[0].passages[3]


def test_the_index_is_found_again_by_content_alone(tmp_path: Path, built: list[int]) -> None:
    rows = [{"title": p.title, "text": p.text.strip(), "id": p.id} for p in SOME]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    opened(node(sources=[_jsonl(tmp_path / "one.jsonl", rows)]))
    (tmp_path / "one.jsonl").rename(tmp_path / "two.jsonl")
    opened(node(sources=[str(tmp_path / "two.jsonl")]))
    opened(node(sources=[str(tmp_path / "c.json")]))
    opened(node(sources=[str(tmp_path / "c.json")], k=3, query_words=9, words=7))
    assert built == [3]
    for number, changes in enumerate([{"k1": 1.25}, {"b": 0.5}, {"title_weight": 2}], 2):
        opened(node(sources=[str(tmp_path / "c.json")], **changes))
        assert len(built) == number
    _jsonl(tmp_path / "two.jsonl", [*rows[:2], rows[2] | {"id": "d"}])
    assert (
        opened(node(sources=[str(tmp_path / "two.jsonl")])).search(["three one one"], 1)[0][0].id
        == "d"
    )
    assert len(built) == 5


def test_the_digest_tells_what_an_index_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus_sets = [
        SOME,
        SOME[::-1],
        SOME[:2],
        [Passage("a", "b")],
        [Passage("", "ab")],
        [Passage("ab", "")],
        [Passage("a", "", "b")],
    ]
    assert len({cache.digest(passages, NODE) for passages in corpus_sets}) == len(corpus_sets)
    before = cache.digest(SOME, NODE)
    for module, name in ((cache, "FORMAT"), (cache, "WORDS_VERSION")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 99)
            assert cache.digest(SOME, NODE) != before
    monkeypatch.setattr(cache.bm25s, "__version__", "0.0")
    assert cache.digest(SOME, NODE) != before


def _folder() -> Path:
    [folder] = (path for path in (cache.cache_dir() / "bm25").iterdir() if path.is_dir())
    return folder


def test_a_damaged_index_is_built_anew(built: list[int], caplog: pytest.LogCaptureFixture) -> None:
    expected = opened(node(), SOME).rank(ASK, 5)
    names = sorted(path.name for path in _folder().iterdir())
    assert len(names) == 7
    damages: list[tuple[str, Callable[[Path], object]]] = [
        ("missing", lambda path: path.unlink()),
        ("short", lambda path: path.write_bytes(path.read_bytes()[:-3])),
        ("zeros", lambda path: path.write_bytes(bytes(path.stat().st_size))),
        ("empty", lambda path: path.write_bytes(b"")),
    ]
    for name in names:
        for damage, harm in damages:
            if (name, damage) == ("passages.jsonl", "zeros"):
                # it is read only where it is found; the folder's rename comes after its bytes are
                # on the disk
                continue
            before = len(built)
            harm(_folder() / name)
            caplog.clear()
            assert opened(node(), SOME).rank(ASK, 5) == expected, (name, damage)
            assert len(built) == before + 1, (name, damage)
            assert "is damaged" in caplog.text
    assert opened(node(), SOME).rank(ASK, 5) == expected


def test_a_killed_writer_leaves_nothing_behind_that_counts(built: list[int]) -> None:
    opened(node(), SOME)
    folder = _folder()
    for path in folder.iterdir():
        (half := folder.with_name(f".{folder.name}.tmp")).mkdir(exist_ok=True)
        path.rename(half / path.name)
    folder.rmdir()
    assert opened(node(), SOME).search(["ahre"], 1) == [[SOME[0]]]
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    built: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setenv("MINIRL_CACHE", str(tmp_path / "file"))
        assert opened(node(), SOME).search(["ahre"], 1) == [[SOME[0]]]
    assert "indexing in memory" in caplog.text
    assert built == [3]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_folder", full)
    assert opened(node(), SOME).search(["ahre"], 1) == [[SOME[0]]]
    assert "No space left on device" in caplog.text
    assert built == [3, 3], "what was built is used"


def test_a_corpus_that_changes_under_the_reader_is_not_kept() -> None:
    versions = iter([SOME, SOME[:2]])
    with pytest.raises(UserError, match="context changed while it was read"):
        cache.open_index(lambda: next(versions), node())
    assert not [path for path in (cache.cache_dir() / "bm25").iterdir() if path.is_dir()]


RACE = """
import sys, time
from pathlib import Path
from minirl.recipe.retriever import Bm25Retriever
from minirl.retrieve import Passage, bm25, open_retriever
bm25.NUMBA = False
build = bm25.Bm25.build.__func__
def slow(cls, passages, node):
    print("built", flush=True)
    time.sleep(1)
    return build(cls, passages, node)
bm25.Bm25.build = classmethod(slow)
Path(sys.argv[1]).touch()
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
passages = [Passage("", f"word{i} common", str(i)) for i in range(500)]
index = open_retriever(Bm25Retriever(kind="bm25"), passages)
print(index.search(["word77"], 5)[0][0].id, len(index.search(["common"], 9)[0]))
"""


@pytest.mark.slow
def test_two_processes_build_once(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    names = ["a", "b"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, own, other],
            env=env,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for own, other in (names, names[::-1])
    ]
    said = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert sorted(len(lines) for lines in said) == [1, 2], "one built, one waited"
    assert {lines[-1] for lines in said} == {"77 9"}


# --- the recipe


def test_nodes_of_a_recipe() -> None:
    read_node = TypeAdapter(nodes.Retriever).validate_python
    assert read_node({"kind": "bm25"}) == Bm25Retriever(kind="bm25")
    assert read_node({"kind": "remote", "url": "http://h:1/search"}) == RemoteRetriever(
        kind="remote", url="http://h:1/search"
    )
    wrong: list[dict[str, Any]] = [
        {},
        {"kind": "dense"},
        {"kind": "bm25", "sources": []},
        {"kind": "bm25", "k": 0},
        {"kind": "bm25", "b": 1.5},
        {"kind": "bm25", "k1": -1},
        {"kind": "bm25", "source": "x"},
        {"kind": "remote"},
        {"kind": "remote", "url": "file:///etc/passwd"},
        {"kind": "remote", "url": "http://h/ x"},
        {"kind": "remote", "url": "http://h", "timeout_s": 0},
    ]
    for data in wrong:
        with pytest.raises(ValidationError):
            read_node(data)
    for kind in (Bm25Retriever, RemoteRetriever):
        assert [name for name, field in kind.model_fields.items() if not field.description] == []


# --- servers

Reply = Callable[["_Handler", dict[str, Any]], None]


class _Handler(BaseHTTPRequestHandler):
    reply: Reply
    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(question)
        with contextlib.suppress(OSError):  # the client may have gone away, as it should
            type(self).reply(self, question)

    def do_GET(self) -> None:
        type(self).asked.append({"GET": self.path})

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


Serve = Callable[[Reply], tuple[str, list[dict[str, Any]]]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 0.01)
    servers: list[ThreadingHTTPServer] = []

    def start(reply: Reply) -> tuple[str, list[dict[str, Any]]]:
        asked: list[dict[str, Any]] = []
        handler = type("Handler", (_Handler,), {"reply": reply, "asked": asked})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/search", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(url: str, queries: Sequence[str], k: int = 2, **changes: Any) -> list[list[Passage]]:
    return open_retriever(
        RemoteRetriever.model_validate({"kind": "remote", "url": url, **changes})
    ).search(queries, k)


def fault(url: str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        ask(url, ["a", "b"], **changes)
    assert str(caught.value).startswith(url)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def test_a_server_is_asked_once_a_batch_and_never_for_nothing(serve: Serve) -> None:
    def reply(handler: _Handler, question: dict[str, Any]) -> None:
        rows = [
            [{"title": q, "text": "ä\ud800", "id": n} for n in range(3)] + [5]
            for q in question["queries"]
        ]
        handler.send(json.dumps(rows).encode())

    url, asked = serve(reply)
    a, b = ([Passage(q, "ä?", "0"), Passage(q, "ä?", "1")] for q in "ab")
    assert ask(url, ["a", " ", "b", ""]) == [a, [], b, []]
    assert asked == [{"queries": ["a", "b"], "k": 2}]
    assert ask(url, ["", "\n"]) == [[], []]
    assert ask(url, []) == []
    assert len(asked) == 1
    assert ask(url, ["\ud800x"], 1)[0][0].title == "?x"


def test_bare_passages_will_do(serve: Serve) -> None:
    url, _ = serve(lambda handler, question: handler.send(b'[[{"text": "x", "title": null}], []]'))
    assert ask(url, ["a", "b"]) == [[Passage("", "x", "")], []]


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_a_passing_fault_is_asked_again(serve: Serve, status: int) -> None:
    url, asked = serve(
        lambda handler, question: handler.send(b"[[]]", 200 if len(asked) > 2 else status)
    )
    assert ask(url, ["a"], retries=2) == [[]]
    assert len(asked) == 3


def test_a_server_that_stays_down_is_given_up(serve: Serve) -> None:
    url, asked = serve(lambda handler, question: handler.send(b"", 503))
    assert "no answer in 3 tries (HTTP 503" in fault(url, retries=2)
    assert len(asked) == 3
    assert "no answer in 2 tries (ConnectError: " in fault("http://127.0.0.1:9/search", retries=1)


@pytest.mark.parametrize("status", [400, 401, 404, 301, 302, 307])
def test_a_refusal_is_not_asked_again(serve: Serve, status: int) -> None:
    url, asked = serve(lambda handler, question: handler.send(b"no", status, Location="/other"))
    assert f"the server refused (HTTP {status}" in fault(url)
    assert asked == [{"queries": ["a", "b"], "k": 2}]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>", "got b'<html>' (Expecting value"),
        (b"\xff\xfe", "got b'\\xff\\xfe'"),
        (b"", "got b''"),
        (b"[" * 200_000, "got b'[[[["),
        (b'[[{"text": ' + b"9" * 5000 + b"}], []]", "got b'[[{"),
        (b"{}", "got {} for 2 queries"),
        (b"[[]]", "got [[]] for 2 queries"),
        (b"[[], 5]", "got [[], 5] for 2 queries"),
        (b'[["a"], []]', "got the passage 'a'"),
        (b'[[{"title": "a"}], []]', "got the passage {'title': 'a'}"),
        (b'[[{"text": "a", "title": 5}], []]', "got the passage {"),
        (b'[[{"text": "a", "id": []}], []]', "got the passage {"),
        (b"[[" + b"[" * 900 + b"]" * 900 + b"], []]", "got the passage [[[[[["),
    ],
)
def test_nonsense_is_refused_in_one_line(serve: Serve, body: bytes, said: str) -> None:
    url, _ = serve(lambda handler, question: handler.send(body))
    assert said in fault(url)


def test_an_endless_answer_is_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_BYTES", 300_000)

    def reply(handler: _Handler, question: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b" " * 10_000)

    url, asked = serve(reply)
    assert "(more than 300000 bytes)" in fault(url)
    assert len(asked) == 1


def test_a_server_that_drips_is_not_waited_for(serve: Serve) -> None:
    def reply(handler: _Handler, question: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    for quiet in (True, False):
        url, asked = serve((lambda handler, question: time.sleep(5)) if quiet else reply)
        start = time.monotonic()
        assert "no answer in 2 tries (no whole answer within 0.3 s)" in fault(
            url, timeout_s=0.3, retries=1
        )
        assert time.monotonic() - start < 2
        assert len(asked) == 2


def test_an_answer_that_breaks_off_is_asked_again(serve: Serve) -> None:
    url, asked = serve(
        lambda handler, question: handler.send(
            b"[[]]", **({"Content-Length": "9"} if len(asked) < 2 else {})
        )
    )
    assert ask(url, ["a"], retries=1) == [[]]
    assert len(asked) == 2
