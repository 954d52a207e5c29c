"""A judge's verdicts on disk, found again by the content that was judged.

Invariant: the file is only appended to, one row a verdict, and not cut back when a run resumes: a
verdict depends on its content alone, so a judge is not asked twice. A row torn by a kill is left
out; that costs one question.
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
    """The key of a verdict: a digest of the judge and of everything that it was shown."""
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class Verdicts:
    """Verdicts by key: 1.0 good, 0.0 bad, a probability in between, None for an unreadable reply.
    Without a path they are in memory alone.

    Several processes may write one file: each row is appended by one call. others: files that are
    also read, but not written.
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
                os.write(self._handle, b"\n")  # so that the next row starts a line of its own
        except OSError as error:
            raise UserError(
                f"{path}: cannot be used for verdicts ({error}); name another folder with --out"
            ) from error

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> float | None:
        """The verdict of a known key."""
        return self._known[key]

    def put(self, key: str, verdict: float | None, **said: str) -> None:
        """Keep a verdict; it is written when this returns. said: more fields for readers of the
        file."""
        if key in self._known:
            return
        self._known[key] = verdict
        if self._handle is not None:
            os.write(self._handle, compact({"key": key, "verdict": verdict, **said}) + b"\n")

    def close(self) -> None:
        """Close the file; the end of the process does the same."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _read(self, path: Path) -> bool:
        """Read a file; return whether its last row is torn."""
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
