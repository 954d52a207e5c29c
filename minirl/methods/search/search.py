"""search: think, search, read, answer (ReSearch, arXiv 2503.19470), in one assistant turn.

The model writes; where it closes a search, what is found is appended as ids inside its turn, and it
writes on. Everything it wrote is trained, no result ever is. Invariant: the ids that were sampled
stay as they are, a result never closes itself early, and the turn, results included, is at most
`attempt_tokens` long. The prompt below and the parser in `verify/qa.py` speak of the same tags.
"""

from __future__ import annotations

from collections.abc import Sequence

from minirl.episode import Part
from minirl.methods.search.rag import NOTHING, corpus_of, form, listed, recall
from minirl.retrieve import Passage
from minirl.rollout import Lookup, Play, Talk
from minirl.tasks import Task
from minirl.verify.qa import SearchTags, defuse, write_answer

EMPTY = "There was no query. Write the words to look for between the two search tags."
NO_MORE = "No searches are left. Answer with what you know."

PROMPT = (
    "Answer the user's question. You can look things up with a search tool: as often as you need"
    " to, one thing at a time, or not at all.\n"
    "\n"
    "Write what you think between <{think}> and </{think}>. To search, write a query between"
    " <{search}> and </{search}>; what the search finds is then shown to you between <{result}>"
    " and </{result}>, and you think on from there. Once you know the answer, write it between"
    " <{answer}> and </{answer}>{form}, and stop.\n"
    "\n"
    "For example:\n"
    "<{think}> To say where its director was born I must know who directed The Third Man."
    " </{think}>\n"
    "<{search}> director of The Third Man </{search}> <{result}>\n"
    "(what was found)\n"
    "</{result}>\n"
    "<{think}> It was directed by Carol Reed. Where was Carol Reed born? </{think}>\n"
    "<{search}> Carol Reed place of birth </{search}> <{result}>\n"
    "(what was found)\n"
    "</{result}>\n"
    "<{think}> Carol Reed was born in Putney. </{think}>\n"
    "{shown}"
)


def instructions(tags: SearchTags) -> str:
    """The system message: what the tags are for, and one example."""
    names = {
        "think": tags.think,
        "search": tags.search,
        "result": tags.result,
        "answer": tags.answer,
    }
    return PROMPT.format(**names, form=form(tags), shown=write_answer("Putney", tags))


def search(talk: Talk, task: Task) -> Play:
    """Prompt, then writing and results in turn until an answer, the model's end or the limit;
    verdict of all that the turn says."""
    qa, retriever = corpus_of(task)
    tags, sampling, limit = qa.tags, talk.sampling, talk.sampling.attempt_tokens
    talk.begin(talk.problem.prompt, system=instructions(tags))
    seen, searches = list[Passage](), 0
    while True:
        text = yield from talk.ask(
            "attempt",
            max_tokens=limit - len(talk.replied),
            trained=True,
            stop=(f"</{tags.search}>", *task.stop),
        )
        query, fresh = called(text, tags, task.stop), list[Passage]()
        if query is None or talk.turns[-1].tokens[-1] in talk.chat.eos:
            break
        if not query:
            result = shown(talk, EMPTY, tags)
        elif sampling.searches is not None and searches >= sampling.searches:
            result = shown(talk, NO_MORE, tags)
        else:
            found = yield Lookup(retriever, query, qa.k)
            searches += 1
            result, fresh = shown(talk, found, tags), visible(talk, found, tags)
        room = limit - len(talk.replied)
        talk.insert("result", result[:room])
        if len(result) >= room:
            talk.mark_cut()
            break
        seen += fresh
    verdict = task.verify(talk.problem, talk.chat.text(talk.replied))
    parts: dict[str, Part] = {name: verdict.parts[name] for name in ("format", "em", "f1")}
    parts |= {"searches": searches, "recall": recall(talk, seen), "response": len(talk.replied)}
    return talk.end(verdict, first=verdict.passed, first_error=verdict.parts["error_kind"], **parts)


def called(text: str, tags: SearchTags, stop: Sequence[str] = ()) -> str | None:
    """The query of the search that ends `text`: what follows the last opening tag before it, ""
    where that is nothing or missing.

    None where there is no search, or an answer (`stop`) came first. A token that ends the tag may
    hold more than that: it is ignored.
    """
    before, found, _ = text.partition(f"</{tags.search}>")
    if not found or any(end in before for end in stop):
        return None
    return before.rpartition(f"<{tags.search}>")[2].strip() if f"<{tags.search}>" in before else ""


def visible(talk: Talk, found: Sequence[Passage], tags: SearchTags) -> list[Passage]:
    """Those of a result's passages whose whole title is shown; see `shown`."""
    tokens = talk.chat.inside(defuse(listed(found), tags))[: talk.sampling.result_tokens]
    chars = len(
        talk.chat.text(tokens, special=True).rstrip("\ufffd")
    )  # a cut may go through a character
    ends = (
        len(defuse(listed([*found[:at], Passage(p.title, "")]), tags)) - 1
        for at, p in enumerate(found)
    )
    return [passage for passage, end in zip(found, ends, strict=True) if end <= chars]


def shown(
    talk: Talk, said: str | Sequence[Passage], tags: SearchTags, most_tokens: int | None = None
) -> tuple[int, ...]:
    """The ids of a result: a notice or passages, cut between two tokens where they are more than
    `result_tokens`, closed either way."""
    inside, most = (
        talk.chat.inside,
        talk.sampling.result_tokens if most_tokens is None else most_tokens,
    )
    text = said if isinstance(said, str) else defuse(listed(said), tags) or NOTHING
    return (*inside(f" <{tags.result}>\n"), *inside(text)[:most], *inside(f"\n</{tags.result}>"))
