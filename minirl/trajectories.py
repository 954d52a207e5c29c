"""The stages of SWiRL (arXiv 2504.04736) inside the loop: trajectories with their provenance, filtered, and actions scored by a judge.

Invariant: what is kept and logged is a function of the recipe, the weights and the verdicts; how many of these were known beforehand shows
in no file but verdicts.jsonl, so a run that was killed while judging ends in the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from minirl import models, recipe
from minirl.episode import Episode, Group, Problem, regroup
from minirl.errors import UserError
from minirl.files import read_rows
from minirl.filters import Judged, approved, marked, passes, summary, tally
from minirl.judge import Case, Opinion, StepCase, step_case
from minirl.methods.stepwise import stepwise, tags_of
from minirl.relay import Relay
from minirl.rollout import play
from minirl.rules import Rules, reader, search_reader
from minirl.rundir import standing, weights_of
from minirl.session import Interrupted, Session
from minirl.speakers import StepScores, answer_judge, step_judge, verdicts_of
from minirl.split import actions, imitations, some, states
from minirl.state import Position
from minirl.tasks.qa import SearchTask
from minirl.verdicts import Verdicts

SHOWN = ("steps", "calls", "errors", "malformed")


class StepScorer:
    """Scores actions by a recipe's judge, opened when it is first asked: by then the first step's check has settled the sampler.

    again: ask once more for what was not answered, for the position moves on for good once a filter's part is saved. source: another run
    of the same base weights, whose verdicts are taken over.
    """

    def __init__(self, s: Session, node: recipe.Judge, method: str = "stepwise", *, again: bool = False, source: str | None = None) -> None:
        self._s = s
        self._node = node
        self._method = method
        self._again = again
        self._source = source
        self._opened: StepScores | None = None
        self._known: Verdicts | None = None
        self._warned = False

    def __call__(self, wanted: Sequence[tuple[Episode, int]]) -> list[Opinion]:
        """An opinion on each (episode, number of the turn), given the turns before it."""
        if self._opened is None:
            self._open()
        assert self._opened is not None
        cases, problems = [self._case(episode, turn) for episode, turn in wanted], [episode.problem for episode, _ in wanted]
        opinions = self._opened(cases, problems)
        if self._again and any(o.came == "unanswered" for o in opinions):
            opinions = self._opened(cases, problems)  # what was answered is known, and not asked for again
        if (failed := sum(o.came == "unanswered" for o in opinions)) and not self._warned:
            self._warned = True  # once a stage; metrics.jsonl counts them all
            self._s.progress.say(
                f"WARNING: the judge gave no answer to {failed} of {len(opinions)} steps; they are not scored, nor trained"
            )
        return opinions

    def _open(self) -> None:
        s, node = self._s, self._node
        self._known = verdicts_of(s.run.folder, s.accelerator.process_index, self._source)
        voice = None if node.kind == "verifier" else s.voices.open(node, s.sampler, patient=True)
        self._opened = step_judge(node, voice, rules_of(s, node, self._method), self._known)

    def _case(self, episode: Episode, turn: int) -> StepCase:
        return step_case(episode.problem.prompt, episode.turns[:turn], episode.turns[turn], self._s.chat)


def rules_of(s: Session, node: recipe.Judge, method: str) -> Rules:
    """The rules for a method's turns."""
    if method == "search" and isinstance(s.task, SearchTask):
        return Rules(s.task, search_reader(s.task), gold=node.gold)
    tags = tags_of(s.task, s.recipe.sampling.stepwise)
    return Rules(s.task, reader(tags), gold=node.gold, steps=tags.steps)


def rewarded(s: Session, stage: recipe.Train, groups: Sequence[Group], score: StepScorer) -> tuple[list[Group], dict[str, float]]:
    """The groups with the judge's scores as rewards: of method step the episode's, else one for each trained turn.

    What was not scored is not trained. Beside them `approved`, the share of the scored actions that the judge approves, and `unscored`, how
    many actions it gave no score.
    """
    episodes = [e for group in groups for e in group.episodes]
    wanted = [(e, turn) for e in episodes for turn in actions(e)]
    opinions = score(wanted)
    assert stage.judge is not None
    scored = [o for o in opinions if o.score is not None]
    good = sum(approved(o, stage.judge.approve_at) for o in scored)
    given = iter(opinions)
    told = [_with_scores(e, [next(given).score for _ in actions(e)], by_step=stage.credit == "step") for e in episodes]
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
    turns = tuple(replace(t, trained=given[i] is not None) if i in given else t for i, t in enumerate(episode.turns))
    return replace(episode, turns=turns, step_rewards=tuple(scores))


