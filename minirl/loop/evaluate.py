"""Evaluation: held-out problems, one or two tries each, problem by problem.

Invariant: an evaluation is a function of the weights and the recipe. Every episode has a seed of
its own problem and sample, the same at every evaluation of a run, so that two evaluations can be
compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minirl.chat import Chat
from minirl.episode import Episode, Part, Problem, regroup
from minirl.judge.judge import Case, Judge
from minirl.methods import evaluated_by
from minirl.recipe import Eval, Sampling
from minirl.record.measures import SCORES
from minirl.record.statistics import majority
from minirl.rollout import Sampler, Talk, play
from minirl.tasks import Task
from minirl.tasks.qa import SearchTask
from minirl.verify.qa import check_form

Rank = Callable[[Sequence[Sequence[int]]], Sequence[float]]
"""A reward model: the token ids of episodes -> the chance that each is right."""
Row = dict[str, Any]
SETTINGS = ("tries", "samples", "temperature")
"""What two evaluations must share to be compared."""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Plays problems as a recipe's `eval` says, and tells what passed.

    judge: asked about every answer of a question-answering task (part `judged`). rank: the chance
    that a sample is right; the score `reranked` says whether the likeliest sample is, the first of
    equals. With `eval.vote` the score `majority` says whether the answer that most samples give is
    right (see `statistics.majority`).
    """

    task: Task
    chat: Chat
    sampling: Sampling
    eval: Eval
    seed: int
    judge: Judge | None = None
    rank: Rank | None = None

    @property
    def settings(self) -> Row:
        """This evaluation's SETTINGS."""
        return {name: getattr(self.eval, name) for name in SETTINGS}

    def evaluate(
        self, problems: Sequence[Problem], sampler: Sampler
    ) -> tuple[list[Row], list[Episode]]:
        """A row a problem for `Run.log_eval`, and the first episode of each problem.

        With 2 tries a failed first try is followed by a reflection and a second; `second` then
        says whether either passed.
        """
        method, samples = evaluated_by(self.eval, self.task), self.eval.samples
        talks = [self._talk(p, k) for p in problems for k in range(samples)]
        episodes = play([method(talk, self.task) for talk in talks], sampler)
        if self.judge is not None and isinstance(self.task, SearchTask):
            verdicts = self.judge([_case(e, self.task, self.chat) for e in episodes])
            episodes = [
                replace(e, parts={**e.parts, "judged": verdict})
                for e, verdict in zip(episodes, verdicts, strict=True)
            ]
        groups = [group.episodes for group in regroup(episodes, samples)]
        rows = [_row(group, self.eval.tries) for group in groups]
        if self.eval.vote:
            for row, group in zip(rows, groups, strict=True):
                _vote(row, group)
        if self.rank is not None:
            chances = self.rank([e.tokens for e in episodes])
            for n, row in enumerate(rows):
                _rerank(row, chances[n * samples : (n + 1) * samples])
        return rows, [group[0] for group in groups]

    def _talk(self, problem: Problem, sample: int) -> Talk:
        return Talk(
            problem,
            self.chat,
            self.sampling,
            temperature=self.eval.temperature,
            seed=f"{self.seed}/eval/{problem.id}/{sample}",
        )


def _case(episode: Episode, task: SearchTask, chat: Chat) -> Case:
    golds = tuple(episode.problem.answer["golds"])
    if "answer" in episode.parts:  # stepwise and the baselines have read it already
        answer: Any = episode.parts["answer"]
        return Case(episode.problem.prompt, golds, answer)
    said = chat.text([token for turn in episode.turns[1:] for token in turn.tokens])
    return Case(episode.problem.prompt, golds, check_form(said, task.tags).answer)


def _row(episodes: Sequence[Episode], tries: int) -> Row:
    row: Row = {
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


def _vote(row: Row, episodes: Sequence[Episode]) -> None:
    row["answer"] = [
        None if (answer := e.parts.get("answer")) is None else str(answer) for e in episodes
    ]
    row["scores"] = row.get("scores", {}) | {
        "majority": [majority(row["answer"], [bool(passed) for passed in row["first"]])]
    }


def _rerank(row: Row, chances: Sequence[float]) -> None:
    row["p_right"] = [round(chance, 6) for chance in chances]
    row["scores"] = row.get("scores", {}) | {
        "reranked": [float(row["first"][chances.index(max(chances))])]
    }


def _number(value: Part) -> float | None:
    return None if value is None else float(value)
