"""The program sandbox: Python that a model wrote, run by pydantic-monty (a small interpreter in
Rust), never by this interpreter.

Invariant: whatever the program, `run_program` returns a Result within its limits, and no byte of
the program is executed in this process. How much else the machine has to do does not make a right
program a slow one: a time-out counts when the program had its time.

Three walls. Monty has no files, network, processes or environment, and counts time and memory
itself. Its process is killed when it does not keep its own time (big integers, deeply nested
source), has a clean environment and rlimits, and may crash alone. A helper process owns it: Monty's
client keeps threads that do not survive a fork and a worker that outlives a killed parent, so it is
kept out of ours.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any, Literal

from minirl.errors import UserError
from minirl.verify.cpu import Meter

ErrorKind = Literal["program_error", "timeout", "memory", "no_number"]

MAX_CHARS = 65_536  # of a program
MAX_REPLY = 65_536  # bytes of what the helper says
MAX_DETAIL = 200  # characters of an error message
MAX_REPR = (
    400  # characters of a result; no float needs more, and a longer integer is no finite float
)
GRACE_S = 0.25  # what Monty's process may take beyond the limit before it is killed
SLACK_S = 5.0  # what the helper may take beyond that, on a loaded machine
# the share of its time, in CPU seconds, that a program must have had before a time-out is its own
ENOUGH = 0.8
PATIENCE = 10  # how many times the wall-clock limit a second run has, in which CPU seconds decide
START_S = 60.0
INSTALL = "install it with `pip install 'pydantic-monty>=1.4,<2'`"

# What Monty runs. The program has a namespace of its own, so it cannot rename what this text uses,
# and whatever it returns or raises leaves as a short string. An exception that a program cannot
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


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use. time_s: seconds of a CPU. memory_mb: MiB of its heap. output_kb:
    KiB printed (and thrown away)."""

    time_s: float = 1.0
    memory_mb: int = 64
    output_kb: int = 64


@dataclass(frozen=True, slots=True)
class Result:
    """What came out: a finite `value`, or None with the kind of error; `detail` is one line for
    people.

    program_error: it does not parse, uses what Monty lacks, or raised. timeout. memory: more memory
    or output than allowed.
    no_number: it returned something else than a plain finite number. text: what that was, where it
    is one to eight letters, brackets, dots and spaces (the letter of an option); None for anything
    else.
    """

    value: int | float | None
    error: ErrorKind | None = None
    detail: str = ""
    text: str | None = None


DEFAULT = Limits()


def run_program(source: str, *, limits: Limits = DEFAULT) -> Result:
    """Run `source` and call its `solution()`; the result is a function of the two arguments (clock
    and random numbers are fixed) and, for a program that needs about as long as it may, of the
    processor's speed.

    Monty's own limit is wall-clock. Where it strikes and the interpreter had less than ENOUGH of
    `time_s` as CPU time, the machine was busy with something else: the program runs once more with
    PATIENCE times the wall-clock, and its CPU seconds decide. Without /proc (macOS) they are not
    known, and the first time-out counts.

    Numbers are int, float, Decimal, or text that is one of these ("42"), which the paper's float()
    takes too; True, 3j, a list, "3/4" or "$5" are not. Imports: what Monty has built in (math,
    decimal, datetime, random, itertools, collections, re and some more; os and pathlib reach
    nothing; no fractions, numpy or sympy) and nothing else; `math` is there without an import, as
    in the paper's runs. Raises UserError where pydantic-monty is not installed.
    """
    if len(source) > MAX_CHARS:
        return Result(None, "program_error", f"{len(source)} characters, more than {MAX_CHARS}")
    request = {"source": source, **asdict(limits)}
    for patience in (1, PATIENCE):
        # A death that is no time-out may come from outside (a signal, the kernel's memory killer),
        # and a program may wait for a processor: only a second one is the program's.
        kind, text = _ask(
            request | {"patience": patience}, patience * limits.time_s + GRACE_S + SLACK_S
        )
        if kind not in ("died", "gone", "late", "starved"):
            break
    if kind == "ok":
        value, short = read_plain_number(text), _SHORT.fullmatch(text)
        return (
            Result(value)
            if value is not None
            else Result(None, "no_number", f"returned {_line(text)}", short[1] if short else None)
        )
    return Result(None, _ERRORS.get(kind, "program_error"), _line(text))


def read_plain_number(text: str) -> int | float | None:
    """The finite number that `text` is the repr of, quoted or not; None for anything else, also
    what is too large for a float."""
    if len(text) > MAX_REPR:
        return None
    quoted = _QUOTED.fullmatch(text)
    text = quoted[1] if quoted else text
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        return None
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def require() -> None:
    """Raise UserError now where programs cannot be run, rather than at the first of them."""
    with _lock:
        _start()


def close() -> None:
    """End the helper, if there is one. It also ends by itself with this process, however that
    ends."""
    global _helper
    with _lock:
        if _helper is not None:
            _helper.close()
        _helper = None


