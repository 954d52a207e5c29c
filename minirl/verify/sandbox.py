"""The program sandbox: Python that a model wrote, run by pydantic-monty (a small interpreter in
Rust), never by this interpreter.

Invariant: whatever the program, `run_program` returns a Result within its limits, and no byte of
the program is executed in this process. A right program is not late because the machine is busy: a
time-out counts only if the program had its time.

Three walls. Monty has no files, network, processes or environment, and counts time and memory
itself. Its process is killed if it does not keep its own time (big integers, deeply nested source),
has a clean environment and rlimits, and may crash alone. A helper process owns it: Monty's client
keeps threads that do not survive a fork, and a worker that outlives a killed parent.
"""

from __future__ import annotations

import math
import os
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from minirl.io.process import Helper

ErrorKind = Literal["program_error", "timeout", "memory", "no_number"]

MAX_CHARS = 65_536  # of a program
MAX_DETAIL = 200  # characters of an error message
MAX_REPR = 400  # characters of a result: no float needs more, a longer integer is no finite float
GRACE_S = 0.25  # Monty's process may take this long beyond the limit before it is killed
SLACK_S = 5.0  # the helper may take this long beyond that, on a loaded machine
ENOUGH = 0.8  # share of its CPU seconds that a program must have had before a time-out is its own
PATIENCE = 10  # how many times the wall-clock limit a second run has, in which CPU seconds decide
INSTALL = "install it with `pip install 'pydantic-monty>=1.4,<2'`"

# The text that Monty runs. The program has a namespace of its own, so it cannot rename what this
# text uses, and its result or error leaves as a short string. An exception that a program cannot
# catch (time, memory) is not caught here either.
DRIVER = f"""
import math
names = {{"__name__": "__main__", "math": math}}
try:
    exec(source, names)
    found = names["solution"]()
    reply = (True, f"{{found!r:.{MAX_REPR + 1}}}")
except BaseException as error:
    reply = (False, f"{{type(error).__name__}}: {{error!s:.{MAX_DETAIL}}}")
reply
"""

