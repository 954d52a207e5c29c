"""A bound on the work that a test does: CPU seconds, far above what is measured, so that a busy
machine fails nothing and a blow-up does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bounded(cpu_s: float = 5.0) -> Iterator[None]:
    """Fails if what runs inside takes more than `cpu_s` seconds of this process."""
    began = time.process_time()
    yield
    assert time.process_time() - began < cpu_s