def relayed(s: Session, stage: recipe.Collect, seed: str, drawn: Sequence[tuple[int, Problem]]) -> list[Group]:
    """Trajectories that the stage's speaker writes, in the policy's tokens; a server's fault is the user's to mend and stops the run."""
    assert stage.speaker is not None
    voice, node = s.voices.open(stage.speaker, s.sampler, patient=False), s.recipe
    talks = [
        Relay(p, s.chat, node.sampling, temperature=stage.temperature, seed=f"{node.seed}/{seed}/{n}/{p.id}/{k}", speaker=voice.chat)
        for n, p in drawn
        for k in range(stage.samples)
    ]
    if reset := getattr(voice.sampler, "reset", None):
        reset()
    return regroup(play([stepwise(talk, s.task) for talk in talks], voice.sampler), stage.samples)


def with_provenance(
    s: Session, stage: recipe.Collect, seed: str, groups: Sequence[Group], drawn: Sequence[tuple[int, Problem]]
) -> list[Group]:
    """Each episode with who wrote it (`by`: the model and a digest of the adapter, or the speaker) and what it was drawn with (`seed`)."""
    by = writer(s) if stage.speaker is None else f"{stage.speaker.kind} {stage.speaker.model}"
    return [
        Group(g.problem, tuple(_noted(e, by=by, seed=f"{s.recipe.seed}/{seed}/{n}/{p.id}/{k}") for k, e in enumerate(g.episodes)))
        for g, (n, p) in zip(groups, drawn, strict=True)
    ]


def _noted(episode: Episode, **more: str) -> Episode:
    return replace(episode, parts={**episode.parts, **more})


def writer(s: Session) -> str:
    """The policy's name: its model, a digest of the base weights, and one of the adapter's."""
    digest = blake2b(digest_size=8)
    for name, p in sorted(s.policy.trainable.items()):
        digest.update(name.encode() + p.detach().cpu().numpy().tobytes())
    return f"policy {s.recipe.model.name} {models.fingerprint(s.policy.model)[:8]} {digest.hexdigest()}"


def described(kept: Sequence[Episode]) -> str:
    """A collect stage's trajectories in a line: how many, means of their numbers, shares that answered and were right."""
    count = max(len(kept), 1)
    means = [f"{name} {sum(float(e.parts.get(name) or 0) for e in kept) / count:.2f}" for name in SHOWN]
    shares = [
        f"{label} {sum(bool(e.parts.get(name)) for e in kept) / count:.1%}"
        for name, label in (("answered", "answered"), ("first", "right"))
    ]
    return f"{len(kept)} trajectories of {len({e.problem.id for e in kept})} questions: {', '.join([*means, *shares])}"


