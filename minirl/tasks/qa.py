"""Multi-hop question answering: HotpotQA, MuSiQue, 2WikiMultiHopQA, Bamboogle, from the hub or from
local files in any of their schemas.

Invariant: every problem's gold answer passes the verifier, and no held-out question, whatever its
case and spacing, is among the training ones. Rows that cannot keep this are left out and counted in
the task's notes; a malformed row is refused by file and number.

A problem's `answer` holds JSON: "golds" (texts, any of which is right), "titles" (of the gold
paragraphs, in MuSiQue by hops), "paragraphs" ([title, text] of those that the row has), "steps"
([question, answer, title]: MuSiQue's decomposition).
"""

from __future__ import annotations

import heapq
import html
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

from minirl.episode import Problem, Verdict
from minirl.errors import UserError
from minirl.io.rows import read_dataset
from minirl.recipe.methods import Kind
from minirl.recipe.qa import QA
from minirl.retrieve import Retriever
from minirl.tasks.corpus import Corpus
from minirl.tasks.qa_rows import Row, digest
from minirl.tasks.task import Task, divides_source, note_left_out
from minirl.verify import qa as verifier
from minirl.verify.qa import RESEARCH, STYLES, SearchTags, normalise

# A title is looked up by its known words only where they are more than this share of it.
MOST_NAMED = 0.5
_REFERENCE = re.compile(r"#(\d{1,2})")
_IN_BRACKETS = re.compile(r"\s*\([^()]*\)$")
_POSSESSIVE = re.compile(r"['’]s\b")


class Step(NamedTuple):
    """One search of a demonstration: what to ask, and the title of the gold paragraph that answers
    it. found: what it says, if known."""

    query: str
    title: str
    found: str | None = None


