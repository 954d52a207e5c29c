"""stepwise: one action a turn, a tool call or the answer (SWiRL, arXiv 2504.04736).

Each of the model's turns is some reasoning and then ONE action between its tags; what the tool says
comes back as the user's turn, `query -> result`, and so do a tool's error and the news that an
action could not be read: neither ends an episode. A task has one tool, the search or the
calculator. Invariant: the model's turns are trained, the tool's never are, and an action is what
`read` says it is, here and wherever actions are judged. The prompt and the parser below speak of
the same tags.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

from minirl.episode import Part, Verdict
from minirl.errors import UserError
from minirl.methods.search.rag import NOTHING, corpus_of, listed, recall, within
from minirl.recipe import Stepwise
from minirl.retrieve import Passage
from minirl.rollout import Lookup, Play, Talk
from minirl.tasks import Task
from minirl.verify import calculator

ACTION, RESULT = "action", "result"
UNREADABLE = "That was not one action. Write either {call} or {answer}, and nothing after it."
EMPTY = "there is nothing between the tags"
ARROW = " -> "
MOST_SHOWN = 300  # characters of a query that are shown again before its result

SEARCH = (
    "Answer the question step by step. In each of your turns think in a sentence or two, then do"
    " ONE thing: look something up, with a query between <{call}> and </{call}>, or give the"
    " answer, as short as it can be, between <{answer}> and </{answer}>. What is found is told to"
    " you in the next message. You have at most {steps} turns. For example:\n"
    "To say where its director was born I must know who directed The Third Man. <{call}>director"
    " of The Third Man</{call}>"
)
CALCULATE = (
    "Solve the problem step by step. In each of your turns think in a sentence or two, then do"
    " ONE thing: have an expression of numbers worked out, between <{call}> and </{call}>, or"
    " give the answer, a number alone, between <{answer}> and </{answer}>. The value is told to"
    " you in the next message. You have at most {steps} turns. For example:\n"
    "Each of the 4 boxes holds 12 eggs. <{call}>4 * 12</{call}>"
)


class Tags(NamedTuple):
    """The tags of a call and of the answer, and which tool a call is for."""

    tool: Literal["search", "calculator"]
    call: str
    answer: str
    steps: int

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends a turn."""
        return f"</{self.call}>", f"</{self.answer}>"

    def instructions(self) -> str:
        """The system message."""
        return (SEARCH if self.tool == "search" else CALCULATE).format(
            call=self.call, answer=self.answer, steps=self.steps
        )

    def unreadable(self) -> str:
        """What is told after a turn that is no action."""
        return UNREADABLE.format(
            call=f"<{self.call}>...</{self.call}>", answer=f"<{self.answer}>...</{self.answer}>"
        )

    def write(self, thought: str, kind: Literal["call", "answer"], content: str) -> str:
        """A turn as a model is to write it."""
        name = self.call if kind == "call" else self.answer
        return f"{thought} <{name}>{content}</{name}>".lstrip()


class Action(NamedTuple):
    """What a turn does."""

    kind: Literal["call", "answer"]
    content: str


def tags_of(task: Task, node: Stepwise) -> Tags:
    """The tags of a task's tool. Raises UserError for a task that cannot be played step by step."""
    if task.verify_answer is None:
        raise UserError(
            f"task {task.name!r} cannot be played step by step; expected question answering, or"
            " maths with task.chain=calls"
        )
    if task.kind == "search":
        return Tags("search", node.query, node.answer, node.steps)
    return Tags("calculator", node.expression, node.answer, node.steps)


def read(text: str, tags: Tags) -> Action | None:
    """The one action that ends a turn; None where there is none, several, or a tag of another one
    beside it.

    A token that ends the closing tag may hold more than that: what follows the tag is ignored,
    unless it is another tag.
    """
    found = list(_pattern(tags).finditer(text))
    if len(found) != 2 or found[0][1] or not found[1][1] or found[0][2] != found[1][2]:
        return None
    content = text[found[0].end() : found[1].start()].strip()
    return Action("call" if found[0][2] == tags.call else "answer", content)


