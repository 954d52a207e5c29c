"""Expressions that are no plain number (4\\pi, 2\\sqrt{3}, (1 + 2) / 7), valued by math-verify in a
process of its own.

Invariant: bounded. Only digits, operators, brackets, roots, fractions and pi get there; the process
is killed when it is slow, and its memory is limited where the system can. math-verify sets an
alarm, which works in a main thread alone, so it never runs in this process.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import resource
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from itertools import accumulate
from multiprocessing.connection import Connection
from typing import Any

from minirl.errors import UserError

MAX_CHARS = 100
MAX_BRACKETS = 8  # its parser takes twice as long with each that is nested
TIMEOUT_S = 5.0
START_S = 60.0  # the first import of sympy on a slow disk
MEMORY_BYTES = 1 << 30
MAX_REPLY = 1000  # bytes
READY = "ready"
INSTALL = "run `pip install 'math-verify>=0.9'` or set it to false"
# No letters but these commands, so nothing but a number can be meant; no numbers and no powers that
# take long to write out.
_COMMANDS = re.compile(r"\\(?:[dt]?frac|sqrt|pi|cdot|times|left|right)(?![a-zA-Z])|\\[,;! ]")
_ALLOWED = re.compile(r"[0-9+\-*/^().\[\]{} ]*")
_HUGE = re.compile(r"[0-9]{10}|\^\s*\{?\s*[0-9]{3}|\^[^+\-*/)]*\^")
# math-verify adds up what only stands side by side (5 6 and 5{6} are 11 to it), and reads 1.5.2 as
# a product.
_SIDE_BY_SIDE = re.compile(r"[0-9.)\]}]\s+[0-9.]|[)\]]\s*[0-9.(]|}\s*[0-9.(]|\.[0-9]*\.")
_STRAY_BRACE = re.compile(r"(?<!frac)(?<!sqrt)(?<![\^}\]])\{|(?<!sqrt)\[")
_COMMA = re.compile(r"(?<=[0-9])(?:,|\{,\})(?=[0-9]{3}(?![0-9]))")
# What digits alone cannot say. "20-30" is a range and "48 + 48/2" a sum that was not worked out:
# neither is an answer.
_NEEDED = re.compile(r"\\(?:[dt]?frac|sqrt|pi)(?![a-zA-Z])|\^")
_OPERATION = re.compile(r"\([^()]*[0-9]\s*[-+*/][^()]*\)")
_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "π": r"\pi ", "∏": r"\pi "}
)
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|([0-9.]+))")
_WRAP = re.compile(r"^\s*(?:\\\(|\\\[|\$)?(.*?)(?:\\\)|\\\]|\$)?[\s.!]*$", re.DOTALL)


class Symbolic:
    """Call it with an expression for its value. Its process starts with the first call, and ends
    with this object or with ours.

    Raises UserError where math-verify is not installed.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        if find_spec("math_verify") is None:
            raise UserError(f"task.symbolic: got true, but math-verify is not installed; {INSTALL}")
        self.timeout_s = timeout_s
        self._line: Connection | None = None
        self._end: Callable[[], object] | None = None

    def __call__(self, expression: str) -> float | None:
        """The finite real value of `expression`; None for what is not one, or takes longer than
        `timeout_s`."""
        latex = to_latex(expression)
        if latex is None:
            return None
        try:
            line = self._line or self._start()
            line.send_bytes(json.dumps(latex).encode())
            if line.poll(self.timeout_s):
                value: float | None = json.loads(line.recv_bytes(MAX_REPLY))
                return value
        except (EOFError, OSError):
            # it died of this expression; like one that takes too long, it has no value, and the
            # process is replaced below
            pass
        except BaseException:  # an interrupt: the next question must not get this one's answer
            self.close()
            raise
        self.close()
        return None

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._end is not None:
            self._end()
        self._line = self._end = None

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    f"from minirl.verify.symbolic import serve; serve({theirs.fileno()})",
                ],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the run's to handle
            )
        self._line = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, process, self._line)
        try:
            said = (
                self._line.recv_bytes(MAX_REPLY).decode()
                if self._line.poll(START_S)
                else f"no answer within {START_S:g} s"
            )
        except (EOFError, OSError) as error:
            said = type(error).__name__
        if said != READY:
            self.close()
            raise UserError(f"task.symbolic: math-verify does not start ({said}); {INSTALL}")
        return self._line


def _end(process: subprocess.Popen[bytes], line: Connection) -> None:
    line.close()
    process.kill()
    process.wait()


def to_latex(expression: str) -> str | None:
    """`expression` as LaTeX that can only be a number; None where it is anything else, or so large
    that it could take long.

    None too where nothing needs a value worked out: a root, pi, a power, a \\frac or an operation
    in brackets that are not around it all.
    """
    match = _WRAP.match(expression[: 2 * MAX_CHARS].translate(_SIGNS))
    latex = _COMMA.sub("", match[1] if match else "")
    latex = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", latex).strip()
    bare = _COMMANDS.sub(lambda m: "*" if m[0] in (r"\times", r"\cdot") else " ", latex)
    braced = not _STRAY_BRACE.search(latex.replace(" ", "")) and latex.count("}{") <= latex.count(
        "frac"
    )
    small = (
        len(latex) <= MAX_CHARS
        and bare.count("(") + bare.count("{") <= MAX_BRACKETS
        and not _HUGE.search(bare)
    )
    plain = _ALLOWED.fullmatch(bare) and not _SIDE_BY_SIDE.search(bare)
    needed = _NEEDED.search(latex) or _OPERATION.search(_unwrapped(bare))
    return (
        latex if small and braced and plain and needed and re.search(r"[0-9]|\\pi", latex) else None
    )


def _unwrapped(text: str) -> str:
    """Without the brackets that hold all of it."""
    text = text.strip()
    while text.startswith("(") and text.endswith(")"):
        depths = list(accumulate((char == "(") - (char == ")") for char in text))
        if 0 in depths[:-1]:
            break
        text = text[1:-1].strip()
    return text


def serve(handle: int) -> None:
    """The process' main: answer on the socket `handle` until the other end is gone."""
    logging.disable()
    line = Connection(handle)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        from math_verify import LatexExtractionConfig, parse
    except (
        Exception
    ) as error:  # whatever it is, nothing can be valued and the user must be told why
        line.send_bytes(f"{type(error).__name__}: {error!s:.200}".encode())
        return
    line.send_bytes(READY.encode())
    with suppress(EOFError, OSError):
        while True:
            latex = json.loads(line.recv_bytes())
            found: list[Any] = parse(f"${latex}$", [LatexExtractionConfig()], parsing_timeout=None)
            line.send_bytes(json.dumps(_value(found)).encode())


def _value(found: list[Any]) -> float | None:
    """The value of what math-verify read: an expression and its text; the text alone where it could
    not."""
    if len(found) != 2:
        return None
    try:
        value = float(found[0].evalf())
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return None
    return value if math.isfinite(value) else None
