"""Methods: what is asked, in which order, and exactly which tokens are trained (invariant 2 on the
play side)."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from scripted import Scripted, talk_of
from tiny import byte_tokenizer

from minirl import recipe
from minirl.chat import Chat
from minirl.episode import Ask, Episode, Problem, Verdict
from minirl.errors import UserError
from minirl.methods import FUNCTIONS, method_of
from minirl.methods.demonstrate import as_sampled, demonstrate
from minirl.methods.reflect import REFLECT, RETRY, failed, reflect
from minirl.methods.self_train import self_train
from minirl.methods.single import single
from minirl.rollout import Talk, play
from minirl.tasks import Demonstration, Task

CHAT = Chat(byte_tokenizer())
PROBLEM = Problem("p", "Two and two?", "4", system="Count.")
RIGHT, WRONG, THOUGHT = "It is 4.", "It is 5.", "Count again."


def verify(problem: Problem, text: str) -> Verdict:
    passed = problem.answer in text
    return Verdict(
        1.0 if passed else 0.25, passed, {"error_kind": None if passed else "miscounted"}
    )


def shown(problem: Problem, rng: Random) -> Demonstration:
    return Demonstration(RIGHT, f"{WRONG}{rng.randrange(10)}", THOUGHT)


TASK = Task("sums", (PROBLEM,), (), verify, stop=(".",), demonstrate=shown)


def sampler_of(first: str, second: str = "") -> Scripted:
    """Answers the first try, the request to reflect and the second try."""

    def script(text: str, ask: Ask) -> str:
        return (
            THOUGHT
            if text.rstrip().endswith(f"{REFLECT}<|im_end|>\n<|im_start|>assistant")
            else second
            if RETRY in text
            else first
        )

    return Scripted(CHAT, script)


def played(
    method: Callable[[Talk, Task], object],
    sampler: Scripted,
    problem: Problem = PROBLEM,
    **options: str,
) -> Episode:
    (episode,) = play([method(talk_of(problem, CHAT, **options), TASK)], sampler)  # type: ignore[list-item, arg-type]
    assert len(episode.tokens) == len(episode.mask) == len(episode.logprobs)
    for turn in episode.turns:
        # Only what was sampled has log-probabilities, and only what the model wrote is ever
        # trained.
        assert turn.sampled == (turn.kind in ("attempt", "reflection", "retry"))
        assert turn.sampled or not turn.trained
    return episode


def kinds(episode: Episode) -> list[str]:
    return [turn.kind for turn in episode.turns]


def trained_text(episode: Episode) -> str:
    """The text of the trained tokens, read off the mask alone."""
    return CHAT.text(
        [token for token, trained in zip(episode.tokens, episode.mask, strict=True) if trained],
        special=True,
    )


@pytest.mark.parametrize(
    ("answer", "reward", "error"), [(RIGHT, 1.0, None), (WRONG, 0.25, "miscounted")]
)
def test_single(answer: str, reward: float, error: str | None) -> None:
    sampler = sampler_of(answer)
    episode = played(single, sampler)
    assert kinds(episode) == ["prompt", "attempt"]
    assert trained_text(episode) == answer
    assert (episode.reward, episode.parts) == (
        reward,
        {"first": error is None, "first_error": error},
    )
    assert [(ask.max_tokens, ask.stop) for ask in sampler.asks] == [(200, (".",))]


def test_reflect_on_line_trains_the_reflection_alone() -> None:
    sampler = sampler_of(WRONG, RIGHT)
    episode = played(reflect, sampler)
    assert kinds(episode) == ["prompt", "attempt", "request", "reflection", "request", "retry"]
    assert trained_text(episode) == f"{THOUGHT}<|im_end|>"
    assert episode.trained_tokens == len(episode.turns[3].tokens) == len(THOUGHT) + 1
    assert episode.mask.index(True) == sum(len(turn.tokens) for turn in episode.turns[:3])
    assert episode.reward == 1.0
    assert episode.parts == {
        "first": False,
        "second": True,
        "second_error": None,
        "first_error": "miscounted",
    }
    # Attempt and retry end as the task says; a reflection ends where the model ends it.
    assert [ask.stop for ask in sampler.asks] == [(".",), (), (".",)]


def test_the_retry_earns_the_reward() -> None:
    episode = played(reflect, sampler_of(WRONG, WRONG))
    assert episode.reward == 0.25
    assert episode.parts == {
        "first": False,
        "second": False,
        "second_error": "miscounted",
        "first_error": "miscounted",
    }


def test_right_first_try_is_not_scored_and_reflects_on_nothing() -> None:
    episode = played(reflect, sampler_of(RIGHT))
    assert kinds(episode) == ["prompt", "attempt"]
    assert episode.reward is None
    assert episode.trained_tokens == 0
    assert episode.parts == {"first": True, "second": True, "first_error": None}


@pytest.mark.parametrize("second", [RIGHT, WRONG])
def test_reflect_on_a_stored_failure(second: str) -> None:
    attempt = played(single, sampler_of(WRONG))
    problem = failed(PROBLEM, attempt.turns)
    sampler = sampler_of("never asked", second)
    episode = played(reflect, sampler, problem)
    assert len(sampler.asks) == 2
    assert sampler.asks[0].tokens[: len(attempt.tokens)] == attempt.tokens, (
        "the stored ids go in as they came out"
    )
    assert episode.problem is problem
    assert episode.turns[:2] == problem.context
    assert trained_text(episode) == f"{THOUGHT}<|im_end|>", (
        "the attempt was trained when it was collected, and is not now"
    )
    assert episode.parts == {
        "first": False,
        "second": second == RIGHT,
        "second_error": None if second == RIGHT else "miscounted",
    }
    assert episode.sampled_tokens == len(THOUGHT) + 1 + len(second), (
        "the attempt was counted when it was collected"
    )


def test_failed_keeps_the_problem_and_trains_none_of_its_context() -> None:
    attempt = played(single, sampler_of(WRONG))
    assert any(turn.trained for turn in attempt.turns)
    problem = failed(PROBLEM, attempt.turns)
    assert [turn.trained for turn in problem.context] == [False, False]
    assert [(t.kind, t.tokens, t.logprobs) for t in problem.context] == [
        (t.kind, t.tokens, t.logprobs) for t in attempt.turns
    ]
    assert (problem.id, problem.prompt, problem.answer, problem.system) == (
        "p",
        "Two and two?",
        "4",
        "Count.",
    )


def test_train_all_trains_the_retry_too() -> None:
    stage = recipe.Train(kind="train", method="reflect", steps=1, train_all=True)
    episode = played(method_of(stage), sampler_of(WRONG, RIGHT))
    assert trained_text(episode) == f"{THOUGHT}<|im_end|>{RIGHT}"


def test_a_reflection_has_its_own_limit() -> None:
    sampler = sampler_of(WRONG, RIGHT)
    talk = Talk(
        PROBLEM,
        CHAT,
        recipe.Sampling(attempt_tokens=30, reflection_tokens=5),
        temperature=1.0,
        seed="0",
    )
    (episode,) = play([reflect(talk, TASK)], sampler)
    assert [ask.max_tokens for ask in sampler.asks] == [30, 5, 30]
    assert trained_text(episode) == THOUGHT[:5]
    # The reflection was cut: it is closed before the next request, by a token that is not trained.
    assert episode.turns[4].tokens[0] == CHAT.end
    # Overlong filtering goes by the trained turn: the retry, which was not cut, does not hide it.
    assert episode.finish == "length"


DEMONSTRATED = {
    0.0: (["prompt", "attempt"], f"{RIGHT}<|im_end|>"),
    1.0: (
        ["prompt", "attempt", "request", "reflection", "request", "retry"],
        f"{THOUGHT}<|im_end|>{RIGHT}<|im_end|>",
    ),
}


@pytest.mark.parametrize("share", DEMONSTRATED)
def test_demonstrate(share: float) -> None:
    sampler = sampler_of("never asked")
    stage = recipe.Train.model_validate(
        {
            "kind": "train",
            "method": "demonstrate",
            "steps": 1,
            "reflections": share,
            "learner": {"loss": "nll"},
        }
    )
    (episode,) = play([method_of(stage)(talk_of(PROBLEM, CHAT), TASK)], sampler)
    assert sampler.asks == []
    assert kinds(episode) == DEMONSTRATED[share][0]
    assert trained_text(episode) == DEMONSTRATED[share][1]
    assert episode.reward is None
    assert episode.sampled_tokens == 0
    if share:
        assert CHAT.text(episode.turns[1].tokens).startswith(WRONG)


def test_demonstrate_shows_reflections_in_the_share_that_is_asked_for() -> None:
    talks = [talk_of(PROBLEM, CHAT, seed=str(seed)) for seed in range(300)]
    episodes = play(
        [demonstrate(talk, TASK, reflections=0.3) for talk in talks], sampler_of("never asked")
    )
    reflections = sum("reflection" in kinds(e) for e in episodes)
    assert 70 <= reflections <= 110, "0.3 of 300, within 2.5 standard deviations"
    again = play(
        [
            demonstrate(talk_of(PROBLEM, CHAT, seed=str(seed)), TASK, reflections=0.3)
            for seed in range(300)
        ],
        sampler_of("never asked"),
    )
    assert again == episodes


def test_demonstrations_and_sampled_episodes_have_one_shape() -> None:
    # What SFT shows is what the model will later be asked, token by token, in the same
    # conversation.
    sampled = played(reflect, sampler_of(WRONG, RIGHT))
    (demonstrated,) = play(
        [demonstrate(talk_of(PROBLEM, CHAT), TASK, reflections=1.0)], sampler_of("never asked")
    )
    assert kinds(sampled) == kinds(demonstrated)
    assert sampled.turns[0] == demonstrated.turns[0]
    assert sampled.turns[4].tokens == demonstrated.turns[4].tokens


def test_a_kept_sample_is_shown_id_by_id() -> None:
    # Ids that the tokenizer would not give for this text: encoded again they would be others.
    sampled = played(single, sampler_of("It is 4 now. Well"))
    problem = as_sampled(sampled)
    sampler = sampler_of("never asked")
    (episode,) = play([demonstrate(talk_of(problem, CHAT), TASK)], sampler)
    assert sampler.asks == []
    assert (episode.tokens, episode.mask) == (sampled.tokens, sampled.mask)
    assert trained_text(episode) == "It is 4 now."
    assert episode.reward is None
    # The log-probabilities are those of other weights, and its tokens were counted when they were
    # sampled.
    assert not any(turn.sampled for turn in episode.turns)
    assert episode.sampled_tokens == 0
    assert (problem.id, problem.answer) == (PROBLEM.id, PROBLEM.answer)


@pytest.mark.parametrize("answer", [RIGHT, WRONG])
def test_self_train_trains_right_attempts_alone(answer: str) -> None:
    episode, attempt = played(self_train, sampler_of(answer)), played(single, sampler_of(answer))
    assert (episode.tokens, episode.reward, episode.parts) == (
        attempt.tokens,
        attempt.reward,
        attempt.parts,
    )
    assert trained_text(episode) == (RIGHT if answer == RIGHT else "")
    assert all(turn.sampled for turn in episode.turns[1:])


def test_self_train_does_not_train_what_was_cut() -> None:
    """Catches: a right answer that goes on to the token limit teaches never to end."""
    episode = played(self_train, sampler_of(RIGHT.removesuffix(".") + " and" * 300))
    assert (episode.finish, episode.parts["first"]) == ("length", True)
    assert trained_text(episode) == ""


def test_a_task_without_gold_solutions_cannot_demonstrate() -> None:
    with pytest.raises(UserError, match="task 'sums' has no demonstrations"):
        play(
            [demonstrate(talk_of(PROBLEM, CHAT), Task("sums", (), (), verify))],
            sampler_of("never asked"),
        )


def test_each_method_of_the_table_has_its_function() -> None:
    assert list(FUNCTIONS) == list(recipe.METHODS)


def test_the_options_of_a_method_are_keys_of_a_train_stage() -> None:
    options = [name for facts in recipe.METHODS.values() for name in facts.options]
    assert set(options) <= set(recipe.Train.model_fields)


def test_method_of_names_the_method() -> None:
    assert method_of(recipe.Collect(kind="collect")) is single
    assert method_of(recipe.Train(kind="train", method="single", steps=1)) is single
