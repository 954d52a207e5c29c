"""no_rag: the baseline without retrieval. The question, some thought, an answer from the model's
own knowledge."""

from __future__ import annotations

from minirl.methods.search.rag import answer, corpus_of, end, put
from minirl.rollout import Play, Talk
from minirl.tasks import Task


def no_rag(talk: Talk, task: Task) -> Play:
    """Question, answer."""
    qa, _ = corpus_of(task)
    put(talk, qa.tags)
    text = yield from answer(talk, task)
    return end(talk, task, text, (), searches=0)
