"""A recipe: the only place a number is written.

A frozen pydantic tree read from YAML. Invariant: what a run does is a function of its resolved recipe alone, and an unknown key is
refused with its path and the nearest known key, never ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from minirl.errors import UserError

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


class Frozen(BaseModel):
    """Base of every node: immutable, and unknown keys are refused with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.0)
                    raise ValueError(f"unknown key {str(key)!r}; the nearest known key is {near[0]!r}")
        return data


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
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What the model computes in; auto takes the fastest that the device does well."""
    lora: Lora = Lora()
    """The adapter that is trained."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    adapter: str | None = None
    """Folder of a peft adapter to start from, e.g. `runs/a/adapter`."""


class CountdownCredit(Frozen):
    """Score of a wrong Countdown answer by error kind; a right one scores 1 (TinyZero gives 0.1 to the last two)."""

    invalid_equation: Probability = 0.0
    """No answer, or one that is no expression of whole numbers, the allowed operators and brackets."""
    wrong_numbers: Probability = 0.0
    """An expression that does not use each given number exactly once."""
    missed_target: Probability = 0.0
    """The right numbers with another value than the target."""


class Countdown(Frozen):
    """Reach a target with each given number exactly once."""

    name: Literal["countdown"]
    """Names this task."""
    source: str = "generate"
    """`generate` makes seeded problems; else a hub id (`Jiayi-Pan/Countdown-Tasks-3to4`) or a local file with columns `nums, target`."""
    numbers: tuple[PositiveInt, ...] = (3, 4)
    """How many numbers a generated problem has: one of these, evenly."""
    high: PositiveInt = 99
    """Generated numbers lie between 1 and this."""
    target_high: PositiveInt = 99
    """Generated targets lie between 1 and this."""
    operators: str = "+-*/"
    """The operators that generated solutions use and the prompt allows."""
    train: PositiveInt = 4096
    """How many training problems to make or take."""
    held_out: PositiveInt = 200
    """How many problems are kept for evaluation; disjoint from training as multisets of numbers + target."""
    credit: CountdownCredit = CountdownCredit()
    """Partial credit by error kind."""


class FunctionCallingCredit(Frozen):
    """Score of a wrong function call by error kind; a right one scores 1."""

    format: Probability = 0.0
    """No call that can be read."""
    tool: Probability = 0.0
    """Calls of other tools than the right ones, or too few or too many."""
    parameter: Probability = 0.0
    """The right tools with a wrong parameter name or value."""


class FunctionCalling(Frozen):
    """Call the right tools with the right arguments; rows in the xLAM schema (`query, tools, answers`)."""

    name: Literal["function_calling"]
    """Names this task."""
    source: str = "Salesforce/xlam-function-calling-60k"
    """A hub id, or a local JSON, JSONL or Parquet file with the columns `query, tools, answers`."""
    train: PositiveInt = 48_000
    """Most rows to train on."""
    held_out: PositiveInt = 200
    """How many rows are kept for evaluation; no query of theirs is trained on."""
    max_tools: PositiveInt = 20
    """Rows that offer more tools than this are left out and counted."""
    credit: FunctionCallingCredit = FunctionCallingCredit()
    """Partial credit by error kind."""


Task = Annotated[Countdown | FunctionCalling, Field(discriminator="name")]


class Sampling(Frozen):
    """How completions are sampled. No top-k or top-p: they bias every importance ratio."""

    temperature: PositiveFloat = 1.0
    """Of the policy in training; the loss scores tokens under the same temperature."""
    attempt_tokens: PositiveInt = 512
    """Most tokens of an attempt or a retry."""
    reflection_tokens: PositiveInt = 256
    """Most tokens of a reflection."""
    rows: PositiveInt = 64
    """Most completions decoded together."""


PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300: group mean and std, per-sample mean.
    "grpo": {},
    # arXiv 2503.20783: no std, one constant denominator.
    "dr_grpo": {"scale": "none", "aggregate": "constant"},
    # arXiv 2503.14476: token mean, clip-higher, no KL, overlong filtering.
    "dapo": {"aggregate": "token", "clip_high": 0.28, "beta": 0.0, "drop_overlong": True},
    # arXiv 2507.18071: sequence-level ratio with its far smaller clip range.
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    # arXiv 2402.14740: leave-one-out baseline; the sequence is one action, so its token gradients are summed, not averaged.
    "rloo": {"baseline": "leave_one_out", "scale": "none", "aggregate": "constant"},
    # Williams 1992: the reward is the advantage, no clipping.
    "reinforce": {"baseline": "none", "scale": "none", "clip_low": None, "clip_high": None, "beta": 0.0},
    # Negative log-likelihood of the trained tokens (SFT): episodes need no reward.
    "nll": {"aggregate": "token", "beta": 0.0},
}


