"""A helper process: one of our functions in a Python of its own, asked over a socket.

Invariant: a question is answered within its time, or the process is killed with all that it
started; the next question starts another and never gets an earlier one's answer. The process ends
with this one, however that ends, and a forked child has none of its parent's.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from minirl.errors import UserError

START_S = 60.0  # the first import of a large package on a slow disk
MAX_REPLY = 65_536  # bytes


class Helper:
    """A process that answers questions with the function that `prepare` returns in it.

    prepare: "module:function". package: the module that it needs installed. refusal: the message
    where no process can be had, with {} for the reason. memory_bytes: the process' address space
    (Linux only); None for no limit. Questions and answers are JSON values.
    """

    def __init__(
        self, prepare: str, package: str, refusal: str, memory_bytes: int | None = None
    ) -> None:
        self._prepare, self._package, self._refusal = prepare, package, refusal
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._line: Connection | None = None
        self._end: weakref.finalize[Any, Any] | None = None  # kills the process, also at exit
        self.pid: int | None = None
        _helpers.add(self)

    def require_package(self) -> None:
        """Raise UserError where the package is not installed."""
        if importlib.util.find_spec(self._package) is None:
            raise UserError(self._refusal.format("is not installed"))

    def start(self) -> None:
        """Start the process if there is none. Raises UserError where it cannot run."""
        with self._lock:
            self._open()

    def ask(self, question: Any, timeout_s: float) -> Any:
        """The answer. Raises TimeoutError if none comes in time and EOFError if the process ends;
        UserError where none can be started."""
        with self._lock:
            line = self._open()
            try:
                return _exchange(line, question, timeout_s)
            except BaseException:  # an interrupt too, or the next question would get this answer
                self._kill()
                raise

    def close(self) -> None:
        """End the process at once; the next question starts another."""
        with self._lock:
            self._kill()

    def _open(self) -> Connection:
        """The line to the process, started if there is none. The caller holds the lock."""
        if self._line is not None:
            return self._line
        self.require_package()
        ours, theirs = socket.socketpair()
        arguments = f"{theirs.fileno()}, {self._prepare!r}, {self._memory_bytes}"
        with theirs:
            process = subprocess.Popen(
                # -P: no file beside us is imported.
                [sys.executable, "-P", "-c", f"import {__name__} as m; m.serve({arguments})"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C reaches only us, and one kill reaches all of it
            )
        self._line, self.pid = Connection(ours.detach()), process.pid
        self._end = weakref.finalize(self, _end_process, process, self._line)
        try:
            reason = _exchange(self._line, None, START_S)
        except (EOFError, TimeoutError) as error:
            reason = str(error)
        except BaseException:
            self._kill()
            raise
        if reason is not None:
            self._kill()
            raise UserError(self._refusal.format(f"does not run ({reason})"))
        return self._line

    def _kill(self) -> None:
        if self._end is not None:
            self._end()
        self._end = self._line = self.pid = None

    def _forget(self) -> None:
        """In a forked child: the process, and whoever held the lock, are the parent's."""
        self._lock = threading.Lock()
        if self._end is not None and (parents := self._end.detach()):
            process, line = parents[2]
            line.close()
            process.returncode = 0  # it is not this process' to wait for
        self._end = self._line = self.pid = None


_helpers: weakref.WeakSet[Helper] = weakref.WeakSet()


def _forget_all() -> None:
    for helper in _helpers:
        helper._forget()


os.register_at_fork(after_in_child=_forget_all)


def _exchange(line: Connection, question: Any, timeout_s: float) -> Any:
    """The answer to a question, or the first message of a process if there is none."""
    try:
        if question is not None:
            line.send_bytes(json.dumps(question).encode())
        if line.poll(timeout_s):
            return json.loads(line.recv_bytes(MAX_REPLY))
    except (EOFError, OSError) as error:
        raise EOFError(f"the process ended ({type(error).__name__})") from error
    raise TimeoutError(f"no answer within {timeout_s:g} s")


def _end_process(process: subprocess.Popen[bytes], line: Connection) -> None:
    """End a process and all that it started: there is nothing to save, and any may be stuck."""
    line.close()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve(handle: int, prepare: str, memory_bytes: int | None) -> None:
    """The process' main: say null, or why it cannot answer; then answer on the socket `handle`
    until the other end is gone."""
    os.set_inheritable(handle, False)
    line = Connection(handle)
    if memory_bytes is not None and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    module, _, function = prepare.partition(":")
    try:
        answer: Callable[[Any], Any] = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever it is, the user must be told why nothing is answered
        line.send_bytes(json.dumps(f"{type(error).__name__}: {error!s:.200}").encode())
        return
    line.send_bytes(b"null")
    with suppress(EOFError, OSError):
        while True:
            line.send_bytes(json.dumps(answer(json.loads(line.recv_bytes()))).encode())
