"""The whole recipe: model, task, sampling, stages, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from minirl.recipe.base import Check, Frozen, NonNegative, refuse
from minirl.recipe.judge import Judge
from minirl.recipe.maths import Maths
from minirl.recipe.methods import EVALUATED_BY, METHODS, MethodFacts, method_for, names
from minirl.recipe.model import Model
from minirl.recipe.own import copies, label_of
from minirl.recipe.sampling import Sampling
from minirl.recipe.stages import Collect, Filter, RewardModel, Stage, Train
from minirl.recipe.tasks import Own, Task, kind_of


class Eval(Frozen):
    """Evaluation on held-out problems: before the first stage, after each train stage, and every so
    many steps."""

    every: NonNegativeInt = 0
    """Steps between evaluations inside a train stage; 0 for none."""
    problems: PositiveInt = 200
    """How many held-out problems."""
    samples: PositiveInt = 1
    """Independent episodes a problem."""
    tries: Literal[1, 2] = 1
    """2 adds a reflection and a second try after each failed first (R3's four numbers)."""
    method: Annotated[str, method_for("eval")] | None = None
    """How a try is made: one attempt, one of the baselines without and with retrieval, search, or
    one action a turn. None: search where the task is question answering, stepwise where it verifies
    bare answers (maths with `chain: calls`), else single."""
    temperature: NonNegative = 0.0
    """0 is greedy."""
    start: bool = True
    """Evaluate before the first stage."""
    vote: bool = False
    """Maths tasks: also count the answer that most of a problem's samples give (majority@k; answers
    that tie count by their shares)."""
    judge: Judge | None = None
    """For question answering, `minirl eval` only: a model that says whether an answer means what a
    gold answer means."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(
            [
                (
                    "samples",
                    self.temperature == 0 and self.samples > 1,
                    f"{self.samples} at temperature 0, where all are equal",
                    "1, or a temperature above 0",
                ),
                (
                    "vote",
                    self.vote and (self.samples < 2 or self.tries == 2),
                    f"{self.samples} samples and {self.tries} tries",
                    "at least 2 samples of one try",
                ),
                (
                    "tries",
                    self.tries == 2 and self.method not in (None, EVALUATED_BY["text"]),
                    f"2 with method {self.method!r}",
                    "1: only a single attempt is reflected on",
                ),
            ]
        )
        return self


class Save(Frozen):
    """Checkpoints inside the run folder."""

    every: PositiveInt = 10
    """Steps between checkpoints of a train stage."""
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints stay."""
    keep_best: bool = True
    """Keep the checkpoint with the best evaluation as well."""
    episodes: NonNegativeInt = 8
    """How many episodes of each step go to episodes.jsonl."""


class Recipe(Frozen):
    """The whole experiment."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Every random choice of a run is drawn from this."""
    model: Model
    """The language model and its adapter."""
    task: Task
    """What is to be solved: problems and a verifier."""
    sampling: Sampling = Sampling()
    """How the model writes."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    """What is done, in this order, with one adapter."""
    eval: Eval = Eval()
    """When and how the held-out problems are played."""
    save: Save = Save()
    """What the run folder keeps."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that get the metrics too, through accelerate."""

    @property
    def named(self) -> list[tuple[str, str, str]]:
        """Each method that is named: where, for which use, and its name."""
        named = [("eval.method", "eval", self.eval.method)] if self.eval.method else []
        return named + [
            (f"stages[{number}].method", stage.kind, stage.method)
            for number, stage in enumerate(self.stages)
            if isinstance(stage, Collect | Train)
        ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_methods(METHODS)
        return self

    def check_methods(self, methods: Mapping[str, MethodFacts]) -> None:
        """Raises ValueError for what does not go together; of methods without facts nothing is
        known, and nothing refused."""
        refuse(self._checks_of_task(methods))
        for number, stage in enumerate(self.stages):
            before = self.stages[number - 1] if number else None
            refuse(self._checks_of_stage(f"stages[{number}]", stage, before, methods))

    def rename(self, change: Callable[[str], str]) -> Recipe:
        """The recipe with the name of each method, and of one's own task, changed."""
        stages = tuple(
            stage.model_copy(update={"method": change(stage.method)})
            if isinstance(stage, Collect | Train)
            else stage
            for stage in self.stages
        )
        parts: dict[str, Any] = {"stages": stages}
        if isinstance(self.task, Own):
            parts["task"] = self.task.model_copy(update={"name": change(self.task.name)})
        if self.eval.method is not None:
            parts["eval"] = self.eval.model_copy(update={"method": change(self.eval.method)})
        return self.model_copy(update=parts)

    def copies(self) -> dict[str, Path]:
        """The files of one's own code: name in the run's folder -> the file."""
        return copies(name for name in (self.task.name, *(name for _, _, name in self.named)))

    def _checks_of_task(self, methods: Mapping[str, MethodFacts]) -> Iterator[Check]:
        kind, name, judge = kind_of(self.task), self.task.name, self.eval.judge
        chain = f" with chain {self.task.chain!r}" if isinstance(self.task, Maths) else ""
        for where, use, method in self.named:
            facts = methods.get(method)
            yield (
                where,
                facts is not None and kind is not None and kind not in facts.plays,
                f"{method!r} for task {name!r}{chain}",
                f"one of {', '.join(names(use, kind))}",
            )
            yield (
                where,
                facts is not None and use not in facts.uses,
                f"{method!r}, which has the uses {', '.join(facts.uses) if facts else ''}",
                f"a method with the use {use}",
            )
        yield (
            "eval.judge.kind",
            judge is not None and judge.kind == "verifier",
            "'verifier', which judges steps",
            "base, model or endpoint",
        )
        yield (
            "eval.judge",
            judge is not None and kind != "search",
            f"a judge for task {name!r}",
            "none: its verifier is exact",
        )
        yield (
            "eval.vote",
            self.eval.vote and not isinstance(self.task, Maths),
            f"true for task {name!r}",
            "gsm8k, svamp or mathqa: others have no one answer",
        )
        yield (
            "eval.tries",
            self.eval.tries == 2 and kind not in ("text", None),
            f"2 for task {name!r}",
            "1: searches and tool calls are not reflected on",
        )

    def _checks_of_stage(
        self, where: str, stage: Stage, before: Stage | None, methods: Mapping[str, MethodFacts]
    ) -> Iterator[Check]:
        gives_states = isinstance(before, Collect) and _makes_states(before, methods)
        kept = before.keep if isinstance(before, Collect) else None
        if isinstance(stage, Filter):
            yield (
                where,
                not gives_states and stage.source is None,
                "a filter without trajectories",
                "a stepwise collect stage before it, or a `source`",
            )
            yield (
                f"{where}.outcome",
                stage.outcome == "judge" and kind_of(self.task) != "search",
                f"'judge' for task {self.task.name!r}",
                "verifier: it is exact",
            )
        elif isinstance(stage, RewardModel):
            yield (
                f"{where}.kind",
                kept != "all",
                "'reward_model'",
                "a collect stage with keep 'all' right before it",
            )
        elif isinstance(stage, Train):
            has_states = gives_states or isinstance(before, Filter)
            facts = methods.get(stage.method)
            yield (
                f"{where}.method",
                facts is not None and has_states != (facts.starts_from == "states"),
                f"{stage.method!r}",
                "step or imitate after a filter or a stepwise collect stage, and only there",
            )
            yield (
                f"{where}.examples",
                stage.examples != "demonstrations" and kept != "passed",
                f"{stage.examples!r}",
                "a collect stage with keep 'passed' right before it",
            )

    def dump(self) -> str:
        """The resolved recipe as YAML, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def plan(self) -> str:
        """What a run will do, a line a stage."""
        name = label_of(self.task.name)
        lines = [f"plan: {self.model.name} on {name}, seed {self.seed}"]
        lines += [f"  {n}  {self._planned(n, stage)}" for n, stage in enumerate(self.stages)]
        evaluation = self.eval
        when = (
            ["before the first stage"] * evaluation.start
            + ["after each train stage"]
            + [f"every {evaluation.every} steps"] * bool(evaluation.every)
        )
        tries = (
            f"{evaluation.problems} held-out problems x {evaluation.samples}, {evaluation.tries}"
            f" tries, temperature {evaluation.temperature:g}"
        )
        tries += f", method {label_of(evaluation.method)}" if evaluation.method else ""
        return "\n".join([*lines, f"  evaluation {', '.join(when)}: {tries}"])

    def _planned(self, number: int, stage: Stage) -> str:
        if isinstance(stage, Filter):
            judge = "no judge" if stage.judge is None else f"judge {stage.judge.kind}"
            return f"filter   {stage.keep}: {judge}, outcome by {stage.outcome}"
        if isinstance(stage, RewardModel):
            return f"reward model: {stage.epochs} epochs over what was kept, lr {stage.lr:g}"
        method, most = label_of(stage.method), self._sampled(number)
        if isinstance(stage, Collect):
            return (
                f"collect  {method}: {stage.problems} problems x {stage.samples} attempts, keep"
                f" {stage.keep} (at most {stage.keep_each} of each){most}"
            )
        loss = f"loss {stage.learner.loss}, lr {stage.learner.lr:g}"
        return (
            f"train    {method}: {stage.steps} steps of {stage.batch} groups x {stage.group}"
            f" episodes, {loss}{most}"
        )

    def _sampled(self, number: int) -> str:
        """How much a stage samples, by its limits; nothing for methods that only show."""
        stage, limits = self.stages[number], self.sampling
        assert isinstance(stage, Collect | Train)
        if (facts := METHODS.get(stage.method)) is None:
            return ""  # one's own: its facts stand in its file
        each = facts.sampled_tokens(limits) if facts.samples else 0
        if isinstance(stage, Collect):
            most = each * stage.problems * stage.samples
        else:
            most = each * stage.steps * stage.batch * stage.group
            if facts.starts_from == "failures" and not (
                number and isinstance(self.stages[number - 1], Collect)
            ):
                most += (
                    limits.attempt_tokens * stage.steps * stage.batch * stage.attempts
                )  # on line: first tries that may fail
        return f", at most {most / 1e6:.3g} M sampled tokens" if most else ""


def _makes_states(stage: Collect, methods: Mapping[str, MethodFacts]) -> bool:
    return stage.method in methods and methods[stage.method].makes_states