class Learner(Frozen):
    """One loss with switches. `loss` names a preset; any number written beside it overrides the preset's."""

    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce", "nll"] = "grpo"
    """The preset; nll is SFT's."""
    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    """What is subtracted from a reward: the group's mean, the mean of the others, nothing."""
    scale: Literal["std", "none"] = "std"
    """Divide advantages by the group's standard deviation, or not."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or the geometric mean over a sequence (GSPO)."""
    aggregate: Literal["sequence", "token", "constant"] = "sequence"
    """Mean over each episode's tokens and then over episodes; over all tokens of the step; or over episodes x the token limit."""
    clip_low: NonNegative | None = 0.2
    """The ratio is clipped below at 1 - clip_low; None for no clipping on that side."""
    clip_high: NonNegative | None = 0.2
    """The ratio is clipped above at 1 + clip_high; None for no clipping on that side."""
    beta: NonNegative = 0.001
    """Weight of the k3 estimate of KL(policy || reference); 0 leaves the reference out of the step."""
    entropy: float = 0.0
    """Weight of an entropy bonus."""
    drop_overlong: bool = False
    """Leave episodes that were cut by their token limit out of the loss (DAPO)."""
    lr: PositiveFloat = 1e-5
    """Peak learning rate of the adapter."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate goes on after the warm-up: as it is, or down to 0."""
    warmup: Probability = 0.03
    """Share of the stage's optimizer steps over which the learning rate rises from 0."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """torch's AdamW, or bitsandbytes' 8-bit and paged ones."""
    weight_decay: NonNegative = 0.0
    """AdamW's, decoupled from the gradient."""
    betas: tuple[Probability, Probability] = (0.9, 0.99)
    """AdamW's decay rates."""
    grad_clip: PositiveFloat = 1.0
    """Largest norm of the whole gradient."""
    passes: PositiveInt = 1
    """How often a step's episodes are gone through."""
    minibatches: PositiveInt = 1
    """Optimizer updates a pass: a step's groups are split into this many."""
    micro_tokens: PositiveInt = 8192
    """Most padded tokens in one forward pass; halved by itself when a GPU runs out of memory. Does not change the gradient."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {**PRESETS.get(str(data.get("loss", "grpo")), {}), **data}
        return data


class Collect(Frozen):
    """Play problems with frozen weights and keep some episodes: they are the next stage's problems."""

    kind: Literal["collect"]
    """Names this kind of stage."""
    method: Literal["single"] = "single"
    """single: one attempt."""
    problems: PositiveInt = 1024
    """How many training problems to play."""
    samples: PositiveInt = 1
    """Attempts a problem (R3: up to 64)."""
    keep: Literal["failed", "passed", "all"] = "failed"
    """Which episodes to keep."""
    keep_each: PositiveInt = 1
    """Most distinct episodes to keep of one problem."""
    temperature: PositiveFloat = 1.0
    """Of the attempts (R3's is not stated; 0.9 is likely)."""
    batch: PositiveInt = 64
    """Problems between two saves of the stage's progress."""


