"""The baselines of ReSearch's table (arXiv 2503.19470): no_rag, naive_rag, iter_retgen and ircot.

Invariant: each asks for its answer in the same words and is scored on that answer alone, in its
tags and box or without, so that two of them differ in what they retrieve. Nothing here is trained.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence

from minirl.episode import Ask, Completion, Episode, Part, Verdict
from minirl.methods.search.rag import NOTHING, corpus_of, form, listed, recall, within
from minirl.retrieve import Passage
from minirl.rollout import Lookup, Play, Talk
from minirl.tasks import Task
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

ANSWER = (
    "Answer the user's question. First think it through in a few sentences. Then write the answer,"
    " as short as it can be, between <{answer}> and </{answer}>{form}, and stop. For example:\n"
    "Carol Reed directed The Third Man, and he was born in Putney. {shown}"
)
WITH_PASSAGES = "What a search has found may help; not all of it is to the point."
ITER_RETGEN_ROUNDS = 3  # the paper's gain is nearly all there after the second
IRCOT_ROUNDS = 5
SENTENCE_ENDS = (". ", ".\n", "? ", "?\n", "! ", "!\n")
_SENTENCE = re.compile(r"\s*\S.*?[.!?](?=\s|$)", re.DOTALL)


def no_rag(talk: Talk, task: Task) -> Play:
    """Question, answer: nothing is retrieved."""
    qa, _ = corpus_of(task)
    _begin(talk, qa.tags)
    text = yield from _answer(talk, task)
    return _end(talk, task, text, (), searches=0)


def naive_rag(talk: Talk, task: Task) -> Play:
    """One search with the question as it is, then an answer below its passages."""
    qa, retriever = corpus_of(task)
    passages = within(talk, (yield Lookup(retriever, talk.problem.prompt, qa.k)))
    _begin(talk, qa.tags, passages)
    text = yield from _answer(talk, task)
    return _end(talk, task, text, passages, searches=1)


def iter_retgen(talk: Talk, task: Task, *, rounds: int = ITER_RETGEN_ROUNDS) -> Play:
    """Retrieve with the question and the last answer, answer again (Iter-RetGen, arXiv 2305.15294).

    Each round is a conversation of its own with its own passages; the last one is the episode.
    """
    qa, retriever = corpus_of(task)
    text, shown = "", list[Passage]()
    for _ in range(rounds):
        query = f"{talk.problem.prompt} {text}".strip()
        passages = within(talk, (yield Lookup(retriever, query, qa.k)))
        shown += passages
        _begin(talk, qa.tags, passages)
        text = yield from _answer(talk, task)
    return _end(talk, task, text, shown, searches=rounds)


def ircot(talk: Talk, task: Task, *, rounds: int = IRCOT_ROUNDS) -> Play:
    """A chain of thought that searches with each of its sentences (IRCoT, arXiv 2212.10509).

    The question is searched for first, then each new sentence; in the last of `rounds` the model
    writes to its end. All passages so far stand above the question, so every round is a
    conversation of its own, in which the model writes on from its sentences.
    """
    qa, retriever = corpus_of(task)
    limit, query, thought, searches = talk.sampling.attempt_tokens, talk.problem.prompt, "", 0
    shown = dict[Passage, Passage]()  # each passage, and the longest part of it that was shown
    while True:
        passages = yield Lookup(retriever, query, qa.k)
        searches += 1
        for passage, part in zip(passages, within(talk, passages), strict=False):
            shown[passage] = max(shown.get(passage, part), part, key=lambda p: len(p.text))
        _begin(talk, qa.tags, list(shown.values()))
        if thought:
            talk.insert("thought", talk.chat.inside(thought))
        if searches >= rounds:
            text = yield from _answer(talk, task)
            break
        # A sentence has ended where the next one begins: its first word is what stops the model,
        # and is left out.
        stops = (*SENTENCE_ENDS, *task.stop)
        text = yield from talk.ask("attempt", max_tokens=limit, stop=stops)
        if f"<{qa.tags.answer}>" in text and not _is_answered(text, task):
            # a full stop inside the answer ends no sentence
            if (room := limit - len(talk.turns[-1].tokens)) > 0:
                text += yield from talk.ask("attempt", max_tokens=room, stop=task.stop)
            break
        sentence = _SENTENCE.match(text)
        if _is_answered(text, task) or sentence is None:
            break
        thought += sentence[0]
        query = sentence[0].strip()
    return _end(talk, task, thought + text, list(shown.values()), searches=searches)


def _begin(talk: Talk, tags: SearchTags, passages: Sequence[Passage] | None = None) -> None:
    """Begin the conversation: the question, below the passages if there are any."""
    system = ANSWER.format(answer=tags.answer, form=form(tags), shown=write_answer("Putney", tags))
    if passages is None:
        talk.begin(talk.problem.prompt, system=system)
        return
    text = defuse(listed(passages), tags) or NOTHING
    talk.begin(f"{text}\n\nQuestion: {talk.problem.prompt}", system=f"{system}\n{WITH_PASSAGES}")


def _answer(talk: Talk, task: Task) -> Generator[Ask, Completion, str]:
    return (yield from talk.ask("attempt", max_tokens=talk.sampling.attempt_tokens, stop=task.stop))


def _stated(text: str, tags: SearchTags) -> str | None:
    """The answer that a reply gives: the text in its answer tags or, if it opens none, in its box,
    or all of it; None if there is none.

    So a model that was never taught the tags is scored on what it says, though its words around the
    answer cost it precision.
    """
    if f"<{tags.answer}>" in text:
        return check_form(text, tags).answer
    return read_box(text) or strip_tags(text, tags).strip() or None


def _is_answered(text: str, task: Task) -> bool:
    """Whether an answer was given in its tags."""
    return any(stop in text for stop in task.stop)


def _end(talk: Talk, task: Task, text: str, shown: Sequence[Passage], *, searches: int) -> Episode:
    """The episode, scored by the F1 of its answer, whatever the form of the rest."""
    qa, _ = corpus_of(task)
    golds, said = talk.problem.answer["golds"], _stated(text, qa.tags)
    em, overlap = (0.0, 0.0) if said is None else (float(exact_match(said, golds)), f1(said, golds))
    wrong = "wrong" if _is_answered(text, task) else "answer"
    parts: dict[str, Part] = {
        "answer": said,
        "em": em,
        "f1": overlap,
        "searches": searches,
        "response": len(talk.replied),
        "recall": recall(talk, shown) if searches else None,
    }
    error = None if em else "partial" if overlap else wrong
    return talk.end(Verdict(overlap, bool(em)), first=bool(em), first_error=error, **parts)
