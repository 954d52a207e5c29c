"""Token weights against numbers computed by hand."""

from __future__ import annotations

import pytest

from minirl.engine.learn.weights import token_weights
from minirl.episode import Episode, Problem, Turn
from minirl.recipe import Learner

PROMPT = Turn("prompt", (1, 2, 3))


def episode(*lengths: int, shown: bool = False) -> Episode:
    """Trained turns of these lengths, with a tool's result of seven tokens after each."""
    turns = [PROMPT]
    for n in lengths:
        turns.append(Turn("attempt", (5,) * n, None if shown else (-1.0,) * n, trained=True))
        turns.append(Turn("result", (6,) * 7))
    return Episode(Problem("p", "?", None), tuple(turns), 1.0)


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("sequence", [1 / 6, 1 / 18, 1 / 12]),  # 3 episodes of 2, 6 and 4 tokens
        ("token", [1 / 12] * 3),  # 2 + 6 + 4 tokens
        ("constant", [1 / 30] * 3),  # 3 * 10
    ],
)
def test_the_three_means(aggregate: str, expected: list[float]) -> None:
    """Catches: results counted as tokens, episodes in place of tokens, a limit that is ignored."""
    learner = Learner.model_validate({"aggregate": aggregate})
    episodes = [episode(2), episode(2, 4), episode(1, 3)]
    assert token_weights(episodes, learner, limit_tokens=10) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("token", [0.25 / 8, 0.25 / 8, 0.75 / 3]),
        ("sequence", [0.25 / (2 * 2), 0.25 / (2 * 6), 0.75 / 3]),
    ],
)
def test_sampled_and_shown_episodes_share_the_loss(aggregate: str, expected: list[float]) -> None:
    """A quarter for 2 + 6 sampled tokens, the rest for 3 shown ones."""
    learner = Learner.model_validate({"loss": "nll", "aggregate": aggregate, "sampled_share": 0.25})
    episodes = [episode(2), episode(2, 4), episode(3, shown=True)]
    assert token_weights(episodes, learner, limit_tokens=10) == pytest.approx(expected)


def test_denominators_are_those_of_all_processes() -> None:
    """The other process has 5 episodes of 20 sampled tokens. Catches: a local denominator."""
    learner = Learner.model_validate({"aggregate": "token"})
    weights = token_weights(
        [episode(4)],
        learner,
        limit_tokens=10,
        total=lambda local: [mine + more for mine, more in zip(local, [5, 20, 0, 0], strict=True)],
    )
    assert weights == [1 / 24]


def test_a_process_without_episodes_has_no_weights() -> None:
    assert token_weights([], Learner(), limit_tokens=10) == []
