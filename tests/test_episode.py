"""The nouns: the mask is born with the token, and an episode goes to JSON and back without loss."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl.episode import Episode, Group, Problem, Turn, Verdict, regroup
from minirl.errors import UserError

PROMPT = Turn("prompt", (1, 2, 3))
ATTEMPT = Turn("attempt", (4, 5), (-0.5, -0.25))
REQUEST = Turn("request", (6,))
REFLECTION = Turn("reflection", (7, 8, 9), (-1.0, -2.0, -3.0), trained=True)
RETRY = Turn("retry", (10,), (-4.0,))


def r3_episode(reward: float | None = 1.0) -> Episode:
    """An R3 episode on a stored failure."""
    problem = Problem("p", "make 3", {"numbers": [1, 2], "target": 3}, context=(PROMPT, ATTEMPT))
    return Episode(
        problem,
        (PROMPT, ATTEMPT, REQUEST, REFLECTION, RETRY),
        reward,
        {"first": False, "second": True},
    )


def test_tokens_mask_and_logprobs_are_concatenations_of_one_length() -> None:
    episode = r3_episode()
    assert episode.tokens == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    assert episode.mask == (False,) * 6 + (True,) * 3 + (False,)
    assert episode.logprobs == (0.0, 0.0, 0.0, -0.5, -0.25, 0.0, -1.0, -2.0, -3.0, -4.0)
    assert episode.trained_tokens == 3
    # The attempt was sampled by the collect stage, and counted there.
    assert episode.sampled_tokens == 4
    assert [turn.sampled for turn in episode.turns] == [False, True, False, True, True]


def test_a_turn_is_trained_only_where_it_says_so() -> None:
    # Sampled is not trained, and the mask covers a turn whole: there is no other way to set it than
    # at the turn's birth.
    assert not Turn("attempt", (1, 2), (-1.0, -1.0)).trained
    assert Episode(Problem("p", "", None), (ATTEMPT,)).mask == (False, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ATTEMPT.trained = True  # type: ignore[misc]


@pytest.mark.parametrize("logprobs", [(), (-1.0,), (-1.0, -1.0, -1.0)])
def test_a_turn_needs_a_logprob_a_token(logprobs: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=rf"turn 'attempt': {len(logprobs)} logprobs for 2 tokens"):
        Turn("attempt", (1, 2), logprobs)


def test_context_is_stored_once() -> None:
    row = r3_episode().to_json()
    assert row["problem"]["context"] == 2
    assert len(row["turns"]) == 5
    assert json.dumps(row).count("[4, 5]") == 1
    back = Episode.from_json(row)
    assert back.problem.context[1] is back.turns[1]
    assert back == r3_episode()


TOKENS = st.lists(st.integers(0, 2**31), max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
PARTS = st.dictionaries(
    st.text(max_size=8),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
)


@st.composite
def turns(draw: st.DrawFn) -> Turn:
    tokens = tuple(draw(TOKENS))
    logprob = st.floats(max_value=0.0, allow_nan=False)
    logprobs = tuple(draw(logprob) for _ in tokens) if draw(st.booleans()) else None
    return Turn(draw(st.text(max_size=8)), tokens, logprobs, draw(st.booleans()))


@st.composite
def episodes(draw: st.DrawFn) -> Episode:
    said = tuple(draw(st.lists(turns(), max_size=5)))
    text = st.text(max_size=12)
    problem = Problem(
        draw(text),
        draw(text),
        draw(JSON),
        draw(st.none() | text),
        draw(st.none() | text),
        tuple(draw(st.lists(st.dictionaries(text, JSON, max_size=2), max_size=2))),
        said[: draw(st.integers(0, len(said)))],
    )
    return Episode(
        problem,
        said,
        draw(st.none() | st.floats(allow_nan=False)),
        draw(PARTS),
        draw(st.sampled_from(["stop", "length"])),
    )


@settings(max_examples=150, deadline=None)
@given(episodes())
def test_json_round_trip(episode: Episode) -> None:
    text = json.dumps(episode.to_json())
    assert "\n" not in text  # one row of a JSONL file
    back = Episode.from_json(json.loads(text))
    assert back == episode
    assert len(back.tokens) == len(back.mask) == len(back.logprobs)


def test_not_scored_and_zero_stay_two_things() -> None:
    for reward in (None, 0.0):
        back = Episode.from_json(json.loads(json.dumps(r3_episode(reward).to_json())))
        assert back.reward == reward
        assert (back.reward is None) == (reward is None)


def _with(path: str, value: Any) -> dict[str, Any]:
    row = json.loads(json.dumps(r3_episode().to_json()))
    node, keys = row, path.split(".")
    for key in keys[:-1]:
        node = node[int(key) if isinstance(node, list) else key]
    node[int(keys[-1]) if isinstance(node, list) else keys[-1]] = value
    return row


def _without(key: str) -> dict[str, Any]:
    return {k: v for k, v in r3_episode().to_json().items() if k != key}


MALFORMED: dict[str, Any] = {
    "a list": [1, 2],
    "text": "episode",
    "nothing": {},
    "null": None,
    **{f"no {key}": _without(key) for key in ("problem", "turns", "reward", "parts", "finish")},
    "turns are text": _with("turns", "12"),
    "a turn is null": _with("turns.0", None),
    "a turn without kind": _with("turns.0", {"tokens": [], "logprobs": None, "trained": False}),
    "tokens are text": _with("turns.0.tokens", "12"),
    "a token is text": _with("turns.0.tokens", ["1", 2, 3]),
    "a token is half": _with("turns.0.tokens", [1.5, 2, 3]),
    "a token is true": _with("turns.0.tokens", [True, 2, 3]),
    "a token is infinite": _with("turns.0.tokens", [float("inf")]),
    "too few logprobs": _with("turns.3.logprobs", [-1.0]),
    "a logprob is text": _with("turns.3.logprobs", ["low", -1.0, -1.0]),
    "trained is text": _with("turns.3.trained", "false"),
    "trained is a number": _with("turns.3.trained", 1),
    "a longer context than the episode": _with("problem.context", 6),
    "a negative context": _with("problem.context", -1),
    "a context of turns": _with("problem.context", []),
    "an unknown field of the problem": _with("problem.colour", "red"),
    "the problem is null": _with("problem", None),
    "tools are text": _with("problem.tools", "calculator"),
    "the reward is a word": _with("reward", "good"),
    "the reward is beyond floating point": _with("reward", 10**400),
    "parts are a number": _with("parts", 3),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_is_named(name: str) -> None:
    with pytest.raises(UserError) as caught:
        Episode.from_json(MALFORMED[name], where="runs/a/kept-0.jsonl, line 7")
    said = str(caught.value)
    assert said.startswith("runs/a/kept-0.jsonl, line 7: not an episode (")
    assert said.endswith("delete the row or collect again")
    assert "\n" not in said


@settings(max_examples=200, deadline=None)
@given(episodes(), st.randoms(use_true_random=False), JSON)
def test_a_spoilt_row_is_an_episode_or_a_user_error(
    episode: Episode, rng: random.Random, value: Any
) -> None:
    row = json.loads(json.dumps(episode.to_json()))
    node: Any = row
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if rng.random() < 0.4 or not node[key] or not isinstance(node[key], dict | list):
            node[key] = value
            break
        node = node[key]
    try:
        back = Episode.from_json(row)
    except UserError:
        return
    assert len(back.tokens) == len(back.mask) == len(back.logprobs)
    assert back.problem.context == back.turns[: len(back.problem.context)]


def test_regroup() -> None:
    a, b = Problem("a", "", None), Problem("b", "", None)
    four = [Episode(p, (), float(i)) for i, p in enumerate((a, a, b, b))]
    assert regroup(four, 2) == [Group(a, tuple(four[:2])), Group(b, tuple(four[2:]))]
    assert [group.rewards for group in regroup(four, 2)] == [(0.0, 1.0), (2.0, 3.0)]
    assert regroup([], 2) == []


@pytest.mark.parametrize(
    ("ids", "size"), [("abab", 2), ("aab", 2), ("aaab", 4), ("aaa", 2), ("ab", 2)]
)
def test_regroup_refuses_mixed_and_broken_groups(ids: str, size: int) -> None:
    problems = {name: Problem(name, "", None) for name in "ab"}
    with pytest.raises(ValueError, match=f"expected runs of {size} episodes of one problem"):
        regroup([Episode(problems[name], ()) for name in ids], size)


def test_regroup_tells_equal_prompts_of_two_failures_apart() -> None:
    # Two stored failures of one problem are two groups, whatever their text: a group is an object,
    # never found by comparing.
    first, second = (Problem("a", "same", None, context=(PROMPT, ATTEMPT)) for _ in range(2))
    with pytest.raises(ValueError, match="of one problem"):
        regroup([Episode(first, (PROMPT, ATTEMPT)), Episode(second, (PROMPT, ATTEMPT))], 2)


def test_show() -> None:
    words = dict(enumerate(["·", "make", "three", "!", "1", "+", "why", "not", "add", "3", "2"]))
    assert (
        r3_episode(0.5).show(lambda ids: " ".join(words[i] for i in ids))
        == "[prompt] make three !\n"
        "[attempt] 1 +\n"
        "[request] why\n"
        "[reflection] ⟦not add 3⟧\n"
        "[retry] 2\n"
        'reward 0.5  {"first": false, "second": true}  finish stop'
    )


def test_a_verdict_keeps_score_and_passed_apart() -> None:
    assert Verdict(0.1, False, {"error_kind": "missed_target"}).passed is False
    assert Verdict(1.0, True).parts == {}
