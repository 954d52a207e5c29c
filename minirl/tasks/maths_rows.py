"""One row of GSM8K, SVAMP or MathQA, in whichever of its schemas, as a question, its gold answer
and its chain.

Invariant: a chain ends as the prompt asks, in "The answer is N.", or is a program; a malformed row
is refused by file and line or row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from minirl.errors import UserError
from minirl.recipe.maths import Gsm8k, Mathqa, Svamp
from minirl.verify import numeric, option
from minirl.verify.statement import PHRASE

# GSM8K's calculator marks, <<48/2=24>>; SVAMP's chains end in "Therefore, the answer is <24>.".
_MARKS = re.compile(r"<<[^<>]*>>")
_CLOSING = re.compile(
    r"(?:Therefore,\s*)?\bthe answer is <(?P<answer>[^<>\n]+)>\s*\.?\s*\Z", re.IGNORECASE
)
# MathQA's rationales end in "answer : c", "the correct option is (c)", "... = 12 . c" and the like.
_LETTER = re.compile(r"[\s.,;:>=('\"\[-]*(?<![a-z0-9])(?P<letter>[a-e])[\s.)!'\"\]]*\Z")
_LEADING_TO_IT = re.compile(
    r"(?:\b(?:so|hence|therefore|thus|the|our|my|required|correct|right|final|is|are|was|will|should|be|clearly"
    r"|options?|choices?|answers?|ans|imo)\b|[\s.,;:>=-])+\Z",
    re.IGNORECASE,
)
# characters at the end of a chain that are searched for it: each start is tried, which is quadratic
MAX_CLOSING = 200
MAX_OPTIONS = 2000  # characters
MAX_VALUE = 10**300  # that a float can hold
_PROGRAM = re.compile(r"^def\s+solution\b", re.MULTILINE)
# A docstring right below the head, on lines of its own.
_DOCSTRING = re.compile(
    r"(?P<head>^def\s+solution\b[^\n]*\n)[ \t]*(?P<quote>\"{3}|'{3}).*?(?P=quote)[ \t]*\n",
    re.MULTILINE | re.DOTALL,
)


class Row(NamedTuple):
    """gold: a letter, a plain number, or None where the right option is no number. chain: None
    where there is none of the kind asked for.

    contradicts: the rationale chooses another letter than the gold one.
    """

    id: str
    question: str
    gold: str | None
    chain: str | None
    options: tuple[str, ...] = ()
    is_letter: bool = False
    contradicts: bool = False


def read_row(
    node: Gsm8k | Svamp | Mathqa, identity: str, where: str, row: Mapping[str, Any]
) -> Row:
    """The row as `node` asks for it. Raises UserError naming `where` for a row that is malformed or
    of another data set."""
    if isinstance(node, Mathqa) and {"Problem", "options", "correct"} <= row.keys():
        return _mathqa(
            node,
            identity,
            where,
            _text(row, "Problem", where),
            row,
            _text(row, "options", where),
            _text(row, "correct", where),
        )
    if {"question", "answer_value"} <= row.keys():
        question, gold = _text(row, "question", where), _text(row, "answer_value", where)
        if isinstance(node, Mathqa) and ("\n" in question or not node.numeric):
            question, _, options = question.rpartition("\n")
            return _mathqa(node, identity, where, question, row, options, gold)
        return Row(
            identity, question, _number(gold, "answer_value", where), _chain(node, row, where)
        )
    if isinstance(node, Gsm8k) and {"question", "answer"} <= row.keys():
        answer = _text(row, "answer", where)
        gold = _number(answer.rpartition("####")[2] if "####" in answer else "", "answer", where)
        return Row(identity, _text(row, "question", where), gold, _said(node, answer))
    if isinstance(node, Svamp) and {"Body", "Question", "Answer"} <= row.keys():
        body = _text(row, "Body", where).strip()
        stop = "" if body.endswith((".", "!", "?", ",")) else "."
        question = f"{body}{stop} {_text(row, 'Question', where)}"
        return Row(identity, question, _number(_text(row, "Answer", where), "Answer", where), None)
    native = {
        Gsm8k: "question, answer",
        Svamp: "Body, Question, Answer",
        Mathqa: "Problem, Rationale, options, correct",
    }[type(node)]
    got = ", ".join(map(str, row))[:120] or "none"
    raise UserError(
        f"{where}: got the columns {got}, expected {native}, or question, answer_value and perhaps"
        " answer_cot"
    )


def read_options(text: str) -> tuple[str, ...] | None:
    """The five options of "a ) 38 , b ) 27.675 , ..." or "['a ) 38', 'b ) 27.675', ...]"; None
    where they are not a to e in this order."""
    found: list[str] = []
    start = 0 if len(text) <= MAX_OPTIONS else len(text)
    for letter in option.LETTERS:
        label = re.compile(rf"(?:\A[\s\['\"]*|['\"]?\s*,\s*['\"]?){letter}\s*\)\s*").search(
            text, start
        )
        if label is None:
            return None
        found.append(text[start : label.start()])
        start = label.end()
    texts = [value.strip(" \t\n'\"[]") for value in [*found[1:], text[start:]]]
    # Some rows name an option twice: "a ) a ) 24".
    texts = [
        value.removeprefix(f"{letter} ) ")
        for letter, value in zip(option.LETTERS, texts, strict=True)
    ]
    return tuple(texts) if all(texts) else None


def _mathqa(
    node: Mathqa,
    identity: str,
    where: str,
    question: str,
    row: Mapping[str, Any],
    listed: str,
    correct: str,
) -> Row:
    options, letter = read_options(listed), correct.strip().lower()
    if options is None or letter not in set(option.LETTERS) or not question.strip():
        got = f"options {listed[:60]!r} with the right one {correct[:20]!r}"
        todo = "mend or delete the row, or set task.numeric=true for data without options"
        raise UserError(
            f"{where}: got {got}, expected a question, `a ) ... , b ) ...` up to e and a letter;"
            f" {todo}"
        )
    value = option.read_option(options[option.LETTERS.index(letter)])
    gold = letter
    if node.numeric:
        if value is None or value.scale > 1:
            return Row(identity, question, None, None)
        gold = _plain(value.value)
    if "Rationale" not in row:
        chain = _chain(node, row, where)
        return Row(identity, question, gold, chain, options, is_letter=not node.numeric)
    body, closing = _without_letter(_text(row, "Rationale", where))
    answer = _short(value.value) if node.numeric and value else f"({letter})"
    chain = f"{body}\n{PHRASE} {answer}." if body and node.chain == "prose" else None
    return Row(
        identity, question, gold, chain, options, not node.numeric, closing not in (None, letter)
    )


def _said(node: Gsm8k | Svamp | Mathqa, chain: str) -> str | None:
    """A chain in prose as the recipe asks for it; for `calls` one with calculator marks, as it
    stands."""
    if node.chain == "calls":
        return chain.strip() if _MARKS.search(chain) else None
    return _prose(chain) if node.chain == "prose" else None


def _without_letter(rationale: str) -> tuple[str, str | None]:
    """A rationale of MathQA without the letter that it ends in, and that letter."""
    text = rationale.strip().strip('"').strip()
    start = max(0, len(text) - MAX_CLOSING)
    match = _LETTER.search(text, start)
    if match is None:
        return text, None
    return text[:start] + _LEADING_TO_IT.sub("", text[start : match.start()]), match["letter"]


def _chain(node: Gsm8k | Svamp | Mathqa, row: Mapping[str, Any], where: str) -> str | None:
    if row.get("answer_cot") is None:
        return None
    chain = _text(row, "answer_cot", where)
    if node.chain == "calls":
        return _said(node, chain)
    is_program = _PROGRAM.search(chain) is not None
    if is_program != (node.chain == "program"):
        return None
    if not is_program:
        return _prose(chain)
    return (chain if node.docstring else _DOCSTRING.sub(r"\g<head>", chain, count=1)).strip()


def _prose(chain: str) -> str:
    """A chain in prose that ends in the fixed phrase; one that ends in another way stays as it
    is."""
    chain = _MARKS.sub("", chain).strip()
    if "####" in chain:
        body, _, answer = chain.rpartition("####")
    elif closing := _CLOSING.search(chain, max(0, len(chain) - MAX_CLOSING)):
        body, answer = chain[: closing.start()], closing["answer"].rstrip("% ")
    else:
        return chain
    return f"{body.rstrip()}\n{PHRASE} {answer.strip()}."


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row[column]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if (
        not isinstance(value, str)
        or not value.strip()
        or any("\ud800" <= char <= "\udfff" for char in value)
    ):
        raise UserError(
            f"{where}: {column}: got {str(value)[:40]!a}, expected text; mend or delete the row"
        )
    return value


def _number(text: str, column: str, where: str) -> str:
    found = numeric.read_number(text)
    if found is None or abs(found.value) > MAX_VALUE:
        raise UserError(
            f"{where}: {column}: got {text[:40]!r}, expected a number; mend or delete the row"
        )
    return _plain(found.value)


def _plain(value: Fraction) -> str:
    """A number as the sandbox and JSON read it too: "625", "0.1388888888888889"."""
    return str(value.numerator) if value.denominator == 1 else repr(float(value))


def _short(value: Fraction) -> str:
    """A number as people write it: "5/36" where the decimal would not end soon."""
    plain = _plain(value)
    return plain if len(plain) <= 12 else str(value)
