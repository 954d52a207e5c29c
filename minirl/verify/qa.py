"""Question answering: exact match and F1 of an answer, and the form of an episode that thinks,
searches and answers.

Invariant: pure, total and linear. Whatever the text, `verify` returns a Verdict in time linear in
its length; text is scanned, never executed. Text between result tags is the retriever's, so no tag
in it counts. Reward: ReSearch's (arXiv 2503.19470, section 2).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from minirl.episode import Part, Verdict

ErrorKind = Literal["think", "search", "answer", "boxed"]


@dataclass(frozen=True, slots=True)
class SearchTags:
    """The names of the four kinds of tags of a search, and whether the answer stands in a \\boxed{}
    inside its pair."""

    think: str = "think"
    search: str = "search"
    result: str = "result"
    answer: str = "answer"
    boxed: bool = True


RESEARCH = SearchTags()
SEARCH_R1 = SearchTags(result="information", boxed=False)  # arXiv 2503.09516
STYLES = {"research": RESEARCH, "search_r1": SEARCH_R1}

_NOT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_EXACT = {"yes", "no", "noanswer"}
_BOXED = "\\boxed{"
_BRACE = re.compile(r"\\.|[{}]")
_STYLING = re.compile(r"\\(?:text|math|emph)[a-z]*(?={)")


def normalise(text: str) -> str:
    """`text` in lower case without ASCII punctuation, without the articles a, an, the, and with
    single spaces, as SQuAD's script has it."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NOT_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> bool:
    """Whether the normalised prediction equals a normalised gold answer (SQuAD 1.1)."""
    return any(p == g for p, g in (_pair(prediction, gold) for gold in golds))


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Bag-of-words F1, the best over the gold answers (SQuAD 1.1); yes, no and noanswer count only
    when equal (HotpotQA's script)."""
    return max((_f1(*_pair(prediction, gold)) for gold in golds), default=0.0)


def read_box(text: str) -> str | None:
    """The content of the last \\boxed{}, inner braces balanced, \\text{} and the like unwrapped;
    None if no box can be read."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start, depth = start + len(_BOXED), 1
    for brace in _BRACE.finditer(text, start):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return _STYLING.sub("", text[start : brace.start()]).strip()
    return None


class Form(NamedTuple):
    """The fault of an episode's text, None if it is in good form; its answer; completed searches.

    answer: of a text in bad form too; the whole of the answer pair if it has no box that can be
    read.
    """

    error: ErrorKind | None
    answer: str | None
    searches: int


def check_form(text: str, tags: SearchTags = RESEARCH) -> Form:
    """Check the form of a whole episode's text, from the first token after the prompt to the last,
    results included.

    Good form: think pairs, at least one, none inside another; every search pair with its result
    pair right after it, inside a thought or outside of it; then one answer pair, the last of all,
    with a \\boxed{} in it that can be read. Words between the tags are free. Of several errors the
    first of search, think, answer, boxed is named.
    """
    marks, content = _scan(text, tags)
    answer = read_box(content) if tags.boxed and content is not None else content
    error = _find_fault(marks) or ("boxed" if answer is None else None)
    if answer is None and content is not None:
        answer = content.strip() or None
    return Form(error, None if answer is None else answer.strip(), marks.count("sSrR"))


def verify(
    golds: Sequence[str],
    text: str,
    *,
    reward: Literal["f1", "exact_match"] = "f1",
    floor: float = 0.1,
    tags: SearchTags = RESEARCH,
) -> Verdict:
    """ReSearch's reward of a whole episode's text: 0 for bad form, else F1 (or exact match) if it
    is not 0, else `floor`.

    passed: good form and an exact match. parts: `format` (bool), `em` and `f1` (of any stated
    answer, in good form or bad, boxed or not), `searches`, and `error_kind`: "think", "search",
    "answer" or "boxed" for the form's fault, "partial" (F1 above 0) or "wrong" for the answer's, or
    None.
    """
    form = check_form(text, tags)
    answer = verify_answer(golds, form.answer, reward=reward, floor=floor)
    em, overlap = answer.parts["em"], answer.parts["f1"]
    kind = form.error or answer.parts["error_kind"]
    score = 0.0 if form.error else answer.score
    parts = {"format": form.error is None, "em": em, "f1": overlap, "searches": form.searches}
    return Verdict(score, kind is None, parts | {"error_kind": kind})


def verify_answer(
    golds: Sequence[str], answer: str | None, *, reward: Literal["f1", "exact_match"], floor: float
) -> Verdict:
    """The same of an answer alone, None if there is none; parts: `em`, `f1` and `error_kind`."""
    em = 0.0 if answer is None else float(exact_match(answer, golds))
    overlap = 0.0 if answer is None else f1(answer, golds)
    kind = None if em else "partial" if overlap else "wrong"
    gain = overlap if reward == "f1" else em
    parts: dict[str, Part] = {"em": em, "f1": overlap, "error_kind": kind}
    return Verdict(gain or float(floor), not kind, parts)


def write_answer(answer: str, tags: SearchTags = RESEARCH) -> str:
    """An answer as a model is to write it, tags and all."""
    content = f"{_BOXED}{answer}}}" if tags.boxed else answer
    return f"<{tags.answer}>{content}</{tags.answer}>"


def defuse(text: str, tags: SearchTags = RESEARCH) -> str:
    """Retrieved text with its tags broken up ("</result>" becomes "< /result>"): no passage can end
    its own result."""
    return _pattern(tags).sub(lambda tag: "< " + tag[0][1:], text)


def strip_tags(text: str, tags: SearchTags = RESEARCH) -> str:
    """`text` without any of its tags; the text between them stays."""
    return _pattern(tags).sub(" ", text)


def _scan(text: str, tags: SearchTags) -> tuple[str, str | None]:
    """The tags as a word of letters, small for an opening tag and capital for a closing one, and
    the content of the last answer pair."""
    letters = {tags.think: "t", tags.search: "s", tags.result: "r", tags.answer: "a"}
    marks, answer = [""], None
    start, in_result = 0, False
    for tag in _pattern(tags).finditer(text):
        closing, name = tag.groups()
        if in_result and not (closing and name == tags.result):
            continue  # what the retriever brought is not the model's doing
        mark = letters[name].upper() if closing else letters[name]
        in_result = mark == "r" and marks[-1] == "S"
        if mark == "A" and marks[-1] == "a":
            answer = text[start : tag.start()]
        start = tag.end()
        marks.append(mark)
    return "".join(marks), answer


def _find_fault(marks: str) -> ErrorKind | None:
    outside = marks.replace("sSrR", "")
    if any(mark in outside for mark in "sSrR"):
        return "search"
    rest = outside.replace("tT", "")
    if rest == outside or "t" in rest or "T" in rest:
        return "think"
    # Pairs that were taken out may have stood inside the answer or after it.
    return None if rest == "aA" and marks.endswith("aA") else "answer"


@cache
def _pattern(tags: SearchTags) -> re.Pattern[str]:
    names = "|".join(map(re.escape, (tags.think, tags.search, tags.result, tags.answer)))
    return re.compile(f"<(/?)({names})>")


def _pair(prediction: str, gold: str) -> tuple[str, str]:
    """Both normalised. Nothing would be left of a gold "The The" or "!!!", and an empty answer
    would match: there both are compared in lower case alone."""
    if normal := normalise(gold):
        return normalise(prediction), normal
    return " ".join(prediction.lower().split()), " ".join(gold.lower().split())


def _f1(prediction: str, gold: str) -> float:
    if prediction != gold and (prediction in _EXACT or gold in _EXACT):
        return 0.0
    words, gold_words = prediction.split(), gold.split()
    same = (Counter(words) & Counter(gold_words)).total()
    if not same:
        return 0.0
    precision, recall = same / len(words), same / len(gold_words)
    return 2 * precision * recall / (precision + recall)
