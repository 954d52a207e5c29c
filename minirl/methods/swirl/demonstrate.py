"""demonstrate_stepwise: a gold trajectory as an episode of method stepwise that nobody sampled, for
SFT (loss nll).

The tool's replies are real: the calculator works GSM8K's marks out, and the searches of a
question's plan are searched. The model's turns are trained, the tool's are not. Small models need
this warm-up, for they do not call tools by themselves.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from minirl.errors import UserError
from minirl.methods.search.demonstrate import learnt
from minirl.methods.search.rag import corpus_of
from minirl.methods.swirl.stepwise import ACTION, RESULT, Tags, found, result, tags_of
from minirl.rollout import Lookup, Play, Talk
from minirl.tasks import Task
from minirl.tasks.calls import read_chain
from minirl.verify import calculator


def demonstrate_stepwise(talk: Talk, task: Task) -> Play:
    """Prompt, then thought and call for each step that the data knows of, each with the tool's
    reply; then thought and answer."""
    tags = tags_of(task, talk.sampling.stepwise)
    talk.begin(talk.problem.prompt, system=tags.instructions())
    if task.kind == "search":
        steps = yield from _searches(talk, task, tags)
    else:
        steps = _calculations(talk, task, tags)
    return talk.end(None, steps=steps)


def _calculations(talk: Talk, task: Task, tags: Tags) -> int:
    if talk.problem.solution is None:
        raise UserError(
            f"{talk.problem.id}: no chain with calculator marks to show; give task.source a file of"
            " GSM8K's own"
        )
    chain = read_chain(talk.problem.solution)
    for call in chain.calls:
        talk.reply(ACTION, tags.write(call.thought, "call", call.expression), trained=True)
        talk.tell(RESULT, result(call.expression, calculator.reply(call.expression)))
    talk.reply(ACTION, tags.write(chain.thought, "answer", chain.answer), trained=True)
    return len(chain.calls) + 1


def _searches(talk: Talk, task: Task, tags: Tags) -> Generator[Lookup, Any, int]:
    qa, retriever = corpus_of(task)
    if qa.plan is None:
        raise UserError(
            f"task {task.name!r} has no plans to show; expected a data set with supporting facts"
            " for demonstrations"
        )
    plan, known = qa.plan(talk.problem), ""
    for step in plan.steps:
        talk.reply(
            ACTION,
            tags.write(f"{known}I need to find: {step.query}", "call", step.query),
            trained=True,
        )
        passages = yield Lookup(retriever, step.query, qa.k)
        said = found(talk, passages)
        talk.tell(RESULT, result(step.query, said))
        known = learnt(step, said)
    talk.reply(ACTION, tags.write(f"{known}Now I can answer.", "answer", plan.answer), trained=True)
    return len(plan.steps) + 1
