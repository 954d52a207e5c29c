"""Measuring: how long, how much memory, and what is reported of it.

Invariant: what is compared runs in one process by turns (ABAB...), after one round that is not
counted: the first pass over new shapes builds their kernels and is slow once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

MEGA, GIGA = 1e6, 1e9


@dataclass(frozen=True, slots=True)
class Spread:
    """The values of a quantity, one per repetition."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return median(self.values)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        least, most = min(self.values), max(self.values)
        return {"median": self.median, "min": least, "max": most, "values": list(self.values)}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of the table: our figure, alone or beside another's.

    unit: a rate such as "tokens/s" (more is better), or "MB", "ms" (less is better).
    against: what `theirs` measures, or why it is missing.
    """

    section: str
    what: str
    unit: str
    ours: Spread
    theirs: Spread | None = None
    against: str = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Median of ours over median of theirs; None where ours stands alone."""
        return None if self.theirs is None else self.ours.median / self.theirs.median

    @property
    def ratios(self) -> Spread | None:
        """Ours over theirs, round by round: how far a busy machine moves the ratio."""
        if self.theirs is None or len(self.ours.values) != len(self.theirs.values):
            return None
        pairs = zip(self.ours.values, self.theirs.values, strict=True)
        return Spread(tuple(ours / theirs for ours, theirs in pairs))

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        spreads = {"ours": self.ours, "theirs": self.theirs, "ratios": self.ratios}
        found = {name: None if s is None else s.to_json() for name, s in spreads.items()}
        return asdict(self) | found | {"ratio": self.ratio}


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that one bench measured.

    machine: its parts in words. model: one line. settings: the options of the bench.
    """

    machine: dict[str, str]
    model: str
    settings: dict[str, Any]
    measurements: list[Measurement] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return asdict(self) | {"measurements": [line.to_json() for line in self.measurements]}


def by_turns(
    sides: Mapping[str, Callable[[], float]], repeats: int, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """Run each side once to warm up, then `repeats` rounds in turn.

    Returns (seconds, the side's own return value) of each counted run.
    """
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, work in sides.items():
            run = timed(work, device)
            if number:
                runs[name].append(run)
    return runs


def timed(work: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """Seconds until `work` ended on the device, and its return value."""
    synchronize(device)
    began = time.perf_counter()
    done = work()
    synchronize(device)
    return time.perf_counter() - began, done


def rates(runs: list[tuple[float, float]]) -> Spread:
    """Work done per second."""
    return Spread(tuple(done / seconds for seconds, done in runs))


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors on a GPU while `work` runs, with those that were there before."""
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
