"""naive_rag: one search with the question as it is, then an answer from what was found."""

from __future__ import annotations

from minirl.methods.search.rag import answer, corpus_of, end, put, within
from minirl.rollout import Lookup, Play, Talk
from minirl.tasks import Task


def naive_rag(talk: Talk, task: Task) -> Play:
    """Passages and question, answer."""
    qa, retriever = corpus_of(task)
    found = yield Lookup(retriever, talk.problem.prompt, qa.k)
    shown = within(talk, found)
    put(talk, qa.tags, shown)
    text = yield from answer(talk, task)
    return end(talk, task, text, shown, searches=1)
