"""ircot: a chain of thought that searches with each of its sentences (IRCoT, arXiv 2212.10509).

The question is searched for first, then each new sentence of reasoning. All passages found so far
stand above the question, so every round is a conversation of its own, in which the model writes on
from the sentences it has; the last one is the episode.
"""

from __future__ import annotations

import re

from minirl.methods.search.rag import answer, answered, corpus_of, end, put, within
from minirl.retrieve import Passage
from minirl.rollout import Lookup, Play, Talk
from minirl.tasks import Task

ROUNDS = 5
SENTENCE_ENDS = (". ", ".\n", "? ", "?\n", "! ", "!\n")
_SENTENCE = re.compile(r"\s*\S.*?[.!?](?=\s|$)", re.DOTALL)


def ircot(talk: Talk, task: Task, *, rounds: int = ROUNDS) -> Play:
    """At most `rounds` searches: with the question, then with the last sentence; in the last round
    the model writes to its end."""
    qa, retriever = corpus_of(task)
    query, thought = talk.problem.prompt, ""
    kept, searches = (
        dict[Passage, Passage](),
        0,
    )  # each passage as it was found, and the most that was shown of it
    while True:
        found = yield Lookup(retriever, query, qa.k)
        searches += 1
        for passage, part in zip(found, within(talk, found), strict=False):
            kept[passage] = max(kept.get(passage, part), part, key=lambda shown: len(shown.text))
        put(talk, qa.tags, list(kept.values()))
        if thought:
            talk.insert("thought", talk.chat.inside(thought))
        if searches >= rounds:
            return end(
                talk,
                task,
                thought + (yield from answer(talk, task)),
                list(kept.values()),
                searches=searches,
            )
        # A sentence has ended where the next one begins: its first word is what stops the model,
        # and is left out.
        text = yield from talk.ask(
            "attempt", max_tokens=talk.sampling.attempt_tokens, stop=(*SENTENCE_ENDS, *task.stop)
        )
        if f"<{qa.tags.answer}>" in text and not answered(
            text, task
        ):  # a full stop inside the answer ends no sentence
            room = talk.sampling.attempt_tokens - len(talk.turns[-1].tokens)
            text += (
                (yield from talk.ask("attempt", max_tokens=room, stop=task.stop))
                if room > 0
                else ""
            )
            return end(talk, task, thought + text, list(kept.values()), searches=searches)
        sentence = _SENTENCE.match(text)
        if answered(text, task) or sentence is None:
            return end(talk, task, thought + text, list(kept.values()), searches=searches)
        thought += sentence[0]
        query = sentence[0].strip()