class Train(Frozen):
    """Play groups, score them, update the adapter."""

    kind: Literal["train"]
    """Names this kind of stage."""
    method: Literal["single", "reflect", "demonstrate"]
    """single: one attempt. reflect: a reflection on a failed attempt, then a retry. demonstrate: gold solutions (SFT)."""
    steps: PositiveInt
    """Steps: each plays `batch` groups and updates the adapter."""
    group: PositiveInt = 8
    """Episodes that share a problem (and, for reflect, one failed attempt)."""
    batch: PositiveInt = 16
    """Groups a step."""
    attempts: PositiveInt = 4
    """reflect without a collect stage before it: most attempts drawn for each failure that the batch needs."""
    train_all: bool = False
    """reflect: train the retry along with the reflection (the paper trains the reflection alone)."""
    reflections: Probability = 0.0
    """demonstrate: share of the examples that show a failed attempt, a reflection and a right retry."""
    learner: Learner = Learner()
    """The loss and the optimizer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.learner.loss != "nll" and self.learner.baseline != "none" and self.group < 2:
            raise ValueError(f"group: got {self.group}, expected at least 2 for baseline {self.learner.baseline!r}")
        if self.learner.loss == "nll" and self.learner.entropy:
            raise ValueError(f"learner.entropy: got {self.learner.entropy} with loss 'nll', which has no entropy bonus; expected 0")
        if (self.method == "demonstrate") != (self.learner.loss == "nll"):
            raise ValueError(f"method {self.method!r} cannot take loss {self.learner.loss!r}; demonstrate goes with nll, and only it does")
        return self


Stage = Annotated[Collect | Train, Field(discriminator="kind")]


class Eval(Frozen):
    """Evaluation on held-out problems: before the first stage, after each train stage, and every so many steps."""

    every: NonNegativeInt = 0
    """Steps between evaluations inside a train stage; 0 for none."""
    problems: PositiveInt = 200
    """How many held-out problems."""
    samples: PositiveInt = 1
    """Independent episodes a problem."""
    tries: Literal[1, 2] = 1
    """2 adds a reflection and a second try after each failed first (R3's four numbers)."""
    temperature: NonNegative = 0.0
    """0 is greedy."""
    start: bool = True
    """Evaluate before the first stage."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples: got {self.samples} at temperature 0, where all are equal; set temperature or expected samples 1")
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

    def dump(self) -> str:
        """The resolved recipe as YAML, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def plan(self) -> str:
        """What a run will do, a line a stage."""
        lines = [f"plan: {self.model.name} on {self.task.name}, seed {self.seed}"]
        for number, stage in enumerate(self.stages):
            if isinstance(stage, Collect):
                made = f"{stage.problems} problems x {stage.samples} attempts, keep {stage.keep} (at most {stage.keep_each} of each)"
                lines.append(f"  {number}  collect  {stage.method}: {made}")
            else:
                loss = f"loss {stage.learner.loss}, lr {stage.learner.lr:g}"
                made = f"{stage.steps} steps of {stage.batch} groups x {stage.group} episodes, {loss}"
                lines.append(f"  {number}  train    {stage.method}: {made}")
        node = self.eval
        when = ["before the first stage"] * node.start + ["after each train stage"] + [f"every {node.every} steps"] * bool(node.every)
        tries = f"{node.problems} held-out problems x {node.samples}, {node.tries} tries, temperature {node.temperature:g}"
        return "\n".join([*lines, f"  evaluation {', '.join(when)}: {tries}"])


def load(path: str | Path, overrides: Sequence[str] = (), *, on_cpu: bool = False) -> Recipe:
    """Read a recipe, lay `on_cpu` over it where asked, then the `a.b=value` overrides.

    Raises UserError for a file that cannot be read, YAML that does not parse, an unknown key or a wrong value, in the `on_cpu` part too.
    """
    try:
        data = _read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the recipe ({error}); expected a YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: got {type(data).__name__}, expected a mapping with the keys model, task, stages")
    cpu_part = data.pop("on_cpu", None)
    if cpu_part is not None and not isinstance(cpu_part, dict):
        raise UserError(f"{path}: on_cpu: got {type(cpu_part).__name__}, expected a mapping")
    if cpu_part:
        laid_over = overlay(data, cpu_part)
        # Also where it is not used: a mistake in it would else come out on another machine.
        parse(laid_over, f"{path} with on_cpu")
        data = laid_over if on_cpu else data
    for text in overrides:
        data = override(data, text)
    return parse(data, str(path))


def parse(data: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from plain data; UserError names `where` and the path of the first wrong value."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, data)}") from error


def overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`: mappings merge key by key, anything else (lists too) is replaced."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = overlay(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def override(data: Mapping[str, Any], text: str) -> dict[str, Any]:
    """`data` with one `a.b=value` set; list items by number (`stages.0.steps=5`), the value read as YAML."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"--set {text}: expected a.b=value")
    try:
        changed: dict[str, Any] = _set(data, path.split("."), _read_yaml(value), text)
        return changed
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--set {text}: the value is not valid YAML ({error})") from error


class _Loader(yaml.SafeLoader):
    """Builds plain data only, and refuses a key that is written twice: the first would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is written twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _set(node: Any, keys: list[str], value: Any, text: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise UserError(f"--set {text}: got {key!r}, expected the number of a list item, 0 to {len(node) - 1}")
        return [*node[: int(key)], _set(node[int(key)], rest, value, text), *node[int(key) + 1 :]]
    if node is not None and not isinstance(node, Mapping):
        raise UserError(f"--set {text}: {key!r} lies under a plain value, {node!r}")
    node = node or {}
    return {**node, key: _set(node.get(key), rest, value, text)}


def _explain(error: ValidationError, data: Any) -> str:
    """The first thing that is wrong, with its path as the user wrote it."""
    first = error.errors()[0]
    path, node = "", data
    for key in first["loc"]:
        if isinstance(node, Mapping) and key not in node and first["type"] != "missing":
            continue  # pydantic names the chosen member of a union; the user wrote no such key
        if isinstance(key, int):
            path += f"[{key}]"
            node = node[key] if isinstance(node, Sequence) and key < len(node) else None
        elif not (isinstance(node, Mapping) and key not in node and key in ("train", "collect", "countdown", "function_calling")):
            path += f".{key}" if path else str(key)
            node = node.get(key) if isinstance(node, Mapping) else None
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] in ("missing", "value_error") else f" (got {str(first['input'])[:80]!r})"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        context = first["ctx"]
        path, got = f"{path}.{context['discriminator'].strip(chr(39))}", ""
        message = "got {tag!r}, expected one of {expected_tags}".format(**context) if "tag" in context else "Field required"
    return f"{path or 'recipe'}: {message}{got}"
