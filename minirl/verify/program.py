"""Programs: does the `solution()` in a text return the gold number, or the gold option's letter?
(ReFT's P-CoT, arXiv 2401.08967.)

Invariant: the text is read line by line and handed to the sandbox as it stands; nothing of it is
executed, compiled or parsed here, and whatever it is, a Verdict comes back within the sandbox's
limits.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from fractions import Fraction

from minirl.episode import Verdict
from minirl.recipe.maths import MathsCredit
from minirl.verify.numeric import make_verdict, write_canonical
from minirl.verify.option import LETTERS
from minirl.verify.sandbox import DEFAULT, Limits, Result, read_plain_number, run_program

FENCE = "```"
_LETTER = re.compile(rf" *\(? *([{LETTERS}]) *[).]? *", re.IGNORECASE)
_HEAD = re.compile(r"(?:async\s+)?def\s+solution\b")
# The beginning of a line at the margin that belongs to a program; no prose sentence begins so.
_CODE = re.compile(
    r"def\s+\w+\s*\(|class\s+\w+\s*[(:]|import\s+[\w.,"
    r" ]+$|from\s+[\w.]+\s+import\b|[A-Za-z_]\w*\s*=[^=]|[@#)\]}]"
)
# Two words in a row make a line with an equals sign prose: "Total = 5 apples". Strings and comments
# aside.
_QUOTED = re.compile(r""" '(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[#].* """, re.VERBOSE)
_KEYWORDS = r"(?:if|else|for|in|and|or|not|is|lambda|await|yield|from)\b"
_TWO_WORDS = re.compile(rf"(?<!\w)(?!{_KEYWORDS})[\w.]++\s++(?!{_KEYWORDS})[^\W\d]")


def find_program(text: str) -> str | None:
    """The program in `text`: the last fenced block that defines `solution`, else the first bare
    definition of it; None if there is neither.

    A fence that is never closed runs to the end (a completion cut short). A bare program may begin
    with imports, constants or helpers and ends at the first line at the margin that is no code, or
    at a second `def solution`: models write on. What precedes </think> is thought.
    """
    lines = text.rpartition("</think>")[2].replace("\r\n", "\n").split("\n")
    blocks = [block for block in _split_fences(lines) if any(map(_HEAD.match, block))]
    block = blocks[-1] if blocks else _find_bare(lines)
    return "\n".join(block) + "\n" if block else None


def run_text(text: str, *, limits: Limits = DEFAULT) -> Result | None:
    """The result of the program in `text`; None if there is no program."""
    program = find_program(text)
    return None if program is None else run_program(program, limits=limits)


def verify(
    gold: str | float,
    text: str,
    credit: MathsCredit,
    *,
    tolerance: float = 0.01,
    limits: Limits = DEFAULT,
) -> Verdict:
    """Score 1.0 if the program in `text` returns a number that differs from `gold` by at most
    `tolerance`, else by `credit`.

    The tolerance is the paper's: absolute, and inclusive for the decimal numbers as written, so
    1.01 is right for 1. parts["error_kind"]: "wrong_answer" (credit.wrong_answer), or "no_program",
    "program_error", "timeout", "memory", "no_number" (all of them credit.no_answer), or None.
    parts["answer"]: the number in a form that equal numbers share, None if there is none. Raises
    ValueError for a `gold` that is no plain number, UserError if there is no sandbox.
    """
    target = read_plain_number(str(gold).strip())
    if target is None:
        raise ValueError(f"gold answer: got {gold!r}, expected a plain finite number")
    result = run_text(text, limits=limits)
    if result is None or result.value is None:
        return make_verdict(result.error if result else "no_program", None, credit)
    value = Fraction(str(result.value))  # as decimal numbers: in binary 1.01 - 1 is more than 0.01
    right = abs(value - Fraction(str(target))) <= Fraction(str(tolerance))
    return make_verdict(None if right else "wrong_answer", write_canonical(value), credit)


def verify_letter(
    gold: str, options: int, text: str, credit: MathsCredit, *, limits: Limits = DEFAULT
) -> Verdict:
    """Score 1.0 if the program in `text` returns the letter `gold` of one of so many options, as
    "c", "C" or "(c)"; else as `verify`.

    parts["error_kind"] is "no_letter" where `verify` has "no_number": another text, the option's
    value, a letter beyond the options. parts["answer"]: the letter. Whether it was worked out or
    only written down is not looked at.
    """
    result = run_text(text, limits=limits)
    if result is None:
        return make_verdict("no_program", None, credit)
    match = _LETTER.fullmatch(result.text or "")
    letter = match[1].lower() if match else ""
    if not letter or letter not in LETTERS[:options]:
        failed = result.error not in (None, "no_number")
        return make_verdict(result.error if failed else "no_letter", None, credit)
    return make_verdict(None if letter == gold else "wrong_answer", letter, credit)


def _split_fences(lines: list[str]) -> Iterator[list[str]]:
    """The blocks between fences, each moved to the margin."""
    block: list[str] | None = None
    for line in [*lines, FENCE]:  # the last closes a block that a completion cut short left open
        if not line.lstrip().startswith(FENCE):
            if block is not None:
                block.append(line)
        elif block is None:
            block = []
        else:
            yield textwrap.dedent("\n".join(block)).split("\n")
            block = None


def _find_bare(lines: list[str]) -> list[str]:
    head = next((i for i, line in enumerate(lines) if _HEAD.match(line)), None)
    if head is None:
        return []
    start = head
    for i in range(head - 1, -1, -1):
        if _is_code(lines[i]):
            start = i
        elif lines[i].strip() and not lines[i][0].isspace():
            break
    end, open_quote = head + 1, ""
    for line in lines[end:]:
        margin = bool(line) and not line[0].isspace() and not open_quote
        if margin and (_HEAD.match(line) or not _is_code(line)):
            break
        open_quote = _open_quote(line, open_quote)
        end += 1
    return lines[start:end]


def _is_code(line: str) -> bool:
    """Whether a line at the margin can be part of a program."""
    left, equals, right = _QUOTED.sub("''", line).partition("=")
    prose = equals and left.strip().isidentifier() and _TWO_WORDS.search(right)
    return _CODE.match(line) is not None and not prose


def _open_quote(line: str, open_quote: str) -> str:
    """The triple quote that is open after `line`, "" if none is: a docstring's further lines may
    stand at the margin."""
    for found in re.findall(r"""'{3}|"{3}""", line):
        if found == open_quote:
            open_quote = ""
        elif not open_quote:
            open_quote = found
    return open_quote
