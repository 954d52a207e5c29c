"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from minirl.engine.cpu.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("another C library")
def used():
    blocks = [torch.ones(2**24) for _ in range(3)]  # 64 MiB each
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    first = used()
print(used() - first)
"""


def test_freed_memory_is_used_again() -> None:
    """Catches: a threshold that the C library does not take. A block of 64 MiB is 16,384 pages."""

    def faults(mode: str) -> int:
        ran = subprocess.run(
            [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, timeout=120
        )
        if "another C library" in ran.stderr:
            pytest.skip("not glibc")
        assert ran.returncode == 0, ran.stderr
        return int(ran.stdout)

    assert faults("keep") < 100
    assert faults("usual") > 10_000
