"""iter_retgen: retrieve, answer, retrieve with the question and that answer, answer again
(Iter-RetGen, arXiv 2305.15294).

Each round is a conversation of its own with the passages of that round; the last one is the
episode.
"""

from __future__ import annotations

from minirl.methods.search.rag import answer, corpus_of, end, put, within
from minirl.retrieve import Passage
from minirl.rollout import Lookup, Play, Talk
from minirl.tasks import Task

ROUNDS = 3  # the paper's gain is nearly all there after the second


def iter_retgen(talk: Talk, task: Task, *, rounds: int = ROUNDS) -> Play:
    """`rounds` times: passages for question + last answer, answer."""
    qa, retriever = corpus_of(task)
    text, seen = "", list[Passage]()
    for _ in range(rounds):
        found = yield Lookup(retriever, f"{talk.problem.prompt} {text}".strip(), qa.k)
        shown = within(talk, found)
        seen += shown
        put(talk, qa.tags, shown)
        text = yield from answer(talk, task)
    return end(talk, task, text, seen, searches=rounds)