class Plan(NamedTuple):
    """How a question can be answered: the searches in order, and the answer."""

    steps: tuple[Step, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class SearchTask(Task):
    """A task whose questions are answered by searching.

    passages: the data set's own paragraphs (title, text), pooled over the problems and each once;
    empty where it has none.
    plan: problem -> Plan, for demonstrations. tags: what `verify` reads, and so what a method has
    to write.
    retriever: what searches are answered from; k: passages a search.
    """

    passages: Sequence[tuple[str, str]] = ()
    plan: Callable[[Problem], Plan] | None = None
    tags: SearchTags = RESEARCH
    retriever: Retriever | None = field(default=None, compare=False)
    k: int = 5

    @property
    def kind(self) -> Kind:
        """A question to search for."""
        return "search"


def open_task(node: QA, seed: int) -> SearchTask:
    """The task; its problems are a function of `node` alone, so that runs with different seeds
    share their held-out set.

    Questions are taken in the order of their digests. Raises UserError for data, or passages to
    search in place of the data's own, that cannot be had or read, or for too few rows.
    """
    left_out: Counter[str] = Counter()
    test_source = node.test_source or node.source
    if divides_source(node):
        usable = _usable(node, node.source, node.split, set(), left_out)
        rows = _choose(node.held_out + node.train, usable)
        held_out, train = rows[: node.held_out], rows[node.held_out :]
    else:
        usable = _usable(node, test_source, node.test_split, set(), left_out)
        held_out = _choose(node.held_out, usable)
        taken = {digest(row.question) for row in held_out}
        train = _choose(node.train, _usable(node, node.source, node.split, taken, left_out))
    if len(held_out) < node.held_out or (node.train and not train):
        raise UserError(
            f"{test_source}: got {len(held_out)} held-out and {len(train)} training questions"
            f" ({left_out.total()} rows left out), expected {node.held_out} and"
            f" {'some' if node.train else 'none'}; pass more data, or a smaller `--set"
            " task.held_out=N`"
        )
    problems = _told_apart([row.problem(node.name) for row in (*train, *held_out)])
    pooled = dict.fromkeys(passage for row in (*train, *held_out) for passage in row.passages)
    corpus = Corpus(node.retriever, passages := tuple(pooled))
    note = f"{node.name}: {corpus.note(partial(coverage_note, problems))}"
    return SearchTask(
        name=node.name,
        train=tuple(problems[: len(train)]),
        held_out=tuple(problems[len(train) :]),
        verify=partial(_verify, node),
        verify_answer=partial(_verify_answer, node),
        stop=(f"</{STYLES[node.tags].answer}>",),
        notes=(*note_left_out(node.name, left_out), note),
        passages=passages,
        plan=plan,
        tags=STYLES[node.tags],
        retriever=corpus,
        k=node.retriever.k,
    )


def coverage(problems: Iterable[Problem], titles: Iterable[str]) -> float | None:
    """The share of the problems' gold paragraphs whose title is among `titles`, a corpus'; None
    where no gold title is known."""
    gold = [_title(title) for problem in problems for title in problem.answer["titles"]]
    there = set(gold).intersection(map(_title, titles))  # of a large corpus no more is kept
    return sum(title in there for title in gold) / len(gold) if gold else None


def coverage_note(problems: Sequence[Problem], titles: Iterable[str], count: int) -> str:
    """`coverage` in words, for the notes of a task. titles: of the `count` passages that are
    searched."""
    if not count:
        return "the data has no paragraphs of its own; give the retriever a corpus"
    share = coverage(problems, titles)
    return (
        f"{count} paragraphs to search; gold paragraphs among them:"
        f" {'unknown' if share is None else f'{share:.1%}'}"
    )


def plan(problem: Problem) -> Plan:
    """A gold search for each supporting paragraph, then the answer. Raises UserError where the data
    names no such paragraph.

    MuSiQue: the questions of its decomposition, with earlier answers filled in. Else the titles
    themselves, a title being asked for only once the question or a paragraph that was found before
    names it: a demonstration must not know what its reader cannot. Where no title is named yet, the
    query is the whole question, whose words the paragraph is likely to share.
    """
    known = problem.answer
    if not known["titles"]:
        raise UserError(
            f"{problem.id}: no supporting paragraphs are known; demonstrations need data with"
            " supporting facts"
        )
    if known["steps"]:
        answers = [found for _, found, _ in known["steps"]]
        steps = [
            Step(_filled(question, answers[:at]), title, found)
            for at, (question, found, title) in enumerate(known["steps"])
        ]
    else:
        steps = list(_hops(problem.prompt, known["titles"], dict(map(tuple, known["paragraphs"]))))
    return Plan(tuple(steps), known["golds"][0])


def _filled(question: str, answers: Sequence[str]) -> str:
    """A question of a decomposition without its shorthand: "#1 >> spouse" after the answer "Ada" is
    "Ada spouse"."""

    def answer(reference: re.Match[str]) -> str:
        number = int(reference[1])
        return answers[number - 1] if 1 <= number <= len(answers) else reference[0]

    return " ".join(_REFERENCE.sub(answer, question).replace(">>", " ").split())


def _hops(question: str, titles: Sequence[str], texts: Mapping[str, str]) -> Iterator[Step]:
    read, left = set(_words(question)), list(titles)

    def named(title: str) -> float:
        words = _words(_plain(title))
        return sum(word in read for word in words) / len(words) if words else 0.0

    while left:
        title = max(left, key=named)
        share, plain = named(title), _plain(title)
        if share < 1:
            known = " ".join(word for word in plain.split() if set(_words(word)) & read)
            plain = known if share > MOST_NAMED else " ".join(question.split())
        yield Step(plain, title)
        left.remove(title)
        read.update(_words(texts.get(title, "")))


def _plain(title: str) -> str:
    """A title as people say it: "Simon &amp; Simon (TV series)" is "Simon & Simon"."""
    return _IN_BRACKETS.sub("", html.unescape(title))


def _words(text: str) -> list[str]:
    return normalise(_POSSESSIVE.sub("", text)).split()


def _verify(node: QA, problem: Problem, text: str) -> Verdict:
    return verifier.verify(
        problem.answer["golds"], text, reward=node.reward, floor=node.floor, tags=STYLES[node.tags]
    )


def _verify_answer(node: QA, problem: Problem, answer: str) -> Verdict:
    golds = problem.answer["golds"]
    return verifier.verify_answer(golds, answer, reward=node.reward, floor=node.floor)


def _choose(count: int, rows: Iterator[Row]) -> list[Row]:
    """`count` rows in the order of their questions' digests; no more than those are in memory at a
    time."""
    return heapq.nsmallest(count, rows, key=lambda row: digest(row.question))


def _usable(
    node: QA, source: str, split: str, held_out: set[bytes], left_out: Counter[str]
) -> Iterator[Row]:
    """The rows of a source that ask something new and can be scored; the others are counted by the
    reason."""
    seen: set[bytes] = set()
    tags = STYLES[node.tags]
    setting = "task.test_source=PATH" if source == node.test_source else "task.source=PATH"
    for where, data in read_dataset(source, (), split, setting=setting):
        row = Row.read(data, where)
        key = digest(row.question)
        if key in held_out:
            left_out["ask what a held-out row asks"] += 1
        elif key in seen:
            left_out["ask what another row asks"] += 1
        elif not row.answerable:
            left_out["cannot be answered"] += 1
        elif not verifier.verify(row.golds, _gold_text(row, tags), tags=tags).passed:
            left_out["have an answer that the verifier cannot read"] += 1
        else:
            seen.add(key)
            yield row


def _gold_text(row: Row, tags: SearchTags) -> str:
    return f"<{tags.think}></{tags.think}>{verifier.write_answer(row.golds[0], tags)}"


def _told_apart(problems: Sequence[Problem]) -> list[Problem]:
    """Problems with ids of their own: those whose id another question has too get their question's
    digest behind it."""
    often = Counter(problem.id for problem in problems)
    return [
        replace(p, id=f"{p.id}-{digest(p.prompt).hex()}") if often[p.id] > 1 else p
        for p in problems
    ]


def _title(title: str) -> str:
    return " ".join(html.unescape(title).casefold().split())
