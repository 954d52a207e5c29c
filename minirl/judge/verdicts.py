"""Verdicts on disk: what a judge has said, found again by the content that it judged.

Invariant: append-only, a row a verdict, and never cut back when a run is taken up: a verdict is a
function of its content, so none is asked for twice, whatever was killed in between. A row that a
kill tore is left out; losing one costs a question, not a run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from hashlib import blake2b
from math import isfinite
from pathlib import Path

from minirl.errors import UserError
from minirl.io.files import compact


def key_of(*parts: str) -> str:
    """The name that a verdict is found by: a digest of the judge and of all that it was shown."""
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class Verdicts:
    """Verdicts by key: 1.0 good, 0.0 bad, a probability in between, None for a reply that cannot be
    read. Without a path in memory alone.

    Several processes may write one file: each row is appended by one call. others: files that are
    read as well, and never written.
    """

    def __init__(self, path: Path | None = None, others: Iterable[Path] = ()) -> None:
        self._known: dict[str, float | None] = {}
        self._handle: int | None = None
        if path is None:
            return
        try:
            for other in others:
                self._read(other)
            torn = self._read(path)
            self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            if torn:
                os.write(self._handle, b"\n")  # the next row must not grow on to a torn one
        except OSError as error:
            raise UserError(
                f"{path}: cannot be used for verdicts ({error}); mend that, or name another folder"
                " with --out"
            ) from error

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> float | None:
        """The verdict of a key that is there."""
        return self._known[key]

    def put(self, key: str, verdict: float | None, **said: str) -> None:
        """Keep a verdict, on the disk when this returns. said: what a reader of the file may want
        to know of it."""
        if key in self._known:
            return
        self._known[key] = verdict
        if self._handle is not None:
            os.write(self._handle, compact({"key": key, "verdict": verdict, **said}) + b"\n")

    def close(self) -> None:
        """Let go of the file; the end of the process does the same."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _read(self, path: Path) -> bool:
        """Take in what the file holds; whether its last row is torn."""
        if not path.exists():
            return False
        lines = path.read_bytes().split(b"\n")
        for line in lines:
            try:
                row = json.loads(line)
                key, verdict = row["key"], row["verdict"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            number = type(verdict) in (int, float) and isfinite(verdict) and 0 <= verdict <= 1
            if isinstance(key, str) and (verdict is None or number):
                self._known[key] = None if verdict is None else float(verdict)
        return bool(lines[-1])
