"""BM25: seconds and memory of indexing, of opening an index again and of searching it, over
synthetic paragraphs.

Invariant: each figure comes from a fresh process that loads the retriever alone, so that memory is
the index's own and no timing inherits another's caches. Word counts follow Zipf's law, as those of
text do.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from minirl.bench.measure import MEGA, Measurement, Spread
from minirl.bench.setup import Bench
from minirl.recipe.retriever import Bm25Retriever
from minirl.retrieve.bm25 import NUMBA, Bm25
from minirl.retrieve.passage import Passage

PARAGRAPHS, QUICK_PARAGRAPHS = (20_000, 200_000), (300,)
PARAGRAPH_WORDS = 80
VOCABULARY = 200_000
QUERIES, QUERY_WORDS, TOP = 500, 8, 5
STOP_WORDS = 100  # no query has these most frequent words, as a user's has no "the" and "of"
SCORER = "with numba" if NUMBA else "numpy alone; pip install numba for more"

# What the two processes report: the unit and a note for the table.
LINES = {
    "index": ("s", f"{PARAGRAPH_WORDS} words each"),
    "memory while indexing": ("MB", "at most, above the paragraphs themselves"),
    "on the disk": ("MB", "index and passages"),
    "open again": ("s", "mapped, not read"),
    "search": ("queries/s", f"{QUERY_WORDS} words, top {TOP}, {SCORER}"),
    "memory after searches": ("MB", f"{QUERIES} queries; mapped files count as far as read"),
}


def measure_retrieval(bench: Bench) -> list[Measurement]:
    """The lines of each size of corpus."""
    sizes = QUICK_PARAGRAPHS if bench.options.quick else PARAGRAPHS
    return [line for count in sizes for line in measure_corpus(count, bench.options.repeats)]


def measure_corpus(count: int, repeats: int) -> list[Measurement]:
    """The lines of one corpus of `count` paragraphs."""
    rounds = [one_round(count) for _ in range(repeats)]
    found = []
    for what, (unit, note) in LINES.items():
        values = Spread(tuple(figures[what] for figures in rounds))
        what = f"BM25, {count:,} paragraphs: {what}"
        found.append(Measurement("retrieval", what, unit, values, note=note))
    return found


def one_round(count: int) -> dict[str, float]:
    """Index, then open and search, each in a process of its own; figures by the keys of LINES."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as alone,
    ):
        built = alone.submit(build, count, folder).result()
        return built | alone.submit(search, count, folder).result()


def build(count: int, folder: str) -> dict[str, float]:
    """Index `count` paragraphs into `folder`; making the paragraphs is not counted."""
    passages = list(paragraphs(count))
    before, began = peak_mb(), time.perf_counter()
    index = Bm25.build(passages, Bm25Retriever(kind="bm25"))
    seconds, peak = time.perf_counter() - began, peak_mb()
    index.save(Path(folder))
    disk = sum(file.stat().st_size for file in Path(folder).iterdir()) / MEGA
    return {"index": seconds, "memory while indexing": peak - before, "on the disk": disk}


def search(count: int, folder: str) -> dict[str, float]:
    """Open what `build` wrote and search it, after one query that is not counted: numba compiles at
    the first."""
    asked = list(queries(count))
    before, began = peak_mb(), time.perf_counter()
    index = Bm25.load(Path(folder), Bm25Retriever(kind="bm25"))
    opened = time.perf_counter() - began
    index.search(asked[:1], TOP)
    began = time.perf_counter()
    index.search(asked, TOP)
    rate = len(asked) / (time.perf_counter() - began)
    return {"open again": opened, "search": rate, "memory after searches": peak_mb() - before}


def paragraphs(count: int) -> Iterator[Passage]:
    """The same `count` paragraphs every time: word number r has a probability proportional to
    1/r."""
    ranks = 1.0 / np.arange(1, VOCABULARY + 1)
    law, random = np.cumsum(ranks / ranks.sum()), np.random.default_rng(0)
    for number in range(count):
        words = law.searchsorted(random.random(PARAGRAPH_WORDS), side="right")
        yield Passage(f"w{words[0]}", " ".join(f"w{word}" for word in words), str(number))


def queries(count: int) -> Iterator[str]:
    """Up to QUERIES queries, each the first QUERY_WORDS rarer words of a paragraph."""
    for passage in paragraphs(min(count, QUERIES)):
        rare = [word for word in passage.text.split() if int(word[1:]) >= STOP_WORDS]
        yield " ".join(rare[:QUERY_WORDS])


def peak_mb() -> float:
    """Most resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's getrusage starts a child at what its parent held
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / MEGA
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGA
