"""Measuring: how long and how much memory, and what is said of it.

Invariant: what is compared runs in one process by turns (ABAB...), after one round that is not
counted: the first pass over new shapes builds their kernels and is slow once.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True)
class Spread:
    """One number a repetition."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return median(self.values)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
        }


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of the table: ours beside what it is measured against, or alone.

    unit: "tokens/s" and other rates (more is better), or "MB", "ms" (less is better). against: what
    `theirs` is, or why it is missing.
    """

    section: str
    what: str
    unit: str
    ours: Spread
    theirs: Spread | None
    against: str
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Median of ours over median of theirs; None where there is nothing beside ours."""
        return None if self.theirs is None else self.ours.median / self.theirs.median

    @property
    def ratios(self) -> Spread | None:
        """Ours over theirs round by round: what a machine busy with other things leaves of the
        ratio."""
        if self.theirs is None or len(self.ours.values) != len(self.theirs.values):
            return None
        return Spread(
            tuple(a / b for a, b in zip(self.ours.values, self.theirs.values, strict=True))
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "section": self.section,
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours.to_json(),
            "theirs": None if self.theirs is None else self.theirs.to_json(),
            "ratio": self.ratio,
            "ratios": None if self.ratios is None else self.ratios.to_json(),
            "against": self.against,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All that one run measured. machine: in words. model: one line. settings: the options it was
    run with."""

    machine: dict[str, str]
    model: str
    settings: dict[str, Any]
    measurements: list[Measurement] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        lines = [measurement.to_json() for measurement in self.measurements]
        return {
            "machine": self.machine,
            "model": self.model,
            "settings": self.settings,
            "measurements": lines,
        }


def by_turns(
    sides: Mapping[str, Callable[[], float]], repeats: int, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """Run each side once to warm up, then `repeats` rounds in turn: (seconds, what the side
    returned) of each counted run."""
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, work in sides.items():
            seconds, done = timed(work, device)
            if number:
                runs[name].append((seconds, done))
    return runs


def timed(work: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """Seconds that `work` took, to its end on the device, and what it returned."""
    synchronize(device)
    began = time.perf_counter()
    done = work()
    synchronize(device)
    return time.perf_counter() - began, done


def rates(runs: list[tuple[float, float]]) -> Spread:
    """Work done a second."""
    return Spread(tuple(done / seconds for seconds, done in runs))


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that `work` holds at once, above what is held when it begins.

    CUDA: torch's own high-water mark. CPU: the same quantity, from the allocations that torch's
    profiler records; the resident size of a process would count what an allocator keeps for later,
    and loading's own peak. Not counted: scratch inside matrix kernels.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "10"
    )  # else it writes a line about each start and stop to standard error
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = [
            event
            for event in json.loads(trace.read_text())["traceEvents"]
            if event["name"] == "[memory]"
        ]
    held = most = 0
    for event in sorted(events, key=lambda event: int(event["args"]["Ev Idx"])):
        held += int(event["args"]["Bytes"])
        most = max(most, held)
    return most


def synchronize(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
