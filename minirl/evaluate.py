"""Evaluation: held-out problems, one or two tries each, problem by problem.

Invariant: an evaluation is a function of the weights and the recipe: every episode has a seed of its own problem and sample, the same
at every evaluation of a run, so that two evaluations can be compared in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minirl import recipe
from minirl.chat import Chat
from minirl.episode import Episode, Problem, regroup
from minirl.methods.reflect import reflect
from minirl.methods.single import single
from minirl.rollout import Sampler, Talk, play
from minirl.tasks import Task


def evaluate(
    problems: Sequence[Problem], task: Task, chat: Chat, sampler: Sampler, sampling: recipe.Sampling, node: recipe.Eval, seed: int
) -> tuple[list[dict[str, Any]], list[Episode]]:
    """One row a problem for `Run.log_eval` (see `statistics.summarise`), and the first episode of each.

    With tries 2 a failed first try is followed by a reflection and a second; `second` then counts problems solved within two tries.
    """
    method = reflect if node.tries == 2 else single

    def talk(problem: Problem, sample: int) -> Talk:
        return Talk(problem, chat, sampling, temperature=node.temperature, seed=f"{seed}/eval/{problem.id}/{sample}")

    episodes = play([method(talk(p, k), task) for p in problems for k in range(node.samples)], sampler)
    groups = regroup(episodes, node.samples)
    return [_row(group.episodes, node.tries) for group in groups], [group.episodes[0] for group in groups]


def _row(episodes: Sequence[Episode], tries: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": episodes[0].problem.id,
        "first": [int(bool(e.parts["first"])) for e in episodes],
        "first_error": [e.parts.get("first_error") for e in episodes],
        "tokens": [e.sampled_tokens for e in episodes],
    }
    if tries == 2:
        row["second"] = [int(bool(e.parts["second"])) for e in episodes]
        row["second_error"] = [e.parts.get("second_error") for e in episodes]
    return row
