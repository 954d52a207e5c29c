"""Credit: from rewards to advantages, by pure functions on plain numbers.

Invariant: a reward of None is "not scored" and gets the advantage None; a group whose scored
rewards are all equal gets exactly 0.0, unless it has no baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

from minirl.episode import Group
from minirl.recipe import Learner

EPSILON = 1e-6  # added to the standard deviation, as in the ReSearch code
Total = Callable[[list[float]], list[float]]
"""Adds up each number of a list over all processes."""
Credit = float | tuple[float, ...]
"""The advantage of an episode, or those of its trained turns."""


def advantages(group: Group, learner: Learner) -> Sequence[Credit | None]:
    """One advantage an episode, shared by all its trained tokens; None for an episode that no loss
    may touch.

    baseline `mean` and scale `std` are GRPO (arXiv 2402.03300, eq. 3), `leave_one_out` is RLOO
    (arXiv 2402.14740, eq. 8). The standard deviation is the sample's (n - 1). Under loss `nll`
    every episode counts 1, whatever its reward. Under `ppo` every scored episode counts 1 too: it
    takes part, and each of its tokens gets an advantage of its own (see ppo.py).

    Credit by step (episodes with `step_rewards`) gives one advantage a trained turn. A turn's
    reward is the judge's opinion of that action alone, given all before it: nothing flows back from
    later turns or from the outcome (SWiRL's objective, arXiv 2504.04736, on line). Baseline and
    scale are taken over all scored turns of the group, whichever step they are: turns after the
    first stand in states of their own, of which there is but one sample.
    """
    usable = [
        e.trained_tokens > 0
        and not (learner.drop_overlong and e.finish == "length")
        and not (learner.loss == "ppo" and e.reward is None)
        for e in group.episodes
    ]
    if learner.loss in ("nll", "ppo"):
        return [1.0 if use else None for use in usable]
    if any(e.step_rewards is not None for e in group.episodes):
        return _by_step(group, learner, usable)
    scored = [reward for reward in group.rewards if reward is not None]
    values = iter(_center_and_scale(scored, learner))
    shaped = [None if reward is None else next(values) for reward in group.rewards]
    return [value if use else None for value, use in zip(shaped, usable, strict=True)]


def is_dead(values: Sequence[Credit | None]) -> bool:
    """Whether a group teaches nothing: no advantage differs from zero."""
    return not any(any(value) if isinstance(value, tuple) else value for value in values)


def _by_step(group: Group, learner: Learner, usable: Sequence[bool]) -> list[Credit | None]:
    """One advantage for each trained turn of each episode; None if none of them was scored."""
    rewards = [[r for r in e.step_rewards or () if r is not None] for e in group.episodes]
    for episode, scored in zip(group.episodes, rewards, strict=True):
        if len(scored) != sum(turn.trained for turn in episode.turns):
            raise ValueError(
                f"episode of {episode.problem.id}: {len(scored)} scored steps, expected one for"
                " each trained turn"
            )
    values = iter(_center_and_scale([r for scored in rewards for r in scored], learner))
    shaped = [tuple(next(values) for _ in scored) for scored in rewards]
    return [value if use and value else None for value, use in zip(shaped, usable, strict=True)]


def token_rewards(
    score: float, logprobs: Sequence[float], reference: Sequence[float], beta: float
) -> list[float]:
    """The reward of each trained token of one episode: the penalty -beta * (logprob - reference),
    and at the last token the score too.

    logprobs and reference: the sampler's and the reference policy's, of the trained tokens alone
    (ReFT, arXiv 2401.08967, section 3.2).
    """
    pairs = zip(logprobs, reference, strict=True)
    penalties = [-beta * (logprob - anchor) for logprob, anchor in pairs]
    return [*penalties[:-1], penalties[-1] + score]


def gae(
    rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Advantages and returns of one episode's trained tokens (generalised advantage estimation,
    arXiv 1506.02438, eq. 16).

    Tokens between two trained turns are skipped: the last token of a turn is followed by the first
    of the next. After the last of all the episode is over and worth 0. A return is an advantage
    plus the value; with lambda 1 it is the sum of the rewards from there on.
    """
    advantages = [0.0] * len(rewards)
    following, after = 0.0, 0.0  # the next token's advantage and value
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * after - values[t] + gamma * lam * following
        advantages[t], after = following, values[t]
    return advantages, [a + value for a, value in zip(advantages, values, strict=True)]


def moments(values: Sequence[float], total: Total = list) -> tuple[float, float]:
    """Mean and population variance of all processes' values; zeros if there are none."""
    count, added = total([float(len(values)), sum(values)])
    mean = added / count if count else 0.0
    (squares,) = total([sum((value - mean) * (value - mean) for value in values)])
    return mean, squares / count if count else 0.0


def whiten(values: Sequence[float], total: Total = list) -> list[float]:
    """Values less their mean, over their population standard deviation, both of all processes."""
    mean, variance = moments(values, total)
    return [(value - mean) / (sqrt(variance) + EPSILON) for value in values]


def explained_variance(
    values: Sequence[float], returns: Sequence[float], total: Total = list
) -> float:
    """1 - Var(returns - values) / Var(returns): 1 if the values foretell every return, 0 if a
    constant would do as well or all returns are equal."""
    left = moments([r - v for r, v in zip(returns, values, strict=True)], total)[1]
    whole = moments(returns, total)[1]
    return 1.0 - left / whole if whole else 0.0


def _center_and_scale(rewards: Sequence[float], learner: Learner) -> list[float]:
    if learner.baseline == "none":
        return list(rewards)
    count = len(rewards)
    if count < 2 or max(rewards) == min(rewards):
        return [0.0] * count
    mean = sum(rewards) / count
    if learner.baseline == "leave_one_out":
        centered = [reward - (sum(rewards) - reward) / (count - 1) for reward in rewards]
    else:
        centered = [reward - mean for reward in rewards]
    if learner.scale == "none":
        return centered
    std = sqrt(sum((reward - mean) ** 2 for reward in rewards) / (count - 1))
    return [value / (std + EPSILON) for value in centered]
