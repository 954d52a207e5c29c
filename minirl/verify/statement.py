"""The statement of an answer in a text: the last "the answer is", `####` (GSM8K's own mark) or
\\boxed{...}.

Invariant: only a statement counts. A sentence that denies or doubts ("the answer is not", "I doubt
that the answer is") states nothing, and nothing before the last statement is ever read as the
answer. Linear in the text, of which the last MAX_CHARS are looked at.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import NamedTuple

MAX_CHARS = 16_384
MAX_STATEMENT = 240
PHRASE = "The answer is"

# `####` is also a Markdown heading: it is a mark only if a number follows, and not one as in
# "#### 2. Compute the total".
_MARK = re.compile(
    r"\bthe\s++(?:(?:final|correct|right)\s++)?answer\s++is(?P<denied>n['’]t)?\b"
    r"|####(?![ \t]*+[0-9]++[.):][ \t]+\S)(?=[ \t]*+[^\s\w#]{0,3}[ \t]*+\.?[0-9])"
    r"|\\(?:boxed|fbox)\s*+\{",
    re.IGNORECASE,
)
# A denial counts where it governs the mark, with such words alone between them: "I do not think it
# is", but not "who do not play is".
_DENIED = re.compile(
    r"(?:\b(?:(?:can)?not|never|n?either|nor|or|doubts?|whether|unless)|n['’]t)\b"
    r"(?:[\s$(*_=\[\\\"'“‘]|(?:think|thinks|thought|believe|say|said|claim|mean|know|knows|sure"
    r"|certain|convinced|clear|true|right|correct|possible|likely|obvious|the|case|that|if|whether"
    r"|is|was|are|be|been|it|this|so|an?|final|answer|equals?|to|just|conclude|exactly|simply"
    r"|really|yet|always|necessarily|actually|only|even|[a-z])\b)*+\Z",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"[.,;:!?\n]")
_HEDGED = re.compile(
    r"[\s.,;()$*\\\]]*+(?:or|maybe|perhaps)\b|[ \t,;()$*\\\]]*+(?:and|nor|not|versus|vs)\b",
    re.IGNORECASE,
)


class Statement(NamedTuple):
    """text: one line of at most MAX_STATEMENT characters, or the content of a box. before: the text
    that leads to the statement."""

    text: str
    before: str


def find_statement(text: str) -> Statement | None:
    """The last statement of an answer in `text`; None if there is none, or the last one is denied,
    hedged or a box never closed."""
    text = text[-MAX_CHARS:]
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    mark = marks[-1]
    clause = _CLAUSE_END.split(text[max(0, mark.start() - MAX_STATEMENT) : mark.start()])[-1]
    if mark["denied"] or _DENIED.search(clause):
        return None
    # "The answer is \boxed{5}" is one statement; the reasoning ends where its first mark begins.
    line = text.rfind("\n", 0, mark.start()) + 1
    before = text[: next(m.start() for m in marks if m.start() >= line)]
    rest = text[mark.end() : mark.end() + 4 * MAX_STATEMENT]
    if mark[0].endswith("{"):
        end = _closing(rest)
        if end is None or end > MAX_STATEMENT or _HEDGED.match(rest, end + 1):
            return None
        return Statement(rest[:end], before)
    statement = rest.lstrip(" \t\r\n:*").partition("\n")[0]
    return Statement(statement[:MAX_STATEMENT], before)


def _closing(text: str) -> int | None:
    """The position at which the brace that was opened before `text` closes; None if it does not."""
    depths = accumulate((char == "{") - (char == "}") for char in text)
    return next((at for at, depth in enumerate(depths) if depth < 0), None)
