"""Rollout: what an episode becomes does not depend on the others, and none waits for a
straggler."""

from __future__ import annotations

import random
from collections.abc import Generator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Scripted, at_random, logprobs_of, talk_of
from tiny import byte_tokenizer

from minirl.chat import Chat
from minirl.episode import Ask, Completion, Episode, Problem, Turn, Verdict
from minirl.rollout import Talk, play, seed_of

CHAT = Chat(byte_tokenizer())
PROBLEMS = [Problem(f"p{i}", f"Question {i}.", i) for i in range(5)]


def ids(text: str) -> tuple[int, ...]:
    return tuple(CHAT.tokenizer.encode(text, add_special_tokens=False))


def chatter(talk: Talk, turns: int | None = None) -> Generator[Ask, Completion, Episode]:
    """Talks on for `turns` turns, or until a reply holds a 0."""
    said = ""
    while (turns is None and "0" not in said) or (
        turns is not None and len(talk.turns) < 2 * turns
    ):
        if len(talk.turns) > 1:
            talk.tell("request", "Go on.")
        said = yield from talk.ask("reply", max_tokens=8, trained=len(talk.turns) > 1, stop=("!",))
    return talk.end(Verdict(len(said) / 8, True), turns=len(talk.turns))


def by_seed(text: str, ask: Ask) -> str:
    """A reply that depends on every token of the conversation and on the seed."""
    return str(seed_of(ask.tokens, ask.seed) % 1000) + ("!?" if ask.seed % 3 else "")


def talks(samples: int = 2) -> list[Talk]:
    return [talk_of(p, CHAT, seed=f"0/{p.id}/{k}") for p in PROBLEMS for k in range(samples)]


IN_ORDER = play([chatter(talk) for talk in talks()], Scripted(CHAT, by_seed))


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_order_of_finishing_gives_the_same_episodes(rng: random.Random) -> None:
    done: list[Episode] = []
    episodes = play(
        [chatter(talk) for talk in talks()],
        Scripted(CHAT, by_seed, at_random(rng)),
        on_done=done.append,
    )
    assert episodes == IN_ORDER
    assert [e.problem for e in episodes] == [p for p in PROBLEMS for _ in range(2)], (
        "in the order of the plays"
    )
    assert sorted(map(id, done)) == sorted(map(id, episodes)), "each is reported once"


def test_an_episode_does_not_depend_on_its_company() -> None:
    assert len({e.parts["turns"] for e in IN_ORDER}) > 1, "the episodes end at different times"
    for talk, expected in zip(talks(), IN_ORDER, strict=True):
        assert play([chatter(talk)], Scripted(CHAT, by_seed)) == [expected]


def test_the_next_ask_is_there_before_anybody_else_is_done() -> None:
    sampler = Scripted(CHAT, lambda text, ask: "yes", order=lambda waiting: [min(waiting)])
    play([chatter(talk, turns=3) for talk in talks(1)[:2]], sampler)
    assert sampler.trace == [
        ("add", 0),
        ("add", 1),
        *[("done", 0), ("add", 0)] * 2,  # episode 1 is still at its first turn: nobody waits for it
        ("done", 0),
        *[("done", 1), ("add", 1)] * 2,
        ("done", 1),
    ]


def test_those_done_together_go_on_together() -> None:
    sampler = Scripted(
        CHAT, lambda text, ask: "yes", order=lambda waiting: sorted(waiting, reverse=True)
    )
    done: list[str] = []
    play(
        [chatter(talk, turns=2 + n) for n, talk in enumerate(talks(1)[:2])],
        sampler,
        on_done=lambda e: done.append(e.problem.id),
    )
    round_ = [("done", 1), ("done", 0), ("add", 1)]
    assert sampler.trace == [("add", 0), ("add", 1), *round_, ("add", 0), *round_, ("done", 1)]
    assert done == ["p0", "p1"]


def test_a_method_that_asks_nothing_never_waits() -> None:
    sampler = Scripted(CHAT, by_seed)
    assert [
        e.turns[0].kind for e in play([chatter(talk, turns=0) for talk in talks(1)], sampler)
    ] == ["prompt"] * 5
    assert play([], sampler) == []
    assert sampler.trace == []


def test_a_mistake_in_a_method_comes_out() -> None:
    def broken(talk: Talk) -> Generator[Ask, Completion, Episode]:
        yield from talk.ask("reply", max_tokens=4)
        raise ZeroDivisionError("in a verifier")

    with pytest.raises(ZeroDivisionError, match="in a verifier"):
        play([broken(talk) for talk in talks(1)], Scripted(CHAT, by_seed))


