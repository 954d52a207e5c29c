"""One row of GSM8K, SVAMP or MathQA, in whichever of its schemas, as a question, its gold answer
and its chain.

Invariant: a chain ends as the prompt asks, in "The answer is N.", or is a program; a malformed row
is refused, naming its file and line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
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
    r"(?:\b(?:so|hence|therefore|thus|the|our|my|required|correct|right|final|is|are|was|will"
    r"|should|be|clearly|options?|choices?|answers?|ans|imo)\b|[\s.,;:>=-])+\Z",
    re.IGNORECASE,
)
MAX_CLOSING = 200  # characters at the end of a chain that are searched for it, in quadratic time
MAX_OPTIONS = 2000  # characters
MAX_VALUE = 10**300  # that a float can hold
_PROGRAM = re.compile(r"^def\s+solution\b", re.MULTILINE)
# A docstring right below the head, on lines of its own.
_DOCSTRING = re.compile(
    r"(?P<head>^def\s+solution\b[^\n]*\n)[ \t]*(?P<quote>\"{3}|'{3}).*?(?P=quote)[ \t]*\n",
    re.MULTILINE | re.DOTALL,
)


class Row(NamedTuple):
    """A row as the recipe asks for it. contradicts: the rationale chooses another letter than the
    gold one."""

    id: str
    question: str
    gold: str | None  # a letter, a plain number, or None if the right option is no number
    chain: str | None  # None if there is none of the kind asked for
    options: tuple[str, ...] = ()
    is_letter: bool = False
    contradicts: bool = False


def read_row(
    task: Gsm8k | Svamp | Mathqa, identity: str, where: str, row: Mapping[str, Any]
) -> Row:
    """The row as `task` asks for it. Raises UserError naming `where` for a row that is malformed or
    of another data set."""
    return _Reader(task, identity, where, row).read()


def read_options(text: str) -> tuple[str, ...] | None:
    """The five options of "a ) 38 , b ) 27.675 , ..." or "['a ) 38', 'b ) 27.675', ...]"; None
    if they are not a to e in this order."""
    pieces: list[str] = []
    start = 0 if len(text) <= MAX_OPTIONS else len(text)
    for letter in option.LETTERS:
        label = re.compile(rf"(?:\A[\s\['\"]*|['\"]?\s*,\s*['\"]?){letter}\s*\)\s*").search(
            text, start
        )
        if label is None:
            return None
        pieces.append(text[start : label.start()])
        start = label.end()
    texts = [piece.strip(" \t\n'\"[]") for piece in [*pieces[1:], text[start:]]]
    # Some rows name an option twice: "a ) a ) 24".
    pairs = zip(option.LETTERS, texts, strict=True)
    options = tuple(text.removeprefix(f"{letter} ) ") for letter, text in pairs)
    return options if all(options) else None


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one row; `where` names it in errors."""

    task: Gsm8k | Svamp | Mathqa
    id: str
    where: str
    row: Mapping[str, Any]

    def read(self) -> Row:
        columns, task = self.row.keys(), self.task
        if isinstance(task, Mathqa) and {"Problem", "options", "correct"} <= columns:
            question, options = self.text("Problem"), self.text("options")
            return self.mathqa(task, question, options, self.text("correct"))
        if {"question", "answer_value"} <= columns:
            question, gold = self.text("question"), self.text("answer_value")
            if isinstance(task, Mathqa) and ("\n" in question or not task.numeric):
                question, _, options = question.rpartition("\n")
                return self.mathqa(task, question, options, gold)
            return Row(self.id, question, self.number(gold, "answer_value"), self.chain())
        if isinstance(task, Gsm8k) and {"question", "answer"} <= columns:
            answer = self.text("answer")
            gold = self.number(answer.rpartition("####")[2] if "####" in answer else "", "answer")
            return Row(self.id, self.text("question"), gold, self.prose_or_calls(answer))
        if isinstance(task, Svamp) and {"Body", "Question", "Answer"} <= columns:
            body = self.text("Body").strip()
            stop = "" if body.endswith((".", "!", "?", ",")) else "."
            question = f"{body}{stop} {self.text('Question')}"
            return Row(self.id, question, self.number(self.text("Answer"), "Answer"), None)
        native = {
            Gsm8k: "question, answer",
            Svamp: "Body, Question, Answer",
            Mathqa: "Problem, Rationale, options, correct",
        }[type(task)]
        got = ", ".join(map(str, self.row))[:120] or "none"
        raise UserError(
            f"{self.where}: got the columns {got}, expected {native}, or question, answer_value and"
            " perhaps answer_cot"
        )

    def mathqa(self, task: Mathqa, question: str, listed: str, correct: str) -> Row:
        options, letter = read_options(listed), correct.strip().lower()
        if options is None or letter not in set(option.LETTERS) or not question.strip():
            got = f"options {listed[:60]!r} with the right one {correct[:20]!r}"
            todo = "mend or delete the row, or set task.numeric=true for data without options"
            raise UserError(
                f"{self.where}: got {got}, expected a question, `a ) ... , b ) ...` up to e and a"
                f" letter; {todo}"
            )
        gold, shown = letter, f"({letter})"
        if task.numeric:
            value = option.read_option(options[option.LETTERS.index(letter)])
            if value is None or value.scale > 1:
                return Row(self.id, question, None, None)
            gold, shown = _write_plain(value.value), _write_short(value.value)
        if "Rationale" not in self.row:
            chain, closing = self.chain(), None
        else:
            body, closing = _split_letter(self.text("Rationale"))
            chain = f"{body}\n{PHRASE} {shown}." if body and task.chain == "prose" else None
        contradicts = closing not in (None, letter)
        return Row(self.id, question, gold, chain, options, not task.numeric, contradicts)

    def chain(self) -> str | None:
        """The column `answer_cot`, if it is of the kind that the recipe asks for."""
        if self.row.get("answer_cot") is None:
            return None
        chain = self.text("answer_cot")
        is_program = _PROGRAM.search(chain) is not None
        if self.task.chain == "calls" or not is_program:
            return self.prose_or_calls(chain)
        if self.task.chain != "program":
            return None
        return (chain if self.task.docstring else _DOCSTRING.sub(r"\g<head>", chain, 1)).strip()

    def prose_or_calls(self, chain: str) -> str | None:
        """A chain in prose that ends as the prompt asks, or for `calls` one with calculator marks,
        as it stands."""
        if self.task.chain == "calls":
            return chain.strip() if _MARKS.search(chain) else None
        return _end_in_phrase(chain) if self.task.chain == "prose" else None

    def text(self, column: str) -> str:
        value = self.row[column]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip() or re.search("[\ud800-\udfff]", value):
            raise UserError(
                f"{self.where}: {column}: got {str(value)[:40]!a}, expected text; mend or delete"
                " the row"
            )
        return value

    def number(self, text: str, column: str) -> str:
        found = numeric.read_number(text)
        if found is None or abs(found.value) > MAX_VALUE:
            raise UserError(
                f"{self.where}: {column}: got {text[:40]!r}, expected a number; mend or delete the"
                " row"
            )
        return _write_plain(found.value)


