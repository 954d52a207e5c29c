"""A trial: a finished run's adapter, or its base model, on the held-out problems, by the run's own
method or by another.

Invariant: the run itself is left as it is; the result is kept beside its own evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from minirl.chat import Chat
from minirl.engine.learn.reward_model import RewardModel
from minirl.engine.sample.live import LiveSampler
from minirl.engine.sample.plain import PlainSampler
from minirl.errors import UserError
from minirl.judge.judge import Judge
from minirl.loop.evaluate import Evaluator
from minirl.loop.judges import JudgeModels, make_answer_judge, open_verdicts
from minirl.loop.log import texts
from minirl.loop.open_model import open_model
from minirl.loop.trial_recipe import read_recipe, sampling_recipe, trial_recipe
from minirl.methods import use_own
from minirl.recipe import Recipe
from minirl.recipe.own import OWN
from minirl.record.evals import add_later_eval, summarise
from minirl.record.progress import Progress
from minirl.record.state import read_note
from minirl.tasks import Task, fingerprint, open_task

RECORDED = ("eval.tries", "eval.samples", "eval.temperature", "eval.problems", "eval.vote")
"""Overrides that a row shows in fields of their own; the others tell how it was made."""


class Evaluation(NamedTuple):
    """The result of a trial.

    summary: see `evals.summarise`. episodes: the first of each problem as a row of episodes.jsonl,
    texts included. row: what was kept in the run folder.
    """

    summary: dict[str, Any]
    episodes: list[dict[str, Any]]
    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """A run's task and model, opened under a label: "base" or "adapter"."""

    folder: Path
    label: str
    chat: Chat
    task: Task
    sampler: LiveSampler | PlainSampler
    progress: Progress
    judge: Judge | None = None
    rank: RewardModel | None = None

    def evaluate(
        self, recipe: Recipe, changed: Sequence[str], method: str | None, more: Sequence[str] = ()
    ) -> Evaluation:
        """Evaluate as a recipe says, and keep the result. changed: overrides that the recipe came
        from. more: what else tells this evaluation from others."""
        self.sampler.reset()
        evaluator = Evaluator(
            self.task, self.chat, recipe.sampling, recipe.eval, recipe.seed, self.judge, self.rank
        )
        problems = self.task.held_out[: recipe.eval.problems]
        rows, episodes = evaluator.evaluate(problems, self.sampler)
        self._warn_of_judge(len(problems) * recipe.eval.samples)
        notes = [text for text in changed if text.partition("=")[0] not in RECORDED]
        notes += [f"eval.method={method}"] if method else []
        row = {"label": self.label, "stage": len(recipe.stages), "step": 0} | evaluator.settings
        row |= {"changed": list(dict.fromkeys([*notes, *more])), "problems": rows}
        summary = summarise(row)
        self.progress.evaluation(f"{self.label}, {method}" if method else self.label, summary)
        add_later_eval(self.folder, row)
        kept = [
            {"label": self.label, **e.to_json(), "texts": texts(self.chat, e)} for e in episodes
        ]
        return Evaluation(summary | {"method": method}, kept, row)

    def _warn_of_judge(self, answers: int) -> None:
        judge = self.judge
        if judge is not None and (missing := judge.unreadable + judge.unanswered):
            self.progress.say(
                f"WARNING: judge: {missing} of {answers} answers have no verdict"
                f" ({judge.unanswered} unanswered, {judge.unreadable} unreadable); `judged` is over"
                " the others"
            )


