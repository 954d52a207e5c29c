"""Scores of single actions by a recipe's judge (SWiRL, arXiv 2504.04736, section 3): the rewards of
step-wise training, and what filters go by.

Invariant: a score is a function of the action, of what came before it and of the judge; an action
without a score is not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from minirl.episode import Episode, Group
from minirl.judge.endpoint import EndpointSampler
from minirl.judge.judge import Opinion, step_case
from minirl.loop.judges import StepScores, make_step_judge, open_verdicts
from minirl.loop.session import Session
from minirl.methods.swirl.filters import approved
from minirl.methods.swirl.rules import Rules, reader, search_reader
from minirl.methods.swirl.states import actions
from minirl.methods.swirl.stepwise import tags_of
from minirl.recipe import Judge, Train
from minirl.recipe.methods import facts_of
from minirl.tasks.qa import SearchTask

Action = tuple[Episode, int]
"""An episode and the number of one of its turns."""


class StepScorer:
    """Scores actions by a recipe's judge, which is opened at the first call: by then the check of
    the stage's first step has settled the sampler.

    again: ask a second time for what was not answered; a filter needs it, because it never returns
    to a part that is saved. source: another run of the same base weights, whose verdicts are
    reused.
    """

    def __init__(
        self,
        s: Session,
        judge: Judge,
        method: str = "stepwise",
        *,
        again: bool = False,
        source: str | None = None,
    ) -> None:
        self._s = s
        self._judge = judge
        self._method = method
        self._again = again
        self._source = source
        self._scores: StepScores | None = None
        self._sampler: object = None
        self._is_warned = False

    def __call__(self, wanted: Sequence[Action]) -> list[Opinion]:
        """An opinion on each action, given the turns before it."""
        scores = self._scores = self._scores or self._open()
        cases = [
            step_case(e.problem.prompt, e.turns[:turn], e.turns[turn], self._s.chat)
            for e, turn in wanted
        ]
        problems = [e.problem for e, _ in wanted]
        opinions = scores(cases, problems)
        if self._again and any(o.status == "unanswered" for o in opinions):
            opinions = scores(cases, problems)  # only what is still unanswered is asked again
        self._warn(sum(o.status == "unanswered" for o in opinions), len(opinions))
        return opinions

    def _open(self) -> StepScores:
        s, judge = self._s, self._judge
        known = open_verdicts(s.run.folder, s.accelerator.process_index, self._source)
        model = None if judge.kind == "verifier" else s.judges.open(judge, s.player.sampler)
        self._sampler = model and model.sampler
        return make_step_judge(judge, model, make_rules(s, judge, self._method), known)

    def _warn(self, unanswered: int, total: int) -> None:
        """Say once a stage that answers are missing; metrics.jsonl counts them all."""
        if not unanswered or self._is_warned:
            return
        self._is_warned = True
        sampler = self._sampler
        fault = f" ({sampler.last_fault})" if isinstance(sampler, EndpointSampler) else ""
        self._s.progress.say(
            f"WARNING: the judge gave no answer to {unanswered} of {total} steps; they are"
            f" not scored, nor trained{fault}"
        )


def make_rules(s: Session, judge: Judge, method: str) -> Rules:
    """The rules for a method's turns."""
    if facts_of(method).actions == "tags" and isinstance(s.task, SearchTask):
        return Rules(s.task, search_reader(s.task), gold=judge.gold)
    tags = tags_of(s.task, s.recipe.sampling.stepwise)
    return Rules(s.task, reader(tags), gold=judge.gold, steps=tags.steps)


def score_groups(
    s: Session,
    stage: Train,
    groups: Sequence[Group],
    scorer: Callable[[Sequence[Action]], list[Opinion]],
) -> tuple[list[Group], dict[str, float]]:
    """The groups with the judge's scores as rewards: one of each episode, or with `credit: step`
    one of each trained turn.

    Beside them `approved`, the approved share of the scored actions, and `unscored`, how many
    actions got no score.
    """
    assert stage.judge is not None
    episodes = [e for group in groups for e in group.episodes]
    opinions = scorer([(e, turn) for e in episodes for turn in actions(e)])
    scored = [o for o in opinions if o.score is not None]
    good = sum(approved(o, stage.judge.approve_at) for o in scored)
    scores = iter([o.score for o in opinions])
    by_step = stage.credit == "step"
    rewarded = [
        Group(
            group.problem,
            tuple(
                _set_scores(e, [next(scores) for _ in actions(e)], by_step=by_step)
                for e in group.episodes
            ),
        )
        for group in groups
    ]
    counts = s.gather([(good, len(scored), len(opinions))])
    all_good, all_scored, total = (sum(column) for column in zip(*counts, strict=True))
    share = {"approved": all_good / all_scored} if all_scored else {}
    return rewarded, {"unscored": float(total - all_scored)} | share


def _set_scores(episode: Episode, scores: Sequence[float | None], *, by_step: bool) -> Episode:
    if not by_step:
        return replace(episode, reward=scores[0] if scores else None)
    by_turn = dict(zip(actions(episode), scores, strict=True))
    turns = tuple(
        replace(t, trained=by_turn[i] is not None) if i in by_turn else t
        for i, t in enumerate(episode.turns)
    )
    return replace(episode, turns=turns, step_rewards=tuple(scores))
