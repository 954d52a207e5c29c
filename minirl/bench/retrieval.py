"""The retriever: seconds and memory of indexing, opening again and searching. How each is measured:
minirl/retrieve/cost.py."""

from __future__ import annotations

from minirl.bench.measure import Measurement, Spread
from minirl.bench.retrieval_cost import FOUND, QUERIES, QUERY_WORDS, WORDS, one_round
from minirl.bench.setup import Bench
from minirl.retrieve.bm25 import NUMBA

PARAGRAPHS, QUICK_PARAGRAPHS = (20_000, 200_000), (300,)


def measure_retrieval(bench: Bench) -> list[Measurement]:
    """The lines of each size of corpus."""
    sizes = QUICK_PARAGRAPHS if bench.options.quick else PARAGRAPHS
    return [line for count in sizes for line in measured(count, bench.options.repeats)]


def measured(count: int, repeats: int) -> list[Measurement]:
    """The lines of one corpus of `count` paragraphs."""
    rounds = [one_round(count) for _ in range(repeats)]
    scored = "with numba" if NUMBA else "numpy alone; pip install numba for more"
    lines = {
        "index": ("s", [built.seconds for built, _ in rounds], f"{WORDS} words each"),
        "memory while indexing": (
            "MB",
            [built.mb for built, _ in rounds],
            "at most, above the paragraphs themselves",
        ),
        "on the disk": ("MB", [built.disk_mb for built, _ in rounds], "index and passages"),
        "open again": ("s", [searched.open_seconds for _, searched in rounds], "mapped, not read"),
        "search": (
            "queries/s",
            [searched.queries_per_s for _, searched in rounds],
            f"{QUERY_WORDS} words, top {FOUND}, {scored}",
        ),
        "memory after searches": (
            "MB",
            [searched.mb for _, searched in rounds],
            f"{QUERIES} queries; with what was read of mapped files",
        ),
    }
    return [
        Measurement(
            "retrieval",
            f"BM25, {count:,} paragraphs: {what}",
            unit,
            Spread(tuple(values)),
            None,
            "",
            note,
        )
        for what, (unit, values, note) in lines.items()
    ]