_ERRORS: dict[str, ErrorKind] = {"timeout": "timeout", "late": "timeout", "memory": "memory"}
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_SHORT = re.compile(r"'([A-Za-z(). ]{1,8})'")
_QUOTED = re.compile(r"(?:Decimal\()?'\s*([^']*?)\s*'\)?")
_helper = Helper(
    "minirl.verify.sandbox:prepare",
    "pydantic_monty",
    f"pydantic-monty {{}}, and model-written programs run nowhere else; {INSTALL}",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one program. time_s: CPU seconds. memory_mb: MiB of its heap. output_kb: KiB
    printed (and thrown away)."""

    time_s: float = 1.0
    memory_mb: int = 64
    output_kb: int = 64


@dataclass(frozen=True, slots=True)
class Result:
    """A finite `value`, or None with the kind of error; `detail` is one line for people.

    program_error: it does not parse, uses what Monty lacks, or raised. timeout. memory: more memory
    or output than allowed. no_number: it returned something else than a plain finite number; `text`
    is that if it has one to eight letters, brackets, dots and spaces (an option's letter).
    """

    value: int | float | None
    error: ErrorKind | None = None
    detail: str = ""
    text: str | None = None


DEFAULT = Limits()


def run_program(source: str, *, limits: Limits = DEFAULT) -> Result:
    """Run `source` and call its `solution()`; the result is a function of the two arguments (clock
    and random numbers are fixed) and, if the program needs about as long as it may, of the
    processor's speed.

    Monty's own limit is wall-clock. Where it strikes and the program had less than ENOUGH of
    `time_s` as CPU time, it runs once more with PATIENCE times the wall-clock, and its CPU seconds
    decide. Without /proc (macOS) they are not known, and the first time-out counts.

    Numbers are int, float, Decimal, or text that is one of these ("42"), which the paper's float()
    takes too; True, 3j, a list, "3/4" or "$5" are not. Imports: what Monty has built in (math,
    decimal, datetime, random, itertools, collections, re and some more; os and pathlib reach
    nothing; no fractions, numpy or sympy) and nothing else; `math` is there without an import, as
    in the paper's runs. Raises UserError where pydantic-monty is not installed.
    """
    if len(source) > MAX_CHARS:
        return Result(None, "program_error", f"{len(source)} characters, more than {MAX_CHARS}")
    for patience in (1, PATIENCE):
        # A death that is no time-out may come from outside (a signal, the kernel's memory killer),
        # and a program may wait for a processor: only a second one is the program's.
        question = {"source": source, **asdict(limits), "patience": patience}
        try:
            kind, text = _helper.ask(question, patience * limits.time_s + GRACE_S + SLACK_S)
        except TimeoutError as error:
            kind, text = "late", str(error)
        except EOFError as error:
            kind, text = "gone", str(error)
        if kind not in ("died", "gone", "late", "starved"):
            break
    if kind != "ok":
        return Result(None, _ERRORS.get(kind, "program_error"), _one_line(text))
    value = read_plain_number(text)
    if value is not None:
        return Result(value)
    short = _SHORT.fullmatch(text)
    return Result(None, "no_number", f"returned {_one_line(text)}", short[1] if short else None)


def read_plain_number(text: str) -> int | float | None:
    """The finite number that `text` is the repr of, quoted or not; None for anything else, also for
    a number too large for a float."""
    if len(text) > MAX_REPR:
        return None
    quoted = _QUOTED.fullmatch(text)
    text = quoted[1] if quoted else text
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        return None
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def require() -> None:
    """Raise UserError now if programs cannot be run, rather than at the first of them."""
    _helper.start()


def close() -> None:
    """End the helper, if there is one. It also ends by itself with this process."""
    _helper.close()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAX_DETAIL]


def prepare() -> Callable[[dict[str, Any]], tuple[str, str]]:
    """In the helper: limit it, start Monty's process, and return what answers questions."""
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    from pydantic_monty import Monty

    pool = Monty(min_processes=1, max_processes=1, feed_duration_limit_grace=GRACE_S)
    pool.__enter__()
    return lambda question: _run(pool, **question)


def _run(
    pool: Any, source: str, time_s: float, memory_mb: int, output_kb: int, patience: int
) -> tuple[str, str]:
    from pydantic_monty import CollectString, MontyCrashedError, MontyError

    limits = {
        "max_feed_duration_secs": patience * time_s,
        "max_memory": memory_mb << 20,
        "max_total_sleep_secs": 0.0,
    }
    policy = {"datetime": datetime(2024, 1, 1), "sleep": "zero", "random_start": {"seed": 0}}
    meter = Meter(None)
    try:
        with pool.checkout(
            limits=limits, os_policy=policy, assert_message_annotations=False
        ) as session:
            meter = Meter(session.worker_pid)
            _limit_memory(session.worker_pid, memory_mb)
            good, text = session.feed_run(
                DRIVER, inputs={"source": source}, print_callback=CollectString(output_kb << 10)
            )
        kind = "ok" if good else "program_error"
    except MontyCrashedError as error:
        kind, text = ("timeout" if error.timed_out else "died"), _one_line(str(error))
    except MontyError as error:
        kinds: dict[type[BaseException], str] = {TimeoutError: "timeout", MemoryError: "memory"}
        kind, text = kinds.get(type(error.exception()), "program_error"), _one_line(str(error))
    return _judge_by_cpu(kind, meter.used_s(), time_s, patience), text


def _judge_by_cpu(kind: str, used_s: float | None, time_s: float, patience: int) -> str:
    """The kind of a run that used so many CPU seconds: "starved" for a first time-out that is the
    machine's, "timeout" for a second run that ended only because it had more wall-clock."""
    if used_s is None:
        return kind
    if patience == 1:
        return "starved" if kind == "timeout" and used_s < ENOUGH * time_s else kind
    return "timeout" if used_s > time_s else kind


def _limit_memory(process: int | None, memory_mb: int) -> None:
    """The kernel's own limit on the memory of Monty's process, above what Monty counts: 17 MiB at
    rest, 110 at 64 MiB (Linux only)."""
    if process is not None and hasattr(resource, "prlimit"):
        size = (2 * memory_mb + 128) << 20
        with suppress(ProcessLookupError):
            resource.prlimit(
                process, resource.RLIMIT_DATA, (size, resource.getrlimit(resource.RLIMIT_DATA)[1])
            )


class Meter:
    """Measures a child process's CPU time from now on, also after it was killed: the kernel adds it
    to what its parent's ended children used."""

    def __init__(self, process: int | None) -> None:
        self._process, self._before, self._ended = process, _cpu_s(process), _ended_cpu_s()

    def used_s(self) -> float | None:
        """CPU seconds, user and system together, to about 0.02; None if there was no such process,
        or no /proc."""
        now = _cpu_s(self._process)
        if now is None:  # it is gone: all that it ever used is now among what ended children used
            now = _ended_cpu_s() - self._ended
        return None if self._before is None else now - self._before


def _cpu_s(process: int | None) -> float | None:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime


def _ended_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
