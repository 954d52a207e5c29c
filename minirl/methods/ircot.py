"""ircot: a chain of thought that searches with each of its sentences (IRCoT, arXiv 2212.10509).

The question is searched for first, then each new sentence of reasoning. All passages found so far stand above the question, so every
round is a conversation of its own, in which the model writes on from the sentences it has; the last one is the episode.
"""

from __future__ import annotations

import re

from minirl.methods.rag import answer, answered, corpus_of, end, put, within
from minirl.retrieve import Passage
from minirl.rollout import Lookup, Play, Talk
from minirl.tasks import Task

ROUNDS = 5
SENTENCE_ENDS = (". ", ".\n", "? ", "?\n", "! ", "!\n")
_SENTENCE = re.compile(r"\s*\S.*?[.!?](?=\s|$)", re.DOTALL)


def ircot(talk: Talk, task: Task, *, rounds: int = ROUNDS) -> Play:
    """At most `rounds` searches: with the question, then with the last sentence; in the last round the model writes to its end."""
    qa, retriever = corpus_of(task)
    query, thought = talk.problem.prompt, ""
    kept, seen, searches = dict[Passage, None](), list[Passage](), 0
    while True:
        found = yield Lookup(retriever, query, qa.k)
        searches += 1
        seen += found
        kept |= dict.fromkeys(within(talk, found))
        put(talk, qa.tags, list(kept))
        if thought:
            talk.insert("thought", talk.chat.inside(thought))
        if searches >= rounds:
            return end(talk, task, thought + (yield from answer(talk, task)), seen, searches=searches)
        # A sentence has ended where the next one begins: its first word is what stops the model, and is left out.
        text = yield from talk.ask("attempt", max_tokens=talk.sampling.attempt_tokens, stop=(*SENTENCE_ENDS, *task.stop))
        sentence = _SENTENCE.match(text)
        if answered(text, task) or sentence is None:
            return end(talk, task, thought + text, seen, searches=searches)
        thought += sentence[0]
        query = sentence[0].strip()