def filter_stage(s: Session, index: int, stage: recipe.Filter) -> None:
    """Judge the trajectories part by part and keep those that pass; every part is saved."""
    episodes = trajectories_of(s, index, stage)
    s.progress.stage(f"{index} filter {stage.keep}", stage.parts, s.run.position.step)
    judge = _both_judges(s, stage)
    at = stage.judge.approve_at if stage.judge is not None else 0.5
    for part in range(s.run.position.step, stage.parts):
        began = time.monotonic()
        some_of = episodes[len(episodes) * part // stage.parts : len(episodes) * (part + 1) // stage.parts]
        judged: list[Judged] = s.gather(judge(s.mine(some_of)))
        s.run.keep(index, [marked(j, at) for j in judged if passes(j, stage.keep, at)])
        counts = tally(judged, stage.keep, at)
        s.log({"stage": index, "step": part} | counts, {"judge_s": time.monotonic() - began})
        done = part + 1 == stage.parts
        s.run.advance(Position(index + 1, 0) if done else Position(index, part + 1))
        if s.asked_to_stop():
            raise Interrupted
    s.accelerator.wait_for_everyone()  # the next stage reads what the main process has just written
    for line in summary([row for row in s.run.rows("metrics") if row["stage"] == index], asked=stage.judge is not None):
        s.progress.say(f"filter {stage.keep}: {line}")


def _both_judges(s: Session, stage: recipe.Filter) -> Callable[[Sequence[Episode]], list[Judged]]:
    """The steps' judge with the rules beside it, and the outcome's."""
    node = stage.judge
    steps = None if node is None else StepScorer(s, node, again=True, source=stage.source)
    rules = None if node is None or node.kind == "verifier" else StepScorer(s, recipe.Judge.model_validate({"kind": "verifier"}))
    answers = None
    if node is not None and stage.outcome == "judge":
        known = verdicts_of(s.run.folder, s.accelerator.process_index, stage.source)
        answers = answer_judge(node, s.voices.open(node, s.sampler, patient=True), known)

    def judge(episodes: Sequence[Episode]) -> list[Judged]:
        wanted = [(e, turn) for e in episodes for turn in actions(e)]
        found = [iter(scorer(wanted)) if scorer else None for scorer in (steps, rules)]
        right: list[bool | None] = [bool(e.parts["first"]) for e in episodes]
        if answers is not None:
            golds = [tuple(e.problem.answer["golds"]) for e in episodes]
            said = [e.parts.get("answer") for e in episodes]
            cases = [Case(e.problem.prompt, g, a if isinstance(a, str) else None) for e, g, a in zip(episodes, golds, said, strict=True)]
            right = list(answers(cases))
            if None in right:
                right = list(answers(cases))  # as in StepScorer: asks for what was not answered
        out = []
        for e, outcome in zip(episodes, right, strict=True):
            given: list[tuple[Opinion, ...] | None] = [None if it is None else tuple(next(it) for _ in actions(e)) for it in found]
            said_by_rules = None if given[1] is None else tuple(approved(o, 0.5) for o in given[1])
            out.append(Judged(e, given[0], outcome, said_by_rules))
        return out

    return judge


def trajectories_of(s: Session, index: int, stage: recipe.Filter) -> list[Episode]:
    """What a filter reads: the collect stage's before it, or those of another run, whose model must write the same tokens."""
    if stage.source is None:
        return s.run.kept(index - 1)
    folder = Path(stage.source).expanduser()
    where = f"stages[{index}].source: {folder}"
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{where} is no run folder, expected one with a finished stepwise collect stage; run its recipe first")
    other = recipe.load(folder / "recipe.yaml")
    found = [n for n, old in enumerate(other.stages) if isinstance(old, recipe.Collect) and old.method == "stepwise"]
    if not found or standing(folder)[0].stage <= found[-1]:
        raise UserError(f"{where} has no finished stepwise collect stage; run its recipe to the end of one")
    _check_source(s, other, folder, where)
    path = folder / "kept" / f"{found[-1]}.jsonl"
    rows: list[dict[str, Any]] = read_rows(path, growing=False)
    return [Episode.from_json(row, f"{path}:{line}") for line, row in enumerate(rows, start=1)]


def _check_source(s: Session, other: recipe.Recipe, folder: Path, where: str) -> None:
    """Raises UserError for trajectories that the run could not have made itself: of another model, task or tool, or other weights."""
    mine = s.recipe
    named: list[tuple[str, Any, Any]] = [
        ("model.name", other.model.name, mine.model.name),
        ("model.template", other.model.template, mine.model.template),
    ]
    named += [("task.name", other.task.name, mine.task.name)]
    for name in type(mine.sampling.stepwise).model_fields:
        named.append((f"sampling.stepwise.{name}", getattr(other.sampling.stepwise, name), getattr(mine.sampling.stepwise, name)))
    for name, got, expected in named:
        if got != expected:
            raise UserError(f"{where} has trajectories made with {name} {got!r}, expected {expected!r}; take another run, or set {name}")
    got, expected = weights_of(folder), models.fingerprint(s.policy.model)
    if got != expected:
        raise UserError(
            f"{where} has trajectories of other base weights (got {str(got)[:8]}, expected {expected[:8]}); load the copy of the model "
            "that run had, in the same dtype and quantisation"
        )


def states_of(s: Session, index: int, stage: recipe.Train, kept: Sequence[Episode]) -> list[Problem]:
    """The states that a stage trains on, with their actions where it imitates them. Raises UserError where it asks for more."""
    split = imitations(kept) if stage.method == "imitate" else states(kept)
    chosen = some(split, stage.states, s.recipe.seed)
    s.progress.say(f"stage {index}: {len(chosen)} of {len(split)} states of {len(kept)} trajectories")
    if stage.states is not None and len(split) < stage.states:
        raise UserError(
            f"stages[{index}].states: got {stage.states}, but there are {len(split)} states; filters are compared at equal numbers, so run "
            f"all of them again with --set stages.{index}.states={len(split)} and another --out"
        )
    return chosen
