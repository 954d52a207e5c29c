"""Expressions that are no plain number (4\\pi, 2\\sqrt{3}, (1 + 2) / 7), valued by math-verify in a
process of its own.

Invariant: bounded. Only digits, operators, brackets, roots, fractions and pi get there; the process
is killed if it is slow, and its memory is limited where the system can. math-verify sets an alarm,
which works in a main thread alone, so it never runs in this process.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from minirl.io.process import Helper

MAX_CHARS = 100
MAX_BRACKETS = 8  # its parser takes twice as long with each that is nested
TIMEOUT_S = 5.0
MEMORY_BYTES = 1 << 30
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
        self.timeout_s = timeout_s
        self._helper = Helper(
            "minirl.verify.symbolic:prepare",
            "math_verify",
            f"task.symbolic: got true, but math-verify {{}}; {INSTALL}",
            MEMORY_BYTES,
        )
        self._helper.require_package()

    def __call__(self, expression: str) -> float | None:
        """The finite real value of `expression`; None if it has none, takes longer than `timeout_s`
        or ends the process."""
        latex = to_latex(expression)
        if latex is None:
            return None
        try:
            value: float | None = self._helper.ask(latex, self.timeout_s)
        except (TimeoutError, EOFError):
            return None
        return value

    def close(self) -> None:
        """End the process; the next call starts another."""
        self._helper.close()


def to_latex(expression: str) -> str | None:
    """`expression` as LaTeX that can only be a number; None if it is anything else, or so large
    that it could take long.

    None too if nothing needs a value worked out: no root, pi, power or \\frac, and no operation in
    brackets that are not around it all.
    """
    match = _WRAP.match(expression[: 2 * MAX_CHARS].translate(_SIGNS))
    latex = _COMMA.sub("", match[1] if match else "")
    latex = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", latex).strip()
    bare = _COMMANDS.sub(lambda m: "*" if m[0] in (r"\times", r"\cdot") else " ", latex)
    is_number = (
        len(latex) <= MAX_CHARS
        and bare.count("(") + bare.count("{") <= MAX_BRACKETS
        and not _HUGE.search(bare)
        and not _STRAY_BRACE.search(latex.replace(" ", ""))
        and latex.count("}{") <= latex.count("frac")
        and _ALLOWED.fullmatch(bare)
        and not _SIDE_BY_SIDE.search(bare)
        and re.search(r"[0-9]|\\pi", latex)
    )
    needs_value = _NEEDED.search(latex) or _OPERATION.search(_unwrap(bare))
    return latex if is_number and needs_value else None


def _unwrap(text: str) -> str:
    """`text` without the brackets that hold all of it."""
    text = text.strip()
    while text.startswith("(") and text.endswith(")"):
        depths = list(accumulate((char == "(") - (char == ")") for char in text))
        if 0 in depths[:-1]:
            break
        text = text[1:-1].strip()
    return text


def prepare() -> Callable[[str], float | None]:
    """In the helper process: the function that values LaTeX."""
    logging.disable()
    from math_verify import LatexExtractionConfig, parse

    return lambda latex: _value(
        parse(f"${latex}$", [LatexExtractionConfig()], parsing_timeout=None)
    )


def _value(found: list[Any]) -> float | None:
    """The value of what math-verify read: an expression and its text, or the text alone if it could
    not read it."""
    if len(found) != 2:
        return None
    try:
        value = float(found[0].evalf())
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return None
    return value if math.isfinite(value) else None
