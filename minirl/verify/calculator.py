"""The calculator: exact arithmetic on what a model writes, units, currency, thousands commas and
percent signs and all.

Invariant: pure, total and bounded. The text is read into numbers, + - * / ^ and brackets, or
refused with a reason; nothing is ever executed, numbers are exact fractions of bounded size, and an
ambiguous text is refused rather than guessed at.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction

MAX_CHARS = 300
MAX_TOKENS = 120
MAX_BITS = 512  # of a numerator or a denominator
MAX_POWER = 64
DECIMALS = 6

FRACTIONS = {
    sign: Fraction(int(upper), int(lower))
    for sign, upper, lower in zip(
        "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888", strict=True
    )
}
"""Fractions that are one character, and their values."""
SCALES = {"hundred": 100, "thousand": 1000, "dozen": 12}
SCALES |= {"million": 10**6, "billion": 10**9, "trillion": 10**12}
"""Words that multiply the number before them."""
_HALF = f"[{''.join(FRACTIONS)}]"
_PLAIN = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])|[0-9]+(?!,[0-9]))(?:\.[0-9]+|\.(?![0-9.]))?|\.[0-9]+"
)
_CURRENCY = r"(?:[$€£¥₹]|(?:US|USD|EUR|GBP|Rs)\b\.?\s*[$€£¥₹]?)"
# Raised and lowered digits and other fractions count as letters to `re`; here they can be read as
# nothing.
_LETTER = "[^\\W\\d_²³¹⁰-ₜ¼-¾⅐-⅟↉]"
_WORD = rf"{_LETTER}+(?:['’]{_LETTER}+)?"
_TOKEN = re.compile(
    rf"\s*(?:(?P<mixed>[0-9]+\s+[0-9]+/[0-9]+(?![0-9.,])|[0-9]*\s*{_HALF})"
    rf"|(?P<number>(?:{_PLAIN})(?:[eE][+-]?[0-9]{{1,2}}(?![\w.]))?)(?:\.\.\.|…)?"
    rf"|(?P<operator>\*\*|[-+*/^()])|(?P<percent>%)|(?P<currency>{_CURRENCY})|(?P<word>{_WORD}))"
)
# After a number a word is its unit, with a power of its own: 5 m^2, 3 apples.
_UNIT_TAIL = re.compile(r"(?:\^[23](?![0-9.])|[²³])?")
_AMOUNT = rf"{_CURRENCY}\s*(?:{_PLAIN})"
# Right behind a slash that stands right behind an amount or a unit, a word goes on with that unit:
# $5/hour, 60 km/h.
_RATE = re.compile(rf"(?:{_AMOUNT}|[^\W\d_](?:\^[23]|[²³])?)/\Z")
_MONEY = re.compile(rf"{_AMOUNT}\s*\Z")
_SCALES = SCALES | {"k": 1000, "mn": 10**6, "bn": 10**9}
_OF_MONEY = {"m": 10**6, "b": 10**9}  # $5m; 5 m are metres
_WORDED = {"plus": "+", "minus": "-", "times": "*", "x": "*", "of": "*", "over": "/"}
_WORDED_BY = {"divided": "over", "multiplied": "times"}
_BY = re.compile(r"\s+by\b", re.IGNORECASE)
_NO_UNITS = frozenset(
    re.findall(
        r"\w+",
        """a b c d e f i j n p q r t u v w y z pi and or not nor to than squared cubed
        half halves third thirds quarter quarters twice fifths sixths sevenths eighths ninths tenths
        hundredths thousandths double triple π sqrt sum mod modulo log ln sin cos tan abs round
        min max factorial equals is are was if then versus vs divided multiplied by zero one two
        three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty
        seventy eighty ninety point percentage mil bil tn""",
    )
)
_PERCENT = ("percent", "pct")
# 1 fifth of 10; but 20 fifth graders
_PARTS = re.compile(r"(?:fif|six|seven|eigh|nin|ten|hundred|thousand)th\Z")
_WORKED = re.compile(
    rf"(?:[0-9)]|{_HALF}).*?(?:[-+*/^%]|\b(?:plus|minus|times|x|of|over|by|percent|pct)\b)",
    re.IGNORECASE,
)
_OF_HUNDRED = "p"
_ARITHMETIC: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS = str.maketrans("×·∙÷⁄∕−–—﹣－", "***///-----")
_BRACKETS = str.maketrans("[]{}", "()()")
_PER_CENT = re.compile(r"\bper\s+cent\b", re.IGNORECASE)


class CalculatorError(ValueError):
    """The reason why an expression has no value, in words for the model that wrote it."""


def reply(expression: str) -> str:
    """The tool's reply: the value as people write it, or "error: " and the reason."""
    try:
        return format_value(evaluate(expression))
    except CalculatorError as error:
        return f"error: {error}"


