"""The filter stage of SWiRL (arXiv 2504.04736): trajectories judged part by part, and those kept
that pass.

Invariant: what is kept and logged is a function of the recipe, the weights and the verdicts; how
many of these were known beforehand shows in no file but verdicts.jsonl, so a run that was killed
while judging ends in the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minirl import recipe
from minirl.engine.model import load as models
from minirl.episode import Episode
from minirl.errors import UserError
from minirl.io.files import read_rows
from minirl.judge.judge import Case, Opinion
from minirl.loop.judges import answer_judge, verdicts_of
from minirl.loop.session import Interrupted, Session
from minirl.loop.step_scores import StepScorer
from minirl.methods.swirl.filters import Judged, approved, marked, passes, tally
from minirl.methods.swirl.states import actions
from minirl.recipe.methods import USUAL
from minirl.record.closed_run import read_position, weights_digest
from minirl.record.report.filters import describe_filter
from minirl.record.state import Position


def filter_stage(s: Session, index: int, stage: recipe.Filter) -> None:
    """Judge the trajectories part by part and keep those that pass; every part is saved."""
    episodes = trajectories_of(s, index, stage)
    s.progress.stage(f"{index} filter {stage.keep}", stage.parts, s.run.position.step)
    judge = _both_judges(s, stage)
    at = stage.judge.approve_at if stage.judge is not None else 0.5
    for part in range(s.run.position.step, stage.parts):
        began = time.monotonic()
        some_of = episodes[
            len(episodes) * part // stage.parts : len(episodes) * (part + 1) // stage.parts
        ]
        judged: list[Judged] = s.gather(judge(s.mine(some_of)))
        s.run.keep(index, [marked(j, at) for j in judged if passes(j, stage.keep, at)])
        counts = tally(judged, stage.keep, at)
        s.log({"stage": index, "step": part} | counts, {"judge_s": time.monotonic() - began})
        done = part + 1 == stage.parts
        s.run.advance(Position(index + 1, 0) if done else Position(index, part + 1))
        if s.asked_to_stop():
            raise Interrupted
    s.accelerator.wait_for_everyone()  # the next stage reads what the main process has just written
    for line in describe_filter(
        [row for row in s.run.rows("metrics") if row["stage"] == index],
        asked=stage.judge is not None,
    ):
        s.progress.say(f"filter {stage.keep}: {line}")


def _both_judges(s: Session, stage: recipe.Filter) -> Callable[[Sequence[Episode]], list[Judged]]:
    """The steps' judge with the rules beside it, and the outcome's."""
    node = stage.judge
    steps = None if node is None else StepScorer(s, node, again=True, source=stage.source)
    rules = (
        None
        if node is None or node.kind == "verifier"
        else StepScorer(s, recipe.Judge.model_validate({"kind": "verifier"}))
    )
    answers = None
    if node is not None and stage.outcome == "judge":
        known = verdicts_of(s.run.folder, s.accelerator.process_index, stage.source)
        answers = answer_judge(node, s.voices.open(node, s.sampler), known)

    def judge(episodes: Sequence[Episode]) -> list[Judged]:
        wanted = [(e, turn) for e in episodes for turn in actions(e)]
        found = [iter(scorer(wanted)) if scorer else None for scorer in (steps, rules)]
        right: list[bool | None] = [bool(e.parts["first"]) for e in episodes]
        if answers is not None:
            golds = [tuple(e.problem.answer["golds"]) for e in episodes]
            said = [e.parts.get("answer") for e in episodes]
            cases = [
                Case(e.problem.prompt, g, a if isinstance(a, str) else None)
                for e, g, a in zip(episodes, golds, said, strict=True)
            ]
            right = list(answers(cases))
            if None in right:
                right = list(answers(cases))  # as in StepScorer: asks for what was not answered
        out = []
        for e, outcome in zip(episodes, right, strict=True):
            given: list[tuple[Opinion, ...] | None] = [
                None if it is None else tuple(next(it) for _ in actions(e)) for it in found
            ]
            said_by_rules = None if given[1] is None else tuple(approved(o, 0.5) for o in given[1])
            out.append(Judged(e, given[0], outcome, said_by_rules))
        return out

    return judge


def trajectories_of(s: Session, index: int, stage: recipe.Filter) -> list[Episode]:
    """What a filter reads: the collect stage's before it, or those of another run, whose model must
    write the same tokens."""
    if stage.source is None:
        return s.run.kept(index - 1)
    folder, where = Path(stage.source).expanduser(), f"stages[{index}].source: {stage.source}"
    other, number = source_of(stage.source, where)
    _check_source(s, other, folder, where)
    path = folder / "kept" / f"{number}.jsonl"
    rows: list[dict[str, Any]] = read_rows(path, growing=False)
    found = [Episode.from_json(row, f"{path}:{line}") for line, row in enumerate(rows, start=1)]
    _check_problems(s, found, where)
    _check_unchanged(s.run.kept(index), found, where)
    return found


def source_of(source: str, where: str) -> tuple[recipe.Recipe, int]:
    """The recipe of a run with trajectories, and the number of its last stepwise collect stage.
    UserError for any other."""
    folder = Path(source).expanduser()
    if not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{where} is no run folder, expected one with a finished stepwise collect stage; run"
            " its recipe first"
        )
    other = recipe.load(folder / "recipe.yaml")
    found = [
        n
        for n, old in enumerate(other.stages)
        if isinstance(old, recipe.Collect) and recipe.METHODS.get(old.method, USUAL).makes_states
    ]
    if not found or read_position(folder)[0].stage <= found[-1]:
        raise UserError(
            f"{where} has no finished stepwise collect stage; run its recipe to the end of one"
        )
    return other, found[-1]


def _check_problems(s: Session, found: list[Episode], where: str) -> None:
    """Raises UserError for a trajectory about a question that this run does not train on: one that
    it holds out, or of other data."""
    mine = {problem.prompt for problem in s.task.train}
    if others := [e.problem for e in found if e.problem.prompt not in mine]:
        held = (
            "holds out"
            if others[0].prompt in {problem.prompt for problem in s.task.held_out}
            else "does not know"
        )
        raise UserError(
            f"{where} has a trajectory about problem {others[0].id!r}, which this run {held},"
            " expected training problems of its own; give both runs the same task.source,"
            " task.test_source, task.train and task.held_out"
        )


def _check_unchanged(kept: Sequence[Episode], found: Sequence[Episode], where: str) -> None:
    """Raises UserError where a filter that was stopped halfway had kept a trajectory that its
    source no longer has."""
    if not {e.tokens for e in kept} <= {e.tokens for e in found}:
        raise UserError(
            f"{where} no longer has what this filter kept of it before it was stopped, so that run"
            " was made anew since; start again with another --out"
        )


def _check_source(s: Session, other: recipe.Recipe, folder: Path, where: str) -> None:
    """Raises UserError for trajectories that the run could not have made itself: of another model,
    task or tool, or other weights."""
    mine = s.recipe
    named: list[tuple[str, Any, Any]] = [
        ("model.name", other.model.name, mine.model.name),
        ("model.template", other.model.template, mine.model.template),
    ]
    named += [("task.name", other.task.name, mine.task.name)]
    for name in type(mine.sampling.stepwise).model_fields:
        named.append(
            (
                f"sampling.stepwise.{name}",
                getattr(other.sampling.stepwise, name),
                getattr(mine.sampling.stepwise, name),
            )
        )
    for name, got, expected in named:
        if got != expected:
            raise UserError(
                f"{where} has trajectories made with {name} {got!r}, expected {expected!r}; take"
                f" another run, or set {name}"
            )
    got, expected = weights_digest(folder), models.fingerprint(s.policy.model)
    if got != expected:
        raise UserError(
            f"{where} has trajectories of other base weights (got {str(got)[:8]}, expected"
            f" {expected[:8]}); load the copy of the model that run had, in the same dtype and"
            " quantisation"
        )
