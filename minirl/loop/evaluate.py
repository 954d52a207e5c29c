"""Evaluation: held-out problems, one or two tries each, problem by problem.

Invariant: an evaluation is a function of the weights and the recipe: every episode has a seed of
its own problem and sample, the same at every evaluation of a run, so that two evaluations can be
compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from minirl import recipe
from minirl.chat import Chat
from minirl.episode import Episode, Part, Problem, regroup
from minirl.judge.judge import Case, Judge
from minirl.methods import evaluated_by
from minirl.record.measures import SCORES
from minirl.record.statistics import majority
from minirl.rollout import Sampler, Talk, play
from minirl.tasks import Task
from minirl.tasks.qa import SearchTask
from minirl.verify.qa import check_form

Rank = Callable[[Sequence[Sequence[int]]], Sequence[float]]
"""A reward model: the token ids of episodes -> the chance that each is right."""


def evaluate(
    problems: Sequence[Problem],
    task: Task,
    chat: Chat,
    sampler: Sampler,
    sampling: recipe.Sampling,
    node: recipe.Eval,
    seed: int,
    judge: Judge | None = None,
    rank: Rank | None = None,
) -> tuple[list[dict[str, Any]], list[Episode]]:
    """One row a problem for `Run.log_eval` (see `evals.summarise`), and the first episode of
    each.

    judge: asked about every answer of a question-answering task, once all are there (part
    `judged`). rank: how likely each sample is right; with it the score `reranked` says whether the
    sample that it puts first is (the earlier one of equals). With `node.vote` the score `majority`
    says whether the answer that most samples give is right (see `statistics.majority`). With tries
    2 a failed first try is followed by a reflection and a second; `second` then counts problems
    solved within two tries.
    """
    method = evaluated_by(node, task)

    def talk(problem: Problem, sample: int) -> Talk:
        return Talk(
            problem,
            chat,
            sampling,
            temperature=node.temperature,
            seed=f"{seed}/eval/{problem.id}/{sample}",
        )

    episodes = play(
        [method(talk(p, k), task) for p in problems for k in range(node.samples)], sampler
    )
    if judge is not None and isinstance(task, SearchTask):
        verdicts = judge([_case(episode, task, chat) for episode in episodes])
        episodes = [
            replace(e, parts={**e.parts, "judged": v})
            for e, v in zip(episodes, verdicts, strict=True)
        ]
    groups = regroup(episodes, node.samples)
    rows = [_row(group.episodes, node.tries) for group in groups]
    for row, group in zip(rows, groups, strict=True):
        if node.vote:
            _vote(row, group.episodes)
    if rank is not None:
        chances = rank([episode.tokens for episode in episodes])
        for number, row in enumerate(rows):
            _rerank(row, chances[number * node.samples : (number + 1) * node.samples])
    return rows, [group.episodes[0] for group in groups]


def _case(episode: Episode, task: SearchTask, chat: Chat) -> Case:
    golds = tuple(episode.problem.answer["golds"])
    if "answer" in episode.parts:  # stepwise and the baselines have read it already
        return Case(episode.problem.prompt, golds, episode.parts["answer"])  # type: ignore[arg-type]
    said = chat.text([token for turn in episode.turns[1:] for token in turn.tokens])
    return Case(episode.problem.prompt, golds, check_form(said, task.tags).answer)


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
    scores = {name: [_number(e.parts.get(name)) for e in episodes] for name in SCORES}
    known = {
        name: values
        for name, values in scores.items()
        if any(value is not None for value in values)
    }
    return row | ({"scores": known} if known else {})


def _vote(row: dict[str, Any], episodes: Sequence[Episode]) -> None:
    row["answer"] = [
        None if (answer := e.parts.get("answer")) is None else str(answer) for e in episodes
    ]
    row["scores"] = row.get("scores", {}) | {
        "majority": [majority(row["answer"], [bool(passed) for passed in row["first"]])]
    }


def _rerank(row: dict[str, Any], chances: Sequence[float]) -> None:
    row["p_right"] = [round(chance, 6) for chance in chances]
    row["scores"] = row.get("scores", {}) | {
        "reranked": [float(row["first"][chances.index(max(chances))])]
    }


def _number(value: Part) -> float | None:
    return None if value is None else float(value)