def evaluate(expression: str) -> Fraction:
    """The exact value; a percent sign divides by 100 ("20% of 50" is 10). "48/2 = 24" and "x =
    48/2" both have the value of 48/2.

    Raises CalculatorError for anything that is not plainly one expression.
    """
    if len(expression) > MAX_CHARS:
        raise CalculatorError(f"more than {MAX_CHARS} characters")
    text = expression.translate(_SIGNS).translate(_BRACKETS)
    text = text.replace("\\$", "$").replace("\\%", "%").strip(" \t\r\n`").rstrip(".?;: ")
    tokens = _Tokens(pick_side(_PER_CENT.sub("percent", text)))
    try:
        tree = ast.parse("".join(tokens.code), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CalculatorError("not an expression: see to its operators and brackets") from error
    try:
        return _value(tree, tokens.numbers)
    except ZeroDivisionError as error:
        raise CalculatorError("division by zero") from error


def format_value(value: Fraction) -> str:
    """A value as people write it: 24, 0.2, -1.5, and 3.333333... if the decimals go on."""
    if value.denominator == 1:
        return str(value.numerator)
    places = DECIMALS
    while abs(value) * 10**places < 1:  # so small that nothing would be left of it
        places += 1
    places += DECIMALS * (places > DECIMALS)
    wide = Context(prec=400)
    shown = wide.divide(Decimal(value.numerator), Decimal(value.denominator)).quantize(
        Decimal(1).scaleb(-places), context=wide
    )
    text = f"{shown:f}".rstrip("0").rstrip(".")
    return text if Fraction(text) == value else f"{shown:f}..."


def pick_side(text: str) -> str:
    """The first side of an equation that has an operator behind a number, else the first with a
    number."""
    sides = [side for side in text.split("=") if re.search(f"[0-9]|{_HALF}", side)]
    return next((side for side in sides if _WORKED.search(side)), sides[0] if sides else text)


class _Tokens:
    """The tokens of an expression: `code` over the names n0, n1, ... (p0, p1, ... for a percent
    sign's 1/100), and the `numbers` that they stand for; units and currency are gone."""

    def __init__(self, text: str) -> None:
        self.text = text.rstrip()
        self.code: list[str] = []
        self.numbers: list[Fraction] = []
        self.after_value = False  # behind a number or a closed bracket, with its unit
        at = 0
        while at < len(self.text):
            token = _TOKEN.match(self.text, at)
            if token is None:
                raise _unreadable(self.text[at:].strip()[:20])
            if len(self.code) > MAX_TOKENS:
                raise CalculatorError("too many numbers and operators")
            kind = str(token.lastgroup)
            at = self.add(kind, token[kind], token.end())
        if not self.numbers:
            raise CalculatorError("no numbers to work with")

    def add(self, kind: str, said: str, end: int) -> int:
        """Add the token that ends at `end`, and what belongs to it. Gives the position behind."""
        if kind in ("mixed", "number"):
            if self.after_value:
                raise CalculatorError(f"an operator is missing before {said!r}")
            self.code.append(f"n{len(self.numbers)}")
            self.numbers.append(_read_number(said))
            self.after_value = True
        elif kind == "operator":
            if said == "(" and self.after_value:
                self.code.append("*")
            self.code.append("**" if said == "^" else said)
            self.after_value = said == ")"
        elif kind == "percent" or said.lower() in _PERCENT:
            if not self.after_value:
                raise CalculatorError("a percent sign without a number before it")
            self.scale(Fraction(1, 100), sign=_OF_HUNDRED)
        elif kind == "word":
            return self.add_word(said, end)
        return end

    def add_word(self, word: str, end: int) -> int:
        """Add a word: an operator, a scale (million) or a unit."""
        low, before = word.lower(), self.text[: end - len(word)]
        if low in _WORDED_BY and (by := _BY.match(self.text, end)):
            end, low = by.end(), _WORDED_BY[low]
        is_letter = word == "x" and not _times(self.text, end)
        if (low in _WORDED and self.after_value and not is_letter) or (
            low == "minus" and not self.after_value
        ):
            self.code.append(_WORDED[low])
            self.after_value = False
            return end
        scale = _SCALES.get(low.removesuffix("s") if low != "s" else low)
        if self.after_value and scale is None and low in _OF_MONEY and _MONEY.search(before):
            scale = _OF_MONEY[low]
        behind_slash = not self.after_value and scale is None and self.code[1:][-1:] == ["/"]
        rest = behind_slash and _RATE.search(before)  # of a unit: $5/hour
        is_part = _PARTS.match(low) and re.match(r"\s+of\b", self.text[end:])
        no_unit = scale is None and (low in _NO_UNITS or word == "M" or is_part)
        if low in _WORDED or no_unit or not (self.after_value or rest):
            raise _unreadable(word)
        self.after_value = True
        if scale is not None:
            self.scale(Fraction(scale), word)
            return end
        if rest:
            self.code.pop()
        tail = _UNIT_TAIL.match(self.text, end)
        return tail.end() if tail else end

    def scale(self, factor: Fraction, word: str | None = None, sign: str = "n") -> None:
        """Multiply the last value, a number or a bracket, so that 1 / 50% is 2.

        word: refused after a slash: 1/2 million is half a million to most.
        """
        code, start, depth = self.code, len(self.code), 0
        while start and (start == len(code) or depth > 0):
            start -= 1
            depth += code[start].count(")") - code[start].count("(")
        if word is not None and code[:start][-1:] == ["/"]:
            raise CalculatorError(f"put brackets around what belongs to {word!r}")
        code[start:] = [f"({''.join(code[start:])}*{sign}{len(self.numbers)})"]
        self.numbers.append(factor)


def _unreadable(text: str) -> CalculatorError:
    return CalculatorError(f"cannot read {text!r}; use numbers, + - * / ^ and brackets")


def _times(text: str, at: int) -> bool:
    """Whether the x that ends before `at` multiplies: a number follows, and it is not 0x10's."""
    return bool(re.match(rf"\s*[$€£(.]*\s*(?:[0-9]|{_HALF})", text[at:])) and not re.search(
        r"(?<![0-9.,])0x\Z", text[:at]
    )


def _read_number(said: str) -> Fraction:
    if said[-1] in FRACTIONS:
        return _check_size(FRACTIONS[said[-1]] + int(said[:-1] or 0))
    if "/" in said:
        whole, num, den = (int(part) for part in re.split(r"\s+|/", said))
        if num >= den:
            raise CalculatorError(f"an operator is missing in {said!r}")
        return _check_size(Fraction(num, den) + whole)
    mantissa, _, exponent = said.lower().partition("e")
    return _check_size(
        Fraction(mantissa.replace(",", "").rstrip(".") or "0") * Fraction(10) ** int(exponent or 0)
    )


def _value(node: ast.expr, numbers: list[Fraction]) -> Fraction:
    match node:
        case ast.Name():
            return numbers[int(node.id[1:])]
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, numbers)
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand, numbers)
        case ast.BinOp():
            left = _value(node.left, numbers)  # once: twice at every level would be exponential
            sum_of = isinstance(node.op, ast.Add | ast.Sub) and left != 1
            if sum_of and _is_share(node.right) and not _is_share(node.left):
                raise CalculatorError("a percentage of what? write 20% of 50, or 0.2")
            return _check_size(_apply(node.op, left, _value(node.right, numbers)))
    raise CalculatorError("not an expression: see to its operators and brackets")


def _is_share(node: ast.expr) -> bool:
    """Whether it is a percentage or a sum of such: 100 - 20% is ambiguous, 100% - 20% is not."""
    match node:
        case ast.BinOp(op=ast.Mult(), right=ast.Name(id=name)):
            return name.startswith(_OF_HUNDRED)
        case ast.BinOp(op=ast.Add() | ast.Sub()):
            return _is_share(node.left) and _is_share(node.right)
    return False


def _apply(operation: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    if isinstance(operation, ast.Pow):
        if right.denominator != 1 or abs(right) > MAX_POWER:
            raise CalculatorError(f"a power has to be a whole number of at most {MAX_POWER}")
        return left ** int(right)
    if type(operation) not in _ARITHMETIC:
        raise CalculatorError("use numbers, + - * / ^ and brackets")
    return _ARITHMETIC[type(operation)](left, right)


def _check_size(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise CalculatorError("a number with too many digits")
    return value
