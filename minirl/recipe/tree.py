"""The whole recipe: model, task, sampling, stages, evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from minirl.recipe.base import Check, Dtype, Frozen, NonNegative, refuse
from minirl.recipe.judge import Judge
from minirl.recipe.maths import Maths
from minirl.recipe.methods import EVALUATED_BY, METHODS, names
from minirl.recipe.sampling import Sampling
from minirl.recipe.stages import Collect, Filter, RewardModel, Stage, Train, method_for
from minirl.recipe.tasks import Task, kind_of


class Lora(Frozen):
    """A LoRA adapter (arXiv 2106.09685)."""

    rank: PositiveInt = 16
    """Rank of the two factors."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Module names that get an adapter; "all-linear" is every linear layer but the output head."""


class Model(Frozen):
    """Which language model, and how it is held in memory."""

    name: str
    """A hub id, a local folder, or `smollm2-135m` (the embedded default, which needs no hub)."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """bitsandbytes quantisation of the frozen base weights."""
    template: Literal["chat", "plain"] = "chat"
    """chat: the model's own chat template. plain: a transcript of user and assistant, for base
    models."""
    dtype: Dtype = "auto"
    """What the model computes in; auto takes the fastest that the device does well."""
    lora: Lora = Lora()
    """The adapter that is trained."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    adapter: str | None = None
    """Folder of a peft adapter to start from, e.g. `runs/a/adapter`."""


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

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self._checks_of_task())
        for number, stage in enumerate(self.stages):
            before = self.stages[number - 1] if number else None
            refuse(self._checks_of_stage(f"stages[{number}]", stage, before))
        return self

    def _checks_of_task(self) -> Iterator[Check]:
        kind, name, judge = kind_of(self.task), self.task.name, self.eval.judge
        chain = f" with chain {self.task.chain!r}" if isinstance(self.task, Maths) else ""
        named = [("eval.method", "eval", self.eval.method)] + [
            (f"stages[{number}].method", stage.kind, stage.method)
            for number, stage in enumerate(self.stages)
            if isinstance(stage, Collect | Train)
        ]
        for where, use, method in named:
            yield (
                where,
                method is not None and kind not in METHODS[method].plays,
                f"{method!r} for task {name!r}{chain}",
                f"one of {', '.join(names(use, kind))}",
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
            self.eval.tries == 2 and kind != "text",
            f"2 for task {name!r}",
            "1: searches and tool calls are not reflected on",
        )

    def _checks_of_stage(self, where: str, stage: Stage, before: Stage | None) -> Iterator[Check]:
        gives_states = isinstance(before, Collect) and METHODS[before.method].makes_states
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
            yield (
                f"{where}.method",
                has_states != (stage.facts.starts_from == "states"),
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
        lines = [f"plan: {self.model.name} on {self.task.name}, seed {self.seed}"]
        for number, stage in enumerate(self.stages):
            if isinstance(stage, Filter):
                judge = "no judge" if stage.judge is None else f"judge {stage.judge.kind}"
                lines.append(
                    f"  {number}  filter   {stage.keep}: {judge}, outcome by {stage.outcome}"
                )
            elif isinstance(stage, Collect):
                made = (
                    f"{stage.problems} problems x {stage.samples} attempts, keep {stage.keep} (at"
                    f" most {stage.keep_each} of each)"
                )
                lines.append(f"  {number}  collect  {stage.method}: {made}{self._sampled(number)}")
            elif isinstance(stage, RewardModel):
                lines.append(
                    f"  {number}  reward model: {stage.epochs} epochs over what was kept, lr"
                    f" {stage.lr:g}"
                )
            else:
                loss = f"loss {stage.learner.loss}, lr {stage.learner.lr:g}"
                made = (
                    f"{stage.steps} steps of {stage.batch} groups x {stage.group} episodes, {loss}"
                )
                lines.append(f"  {number}  train    {stage.method}: {made}{self._sampled(number)}")
        node = self.eval
        when = (
            ["before the first stage"] * node.start
            + ["after each train stage"]
            + [f"every {node.every} steps"] * bool(node.every)
        )
        tries = (
            f"{node.problems} held-out problems x {node.samples}, {node.tries} tries, temperature"
            f" {node.temperature:g}"
        )
        tries += f", method {node.method}" if node.method else ""
        return "\n".join([*lines, f"  evaluation {', '.join(when)}: {tries}"])

    def _sampled(self, number: int) -> str:
        """How much a stage samples, by its limits; nothing for methods that only show."""
        stage, limits = self.stages[number], self.sampling
        assert isinstance(stage, Collect | Train)
        facts = METHODS[stage.method]
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
