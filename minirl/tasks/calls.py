"""Calls of the calculator in a chain of GSM8K: each of its marks <<48/2=24>> is a call, and the
words before it are the thought.

Invariant: a thought ends where its call's value would stand, and a chain is shown only if the
calculator gives the values of its marks.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from minirl.verify.calculator import CalculatorError, evaluate
from minirl.verify.numeric import read_number

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
    # One number is nothing to work out.
    text = _MARK.sub(lambda m: "" if _ONE_NUMBER.fullmatch(m["expression"]) else m[0], text)
    calls, at = list[Call](), 0
    for mark in _MARK.finditer(text):
        thought = _DANGLING.sub("", text[at : mark.start()]).strip()
        calls.append(Call(thought, mark["expression"].strip()))
        at = mark.end()
    return Chain(tuple(calls), text[at:].strip(), answer)


def read_values(solution: str) -> list[Fraction]:
    """The values of a solution's marks, in order, without those that are no numbers."""
    numbers = (read_number(mark["value"]) for mark in _MARK.finditer(solution))
    return [number.value for number in numbers if number is not None]


def has_right_calls(solution: str) -> bool:
    """Whether a chain calls the calculator at all, and every mark has the calculator's value, to a
    hundredth or a hundredth part."""
    marks = _MARK.finditer(solution)
    return bool(read_chain(solution).calls) and all(
        _agrees(mark["expression"], mark["value"]) for mark in marks
    )


def _agrees(expression: str, value: str) -> bool:
    stated = read_number(value)
    try:
        exact = evaluate(expression)
    except CalculatorError:
        return False
    margin = max(Fraction(1, 100), abs(exact) / 100)
    return stated is not None and abs(exact - stated.value) <= margin