def _split_letter(rationale: str) -> tuple[str, str | None]:
    """A rationale of MathQA without the letter that it ends in, and that letter."""
    text = rationale.strip().strip('"').strip()
    start = max(0, len(text) - MAX_CLOSING)
    match = _LETTER.search(text, start)
    if match is None:
        return text, None
    return text[:start] + _LEADING_TO_IT.sub("", text[start : match.start()]), match["letter"]


def _end_in_phrase(chain: str) -> str:
    """A chain without marks that ends in the fixed phrase; one that states no answer stays as it
    is."""
    chain = _MARKS.sub("", chain).strip()
    if "####" in chain:
        body, _, answer = chain.rpartition("####")
    elif closing := _CLOSING.search(chain, max(0, len(chain) - MAX_CLOSING)):
        body, answer = chain[: closing.start()], closing["answer"].rstrip("% ")
    else:
        return chain
    return f"{body.rstrip()}\n{PHRASE} {answer.strip()}."


def _write_plain(value: Fraction) -> str:
    """A number as the sandbox and JSON read it too: "625", "0.1388888888888889"."""
    return str(value.numerator) if value.denominator == 1 else repr(float(value))


def _write_short(value: Fraction) -> str:
    """A number as people write it: "5/36" if the decimal would not end soon."""
    plain = _write_plain(value)
    return plain if len(plain) <= 12 else str(value)
