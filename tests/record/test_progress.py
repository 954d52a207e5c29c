"""The display: plain lines at once without a terminal, a live panel on one, and no number that can
break it."""

from __future__ import annotations

import io

from rich.console import Console

from minirl.record.progress import Progress
from minirl.record.statistics import Interval

ROW = {
    "stage": 1,
    "step": 3,
    "reward": 0.25,
    "first": 0.5,
    "second": 0.625,
    "dead": 3,
    "groups": 16,
    "kl": 0.00123,
    "entropy": 1.5,
}
TIMES = {"sample_s": 2.0, "learn_s": 1.0, "sample_tps": 1234.5, "learn_tps": 507.0}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Sink(io.StringIO):
    """Counts what has been flushed, as a log file's reader would see it."""

    flushed = ""

    def flush(self) -> None:
        self.flushed = self.getvalue()


def plain() -> tuple[Progress, Sink, Clock]:
    sink, clock = Sink(), Clock()
    return Progress(Console(file=sink, force_terminal=False, width=80), clock=clock), sink, clock


def test_plain_lines_come_at_once_and_unwrapped() -> None:
    progress, sink, clock = plain()
    with progress:
        progress.stage("1 reflect", 10, 4)
        assert sink.flushed == "1 reflect: 10 steps, 4 already done\n"
        clock.now += 6
        progress.step(ROW, TIMES)
        assert (
            sink.flushed.splitlines()[1]
            == "1 reflect 5/10  reward 0.250  first 0.500  second 0.625  dead 3/16  KL 0.0012 "
            " entropy 1.500  sampling tok/s 1,234  learning tok/s 507  eta 0:30"
        )
        progress.say("evaluation [bold]at step 5[/bold]")
        assert sink.flushed.endswith(
            "evaluation [bold]at step 5[/bold]\n"
        )  # text is never taken for markup


def test_missing_and_odd_numbers_are_left_out() -> None:
    progress, sink, _ = plain()
    with progress:
        progress.stage("0 collect", 2, 0)
        progress.step({})
        progress.step(
            {
                "reward": None,
                "kl": float("nan"),
                "entropy": float("inf"),
                "loss": "?",
                "dead": 1,
                "lr": True,
                "kept": 31,
            },
            {},
        )
    assert sink.flushed.splitlines()[1:] == ["0 collect 1/2", "0 collect 2/2  kept 31  dead 1"]


def test_skipped_steps_are_shown_once_there_are_any() -> None:
    progress, sink, _ = plain()
    with progress:
        progress.stage("1", 2, 0)
        progress.step({"skipped": 0.0, "dead": 2.0, "groups": 16.0})
        progress.step({"skipped": 3.0})
    assert sink.flushed.splitlines()[1:] == ["1 1/2  dead 2/16", "1 2/2  skipped steps 3"]


def test_an_evaluation_is_one_line() -> None:
    progress, sink, _ = plain()
    summary = {
        "first": Interval(0.25, 0.1, 0.456),
        "second": Interval(0.5, 0.3, 0.7),
        "fixed": None,
        "problems": 20,
    }
    with progress:
        progress.evaluation("start", summary)
    line = (
        "evaluation start on 20 problems: 1st try 25.0% [10.0%, 45.6%], within 2 tries 50.0%"
        " [30.0%, 70.0%]\n"
    )
    assert sink.flushed == line


def test_time_left_follows_the_recent_steps() -> None:
    progress, sink, clock = plain()
    with progress:
        progress.stage("1", 100, 0)
        for seconds in [500.0] * 5 + [10.0] * 20:  # slow at first; the last 20 steps count
            clock.now += seconds
            progress.step({})
    assert sink.flushed.splitlines()[-1] == "1 25/100  eta 12:30"


def test_long_sampling_is_reported_without_a_terminal() -> None:
    progress, sink, clock = plain()
    with progress:
        progress.stage("1", 3, 0)
        for done in range(1, 65):
            clock.now += 1
            progress.sampling(done, 64)
    assert [line for line in sink.flushed.splitlines() if "sampling" in line] == [
        f"1 1/3  sampling: {n} of 64 episodes" for n in (20, 40, 60)
    ]


def test_live_panel_shows_the_step() -> None:
    sink, clock = io.StringIO(), Clock()
    with Progress(Console(file=sink, force_terminal=True, width=100), clock=clock) as progress:
        progress.stage("1 reflect", 10, 0)
        clock.now += 8
        progress.step(ROW, TIMES)
        progress.sampling(3, 64)
        progress.say("a notice")
    text = sink.getvalue()
    for part in ("1 reflect", "step 1/10", "1:12 left", "0.625", "3/16", "1,234", "a notice"):
        assert part in text, part


def test_live_panel_before_any_stage_and_after_an_error() -> None:
    sink = io.StringIO()
    try:
        with Progress(Console(file=sink, force_terminal=True, width=40)):
            raise ValueError("stop")
    except ValueError:
        pass
    assert "starting" in sink.getvalue()
    assert sink.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_other_processes_show_nothing() -> None:
    sink = Sink()
    with Progress(Console(file=sink, force_terminal=False), quiet=True) as progress:
        progress.stage("1", 2, 0)
        progress.step(ROW, TIMES)
        progress.say("hello")
    assert sink.getvalue() == ""
