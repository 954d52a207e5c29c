"""Passages in a folder, read one at a time, so that a corpus of any size needs no memory.

Invariant: `Stored` gives the passages that `store` wrote, in their order.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from minirl.retrieve.passage import Passage

ROWS, ENDS = "passages.jsonl", "ends.npy"


def store(passages: Iterable[Passage], folder: Path) -> None:
    """Write `passages` into an existing folder: one JSON row [title, text, id] a line, and where
    each line ends, in bytes."""
    ends, at = [], 0
    with (folder / ROWS).open("wb") as file:
        for passage in passages:
            at += file.write(json.dumps([passage.title, passage.text, passage.id]).encode() + b"\n")
            ends.append(at)
    np.save(folder / ENDS, np.array(ends, dtype=np.int64))


class Stored:
    """The passages of a folder, by number. Raises OSError or ValueError for a damaged one."""

    def __init__(self, folder: Path) -> None:
        self._ends = np.asarray(np.load(folder / ENDS, mmap_mode="r"))  # (N,)
        with (folder / ROWS).open("rb") as file:
            self._rows = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._ends) == 0 or self._ends[-1] != len(self._rows):
            raise ValueError(
                f"{ROWS}: got {len(self._rows)} bytes, expected as many as {ENDS} says"
            )

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, at: int, /) -> Passage:
        """The passage with this number, 0 <= at < len."""
        if not 0 <= at < len(self):
            raise IndexError(at)
        start = int(self._ends[at - 1]) if at else 0
        title, text, identifier = json.loads(self._rows[start : int(self._ends[at])])
        return Passage(title, text, identifier)

    def __iter__(self) -> Iterator[Passage]:
        return (self[at] for at in range(len(self)))
