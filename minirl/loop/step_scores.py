"""Actions scored one by one by a recipe's judge (SWiRL, arXiv 2504.04736, section 3): for step-wise
rewards, and for filters.

Invariant: a score is a function of the action, of what came before it and of the judge; what has
none is not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from minirl import recipe
from minirl.episode import Episode, Group
from minirl.judge.endpoint import EndpointSampler
from minirl.judge.judge import Opinion, StepCase, step_case
from minirl.judge.verdicts import Verdicts
from minirl.loop.judges import StepScores, step_judge, verdicts_of
from minirl.loop.session import Session
from minirl.methods.swirl.filters import approved
from minirl.methods.swirl.rules import Rules, reader, search_reader
from minirl.methods.swirl.states import actions
from minirl.methods.swirl.stepwise import tags_of
from minirl.recipe.methods import facts_of
from minirl.tasks.qa import SearchTask


class StepScorer:
    """Scores actions by a recipe's judge, opened when it is first asked: by then the first step's
    check has settled the sampler.

    again: ask once more for what was not answered, for the position moves on for good once a
    filter's part is saved. source: another run of the same base weights, whose verdicts are taken
    over.
    """

    def __init__(
        self,
        s: Session,
        node: recipe.Judge,
        method: str = "stepwise",
        *,
        again: bool = False,
        source: str | None = None,
    ) -> None:
        self._s = s
        self._node = node
        self._method = method
        self._again = again
        self._source = source
        self._opened: StepScores | None = None
        self._known: Verdicts | None = None
        self._warned = False
        self._sampler: object = None

    def __call__(self, wanted: Sequence[tuple[Episode, int]]) -> list[Opinion]:
        """An opinion on each (episode, number of the turn), given the turns before it."""
        if self._opened is None:
            self._open()
        assert self._opened is not None
        cases, problems = (
            [self._case(episode, turn) for episode, turn in wanted],
            [episode.problem for episode, _ in wanted],
        )
        opinions = self._opened(cases, problems)
        if self._again and any(o.came == "unanswered" for o in opinions):
            opinions = self._opened(
                cases, problems
            )  # what was answered is known, and not asked for again
        if (failed := sum(o.came == "unanswered" for o in opinions)) and not self._warned:
            self._warned = True  # once a stage; metrics.jsonl counts them all
            said = (
                f"WARNING: the judge gave no answer to {failed} of {len(opinions)} steps; they are"
                " not scored, nor trained"
            )
            self._s.progress.say(
                f"{said} ({self._sampler.last_fault})"
                if isinstance(self._sampler, EndpointSampler)
                else said
            )
        return opinions

    def _open(self) -> None:
        s, node = self._s, self._node
        self._known = verdicts_of(s.run.folder, s.accelerator.process_index, self._source)
        voice = None if node.kind == "verifier" else s.voices.open(node, s.sampler)
        self._sampler = None if voice is None else voice.sampler
        self._opened = step_judge(node, voice, rules_of(s, node, self._method), self._known)

    def _case(self, episode: Episode, turn: int) -> StepCase:
        return step_case(
            episode.problem.prompt, episode.turns[:turn], episode.turns[turn], self._s.chat
        )


def rules_of(s: Session, node: recipe.Judge, method: str) -> Rules:
    """The rules for a method's turns."""
    if facts_of(method).actions == "tags" and isinstance(s.task, SearchTask):
        return Rules(s.task, search_reader(s.task), gold=node.gold)
    tags = tags_of(s.task, s.recipe.sampling.stepwise)
    return Rules(s.task, reader(tags), gold=node.gold, steps=tags.steps)


def rewarded(
    s: Session, stage: recipe.Train, groups: Sequence[Group], score: StepScorer
) -> tuple[list[Group], dict[str, float]]:
    """The groups with the judge's scores as rewards: of method step the episode's, else one for
    each trained turn.

    What was not scored is not trained. Beside them `approved`, the share of the scored actions that
    the judge approves, and `unscored`, how many actions it gave no score.
    """
    episodes = [e for group in groups for e in group.episodes]
    wanted = [(e, turn) for e in episodes for turn in actions(e)]
    opinions = score(wanted)
    assert stage.judge is not None
    scored = [o for o in opinions if o.score is not None]
    good = sum(approved(o, stage.judge.approve_at) for o in scored)
    given = iter(opinions)
    told = [
        _with_scores(e, [next(given).score for _ in actions(e)], by_step=stage.credit == "step")
        for e in episodes
    ]
    out, at = [], 0
    for group in groups:
        out.append(Group(group.problem, tuple(told[at : at + len(group.episodes)])))
        at += len(group.episodes)
    counts = s.gather([(good, len(scored), len(opinions))])
    good, seen, total = (sum(column) for column in zip(*counts, strict=True))
    return out, {"unscored": float(total - seen)} | ({"approved": good / seen} if seen else {})


def _with_scores(episode: Episode, scores: Sequence[float | None], *, by_step: bool) -> Episode:
    if not by_step:
        return replace(episode, reward=scores[0] if scores else None)
    given = dict(zip(actions(episode), scores, strict=True))
    turns = tuple(
        replace(t, trained=given[i] is not None) if i in given else t
        for i, t in enumerate(episode.turns)
    )
    return replace(episode, turns=turns, step_rewards=tuple(scores))
