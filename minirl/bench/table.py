"""The table at the end of a bench, and the machine in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers
from rich.table import Table

from minirl.bench.measure import Report, Spread
from minirl.bench.setup import Bench


def render(report: Report) -> Table:
    """One line a measurement; the ratio is ours over theirs, medians."""
    table = Table(
        title=report.model,
        caption=", ".join(report.machine.values()),
        caption_justify="left",
        title_justify="left",
    )
    for name in ("what", "ours", "theirs", "against"):
        table.add_column(name, justify="right" if name in ("ours", "theirs") else "left")
    table.add_column("ratio", justify="right")
    table.add_column("min-max: ours | theirs | ratio")
    last = ""
    for line in report.measurements:
        if last and line.section != last:
            table.add_section()
        last = line.section
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}x"
        ours = f"{number(line.ours.median)} {line.unit}"
        theirs = "" if line.theirs is None else number(line.theirs.median)
        sides = [between(side) for side in (line.ours, line.theirs, line.ratios) if side]
        table.add_row(line.what, ours, theirs, line.against, ratio, " | ".join(filter(None, sides)))
    return table


def number(value: float) -> str:
    """Three figures: 1,234 or 12.3 or 0.123."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def between(spread: Spread) -> str:
    """Smallest and largest of several; empty for one."""
    if len(spread.values) < 2:
        return ""
    return f"{number(min(spread.values))}-{number(max(spread.values))}"


def machine(bench: Bench) -> dict[str, str]:
    """Processor, accelerator, threads, versions, dtype and the load when the bench began: what a
    figure is worth nothing without."""
    device, options = bench.device, bench.options
    found = {"processor": _processor(), "threads": f"{torch.get_num_threads()} threads"}
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        found["accelerator"] = f"{torch.cuda.get_device_name(device)} ({memory / 2**30:.0f} GiB)"
    found["versions"] = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, python"
        f" {platform.python_version()}"
    )
    base = "" if options.quantize == "none" else f" over {options.quantize}"
    found["dtype"] = str(bench.policy.dtype).removeprefix("torch.") + base
    if hasattr(os, "getloadavg"):
        found["load"] = f"load {os.getloadavg()[0]:.1f} at the start"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
