"""What the methods that retrieve have in common: the task's retriever, passages as text, and how a
plain answer is asked for and scored.

Invariant: every baseline is asked for its answer in the same words and scored on that answer alone,
in its tags and box or without, so that between two of them only the retrieval differs. Nothing here
is trained.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from minirl.episode import Ask, Completion, Episode, Part, Verdict
from minirl.errors import UserError
from minirl.retrieve import Passage, Retriever
from minirl.rollout import Talk
from minirl.tasks import Task
from minirl.tasks.qa import SearchTask, coverage
from minirl.verify.qa import (
    SearchTags,
    check_form,
    defuse,
    exact_match,
    f1,
    read_box,
    strip_tags,
    write_answer,
)

ANSWER = """\
Answer the user's question. First think it through in a few sentences. Then write the answer, as short as it can be, between <{answer}> \
and </{answer}>{form}, and stop. For example:
Carol Reed directed The Third Man, and he was born in Putney. {shown}"""
IN_A_BOX = ", with nothing but the answer itself inside \\boxed{}"
ALONE = ", with nothing else between them"
NOTHING = "Nothing was found."
WITH_PASSAGES = "What a search has found may help; not all of it is to the point."


def corpus_of(task: Task) -> tuple[SearchTask, Retriever]:
    """The task and its retriever. Raises UserError for a task that has none."""
    if isinstance(task, SearchTask) and task.retriever is not None:
        return task, task.retriever
    raise UserError(
        f"task {task.name!r} has nothing to search; expected a question-answering task such as"
        " hotpotqa"
    )


def listed(passages: Sequence[Passage]) -> str:
    """Passages as a reader sees them: title, text, a blank line between two."""
    return "\n\n".join(f"{p.title}\n{p.text}" if p.title else p.text for p in passages)


def recall(talk: Talk, seen: Sequence[Passage]) -> float | None:
    """The share of the question's gold paragraphs among those that were shown, by title; None where
    none is known.

    seen: passages whose whole title the model could read. What `result_tokens` cut away before it
    was found, but never shown.
    """
    return coverage([talk.problem], [passage.title for passage in seen])


def form(tags: SearchTags) -> str:
    """How the answer is to stand between its tags, as a prompt says it."""
    return IN_A_BOX if tags.boxed else ALONE


def put(talk: Talk, tags: SearchTags, passages: Sequence[Passage] | None = None) -> None:
    """Begin the conversation: the question, below the passages where there are any. Each search's
    are at most `result_tokens` long."""
    system = ANSWER.format(answer=tags.answer, form=form(tags), shown=write_answer("Putney", tags))
    if passages is None:
        talk.begin(talk.problem.prompt, system=system)
        return
    text = defuse(listed(passages), tags) or NOTHING
    talk.begin(f"{text}\n\nQuestion: {talk.problem.prompt}", system=f"{system}\n{WITH_PASSAGES}")


def within(talk: Talk, passages: Sequence[Passage]) -> list[Passage]:
    """The first of the passages, as far as `result_tokens` go; the last of them cut between two
    tokens, after its title."""
    kept, room = list[Passage](), talk.sampling.result_tokens
    for passage in passages:
        tokens = talk.chat.inside(listed([passage]))
        if len(tokens) > room:
            left = room - len(talk.chat.inside(f"{passage.title}\n"))
            cut = talk.chat.text(talk.chat.inside(passage.text)[: max(0, left)])
            return [*kept, Passage(passage.title, cut, passage.id)] if cut else kept
        kept.append(passage)
        room -= len(tokens)
    return kept


def answer(talk: Talk, task: Task) -> Generator[Ask, Completion, str]:
    """One answer to the conversation as it stands."""
    return (yield from talk.ask("attempt", max_tokens=talk.sampling.attempt_tokens, stop=task.stop))


def stated(text: str, tags: SearchTags) -> str | None:
    """The answer that a reply gives: what its answer tags hold or, where it opens none, its box, or
    all of it; None for nothing.

    So a model that was never taught the tags is scored on what it says, though its words around the
    answer cost it precision.
    """
    if f"<{tags.answer}>" in text:
        return check_form(text, tags).answer
    return read_box(text) or strip_tags(text, tags).strip() or None


def end(talk: Talk, task: Task, text: str, seen: Sequence[Passage], *, searches: int) -> Episode:
    """The episode, scored by the F1 of the answer that `text` gives, whatever the form of the
    rest."""
    qa, _ = corpus_of(task)
    golds, said = talk.problem.answer["golds"], stated(text, qa.tags)
    em, overlap = (0.0, 0.0) if said is None else (float(exact_match(said, golds)), f1(said, golds))
    kind = None if em else "partial" if overlap else "wrong" if answered(text, task) else "answer"
    parts: dict[str, Part] = {
        "answer": said,
        "em": em,
        "f1": overlap,
        "searches": searches,
        "response": len(talk.replied),
    }
    parts["recall"] = recall(talk, seen) if searches else None
    return talk.end(Verdict(overlap, bool(em)), first=bool(em), first_error=kind, **parts)


def answered(text: str, task: Task) -> bool:
    """Whether an answer was given in its tags."""
    return any(stop in text for stop in task.stop)
