"""What the methods that retrieve share: the task's retriever, and passages as text."""

from __future__ import annotations

from collections.abc import Sequence

from minirl.errors import UserError
from minirl.retrieve import Passage, Retriever
from minirl.rollout import Talk
from minirl.tasks import Task
from minirl.tasks.qa import SearchTask, coverage
from minirl.verify.qa import SearchTags

IN_A_BOX = ", with nothing but the answer itself inside \\boxed{}"
ALONE = ", with nothing else between them"
NOTHING = "Nothing was found."


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


def recall(talk: Talk, shown: Sequence[Passage]) -> float | None:
    """The share of the question's gold paragraphs among the passages that were shown, by title;
    None if none is known.

    shown: passages whose whole title the model could read, not those that `result_tokens` cut away.
    """
    return coverage([talk.problem], [passage.title for passage in shown])


def form(tags: SearchTags) -> str:
    """How the answer is to stand between its tags, as a prompt says it."""
    return IN_A_BOX if tags.boxed else ALONE


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
