"""demonstrate_search: the plan of a question as an episode of method search that nobody sampled,
for SFT (loss nll).

The searches are real. A thought tells no more than the results above it say, and the answer is
trained only where one of them holds it, or where it is yes or no: a model that is shown answers out
of nowhere learns to make them up. All else is trained, but no result ever is. Small models need
this warm-up, for they do not begin to search by themselves.
"""

from __future__ import annotations

from minirl.errors import UserError
from minirl.methods.search.rag import corpus_of
from minirl.methods.search.search import instructions, shown
from minirl.rollout import Lookup, Play, Talk
from minirl.tasks import Task
from minirl.tasks.qa import Step
from minirl.verify.qa import SearchTags, normalise, write_answer

FAILED = "That did not help. "


def demonstrate_search(talk: Talk, task: Task) -> Play:
    """Prompt, then thought, search and result for each step of the plan, then thought and answer.

    Results are shortened, all to the same length, where the whole would not fit into
    `attempt_tokens`.
    """
    qa, retriever = corpus_of(task)
    if qa.plan is None:
        raise UserError(
            f"task {task.name!r} has no plans to show; expected a data set with supporting facts"
            " for method demonstrate"
        )
    plan, tags, inside = qa.plan(talk.problem), qa.tags, talk.chat.inside
    talk.begin(talk.problem.prompt, system=instructions(tags))
    known = [
        "",
        *(max(FAILED, tells(step.title), tells(step.found or ""), key=len) for step in plan.steps),
    ]  # at the longest
    written = [
        call(step, said, tags) for step, said in zip(plan.steps, known[:-1], strict=True)
    ] + [last(plan.answer, known[-1], tags)]
    fixed = (
        sum(len(inside(text)) for text in written)
        + len(plan.steps) * len(shown(talk, "", tags))
        + 1
    )  # the end marker
    room = max(0, talk.sampling.attempt_tokens - fixed) // max(1, len(plan.steps))
    learned, read = "", list[str]()
    for step in plan.steps:
        talk.insert("demonstration", inside(call(step, learned, tags)), trained=True)
        found = yield Lookup(retriever, step.query, qa.k)
        result = shown(talk, found, tags, min(room, talk.sampling.result_tokens))
        talk.insert("result", result)
        read.append(talk.chat.text(result))
        learned = learnt(step, read[-1])
    answerable = normalise(plan.answer) in ("yes", "no") or any(
        holds(result, plan.answer) for result in read
    )
    talk.reply("demonstration", last(plan.answer, learned, tags), trained=answerable)
    return talk.end(None, searches=len(plan.steps))


def call(step: Step, known: str, tags: SearchTags) -> str:
    """What leads to a search, and the search."""
    begin = "\n" if known else ""
    return (
        f"{begin}<{tags.think}> {known}I need to find: {step.query}"
        f" </{tags.think}>\n<{tags.search}> {step.query} </{tags.search}>"
    )


def last(answer: str, known: str, tags: SearchTags) -> str:
    """What leads to the answer, and the answer."""
    return (
        f"\n<{tags.think}> {known}Now I can answer. </{tags.think}>\n{write_answer(answer, tags)}"
    )


def learnt(step: Step, result: str) -> str:
    """What a result says about its step: the answer where the data has one and the result holds it,
    else the title, else that it failed."""
    return next(
        (tells(name) for name in (step.found, step.title) if name and holds(result, name)), FAILED
    )


def holds(result: str, name: str) -> bool:
    """Whether a result says these words, one after another, however they are written."""
    return f" {normalise(name)} " in f" {normalise(result)} "


def tells(name: str) -> str:
    """A sentence for what was found."""
    return f"This tells of {name}. "