def stepwise(talk: Talk, task: Task) -> Play:
    """Prompt, then actions and the tool's replies in turn until an answer or the last step; verdict
    of the answer.

    An episode without an answer is worth 0. parts: `steps` (actions), `calls` (the tool's replies),
    `errors` (of these, errors), `malformed` (actions that could not be read), `answered`, `answer`;
    for questions also `searches`, `recall`, `em` and `f1`.
    """
    tags, answer = tags_of(task, talk.sampling.stepwise), None
    counts = {"steps": 0, "calls": 0, "errors": 0, "malformed": 0}
    seen: list[Passage] = []
    talk.begin(talk.problem.prompt, system=tags.instructions())
    for left in reversed(range(tags.steps)):
        text = yield from talk.ask(
            ACTION, max_tokens=talk.sampling.attempt_tokens, trained=True, stop=tags.stop
        )
        action = read(text, tags)
        counts["steps"] += 1
        counts["malformed"] += action is None
        if action is not None and action.kind == "answer":
            answer = action.content
            break
        if not left:
            break
        if action is None:
            talk.tell(RESULT, tags.unreadable())
        else:
            counts["errors"] += yield from _call(talk, task, action.content, seen)
            counts["calls"] += 1
    verdict, parts = _scored(talk, task, tags, answer, counts, seen)
    return talk.end(verdict, **parts)


def step(talk: Talk, task: Task) -> Play:
    """One new action at a stored state, not scored: a judge does that. No tool runs."""
    text = yield from talk.ask(
        ACTION,
        max_tokens=talk.sampling.attempt_tokens,
        trained=True,
        stop=tags_of(task, talk.sampling.stepwise).stop,
    )
    action = read(text, tags_of(task, talk.sampling.stepwise))
    return talk.end(
        None, malformed=int(action is None), answered=action is not None and action.kind == "answer"
    )


def imitate(talk: Talk, task: Task) -> Play:
    """A stored action at its state, for SFT: both stand in the problem's context already, the
    action marked as trained."""
    yield from ()
    return talk.end(None)


def result(query: str, said: str) -> str:
    """What the tool's turn says."""
    return f"{' '.join(query.split())[:MOST_SHOWN]}{ARROW}{said}"


def found(talk: Talk, passages: Sequence[Passage]) -> str:
    """Passages as the tool tells them, at most `result_tokens` long."""
    return f"\n{listed(within(talk, passages))}" if passages else NOTHING


def _call(
    talk: Talk, task: Task, content: str, seen: list[Passage]
) -> Generator[Lookup, Any, bool]:
    """Tell the tool's reply to a call; whether it is an error."""
    if not content:
        talk.tell(RESULT, result("", f"error: {EMPTY}"))
        return True
    if task.kind == "calls":
        said = calculator.reply(content)
        talk.tell(RESULT, result(content, said))
        return said.startswith("error")
    qa, retriever = corpus_of(task)
    passages: list[Passage] = yield Lookup(retriever, content, qa.k)
    seen += within(talk, passages)  # as `found` shows them
    talk.tell(RESULT, result(content, found(talk, passages)))
    return False


def _scored(
    talk: Talk,
    task: Task,
    tags: Tags,
    answer: str | None,
    counts: dict[str, int],
    seen: Sequence[Passage],
) -> tuple[Verdict, dict[str, Part]]:
    assert task.verify_answer is not None
    verdict = (
        Verdict(0.0, False, {"error_kind": "answer"})
        if answer is None
        else task.verify_answer(talk.problem, answer)
    )
    parts: dict[str, Part] = {
        "first": verdict.passed,
        "first_error": verdict.parts.get("error_kind"),
        **counts,
        "answered": answer is not None,
    }
    parts["answer"] = None if answer is None else answer[:MOST_SHOWN]
    if tags.tool == "search":
        parts |= {"em": verdict.parts.get("em", 0.0), "f1": verdict.parts.get("f1", 0.0)}
        parts |= {"searches": counts["calls"], "recall": recall(talk, seen)}
    return verdict, parts


@cache
def _pattern(tags: Tags) -> re.Pattern[str]:
    return re.compile(f"<(/?)({re.escape(tags.call)}|{re.escape(tags.answer)})>")
