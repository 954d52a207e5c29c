"""Numbers: does a text state the gold number? (ReFT, arXiv 2401.08967, section 3: the number after
the last "the answer is".)

Invariant: pure, total and bounded. A statement counts if it is ONE number in a plain form, with or
without a unit; a range, two numbers, a denial or a sum that is not worked out is no number.
Numbers are exact fractions: a tolerance of 0.01 is not a float near it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from minirl.episode import Part, Verdict
from minirl.recipe.maths import MathsCredit
from minirl.verify.calculator import FRACTIONS, SCALES
from minirl.verify.statement import MAX_STATEMENT, find_statement

Evaluate = Callable[[str], float | None]

# A thousands separator stands before groups of exactly three digits; a decimal comma is not read,
# as 1,234 would then mean two numbers.
_PLAIN = (
    r"(?:(?:[1-9][0-9]{0,2}(?:(?:,|\{,\}|\\,|[\u2009\u202f])[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?"
    r"|\.[0-9]++)"
)
_EXPONENT = r"[+-]?[0-9]{1,3}(?![0-9])"
_POWER = (
    rf"(?:[eE](?P<e>{_EXPONENT})"
    rf"|\s*(?:[x×*·]|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*[{{(]?(?P<power>{_EXPONENT})[)}}]?)"
)
_CURRENCY = r"(?:\\?\$|[€£¥₹]|(?:rs|usd|us)\b\s*\.?)"
_LEAD = re.compile(
    rf"(?:[\s:*_\"'“‘`(\[{{~≈]|\\[(\[]|\\(?:text|mathrm|mathbf)\b|{_CURRENCY}"
    r"|(?:about|approximately|approx|around|roughly|exactly)\b\.?)*+",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    rf"(?P<sign>(?:[+-]|(?:negative|minus)\b))?\s*{_CURRENCY}?\s*(?P<inner>-)?"
    rf"(?:(?P<whole>[0-9]++)\s+(?:and\s+)?(?P<num>[0-9]++)\s*/\s*(?P<den>[0-9]++)"
    rf"|(?P<upper>{_PLAIN})\s*/\s*(?P<lower>{_PLAIN})"
    rf"|(?P<plain>{_PLAIN}){_POWER}?)",
    re.IGNORECASE,
)
# Numbers in words, where they are not part of a longer one: "two-seaters" is a unit, "two" and
# "three-quarters" are numbers.
_IN_WORDS = (
    r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
    r"|hundred|thousand|million|billion|trillion)(?!-(?!quarters?\b))"
)
_PERCENT = re.compile(r"\s*(?:\\?%|(?:percent|per\s?cent|pct)\b)", re.IGNORECASE)
_SCALE = re.compile(
    rf"\s*(?:(?P<word>hundred|thousand|million|billion|trillion|dozen)s?|(?P<k>k))\b"
    rf"(?!\s*,\s*{_IN_WORDS}\b)",
    re.IGNORECASE,
)
# A unit is words, which may carry a power (m^2, cm3), among closing marks. A digit or an operator
# that is left over makes it no unit.
_WORD = r"(?:[-/]?[^\W\d_\u00b2\u00b3\u00b9\u2070-\u209f]++(?:[²³]|\^?\{?[23]\}?(?![0-9]))?+)"
_UNIT = re.compile(rf"(?:[\s*_\"'”’`)\]{{}}\\$€£¥₹¢°]|/(?=\s)|{_WORD})*+")
_END = re.compile(r"\Z|[.!](?![0-9])|[;,(](?![\s*_\\(+$€£¥₹.~-]*+[0-9])")
_NOT_A_UNIT = re.compile(
    r"\s*and\b|.*(?<![^\W\d_])(?:or|nor|not|plus|minus|versus|vs|wrong|incorrect|squared|cubed"
    r"|factorial|sqrt|frac|pi|π|[xyzni]|half|halves|thirds"
    r"|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|million)ths|multiplied|divided|below"
    r"|to\s+the\s+power|(?:less|more|fewer)\s+than"
    r"|times\s+(?!(?:an?|per|each|every|in|as|more|daily|weekly)\b)[^\W\d_]+"
    rf"|{_IN_WORDS})\b",
    re.IGNORECASE,
)
_HEDGED = re.compile(r"[.,;(!\s]*+(?:or|maybe|perhaps)\b", re.IGNORECASE)
_FRAC = re.compile(rf"\\[dt]?frac\s*\{{\s*(-?{_PLAIN})\s*\}}\s*\{{\s*({_PLAIN})\s*\}}")
# What may stand left of an equals sign: at most one letter with its own, and arithmetic. "5, 6 = 6"
# and "x = 5 and y = 6" do not.
_EQUATION = re.compile(r"[\s*(\[$]*+(?:[A-Za-z]\s*=)?(?:[\s0-9+\-*/×÷·()$%=^]|\.|,(?=[0-9]{3}))*+")
_FIGURE = re.compile(rf"{_PLAIN}(?:\s*/\s*{_PLAIN})?")
_CHARACTERS = {
    **dict.fromkeys(map(ord, "−–—‐‑﹣－"), "-"),
    **dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2007\u3000"), " "),
    **dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"), ""),
    **dict.fromkeys(map(ord, "⁄∕"), "/"),
    **{ord(sign): f" {value}" for sign, value in FRACTIONS.items()},
}
_SPACING = (("\\!", ""), ("~", " "), ("^{\\circ}", "°"), ("^\\circ", "°"))  # 1,\!000, 12~\text{cm}


class Number(NamedTuple):
    """A stated number. scale: the factor of its unit: 1/100 for a percentage, 12 for dozens, 10**6
    for millions, else 1."""

    value: Fraction
    scale: Fraction = Fraction(1)

    @property
    def canonical(self) -> str:
        """The text that it votes for: "2 dozen" for 24; "50%" for 50, the answer of a word problem
        that asks for a percentage."""
        return write_canonical(self.value * max(self.scale, Fraction(1)))

    def equals(self, gold: Fraction, tolerance: Fraction) -> bool:
        """|difference| <= tolerance, in either reading: "50%" states 50 (what percentage?) and 0.5
        (what share?), "2 dozen" 2 and 24.

        Data sets hold both. The difference of a percentage is taken in points, so that 51% is not
        0.5 within 0.01.
        """
        scaled = abs(self.value * self.scale - gold) <= tolerance * min(self.scale, Fraction(1))
        return scaled or abs(self.value - gold) <= tolerance


def read_number(text: str) -> Number | None:
    """The one number that `text` is, its unit aside: "$ 1,234.50", "12 apples", "-3/4", "1 1/2",
    "15 %", "2.5e3"; None if it is anything else.

    Also "2 + 3 = 5" and "x = 5", where the last side counts. A fraction is read as its value
    whether or not it is in lowest terms.
    """
    text = text[:MAX_STATEMENT].translate(_CHARACTERS)
    for latex, plain in _SPACING:
        text = text.replace(latex, plain)
    text = _FRAC.sub(r" \1/\2", text).strip()
    found = _read_head(text)
    if found is None and "=" in text:
        left, equals, right = text.rpartition("=")
        found = _read_head(right.strip()) if _EQUATION.fullmatch(left + equals) else None
    return found


def write_canonical(value: Fraction) -> str:
    """One text for all ways to write a number, so that answers can vote: whole numbers in full,
    others to nine significant digits, because programs return 0.1 + 0.2 where a text says 0.3."""
    if value.denominator == 1:
        return str(value.numerator)
    try:
        return f"{float(value):.9g}"
    except OverflowError:
        return str(value)


def read_last_figure(text: str) -> list[Fraction]:
    """The readings of the last figure in `text`: its value, for a fraction its value and its last
    number; [] if there is none."""
    figures = _FIGURE.findall(text[-MAX_STATEMENT:])
    if not figures:
        return []
    upper, slash, lower = figures[-1].partition("/")
    readings = [_plain(lower if slash else upper)]
    return [_plain(upper) / readings[0], *readings] if slash and readings[0] else readings


def verify(
    gold: str | float,
    text: str,
    credit: MathsCredit,
    *,
    tolerance: float = 0.01,
    symbolic: Evaluate | None = None,
) -> Verdict:
    """Score 1.0 if the number that `text` states last differs from `gold` by at most `tolerance`,
    else by `credit`.

    parts["error_kind"]: "wrong_answer" (another number), "no_answer" (none that can be read), or
    None. parts["answer"]: the number in a form that equal numbers share, None if there is none.
    symbolic: values an expression that is not a plain number, such as 4\\pi or 2\\sqrt{3}, or gives
    None.
    Raises ValueError for a `gold` that is no number.
    """
    target = read_number(str(gold))
    if target is None:
        raise ValueError(f"gold answer: got {gold!r}, expected a number")
    statement = find_statement(text)
    answer = None if statement is None else read_number(statement.text)
    if answer is None and statement is not None and symbolic is not None:
        value = symbolic(statement.text)
        answer = None if value is None else Number(Fraction(value))
    if answer is None:
        return make_verdict("no_answer", None, credit)
    right = answer.equals(target.value, Fraction(str(tolerance)))
    return make_verdict(None if right else "wrong_answer", answer.canonical, credit)


def make_verdict(
    kind: str | None, answer: str | None, credit: MathsCredit, **parts: Part
) -> Verdict:
    """Score 1.0 without an error kind, credit.wrong_answer for "wrong_answer", else
    credit.no_answer."""
    partial = credit.wrong_answer if kind == "wrong_answer" else credit.no_answer
    score = 1.0 if kind is None else partial
    return Verdict(score, kind is None, {"error_kind": kind, "answer": answer, **parts})


def _read_head(text: str) -> Number | None:
    """The number at the head of `text`, if nothing but a unit and the end of a sentence follows."""
    if text.startswith("<"):  # SVAMP's prose chains state <203>; an open < alone is "less than"
        inner, closed, rest = text[1:].partition(">")
        text = inner + rest if closed else ""
    lead = _LEAD.match(text)
    match = _NUMBER.match(text, lead.end() if lead else 0)
    value = _value(match) if match else None
    if match is None or value is None:
        return None
    at, scale = match.end(), Fraction(1)
    if percent := _PERCENT.match(text, at):
        at, scale = percent.end(), Fraction(1, 100)
    elif word := _SCALE.match(text, at):
        at, scale = word.end(), Fraction(1000 if word["k"] else SCALES[word["word"].lower()])
    unit = _UNIT.match(text, at)
    end = unit.end() if unit else at
    if _NOT_A_UNIT.match(text, at, end) or not _END.match(text, end) or _HEDGED.match(text, end):
        return None
    return Number(value, scale)


def _value(match: re.Match[str]) -> Fraction | None:
    """None for a zero denominator, two signs, and a mixed number whose fraction is not below 1."""
    if match["sign"] and match["inner"]:
        return None
    if match["whole"]:
        num, den = int(match["num"]), int(match["den"])
        value = int(match["whole"]) + Fraction(num, den) if num < den else None
    elif match["upper"]:
        lower = _plain(match["lower"])
        value = _plain(match["upper"]) / lower if lower else None
    else:
        value = _plain(match["plain"]) * Fraction(10) ** int(match["e"] or match["power"] or 0)
    negative = match["inner"] or (match["sign"] or "+").lower() in ("-", "negative", "minus")
    return -value if value is not None and negative else value


def _plain(digits: str) -> Fraction:
    return Fraction(re.sub(r"[^0-9.]", "", digits))
