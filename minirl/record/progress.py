"""The display of a running run: a live panel on a terminal, else one plain line a step.

Invariant: nothing here feeds back into the run; a missing or odd number is left out, never an
error; and plain lines are flushed as they come, so that a log file or a notebook shows them at
once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, Self, TypeGuard

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from minirl.record.measures import MEASURES, OUTCOMES

QUIET_S = 20.0
"""Without a terminal, sampling is reported when nothing was printed for this long."""
RECENT_STEPS = 20
"""The time left is estimated from the mean of this many last steps."""


class Progress:
    """Shows a run.

    console: where to; live only on a terminal. quiet: show nothing, for all but the main process of
    a run. clock: seconds, monotonic.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._quiet = quiet
        self._clock = clock
        self._live: Live | None = None
        self._name, self._steps, self._done = "", 0, 0
        self._shown: dict[str, str] = {}
        self._sampling: tuple[int, int] | None = None
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_step = self._last_line = clock()

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._sampling = None
            self._live.stop()
            self._live = None

    def stage(self, name: str, steps: int, done: int = 0) -> None:
        """A stage begins, or is resumed after `done` of its `steps`."""
        self._name, self._steps, self._done = name, steps, done
        self._shown, self._sampling = {}, None
        self._durations.clear()
        self._last_step = self._clock()
        if self._live is None:
            self._line(f"{name}: {steps} steps" + (f", {done} already done" if done else ""))

    def sampling(self, done: int, total: int) -> None:
        """How many of the running step's episodes are complete; cheap enough to call for each."""
        self._sampling = (done, total) if done < total else None
        if self._live is None and done < total and self._clock() - self._last_line >= QUIET_S:
            self._line(f"{self._place(self._done + 1)}  sampling: {done} of {total} episodes")

    def step(self, row: Mapping[str, Any], times: Mapping[str, Any] | None = None) -> None:
        """One step (or collect chunk) is done. row, times: its rows of metrics.jsonl and
        timings.jsonl, which may lack any key."""
        now = self._clock()
        self._durations.append(now - self._last_step)
        self._last_step = now
        self._done += 1
        self._sampling = None
        self._shown = _format({**row, **(times or {}), "skipped": row.get("skipped") or None})
        if _is_number(groups := row.get("groups")) and "dead" in self._shown:
            self._shown["dead"] += f"/{groups:.0f}"
        if self._live is None:
            left = self._eta_s()
            parts = [f"{label} {text}" for label, text in self._shown.items()]
            eta = [f"eta {_clock_text(left)}"] if left else []
            self._line("  ".join([self._place(self._done), *parts, *eta]))

    def say(self, text: str) -> None:
        """A line that stays: a notice, a warning, an evaluation."""
        if self._live is None:
            self._line(text)
        else:
            self._console.print(Text(text))

    def evaluation(self, label: str, summary: Mapping[str, Any]) -> None:
        """A line with the intervals of an evaluation. summary: of `evals.summarise`."""
        shares = [
            f"{measure.label} {i.value:.1%} [{i.low:.1%}, {i.high:.1%}]"
            for measure in OUTCOMES
            if (i := summary.get(measure.key)) is not None
        ]
        shares += [
            f"{key} {i.value:.3g} [{i.low:.3g}, {i.high:.3g}]"
            for key, i in summary.get("scores", {}).items()
        ]
        self.say(f"evaluation {label} on {summary.get('problems')} problems: {', '.join(shares)}")

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        if not self._quiet:
            self._console.file.write(text + "\n")
            self._console.file.flush()

    def _place(self, number: int) -> str:
        return f"{self._name} {number}/{self._steps}"

    def _eta_s(self) -> float | None:
        """Seconds that the rest of the stage will take; None before the first step."""
        if not self._durations:
            return None
        return (self._steps - self._done) * sum(self._durations) / len(self._durations)

    def _render(self) -> RenderableType:
        if not self._name:
            return Text("starting ...", style="dim")
        head = Table.grid(padding=(0, 2))
        left = self._eta_s()
        bar = ProgressBar(total=max(1, self._steps), completed=self._done, width=30)
        eta = f"{_clock_text(left)} left" if left is not None else "time left unknown"
        head.add_row(
            Text(self._name, style="bold"),
            f"step {self._done}/{self._steps}",
            bar,
            Text(eta, style="dim"),
        )
        width = max(1, (self._console.width - 4) // 26)
        numbers = Table.grid(padding=(0, 3))
        cells = [
            Text.assemble((f"{label} ", "dim"), (text, "bold"))
            for label, text in self._shown.items()
        ]
        for start in range(0, len(cells), width):
            numbers.add_row(*cells[start : start + width])
        body = Group(head, numbers, self._status())
        return Panel(body, title="minirl", title_align="left", border_style="dim")

    def _status(self) -> Text:
        now = f"{_clock_text(self._clock() - self._last_step)} into this step"
        if self._sampling:
            done, total = self._sampling
            return Text(f"sampling {done} of {total} episodes, {now}", style="cyan")
        return Text(f"working, {now}" if self._done < self._steps else "stage done", style="dim")


def _format(values: Mapping[str, Any]) -> dict[str, str]:
    """{label: text} of the measures that have a format; booleans, text, None and NaN are left
    out."""
    return {
        measure.short or measure.label: format(value, measure.format)
        for measure in MEASURES
        if measure.format and _is_number(value := values.get(measure.key))
    }


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _clock_text(seconds: float) -> str:
    """75 -> "1:15", 4000 -> "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
