"""The filter stage of SWiRL (arXiv 2504.04736): judge trajectories part by part, keep those that
pass.

Invariant: what is kept and logged is a function of the recipe, the weights and the verdicts. Which
verdicts were known beforehand shows in no file but verdicts.jsonl, so a run that was killed while
judging ends in the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from minirl.episode import Episode
from minirl.judge.judge import Case, Judge, Opinion
from minirl.loop.judges import make_answer_judge, open_verdicts
from minirl.loop.log import log_step
from minirl.loop.session import Session
from minirl.loop.source import read_trajectories
from minirl.loop.step_scores import StepScorer
from minirl.methods.swirl.filters import Judged, approved, marked, passes, tally
from minirl.methods.swirl.states import actions
from minirl.recipe import Filter
from minirl.recipe import Judge as JudgeRecipe
from minirl.record.report.filters import describe_filter
from minirl.record.state import Position


def filter_stage(s: Session, index: int, stage: Filter) -> None:
    """Judge the parts that are still to do; every part is saved before the next begins."""
    episodes, parts = read_trajectories(s, index, stage), stage.parts
    s.progress.stage(f"{index} filter {stage.keep}", parts, s.run.position.step)
    judge = TrajectoryJudge(s, stage)
    limit = stage.judge.approve_at if stage.judge is not None else 0.5
    for part in range(s.run.position.step, parts):
        began = time.monotonic()
        start, end = (len(episodes) * n // parts for n in (part, part + 1))
        judged: list[Judged] = s.gather(judge(s.share(episodes[start:end])))
        s.run.keep(index, [marked(j, limit) for j in judged if passes(j, stage.keep, limit)])
        row = {"stage": index, "step": part} | tally(judged, stage.keep, limit)
        log_step(s, row, {"judge_s": time.monotonic() - began})
        is_last = part + 1 == parts
        s.run.advance(Position(index + 1, 0) if is_last else Position(index, part + 1))
        s.stop_if_asked()
    s.accelerator.wait_for_everyone()  # the next stage reads what the main process has just written
    rows = [row for row in s.run.rows("metrics") if row["stage"] == index]
    for line in describe_filter(rows, asked=stage.judge is not None):
        s.progress.say(f"filter {stage.keep}: {line}")


class TrajectoryJudge:
    """Judges whole trajectories: each step by the stage's judge and, to compare, by the rules; the
    outcome by the task's verifier or by the judge."""

    def __init__(self, s: Session, stage: Filter) -> None:
        judge = stage.judge
        self._steps = self._rules = None
        self._answers: Judge | None = None
        if judge is None:
            return
        self._steps = StepScorer(s, judge, again=True, source=stage.source)
        if judge.kind != "verifier":
            self._rules = StepScorer(s, JudgeRecipe.model_validate({"kind": "verifier"}))
        if stage.outcome == "judge":
            known = open_verdicts(s.run.folder, s.accelerator.process_index, stage.source)
            self._answers = make_answer_judge(judge, s.judges.open(judge, s.player.sampler), known)

    def __call__(self, episodes: Sequence[Episode]) -> list[Judged]:
        """The trajectories with their opinions, in order."""
        steps = _score_steps(self._steps, episodes)
        rules = _score_steps(self._rules, episodes)
        return [
            Judged(e, own, is_right, None if by is None else tuple(approved(o, 0.5) for o in by))
            for e, own, by, is_right in zip(
                episodes, steps, rules, self._judge_outcomes(episodes), strict=True
            )
        ]

    def _judge_outcomes(self, episodes: Sequence[Episode]) -> list[bool | None]:
        """Whether each answer is right; None if the judge gave no verdict."""
        if self._answers is None:
            return [bool(e.parts["first"]) for e in episodes]
        cases = []
        for e in episodes:
            answer = e.parts.get("answer")
            answer = answer if isinstance(answer, str) else None
            cases.append(Case(e.problem.prompt, tuple(e.problem.answer["golds"]), answer))
        verdicts = list(self._answers(cases))
        return list(self._answers(cases)) if None in verdicts else verdicts  # as in StepScorer


def _score_steps(
    scorer: StepScorer | None, episodes: Sequence[Episode]
) -> list[tuple[Opinion, ...] | None]:
    """An opinion on each action of each episode; None for every episode if there is no scorer."""
    if scorer is None:
        return [None] * len(episodes)
    opinions = iter(scorer([(e, turn) for e in episodes for turn in actions(e)]))
    return [tuple(next(opinions) for _ in actions(e)) for e in episodes]
