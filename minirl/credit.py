"""Credit: rewards become advantages. Pure functions on plain numbers.

Invariant: a reward of None is "not scored" and gets the advantage None; a group whose scored rewards are all equal gets exactly 0.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from minirl.episode import Group
from minirl.recipe import Learner

EPSILON = 1e-6  # added to the standard deviation, as in the ReSearch code


def advantages(group: Group, learner: Learner) -> list[float | None]:
    """One advantage an episode, shared by all its trained tokens; None for an episode that no loss may touch.

    baseline `mean` and scale `std` are GRPO (arXiv 2402.03300, eq. 3), `leave_one_out` is RLOO (arXiv 2402.14740, eq. 8). The standard
    deviation is the sample's (n - 1). Under loss `nll` every episode counts 1: its likelihood is raised whatever its reward.
    """
    usable = [e.trained_tokens > 0 and not (learner.drop_overlong and e.finish == "length") for e in group.episodes]
    if learner.loss == "nll":
        return [1.0 if use else None for use in usable]
    scored = [reward for reward in group.rewards if reward is not None]
    values = iter(_center_and_scale(scored, learner))
    shaped = [None if reward is None else next(values) for reward in group.rewards]
    return [value if use else None for value, use in zip(shaped, usable, strict=True)]


def is_dead(values: Sequence[float | None]) -> bool:
    """Whether a group teaches nothing: no advantage differs from zero. Such groups cost no forward pass."""
    return not any(values)


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
