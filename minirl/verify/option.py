"""Options: does a text choose the gold letter of a multiple-choice question? (MathQA in ReFT, arXiv
2401.08967, section 3.)

Invariant: pure, total and bounded. Only a statement that chooses ONE letter counts, as `c`, `(C)`,
`c ) 38` or `option c`; two letters, a letter in a word and the article "a" choose none. A right
letter may stand below a wrong chain (section 3.6: reward hacking); parts["value_agrees"] and
parts["lucky"] say so without changing the score.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from minirl.episode import Verdict
from minirl.recipe.maths import MathsCredit
from minirl.verify.numeric import Number, make_verdict, read_last_figure, read_number
from minirl.verify.statement import Statement, find_statement

LETTERS = "abcde"
_LEAD = (
    r"(?:[\s*_\"'“‘`(\[{<$]|\\\(|\\(?:text|textbf|mathrm|mathbf)\b"
    r"|(?:the\s++)?(?:answer\s++)?(?:option|choice|letter)\b)*+"
)
_CLOSE = (
    r"[\s*_\"'”’`$]*+(?P<bracket>[)\]}>:]|\.(?=\s*[^\s\w]*[0-9]))?(?:[\s*_\"'”’`$)\]}>]|\\\))*+"
)
_CHOICE = re.compile(rf"{_LEAD}(?P<letter>[A-Za-z])(?![\w'’+#-]){_CLOSE}", re.IGNORECASE)
_END = re.compile(r"\Z|[.!](?!\w)|[;,(]")
# A second letter in the form of an option, or a word that takes the first one back.
_WORD = re.compile(r"\w+")
_SECOND = re.compile(
    r"\b(?:or|nor|not|and)\b|[(\[]\s*[a-e]\s*[)\]]|(?<![\w'’)\]])[a-e]\s*[)\]]"
    r"|[,;/&]\s*[a-e]\s*(?:[.!;,]|\Z)",
    re.IGNORECASE,
)
# The next sentence is about something else, unless it goes on with "or".
_NEXT = re.compile(r"(?<=[.!])\s+(?!(?i:or|and|nor|not|maybe|perhaps)\b)[A-Z]")
# What the extraction of MathQA left before a value ("a ) 2" inside option a, "s . 180" for "rs .
# 180") and after it ("288 cm 2").
_STRAY = re.compile(
    r"^\s*(?:[a-e]\s*[).]|[a-z]\s*=|r?s\b\s*\.?)\s*|(?<=[a-z])\s*\^?\s*[23]\s*\.?\s*$"
)


def read_option(option: str) -> Number | None:
    """The number of an option of MathQA; None for a ratio, a formula or "none of these"."""
    return read_number(_STRAY.sub("", option))


def verify(gold: str, options: Sequence[str], text: str, credit: MathsCredit) -> Verdict:
    """Score 1.0 if `text` states the letter `gold` last, else by `credit`.

    parts["error_kind"]: "wrong_answer" (another letter), "no_answer" (no single letter), or None.
    parts["value_agrees"]: whether the chosen option's value is the last number of the chain (or the
    one stated with the letter); None if either is no number. On MathQA's own rationales it is True
    for 92% of the right letters and 1% of the others. parts["lucky"]: for a right letter, whether
    the value does not agree. parts["answer"]: the letter.
    """
    statement = find_statement(text)
    choice = None if statement is None else _read_choice(statement.text, options)
    if statement is None or choice is None or choice[0] not in LETTERS[: len(options)]:
        return make_verdict("no_answer", None, credit, value_agrees=None, lucky=None)
    letter, after = choice
    agrees = _agrees(read_option(options[LETTERS.index(letter)]), after, statement)
    kind = None if letter == gold else "wrong_answer"
    lucky = None if kind or agrees is None else not agrees
    return make_verdict(kind, letter, credit, value_agrees=agrees, lucky=lucky)


def _read_choice(statement: str, options: Sequence[str]) -> tuple[str, str] | None:
    """The letter that a statement chooses, and the text after it: ("c", "38") of "(c) 38".

    Repeating the text of the chosen one of `options` takes nothing back: "(c) 1 hour and 41
    minutes" chooses one letter.
    """
    match = _CHOICE.match(statement)
    if match is None:
        return None
    after, letter = statement[match.end() :], match["letter"].lower()
    own = dict(zip(LETTERS, options, strict=False)).get(letter, "")
    if _SECOND.search(_NEXT.split(_drop_echo(after, own))[0]) or not (
        match["bracket"] or _END.match(after)
    ):
        return None
    return letter, after


def _drop_echo(text: str, option: str) -> str:
    """`text` without the words of `option` at its head."""
    words, own = list(_WORD.finditer(text)), [word.casefold() for word in _WORD.findall(option)]
    if not own or [word[0].casefold() for word in words[: len(own)]] != own:
        return text
    return text[words[len(own) - 1].end() :]


def _agrees(value: Number | None, after: str, statement: Statement) -> bool | None:
    if value is None:
        return None
    beside = read_option(after)
    last = [abs(beside.value)] if beside else read_last_figure(statement.before)
    if not last:
        return None
    # Figures have no sign: in a chain a minus may be an operation.
    return any(abs(figure - abs(value.value)) <= Fraction(1, 100) for figure in last)
