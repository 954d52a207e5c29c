"""The whole recipe: model, task, sampling, stages, evaluation."""

from __future__ import annotations

from typing import Literal, Self

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from minirl.recipe.base import Dtype, Frozen, NonNegative
from minirl.recipe.judge import Judge
from minirl.recipe.maths import Maths
from minirl.recipe.qa import QA
from minirl.recipe.stages import Collect, Filter, RewardModel, Stage, Train
from minirl.recipe.stepwise import Stepwise
from minirl.recipe.tasks import Task

STEPS = ("stepwise", "step", "demonstrate_stepwise", "imitate")
SEARCHING = ("search", "no_rag", "naive_rag", "iter_retgen", "ircot")


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


class Sampling(Frozen):
    """How completions are sampled. No top-k or top-p: they bias every importance ratio."""

    temperature: PositiveFloat = 1.0
    """Of the policy in training; the loss scores tokens under the same temperature."""
    attempt_tokens: PositiveInt = 512
    """Most tokens of an attempt or a retry; for method search of the whole turn, results included;
    for method stepwise of an action."""
    reflection_tokens: PositiveInt = 256
    """Most tokens of a reflection."""
    result_tokens: PositiveInt = 1024
    """search, stepwise and the baselines that retrieve: most tokens of the passages that one search
    brings (Search-R1: 500)."""
    searches: PositiveInt | None = None
    """search: most searches an episode; None for as many as `attempt_tokens` has room for
    (ReSearch)."""
    stepwise: Stepwise = Stepwise()
    """Method stepwise: the tags of an action, and how many actions there can be."""
    rows: PositiveInt = 64
    """Most completions decoded together."""
    cache_tokens: PositiveInt | None = None
    """Most tokens whose keys and values the sampler holds: where conversations are long, fewer rows
    decode together and the least recently used conversation is computed again when it goes on.
    None: as many as `rows` conversations of the greatest length need."""
    cuda_graphs: bool = False
    """On a GPU, replay decode steps from captured CUDA graphs, and keep the cache's memory between
    rollouts. Not yet run on a GPU."""


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
    method: (
        Literal["single", "no_rag", "naive_rag", "iter_retgen", "ircot", "search", "stepwise"]
        | None
    ) = None
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
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples: got {self.samples} at temperature 0, where all are equal; set"
                " temperature or expected samples 1"
            )
        if self.vote and (self.samples < 2 or self.tries == 2):
            raise ValueError(
                f"vote: got {self.samples} samples and {self.tries} tries, expected at least 2"
                " samples of one try"
            )
        if self.tries == 2 and self.method not in (None, "single"):
            raise ValueError(
                f"tries: got 2 with method {self.method!r}, expected 1: only a single attempt is"
                " reflected on"
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
    def _check_searches(self) -> Self:
        searched, calls = (
            isinstance(self.task, QA),
            isinstance(self.task, Maths) and self.task.chain == "calls",
        )
        named: list[tuple[str, str | None]] = [("eval.method", self.eval.method)]
        named += [
            (f"stages[{n}].method", stage.method)
            for n, stage in enumerate(self.stages)
            if isinstance(stage, Collect | Train)
        ]
        for where, method in named:
            if not searched and method in SEARCHING:
                raise ValueError(
                    f"{where}: got {method!r} for task {self.task.name!r}, expected a"
                    " question-answering task to search in"
                )
            if searched and method in ("single", "reflect"):
                raise ValueError(
                    f"{where}: got {method!r} for task {self.task.name!r}, expected search: its"
                    " questions are searched for"
                )
            if not searched and not calls and method in STEPS:
                task = f"{self.task.name!r}" + (
                    f" with chain {self.task.chain!r}" if isinstance(self.task, Maths) else ""
                )
                raise ValueError(
                    f"{where}: got {method!r} for task {task}, expected question answering, or"
                    " maths with chain: calls"
                )
            if calls and method in ("single", "reflect", "demonstrate", "self_train"):
                raise ValueError(
                    f"{where}: got {method!r} for task {self.task.name!r} with chain 'calls',"
                    " expected stepwise or chain: prose"
                )
        if self.eval.judge is not None and self.eval.judge.kind == "verifier":
            raise ValueError(
                "eval.judge.kind: got 'verifier', which judges steps; expected base, model or"
                " endpoint"
            )
        if self.eval.vote and not isinstance(self.task, Maths):
            raise ValueError(
                f"eval.vote: got true for task {self.task.name!r}, expected gsm8k, svamp or mathqa:"
                " others have no one answer"
            )
        if not searched and self.eval.judge is not None:
            raise ValueError(
                f"eval.judge: got a judge for task {self.task.name!r}, expected none: its verifier"
                " is exact"
            )
        if (searched or calls) and self.eval.tries == 2:
            raise ValueError(
                f"eval.tries: got 2 for task {self.task.name!r}, expected 1: searches and tool"
                " calls are not reflected on"
            )
        return self

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        for n, stage in enumerate(self.stages):
            before = self.stages[n - 1] if n else None
            collected = isinstance(before, Collect) and before.method == "stepwise"
            if isinstance(stage, Filter) and not collected and stage.source is None:
                raise ValueError(
                    f"stages[{n}]: got a filter without trajectories, expected a stepwise collect"
                    " stage before it, or a `source`"
                )
            if (
                isinstance(stage, Filter)
                and stage.judge is not None
                and stage.outcome == "judge"
                and not isinstance(self.task, QA)
            ):
                raise ValueError(
                    f"stages[{n}].outcome: got 'judge' for task {self.task.name!r}, expected"
                    " verifier: it is exact"
                )
            if isinstance(stage, Train):
                kept = collected or isinstance(before, Filter)
                if kept != (stage.method in ("step", "imitate")):
                    raise ValueError(
                        f"stages[{n}].method: got {stage.method!r}; step and imitate stand after a"
                        " filter or a stepwise collect stage, and only they do"
                    )
        return self

    @model_validator(mode="after")
    def _check_kept(self) -> Self:
        for number, stage in enumerate(self.stages):
            if isinstance(stage, RewardModel):
                wanted, got = "all", f"stages[{number}].kind: got 'reward_model'"
            elif isinstance(stage, Train) and stage.examples != "demonstrations":
                wanted, got = "passed", f"stages[{number}].examples: got {stage.examples!r}"
            else:
                continue
            before = self.stages[number - 1] if number else None
            if not isinstance(before, Collect) or before.keep != wanted:
                raise ValueError(
                    f"{got}, expected a collect stage with keep {wanted!r} right before it"
                )
        return self

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
        each = {
            "reflect": limits.reflection_tokens + limits.attempt_tokens,
            "stepwise": limits.stepwise.steps * limits.attempt_tokens,
            **dict.fromkeys(("single", "self_train", "search", "step"), limits.attempt_tokens),
        }.get(stage.method, 0)
        if isinstance(stage, Collect):
            most = each * stage.problems * stage.samples
        else:
            most = each * stage.steps * stage.batch * stage.group
            if stage.method == "reflect" and not (
                number and isinstance(self.stages[number - 1], Collect)
            ):
                most += (
                    limits.attempt_tokens * stage.steps * stage.batch * stage.attempts
                )  # on line: first tries that may fail
        return f", at most {most / 1e6:.3g} M sampled tokens" if most else ""
