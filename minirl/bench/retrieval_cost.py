"""What an index costs: seconds and memory of indexing, of opening again and of searching, over
synthetic paragraphs.

Invariant: each figure comes from a fresh process that loads the retriever alone, so that memory is
the index's and no timing inherits another's caches. Word counts follow Zipf's law, as those of text
do; the words are no language's.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from minirl.recipe.retriever import Bm25Retriever
from minirl.retrieve import Passage
from minirl.retrieve.bm25 import Bm25

WORDS = 80  # a paragraph
VOCABULARY = 200_000
QUERIES, QUERY_WORDS, FOUND = 500, 8, 5
STOP_WORDS = (
    100  # the most frequent words, of which no query is made, as none is made of "the" and "of"
)
MEGA = 1e6


@dataclass(frozen=True, slots=True)
class Built:
    """Indexing. seconds: without making the paragraphs. mb: resident at most, above what the
    process and the paragraphs held before."""

    seconds: float
    mb: float
    disk_mb: float


@dataclass(frozen=True, slots=True)
class Searched:
    """An index opened again. mb: resident after the searches, above what the process held before;
    mapped files count, as far as read."""

    open_seconds: float
    queries_per_s: float
    mb: float


def one_round(count: int) -> tuple[Built, Searched]:
    """Index, then open and search, each in a process of its own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as alone,
    ):
        built = alone.submit(build, count, folder).result()
        return built, alone.submit(search, count, folder).result()


def build(count: int, folder: str) -> Built:
    """Index `count` paragraphs into `folder`."""
    passages = list(paragraphs(count))
    before, began = peak_mb(), time.perf_counter()
    index = Bm25.build(passages, Bm25Retriever(kind="bm25"))
    seconds, most = time.perf_counter() - began, peak_mb()
    index.save(Path(folder))
    return Built(
        seconds, most - before, sum(file.stat().st_size for file in Path(folder).iterdir()) / MEGA
    )


def search(count: int, folder: str) -> Searched:
    """Open what `build` wrote and search it, after a query that is not counted (numba compiles at
    the first)."""
    asked = list(queries(count))
    before, began = peak_mb(), time.perf_counter()
    index = Bm25.load(Path(folder), Bm25Retriever(kind="bm25"))
    opened = time.perf_counter() - began
    index.search(asked[:1], FOUND)
    began = time.perf_counter()
    index.search(asked, FOUND)
    return Searched(opened, len(asked) / (time.perf_counter() - began), peak_mb() - before)


def paragraphs(count: int) -> Iterator[Passage]:
    """The same `count` paragraphs every time: word number r is drawn with a probability
    proportional to 1/r."""
    ranks = 1.0 / np.arange(1, VOCABULARY + 1)
    law, random = np.cumsum(ranks / ranks.sum()), np.random.default_rng(0)
    for number in range(count):
        drawn = law.searchsorted(random.random(WORDS), side="right")
        yield Passage(f"w{drawn[0]}", " ".join(f"w{word}" for word in drawn), str(number))


def queries(count: int) -> Iterator[str]:
    """QUERIES queries, each of the first QUERY_WORDS words of a paragraph that are not among the
    most frequent."""
    for passage in paragraphs(min(count, QUERIES)):
        rare = [word for word in passage.text.split() if int(word[1:]) >= STOP_WORDS]
        yield " ".join(rare[:QUERY_WORDS])


def peak_mb() -> float:
    """Most resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's getrusage starts a child at what its parent held
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / MEGA
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / MEGA
    )
