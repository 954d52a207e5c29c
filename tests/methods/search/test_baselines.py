"""The baselines without training: what each retrieves, what it shows, how often it asks, and how
its answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from scripted import Scripted
from tiny import byte_tokenizer

from minirl import recipe
from minirl.chat import Chat
from minirl.episode import Ask, Episode, Problem, Verdict
from minirl.errors import UserError
from minirl.methods import FUNCTIONS, Method, evaluated_by
from minirl.methods.search.baselines import ircot, iter_retgen, naive_rag, no_rag
from minirl.methods.search.rag import form, within
from minirl.methods.search.search import instructions, search
from minirl.methods.single import single
from minirl.recipe import Sampling
from minirl.recipe.methods import names
from minirl.retrieve import Passage
from minirl.rollout import Talk, play
from minirl.tasks import Task
from minirl.tasks.qa import SearchTask
from minirl.verify.qa import RESEARCH, SEARCH_R1, SearchTags, verify

CHAT = Chat(byte_tokenizer())
QUESTION = "Where was the director born?"
PROBLEM = Problem(
    "q",
    QUESTION,
    {"golds": ["Putney"], "titles": ["The Third Man", "Carol Reed"], "paragraphs": [], "steps": []},
)
FILM, REED = (
    Passage("The Third Man", "Directed by Carol Reed."),
    Passage("Carol Reed", "Born in Putney."),
)
PUTNEY, ROME = (
    "It was in Putney. <answer>\\boxed{Putney}</answer>",
    "In Rome. <answer>\\boxed{Rome}</answer>",
)


class Library:
    """Finds the film for the question, and Carol Reed for whatever names him."""

    def __init__(self) -> None:
        self.queries: list[list[str]] = []

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self.queries.append(list(queries))
        return [
            ([FILM] if QUESTION in query else []) + ([REED] if "Carol Reed" in query else [])
            for query in queries
        ]


def scored(problem: Problem, text: str, tags: SearchTags = RESEARCH) -> Verdict:
    return verify(problem.answer["golds"], text, tags=tags)


def played(
    method: Method,
    script: Callable[[str, Ask], str],
    *,
    tags: SearchTags = RESEARCH,
    **sampling: Any,
) -> tuple[Episode, Scripted, list[str]]:
    """One episode, its sampler, and the queries."""
    library = Library()
    task = SearchTask(
        "films",
        (),
        (PROBLEM,),
        partial(scored, tags=tags),
        stop=("</answer>",),
        tags=tags,
        retriever=library,
        k=5,
    )
    sampler = Scripted(CHAT, script)
    talk = Talk(
        PROBLEM, CHAT, Sampling(**({"attempt_tokens": 300} | sampling)), temperature=0.0, seed="0"
    )
    (episode,) = play([method(talk, task)], sampler)
    assert not any(episode.mask)
    return episode, sampler, [query for queries in library.queries for query in queries]


def user(ask: Ask) -> str:
    """The user message of an ask."""
    return (
        CHAT.text(ask.tokens, special=True)
        .partition("<|im_start|>user\n")[2]
        .partition("<|im_end|>")[0]
    )


def test_no_rag() -> None:
    episode, sampler, queries = played(no_rag, lambda text, ask: PUTNEY)
    assert queries == []
    assert [user(ask) for ask in sampler.asks] == [QUESTION]
    assert (episode.reward, episode.parts) == (
        1.0,
        {
            "answer": "Putney",
            "em": 1.0,
            "f1": 1.0,
            "searches": 0,
            "response": len(PUTNEY),
            "recall": None,
            "first": True,
            "first_error": None,
        },
    )


@pytest.mark.parametrize("tags", [RESEARCH, SEARCH_R1])
def test_the_answer_counts_with_its_box_and_without(tags: SearchTags) -> None:
    """The prompt says which form is wanted; the score goes by the answer."""
    for said, em in (("Putney", 1.0), (" Rome ", 0.0), ("", 0.0)):
        episode, sampler, _ = played(
            no_rag, lambda text, ask, said=said: f"It was there. <answer>{said}</answer>", tags=tags
        )  # type: ignore[misc]
        assert (
            episode.reward,
            episode.parts["em"],
            episode.parts["f1"],
            episode.parts["first"],
        ) == (em, em, em, bool(em)), said
    prompt = CHAT.text(sampler.asks[0].tokens)
    assert ("inside \\boxed{}" in prompt) == tags.boxed
    assert form(tags) in instructions(tags), "asked for in the words of method search"
    assert form(tags) in prompt


@pytest.mark.parametrize(
    ("said", "answer", "em", "f1", "error"),
    [
        ("Putney", "Putney", 1.0, 1.0, None),
        (
            "He was born in Putney.\n",
            "He was born in Putney.",
            0.0,
            1 / 3,
            "partial",
        ),  # one word of five is right, and the only one wanted
        ("I do not know", "I do not know", 0.0, 0.0, "answer"),
        ("\\boxed{Putney}", "Putney", 1.0, 1.0, None),
        ("The answer is \\boxed{Putney}.", "Putney", 1.0, 1.0, None),
        ("Putney</answer>", "Putney", 1.0, 1.0, None),  # the prompt's own stop string
        ("  \n", None, 0.0, 0.0, "answer"),
        ("Putney. <answer>", None, 0.0, 0.0, "answer"),  # the answer was begun and cut off
        ("Putney. <answer></answer>", None, 0.0, 0.0, "wrong"),
        ("<answer>Rome</answer> or Putney", "Rome", 0.0, 0.0, "wrong"),
    ],
)
def test_a_reply_without_tags_is_an_answer_as_a_whole(
    said: str, answer: str | None, em: float, f1: float, error: str | None
) -> None:
    """A model that was never taught the tags knows something all the same. Catches: its rows of the
    table are 0 for their form alone."""
    parts = played(no_rag, lambda text, ask: said)[0].parts
    assert (parts["answer"], parts["em"], parts["f1"], parts["first_error"]) == (
        answer,
        em,
        pytest.approx(f1),
        error,
    )


def test_naive_rag() -> None:
    episode, sampler, queries = played(naive_rag, lambda text, ask: ROME)
    assert queries == [QUESTION]
    assert [user(ask) for ask in sampler.asks] == [
        f"The Third Man\nDirected by Carol Reed.\n\nQuestion: {QUESTION}"
    ]
    assert (
        episode.reward,
        episode.parts["first_error"],
        episode.parts["recall"],
        episode.parts["searches"],
    ) == (0.0, "wrong", 0.5, 1)


def test_iter_retgen_searches_with_its_last_answer() -> None:
    first = "It is by Carol Reed. <answer>\\boxed{Vienna}</answer>"

    def script(text: str, ask: Ask) -> str:
        return PUTNEY if "Born in Putney" in text else first

    episode, sampler, queries = played(iter_retgen, script)
    assert queries == [QUESTION, f"{QUESTION} {first}", f"{QUESTION} {PUTNEY}"]
    film, both = FILM.text, f"{FILM.text}\n\n{REED.title}\n{REED.text}"
    assert [user(ask) for ask in sampler.asks] == [
        f"The Third Man\n{found}\n\nQuestion: {QUESTION}" for found in (film, both, film)
    ]
    assert len({ask.seed for ask in sampler.asks}) == 3
    # The third round finds less than the second, and its answer is the one that counts.
    assert CHAT.text(episode.turns[-1].tokens) == first
    assert (episode.parts["em"], episode.parts["searches"], episode.parts["recall"]) == (
        0.0,
        3,
        1.0,
    )
    assert [turn.kind for turn in episode.turns] == ["prompt", "attempt"]


def test_ircot_searches_with_each_sentence_and_keeps_what_it_found() -> None:
    first, second, third = (
        "The film is by Carol Reed.",
        " He was born in Putney.",
        " <answer>\\boxed{Putney}</answer>",
    )

    def script(text: str, ask: Ask) -> str:
        said = text.rpartition("assistant\n")[2]
        return third if second in said else f"{second} So" if first in said else f"{first} And"

    episode, sampler, queries = played(ircot, script)
    assert queries == [QUESTION, first, second.strip()]
    film, both = FILM.text, f"{FILM.text}\n\n{REED.title}\n{REED.text}"
    assert [user(ask) for ask in sampler.asks] == [
        f"The Third Man\n{found}\n\nQuestion: {QUESTION}" for found in (film, both, both)
    ]
    ends = [
        CHAT.text(ask.tokens, special=True).rpartition("assistant\n")[2] for ask in sampler.asks
    ]
    assert ends == [
        "",
        first,
        first + second,
    ], "the model goes on with its own sentences, and with nothing behind them"
    assert (episode.parts["em"], episode.parts["searches"], episode.parts["recall"]) == (
        1.0,
        3,
        1.0,
    )


def test_ircot_ends_with_an_answer() -> None:
    episode, sampler, queries = played(ircot, lambda text, ask: "<answer>\\boxed{Putney}</answer>")
    assert (len(queries), len(sampler.asks), episode.parts["em"], episode.parts["searches"]) == (
        1,
        1,
        1.0,
        1,
    )


def test_ircot_does_not_search_inside_an_answer() -> None:
    whole = "It was there. <answer>\\boxed{St. Louis, Mo. or so}</answer>"

    def script(text: str, ask: Ask) -> str:
        said = text.rpartition("assistant\n")[2]
        assert whole.startswith(said), "it goes on from its own words"
        return whole[len(said) :]

    episode, sampler, queries = played(ircot, script)
    assert queries == [QUESTION, "It was there."]
    assert [ask.stop == ("</answer>",) for ask in sampler.asks] == [False, False, True]
    assert CHAT.text([t for turn in episode.turns[1:] for t in turn.tokens]) == whole
    assert (episode.parts["first_error"], episode.parts["searches"]) == ("wrong", 2)
    for room in (
        len(whole) - 20,
        20,
        19,
    ):  # too little for the whole answer; cut at the full stop inside it, and before
        episode, sampler, queries = played(ircot, script, attempt_tokens=room)
        assert sum(len(turn.tokens) for turn in episode.turns if turn.kind == "attempt") == room
        assert (episode.parts["first_error"], episode.finish, len(queries)) == (
            "answer",
            "stop" if room == 20 else "length",
            2,
        )


def test_ircot_shows_a_passage_once_at_its_longest() -> None:
    """What the budget cut in one round may be whole in another; without an id, too."""
    long = Passage("Carol Reed", "Born in Putney, a good way up the river.")

    class Two:
        def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
            return [[FILM, long] if query == QUESTION else [long] for query in queries]

    task = SearchTask("films", (), (PROBLEM,), scored, stop=("</answer>",), retriever=Two(), k=5)
    sampler = Scripted(
        CHAT,
        lambda text, ask: PUTNEY[18:] if "So." in text.rpartition("assistant\n")[2] else "So. And",
    )
    talk = Talk(
        PROBLEM, CHAT, Sampling(attempt_tokens=300, result_tokens=60), temperature=0.0, seed="0"
    )
    play([ircot(talk, task)], sampler)
    film = f"{FILM.title}\n{FILM.text}\n\n"
    shown = [f"{film}Carol Reed\nBorn in Putn", f"{film}{long.title}\n{long.text}"]
    assert [user(ask).partition("\n\nQuestion")[0] for ask in sampler.asks] == shown


def test_ircot_has_a_limit() -> None:
    episode, sampler, queries = played(
        ircot, lambda text, ask: " And Carol Reed. And" if ask.stop != ("</answer>",) else PUTNEY
    )
    assert queries == [QUESTION, *["And Carol Reed."] * 4]
    assert [ask.stop == ("</answer>",) for ask in sampler.asks] == [False] * 4 + [True]
    assert (episode.parts["em"], episode.parts["searches"]) == (1.0, 5)


def test_ircot_ends_where_the_model_has_nothing_to_say() -> None:
    episode, sampler, _ = played(
        ircot,
        lambda text, ask: (
            "" if "Reed" in text.rpartition("assistant\n")[2] else "It is by Carol Reed."
        ),
    )
    assert len(sampler.asks) == 2
    assert (episode.parts["first_error"], episode.parts["em"], episode.parts["searches"]) == (
        "answer",
        0.0,
        2,
    )


@pytest.mark.parametrize("method", [naive_rag, iter_retgen, ircot])
def test_passages_have_a_budget(method: Method) -> None:
    _, sampler, _ = played(method, lambda text, ask: PUTNEY, result_tokens=20)
    assert user(sampler.asks[0]) == f"The Third Man\nDirect\n\nQuestion: {QUESTION}"
    episode, sampler, _ = played(method, lambda text, ask: PUTNEY, result_tokens=13)
    assert "The Third Man" not in user(sampler.asks[0])
    assert episode.parts["recall"] == 0.0, "found, but never shown"


def test_within() -> None:
    talk = Talk(
        PROBLEM,
        CHAT,
        Sampling(result_tokens=len("The Third Man\nDirected by Carol Reed.") + 14),
        temperature=0.0,
        seed="0",
    )
    assert within(talk, [FILM, REED]) == [FILM, Passage("Carol Reed", "Bor")]
    talk = Talk(PROBLEM, CHAT, Sampling(result_tokens=40), temperature=0.0, seed="0")
    assert within(talk, [FILM, REED]) == [FILM], "no title without text"


def test_the_method_of_an_evaluation() -> None:
    plain, searched = Task("sums", (), (), scored), SearchTask("films", (), (), scored)
    assert evaluated_by(recipe.Eval(), plain) is single
    assert evaluated_by(recipe.Eval(), searched) is search
    for name in names("eval"):
        assert evaluated_by(recipe.Eval(method=name), searched) is FUNCTIONS[name]
    with pytest.raises(UserError, match="nothing to search"):
        play(
            [no_rag(Talk(PROBLEM, CHAT, Sampling(), temperature=0.0, seed="0"), plain)],
            Scripted(CHAT, lambda text, ask: ""),
        )


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        (
            {"name": "countdown"},
            {"eval": {"method": "search"}},
            "eval.method: got 'search' for task 'countdown'",
        ),
        (
            {"name": "countdown"},
            {"stages": [{"kind": "train", "method": "search", "steps": 1}]},
            "stages[0].method: got 'search' for task",
        ),
        (
            {"name": "hotpotqa"},
            {},
            "stages[0].method: got 'single' for task 'hotpotqa', expected one of demonstrate",
        ),
        (
            {"name": "hotpotqa"},
            {"stages": [{"kind": "train", "method": "search", "steps": 1}], "eval": {"tries": 2}},
            "eval.tries: got 2",
        ),
    ],
)
def test_methods_that_do_not_fit_the_task(
    task: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    whole = {
        "model": {"name": "m"},
        "task": task,
        "stages": [{"kind": "train", "method": "single", "steps": 1}],
    } | more
    with pytest.raises(UserError) as error:
        recipe.parse(whole, "r.yaml")
    assert said in str(error.value)
