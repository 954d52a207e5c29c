"""Calls of the calculator in a chain of GSM8K: its marks <<48/2=24>> say what to work out, and the
words before each why.

Invariant: a thought ends where the value that its call works out would stand; a chain is shown only
where the calculator confirms its marks.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from minirl.verify import numeric
from minirl.verify.calculator import CalculatorError, evaluate

_MARK = re.compile(r"<<(?P<expression>[^<>=]{1,200})=(?P<value>[^<>]{1,60})>>")
_ANSWER = re.compile(r"\n?####\s*(?P<answer>.*)\Z", re.DOTALL)
_ONE_NUMBER = re.compile(r"\s*-?[0-9.,]+\s*")
_DANGLING = re.compile(r"[\s=:$€£¥₹]+\Z")


class Call(NamedTuple):
    """A thought, and the expression that it leads to."""

    thought: str
    expression: str


class Chain(NamedTuple):
    """The calls of a chain in order; the thought after the last, and the answer."""

    calls: tuple[Call, ...]
    thought: str
    answer: str


def read_chain(solution: str) -> Chain:
    """A solution of GSM8K as calls. A line without a mark joins the thought that follows it."""
    ending = _ANSWER.search(solution)
    answer = ending["answer"].strip() if ending else ""
    text = solution[: ending.start()] if ending else solution
    text = _MARK.sub(
        lambda mark: "" if _ONE_NUMBER.fullmatch(mark["expression"]) else mark[0], text
    )  # one number is nothing to work out
    calls, at = list[Call](), 0
    for mark in _MARK.finditer(text):
        calls.append(
            Call(_DANGLING.sub("", text[at : mark.start()]).strip(), mark["expression"].strip())
        )
        at = mark.end()
    return Chain(tuple(calls), text[at:].strip(), answer)


def read_values(solution: str) -> list[Fraction]:
    """The values that the marks of a solution state, in order; those that are no numbers are left
    out."""
    stated = (numeric.read_number(mark["value"]) for mark in _MARK.finditer(solution))
    return [found.value for found in stated if found is not None]


def has_right_calls(solution: str) -> bool:
    """Whether a chain calls the calculator at all, and gets from it what its marks say, to a
    hundredth or a hundredth part."""
    marks = list(_MARK.finditer(solution))
    return bool(read_chain(solution).calls) and all(
        _agrees(mark["expression"], mark["value"]) for mark in marks
    )


def _agrees(expression: str, value: str) -> bool:
    stated = numeric.read_number(value)
    try:
        found = evaluate(expression)
    except CalculatorError:
        return False
    return stated is not None and abs(found - stated.value) <= max(
        Fraction(1, 100), abs(found) / 100
    )