def evaluate_run(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    base: bool = False,
    method: str | Callable[..., Any] | None = None,
    samples: int | None = None,
    vote: bool = False,
    rerank: Path | None = None,
    task: Path | Task | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a run's final adapter, or with `base` its model as it was at the start, and keep the
    result beside the run.

    overrides: `eval.samples=8` and the like, laid over the run's own recipe. method: as in
    `eval.method`, e.g. a baseline that retrieves, or a function. samples: of each problem, at the
    temperature of training if the recipe evaluates greedily. vote: as `eval.vote`. rerank: a run
    with a reward model, which picks one of the samples. task: another recipe, whose task, sampling
    and evaluation take the place of the run's own, to try on one task what was trained on another;
    or the Task of a run with `task: {name: own}`.
    """
    own_task, other = (task, None) if isinstance(task, Task) else (None, task)
    own_method, method = (method, OWN) if callable(method) else (None, method)
    changed = [
        *overrides,
        *([f"eval.samples={samples}"] if samples is not None else []),
        *(["eval.vote=true"] if vote else []),
    ]
    choose = trial_recipe if samples is None or samples < 2 else sampling_recipe
    recipe = choose(folder, other, changed, method)
    use_own(recipe, own_method, uses=("eval",))
    if rerank is not None and (recipe.eval.samples < 2 or recipe.eval.tries == 2):
        raise UserError(
            f"--rerank: got {recipe.eval.samples} samples of {recipe.eval.tries} tries, expected at"
            " least 2 samples of one try; add --samples 8"
        )
    changed += [] if other is None else [f"recipe={other.stem}"]
    more = [*["vote"] * recipe.eval.vote, *([f"rerank {rerank}"] if rerank else [])]
    with progress or Progress() as shown:
        rank = None if rerank is None else _open_reward_model(rerank, recipe)
        trial = open_trial(folder, recipe, shown, base=base, own_task=own_task)
        return replace(trial, rank=rank).evaluate(recipe, changed, method, more)


def open_trial(
    folder: Path,
    recipe: Recipe,
    progress: Progress,
    *,
    base: bool = False,
    own_task: Task | None = None,
) -> Trial:
    """Open the task and the model of a run: its adapter, or with `base` the model without it."""
    model = recipe.model
    if not base:
        if not (folder / "adapter").is_dir():
            raise UserError(
                f"{folder}: no adapter yet; finish the run first (the same `minirl run` takes it up"
                " again), or use --base"
            )
        model = model.model_copy(update={"adapter": str(folder / "adapter")})
    task = open_task(recipe.task, recipe.seed, own_task)
    if own_task is None:
        _warn_of_other_problems(folder, recipe, task, progress)
    policy, chat, sampler, description = open_model(model, recipe.sampling, recipe.seed)
    for line in (description, *task.notes):
        progress.say(line)
    judge = open_judge(recipe, folder, JudgeModels(policy, chat, recipe.sampling), sampler)
    return Trial(folder, "base" if base else "adapter", chat, task, sampler, progress, judge)


def open_judge(
    recipe: Recipe, folder: Path, judges: JudgeModels, sampler: LiveSampler | PlainSampler
) -> Judge | None:
    """The judge of `eval.judge`, with the verdicts that the run folder has."""
    judge = recipe.eval.judge
    if judge is None:
        return None
    return make_answer_judge(judge, judges.open(judge, sampler), open_verdicts(folder))


def _open_reward_model(folder: Path, recipe: Recipe) -> RewardModel:
    """The reward model of another run, if it reads the same tokens."""
    theirs, ours = read_recipe(folder).model, recipe.model
    if (theirs.name, theirs.template) != (ours.name, ours.template):
        raise UserError(
            f"--rerank: {folder} reads {theirs.name} ({theirs.template}), expected the model of the"
            f" run, {ours.name}"
        )
    return RewardModel.open(folder / "reward_model", theirs)


def _warn_of_other_problems(folder: Path, recipe: Recipe, task: Task, progress: Progress) -> None:
    """Warn if the run's own task has other problems now than when it was trained: some that are
    held out now may have been trained on."""
    own = read_recipe(folder)
    known = read_note(folder / "task.json", "problems").get("problems")
    is_own = (recipe.task, recipe.seed) == (own.task, own.seed)
    if is_own and known not in (None, now := fingerprint(task)):
        progress.say(
            f"WARNING: the task {recipe.task.name} has other problems here than the run had (digest"
            f" {now[:8]}, the run's {str(known)[:8]}); some of those held out now may have been"
            " trained on"
        )
