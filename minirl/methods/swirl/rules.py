"""Rules in place of a judging model: whether a step is a good one, read off its text alone. For
tests and cheap ablations.

Invariant: pure and bounded, no tool but the calculator is run, and without `gold` nothing but the
question and what was said is looked at. The rules: a turn is one readable action, the last turn
there is answers, and no call is made twice. A calculation is of two numbers or more and has a
value; every number in it stands in the question or in a reply, or is one that people know (up to
12, 100, 60 minutes, ...), or a share that a percentage there is (0.2, 0.8 or 1.2 for 20 %). A
search asks for something, and at least half of its words stand in the question or in a reply. An
answer is a number that the calculator gave, or words that stand in what was found; yes and no count
where something was. With `gold` an answer is good when the task's verifier passes it, and a call
must also get what is still missing: a value that the gold solution works out or ends in, or any
paragraph while one of the supporting ones has not been shown. (Were calls judged as without it, one
more call would be safer than any answer, and a policy that is trained on that soon never answers.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from minirl.episode import Problem
from minirl.judge.judge import Opinion, StepCase
from minirl.methods.search.rag import NOTHING
from minirl.methods.search.search import called
from minirl.methods.swirl.stepwise import Action, Tags, read, result
from minirl.tasks import Task
from minirl.tasks.calls import read_values
from minirl.tasks.qa import SearchTask, coverage
from minirl.verify import calculator, qa
from minirl.verify.numeric import read_number

Reader = Callable[[str], Action | None]
_SMALL = (*range(13), 15, 16, 20, 24, 25, 30, 36, 48, 50, 52, 60, 75, 90, 100, 144, 180, 360, 365)
KNOWN = frozenset(map(Fraction, (*_SMALL, 1000, 1760, 3600, 5280)))
"""Numbers that people know, and need not be told."""
_FIGURE = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]*\.?[0-9]+")
_PERCENT = re.compile(rf"({_FIGURE.pattern})\s*(?:%|per\s?cent)")
_EITHER = ("yes", "no")


def reader(tags: Tags) -> Reader:
    """How a turn of method stepwise is read."""
    return lambda text: read(text, tags)


def search_reader(task: SearchTask) -> Reader:
    """How a piece of a turn of method search is read: a search, or the answer."""

    def action(text: str) -> Action | None:
        query = called(text, task.tags, task.stop)
        if query is not None:
            return Action("call", query)
        answer = qa.check_form(text, task.tags).answer
        return None if answer is None else Action("answer", answer)

    return action


class ToolRules(NamedTuple):
    """The rules that differ by tool. plain: a call without what makes no difference. asks: whether
    it is sensible after what was told. gains: whether it gets something that the gold answer needs.
    supports: whether what was told supports an answer."""

    plain: Callable[[str], str]
    asks: Callable[[str, Sequence[str]], bool]
    gains: Callable[[str, Problem, Sequence[str]], bool]
    supports: Callable[[str, Sequence[str]], bool]


class Rules:
    """Opinions on steps by rule; see the module's words. read: how a turn is read. steps: most
    turns there can be."""

    def __init__(
        self, task: Task, read: Reader, *, gold: bool = False, steps: int | None = None
    ) -> None:
        self._task = task
        self._tool = TOOLS[task.kind]
        self._read = read
        self._gold = gold
        self._steps = steps

    def __call__(self, cases: Sequence[StepCase], problems: Sequence[Problem]) -> list[Opinion]:
        """1 or 0 for each step; `problems` are looked at with `gold` alone."""
        return [
            Opinion(float(self._approves(case, problem)))
            for case, problem in zip(cases, problems, strict=True)
        ]

    def reads(self, message: str) -> bool:
        """Whether a message is one readable action."""
        return self._read(message) is not None

    def _approves(self, case: StepCase, problem: Problem) -> bool:
        action = self._read(case.message)
        if action is None or not action.content:
            return False
        if action.kind == "answer" and self._gold:
            return (
                self._task.verify_answer is not None
                and self._task.verify_answer(problem, action.content).passed
            )
        told = self._replies(case)
        if action.kind == "answer":
            return self._tool.supports(action.content, told)
        before = [self._read(text) for author, text in case.said if author == "model"]
        if len(before) + 1 == self._steps:
            return False  # nobody will answer this call
        plain = self._tool.plain(action.content)
        calls = [a.content for a in before if a is not None and a.kind == "call"]
        if plain in map(self._tool.plain, calls):
            return False
        return self._tool.asks(action.content, [case.question, *told]) and (
            not self._gold or self._tool.gains(action.content, problem, told)
        )

    def _replies(self, case: StepCase) -> list[str]:
        """What the tool has given for each call, without the call that stands before it; no
        notices."""
        action, found = None, []
        for author, text in case.said:
            if author == "model":
                action = self._read(text)
            elif action is not None and action.kind == "call":
                found.append(text.removeprefix(result(action.content, "").lstrip()).strip())
        return [text for text in found if text not in ("", NOTHING)]


def _gains_paragraph(query: str, problem: Problem, told: Sequence[str]) -> bool:
    """Whether a paragraph that the gold answer needs has not been shown; True if none is known."""
    return coverage([problem], (line for text in told for line in text.splitlines())) != 1.0


def _gains_value(expression: str, problem: Problem, told: Sequence[str]) -> bool:
    """Whether it has a value that the gold solution needs and nobody has been told; True if no
    solution is known."""
    if problem.solution is None or not (steps := read_values(problem.solution)):
        return True
    # The answer too: chains leave the mark of their last step out at times.
    final = read_number(str(problem.answer["value"]))
    value, known = calculator.evaluate(expression), _values(told)
    needed = [*steps, *([] if final is None else [final.value])]
    return any(_same(value, n) and not any(_same(n, k) for k in known) for n in needed)


def _is_said(answer: str, told: Sequence[str]) -> bool:
    """Whether the words of an answer stand in what was found; yes and no count where something
    was."""
    words, found = qa.normalise(answer), [f" {qa.normalise(text)} " for text in told]
    if not words or not found:
        return False
    return words in _EITHER or any(f" {words} " in text for text in found)


def _is_worked_out(answer: str, told: Sequence[str]) -> bool:
    """Whether an answer is a number that the calculator gave."""
    stated = read_number(answer)
    return stated is not None and any(_same(value, stated.value) for value in _values(told))


def _values(told: Sequence[str]) -> list[Fraction]:
    """The numbers that the calculator has given."""
    found = (read_number(text.strip(" .")) for text in told)
    return [value.value for value in found if value is not None]


def _same(a: Fraction, b: Fraction) -> bool:
    return abs(a - b) <= Fraction(1, 100)


def _plain_query(query: str) -> str:
    return " ".join(query.lower().split())


def _plain_expression(expression: str) -> str:
    return re.sub(r"[\s$,]", "", expression.lower())


def _asks_for_numbers(expression: str, known: Sequence[str]) -> bool:
    try:
        calculator.evaluate(expression)
    except calculator.CalculatorError:
        return False
    worked = calculator.pick_side(expression)
    if len(_FIGURE.findall(worked)) < 2:
        return False  # one number is no calculation
    return _figures(worked) - KNOWN <= {
        value for text in known for value in _figures(text) | _shares(text)
    }


def _figures(text: str) -> set[Fraction]:
    return {Fraction(figure.replace(",", "")) for figure in _FIGURE.findall(text)}


def _shares(text: str) -> set[Fraction]:
    """What people write for the percentages in a text: 0.2, 0.8 and 1.2 for "20 %"."""
    found = {Fraction(figure.replace(",", "")) / 100 for figure in _PERCENT.findall(text)}
    return found | {1 - share for share in found} | {1 + share for share in found}


def _asks_for_words(query: str, known: Sequence[str]) -> bool:
    words = set(qa.normalise(query).split())
    there = {word for text in known for word in qa.normalise(text).split()}
    return bool(words) and 2 * len(words & there) >= len(words)


TOOLS: dict[str, ToolRules] = {
    "search": ToolRules(_plain_query, _asks_for_words, _gains_paragraph, _is_said),
    "calls": ToolRules(_plain_expression, _asks_for_numbers, _gains_value, _is_worked_out),
}
"""By the kind of a task."""