@pytest.mark.parametrize("said", ["3 + 4!!", "3 + 4, so", "3 + 4"])
def test_token_in_token_out(said: str) -> None:
    """Each ask is the one before, the ids it was answered with, and the appended ids: nothing is
    rendered or encoded again."""
    sampler = Scripted(CHAT, lambda text, ask: said)
    (episode,) = play([chatter(talk_of(PROBLEMS[0], CHAT, seed="s"), turns=3)], sampler)
    prompt = CHAT.prompt(PROBLEMS[0])
    # Ended by a stop string, by the limit of 8 tokens, by the model itself: only in the last case
    # the end marker is there already.
    ended = said == "3 + 4"
    reply = (*ids("3 + 4"), CHAT.end) if ended else ids("3 + 4!" if "!" in said else "3 + 4, s")
    more = (
        *(() if ended else (CHAT.end,)),
        *ids("\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"),
    )
    assert [ask.tokens for ask in sampler.asks] == [
        prompt,
        prompt + reply + more,
        prompt + (reply + more) * 2,
    ]
    assert episode.tokens == prompt + (reply + more) * 2 + reply
    assert episode.mask == (False,) * len(prompt + reply + more) + (
        (True,) * len(reply) + (False,) * len(more) + (True,) * len(reply)
    )
    assert [turn.logprobs for turn in episode.turns[1::2]] == [
        logprobs_of(reply, ask.seed) for ask in sampler.asks
    ]
    assert [turn.sampled for turn in episode.turns] == [False, True] * 3


def test_a_context_replaces_the_prompt() -> None:
    context = (Turn("prompt", ids("stored")), Turn("attempt", ids("wrong"), (-1.0,) * 5))
    sampler = Scripted(CHAT, by_seed)
    talk = talk_of(Problem("p", "never rendered", None, context=context), CHAT)
    talk.tell("request", "Why?")
    play([chatter(talk, turns=3)], sampler)
    assert sampler.asks[0].tokens[:11] == ids("storedwrong")
    assert "never rendered" not in CHAT.text(sampler.asks[-1].tokens)


def test_what_an_ask_carries() -> None:
    sampler = Scripted(CHAT, lambda text, ask: "0 and so on, at length")
    (episode,) = play([chatter(talk_of(PROBLEMS[1], CHAT, seed="0/x", temperature=0.7))], sampler)
    (ask,) = sampler.asks
    assert (ask.max_tokens, ask.temperature, ask.stop, ask.seed) == (
        8,
        0.7,
        ("!",),
        seed_of("0/x", 1),
    )
    assert episode.turns[1].tokens == ids("0 and so")
    assert episode.finish == "length"
    assert episode.reward == 1.0


def test_end_without_a_verdict_is_not_scored() -> None:
    talk = talk_of(PROBLEMS[0], CHAT)
    assert talk.end(None, first=True).reward is None
    assert talk.end(Verdict(0.0, False)).reward == 0.0


def test_a_reply_that_nobody_sampled() -> None:
    talk = talk_of(PROBLEMS[0], CHAT)
    talk.reply("attempt", "3 + 4", trained=True)
    turn = talk.turns[-1]
    assert (turn.kind, turn.tokens, turn.logprobs, turn.trained) == (
        "attempt",
        (*ids("3 + 4"), CHAT.end),
        None,
        True,
    )


def test_seeds_are_known_numbers_and_all_different() -> None:
    # BLAKE2b-64 of "0/eval/p/0/1", without its last bit: the same on every machine and in every
    # version.
    assert seed_of("0/eval/p/0", 1) == 7606614369628152470
    assert seed_of("0/eval/p/0", "1") == 7606614369628152470
    sampler = Scripted(CHAT, lambda text, ask: "yes")
    play([chatter(talk, turns=4) for talk in talks(3)], sampler)
    seeds = [ask.seed for ask in sampler.asks]
    assert len(seeds) == 15 * 4
    assert len(set(seeds)) == len(seeds), "every turn of every sample has its own"
    assert all(0 <= seed < 2**63 for seed in seeds)
    again = Scripted(CHAT, lambda text, ask: "yes")
    play([chatter(talk, turns=4) for talk in talks(3)], again)
    assert [ask.seed for ask in again.asks] == seeds
