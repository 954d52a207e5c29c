"""Countdown: does an expression use each number once and reach the target?

Invariant: nothing is ever executed. The text is parsed to an AST of whole numbers, + - * / and
brackets, bounded in length and depth, and valued with exact fractions. Error kinds are those of R3
(arXiv 2505.24726): invalid_equation, wrong_numbers, missed_target.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from fractions import Fraction

from minirl.episode import Verdict
from minirl.recipe import CountdownCredit

MAX_CHARS = 200
MAX_DIGITS = 9
OPEN, CLOSE = "<answer>", "</answer>"
_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
_WHOLE = re.compile(rf"[0-9]{{1,{MAX_DIGITS}}}")
_SIGNS = str.maketrans("×·÷−–", "**/--")


class InvalidEquation(ValueError):  # noqa: N818 - the paper's name of an error kind
    """The text is not an expression of whole numbers, the allowed operators and brackets, or
    divides by zero."""


def find_answer(text: str) -> str | None:
    """The text inside the last complete <answer> pair, None if there is none."""
    end = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, end) if end >= 0 else -1
    return None if start < 0 else text[start + len(OPEN) : end].strip()


def evaluate(expression: str, operators: str = "+-*/") -> tuple[Fraction, list[int]]:
    """The exact value and the numbers used, left to right. Raises InvalidEquation if it is not such
    an expression."""
    expression = expression.translate(_SIGNS)
    if len(expression) > MAX_CHARS or not _ALLOWED.fullmatch(expression):
        raise InvalidEquation(f"not an expression of whole numbers, {operators} and brackets")
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", expression):
        raise InvalidEquation(f"a number of more than {MAX_DIGITS} digits")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InvalidEquation("does not parse") from error
    try:
        return _value(tree, operators), [int(number) for number in re.findall("[0-9]+", expression)]
    except ZeroDivisionError as error:
        raise InvalidEquation("divides by zero") from error


def verify(
    numbers: Sequence[int], target: int, text: str, credit: CountdownCredit, operators: str = "+-*/"
) -> Verdict:
    """Score `text` against a problem: 1 for a right answer, else `credit` of its error kind.

    The answer may end in `= value`, a whole number that has to be the expression's: an equation
    that does not hold is an invalid one.
    """
    kind = _find_fault(numbers, target, find_answer(text) or "", operators)
    score = 1.0 if kind is None else float(getattr(credit, kind))
    return Verdict(score, kind is None, {"error_kind": kind})


def _find_fault(numbers: Sequence[int], target: int, answer: str, operators: str) -> str | None:
    expression, equals, stated = answer.partition("=")
    try:
        value, used = evaluate(expression, operators)
    except InvalidEquation:
        return "invalid_equation"
    if equals and not _WHOLE.fullmatch(stated.strip()):
        return "invalid_equation"
    if sorted(used) != sorted(numbers):
        return "wrong_numbers"
    if value != target:
        return "missed_target"
    return "invalid_equation" if equals and int(stated) != value else None


def _value(node: ast.expr, operators: str) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise InvalidEquation("only numbers and two-sided operators")
    left, right = _value(node.left, operators), _value(node.right, operators)
    match node.op:
        case ast.Add() if "+" in operators:
            return left + right
        case ast.Sub() if "-" in operators:
            return left - right
        case ast.Mult() if "*" in operators:
            return left * right
        case ast.Div() if "/" in operators:
            return left / right
    raise InvalidEquation(f"an operator outside {operators}")
