"""CPU seconds of a process that this one started, read from /proc (Linux; elsewhere they are not
known).

Invariant: what a process used is known also after it was killed: the kernel adds it to what its
parent's ended children used.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path


class Meter:
    """Counts from now on what a process uses; None for one that there is not."""

    def __init__(self, process: int | None) -> None:
        self._process, self._before, self._ended = process, _used_s(process), _ended_s()

    def used_s(self) -> float | None:
        """CPU seconds, of user and system together, to about 0.02; None where the system does not
        say."""
        now = _used_s(self._process)
        if now is None:  # it is gone: all that it ever used is now among what ended children used
            now = _ended_s() - self._ended
        return None if self._before is None else now - self._before


def _used_s(process: int | None) -> float | None:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime


def _ended_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