class _Helper:
    """The process that owns Monty's, and the line to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Its own session, so that Ctrl-C reaches only us and one kill reaches all of it; -P, so
            # that no file beside it is imported.
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    f"from minirl.verify.sandbox import serve; serve({theirs.fileno()})",
                ],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.line = Connection(ours.detach())

    def ask(self, request: dict[str, Any] | None, timeout_s: float) -> list[str]:
        """[kind, text]; kind "late" where no answer came in time, "gone" where the process
        ended."""
        try:
            if request is not None:
                self.line.send_bytes(json.dumps(request).encode())
            if not self.line.poll(timeout_s):
                return ["late", f"no answer within {timeout_s:g} s"]
            reply: list[str] = json.loads(self.line.recv_bytes(MAX_REPLY))
        except (EOFError, OSError):
            return ["gone", "the sandbox's process ended"]
        return reply

    def close(self) -> None:
        """End it and Monty's process with it, at once: there is nothing to save, and either may be
        stuck."""
        self.line.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


_helper: _Helper | None = None
_lock = threading.Lock()
atexit.register(close)


def _forget() -> None:
    """In a forked child: the helper and whoever held the lock are the parent's."""
    global _helper, _lock
    if _helper is not None:
        _helper.line.close()
        _helper.process.returncode = 0
    _helper, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _start() -> _Helper:
    """The helper, started if there is none. The caller holds the lock."""
    global _helper
    if _helper is not None:
        return _helper
    if importlib.util.find_spec("pydantic_monty") is None:
        raise UserError(
            "pydantic-monty is not installed, and model-written programs run nowhere else;"
            f" {INSTALL}"
        )
    helper = _Helper()
    kind, text = helper.ask(None, START_S)
    if kind != "ready":
        helper.close()
        raise UserError(
            f"pydantic-monty does not run ({text}), and model-written programs run nowhere else;"
            f" {INSTALL}"
        )
    _helper = helper
    return helper


def _ask(request: dict[str, Any], timeout_s: float) -> list[str]:
    global _helper
    with _lock:
        helper, reply = _start(), ["gone", ""]
        try:
            reply = helper.ask(request, timeout_s)
        finally:
            # Also after an interrupt: the next question must not get this one's answer.
            if reply[0] in ("gone", "late"):
                helper.close()
                _helper = None
        return reply


def _line(text: str) -> str:
    return " ".join(text.split())[:MAX_DETAIL]


def serve(handle: int) -> None:
    """The helper's main: answer requests on the socket `handle` until the other end is gone."""
    os.set_inheritable(handle, False)
    line = Connection(handle)
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    try:
        from pydantic_monty import Monty

        pool = Monty(min_processes=1, max_processes=1, feed_duration_limit_grace=GRACE_S)
        pool.__enter__()
    except (
        Exception
    ) as error:  # whatever it is, programs cannot be run and the user must be told why
        line.send_bytes(
            json.dumps(["refused", f"{type(error).__name__}: {error!s:.{MAX_DETAIL}}"]).encode()
        )
        return
    line.send_bytes(json.dumps(["ready", ""]).encode())
    with suppress(EOFError, OSError):
        while True:
            line.send_bytes(json.dumps(_run(pool, **json.loads(line.recv_bytes()))).encode())


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
            _fence(session.worker_pid, memory_mb)
            good, text = session.feed_run(
                DRIVER, inputs={"source": source}, print_callback=CollectString(output_kb << 10)
            )
        kind = "ok" if good else "program_error"
    except MontyCrashedError as error:
        kind, text = ("timeout" if error.timed_out else "died"), _line(str(error))
    except MontyError as error:
        kinds: dict[type[BaseException], str] = {TimeoutError: "timeout", MemoryError: "memory"}
        kind, text = kinds.get(type(error.exception()), "program_error"), _line(str(error))
    return _by_cpu(kind, meter.used_s(), time_s, patience), text


def _by_cpu(kind: str, used_s: float | None, time_s: float, patience: int) -> str:
    """The kind of a run that used so many CPU seconds: "starved" for a first time-out that is the
    machine's, "timeout" for a second run that ended only because it had more wall-clock."""
    if used_s is None:
        return kind
    if patience == 1:
        return "starved" if kind == "timeout" and used_s < ENOUGH * time_s else kind
    return "timeout" if used_s > time_s else kind


def _fence(process: int | None, memory_mb: int) -> None:
    """The kernel's own limit on the memory of Monty's process, above what Monty counts: 17 MiB at
    rest, 110 at 64 MiB (Linux only)."""
    if process is not None and hasattr(resource, "prlimit"):
        size = (2 * memory_mb + 128) << 20
        with suppress(ProcessLookupError):
            resource.prlimit(
                process, resource.RLIMIT_DATA, (size, resource.getrlimit(resource.RLIMIT_DATA)[1])
            )
