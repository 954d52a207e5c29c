"""The stages of a recipe: what is played, what is kept, what is trained."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from minirl.recipe.base import Frozen, Probability
from minirl.recipe.judge import Judge
from minirl.recipe.learner import Learner

SHOWN = ("demonstrate", "demonstrate_stepwise", "imitate")
"""The methods of SFT: nothing is sampled."""
IMITATING = (*SHOWN, "self_train")
"""Methods that raise the likelihood of right answers, whoever wrote them (loss nll)."""


class Collect(Frozen):
    """Play problems with frozen weights and keep some episodes: they are the next stage's
    problems."""

    kind: Literal["collect"]
    """Names this kind of stage."""
    method: Literal["single", "stepwise"] = "single"
    """single: one attempt. stepwise: trajectories of one action a turn (SWiRL)."""
    problems: PositiveInt = 1024
    """How many training problems to play."""
    samples: PositiveInt = 1
    """Attempts a problem (R3: up to 64)."""
    keep: Literal["failed", "passed", "all"] = "failed"
    """Which episodes to keep. passed: right ones that ended by themselves; one that the token limit
    cut would teach never to end."""
    keep_each: PositiveInt = 1
    """Most distinct episodes to keep of one problem."""
    temperature: PositiveFloat = 1.0
    """Of the attempts (R3's is not stated; 0.9 is likely)."""
    batch: PositiveInt = 64
    """Problems between two saves of the stage's progress."""


class Filter(Frozen):
    """Judge the trajectories of a collect stage and keep some of them (SWiRL, arXiv 2504.04736):
    they are the next stage's."""

    kind: Literal["filter"]
    """Names this kind of stage."""
    keep: Literal["none", "process", "outcome", "both"] = "process"
    """Which filter. none: all are kept. process: the judge approves every step, without the gold
    answer. outcome: the final answer is right. both: both."""
    judge: Judge | None = None
    """Who judges the steps; needed by process and both. With outcome and none it is asked for the
    rates alone."""
    outcome: Literal["verifier", "judge"] = "verifier"
    """Who says that an answer is right: the task's verifier, or the judge, shown the gold answers.
    """
    source: str | None = None
    """Folder of an earlier run whose last collect stage's trajectories are taken; None for the
    collect stage before this one."""
    parts: PositiveInt = 20
    """In how many parts the trajectories are judged; progress is saved after each."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.judge is None and (self.keep in ("process", "both") or self.outcome == "judge"):
            raise ValueError(
                f"judge: got none with keep {self.keep!r} and outcome {self.outcome!r}, expected"
                " one, e.g. judge: {kind: base}"
            )
        if self.judge is not None and self.judge.gold:
            raise ValueError(
                "judge.gold: got true, expected false: a process filter never sees the gold answer"
            )
        if self.judge is not None and self.judge.kind == "verifier" and self.outcome == "judge":
            raise ValueError(
                "outcome: got 'judge' with judge.kind 'verifier', which are rules for steps;"
                " expected outcome: verifier"
            )
        return self


class Train(Frozen):
    """Play groups, score them, update the adapter."""

    kind: Literal["train"]
    """Names this kind of stage."""
    method: Literal[
        "single",
        "reflect",
        "search",
        "demonstrate",
        "self_train",
        "stepwise",
        "step",
        "demonstrate_stepwise",
        "imitate",
    ]
    """single: one attempt. reflect: a reflection on a failed attempt, then a retry. search:
    thoughts, searches and an answer (ReSearch).
    demonstrate: gold solutions, or for a question-answering task searches that lead to the answer
    (SFT). self_train: attempts, of which the right ones are trained, and beside each problem's its
    gold solution (ReFT's online self-training). stepwise: whole trajectories of one action a turn.
    step: one new action at each state of the trajectories that were kept, scored by `judge`
    (SWiRL).
    demonstrate_stepwise: gold trajectories (SFT). imitate: the kept trajectories' own actions,
    state by state (SFT)."""
    steps: NonNegativeInt
    """Steps: each plays `batch` groups and updates the adapter. 0 leaves the stage out, e.g. a
    warm-up that `model.adapter` has had."""
    group: PositiveInt = 8
    """Episodes that share a problem (and, for reflect, one failed attempt)."""
    batch: PositiveInt = 16
    """Groups a step."""
    attempts: PositiveInt = 4
    """reflect without a collect stage before it: most attempts drawn for each failure that the
    batch needs."""
    train_all: bool = False
    """reflect: train the retry along with the reflection (the paper trains the reflection alone).
    """
    reflections: Probability = 0.0
    """demonstrate: share of the examples that show a failed attempt, a reflection and a right
    retry."""
    examples: Literal["demonstrations", "kept", "both"] = "demonstrations"
    """demonstrate after a collect stage: gold solutions of the problems that it kept; the kept
    samples themselves, token by token; or gold solutions of all the task's problems and the kept
    samples in one pool (ReFT's offline self-training)."""
    judge: Judge | None = None
    """step, and credit by step: who scores the actions."""
    credit: Literal["episode", "step"] = "episode"
    """search and stepwise: every action gets the episode's reward, or its own score, the judge's
    (see credit.advantages)."""
    states: PositiveInt | None = None
    """step and imitate: most states to train on, a seeded choice among all; None for all. For
    filters compared at equal numbers."""
    learner: Learner = Learner()
    """The loss and the optimizer."""

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.credit == "step" and (
            self.method not in ("search", "stepwise") or self.learner.loss == "ppo"
        ):
            got = f"method {self.method!r} and loss {self.learner.loss!r}"
            raise ValueError(
                f"credit: got 'step' with {got}, expected method search or stepwise and a loss with"
                " a group baseline"
            )
        if (self.judge is None) == (self.method == "step" or self.credit == "step"):
            got = "none" if self.judge is None else "one"
            raise ValueError(
                f"judge: got {got} with method {self.method!r}; method step and credit by step need"
                " one, and only they have it"
            )
        if self.states is not None and self.method not in ("step", "imitate"):
            raise ValueError(
                f"states: got {self.states} with method {self.method!r}, expected method step or"
                " imitate, which train on states"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.learner.loss != "nll" and self.learner.baseline != "none" and self.group < 2:
            raise ValueError(
                f"group: got {self.group}, expected at least 2 for baseline"
                f" {self.learner.baseline!r}"
            )
        if self.learner.loss == "nll" and self.learner.entropy:
            raise ValueError(
                f"learner.entropy: got {self.learner.entropy} with loss 'nll', which has no entropy"
                " bonus; expected 0"
            )
        if (self.method in IMITATING) != (self.learner.loss == "nll"):
            raise ValueError(
                f"method {self.method!r} cannot take loss {self.learner.loss!r};"
                f" {', '.join(IMITATING)} go with nll, and only they do"
            )
        if self.method != "demonstrate" and self.examples != "demonstrations":
            raise ValueError(
                f"examples: got {self.examples!r} with method {self.method!r}; only demonstrate"
                " draws kept samples"
            )
        if self.examples != "demonstrations" and self.reflections:
            raise ValueError(
                f"reflections: got {self.reflections} with examples {self.examples!r}, expected 0:"
                " samples show no reflection"
            )
        return self

    @model_validator(mode="after")
    def _check_learner(self) -> Self:
        node = self.learner
        if self.method == "self_train" and node.minibatches > 1:
            got = f"learner.minibatches: got {node.minibatches} with method 'self_train'"
            raise ValueError(
                f"{got}, expected 1: each update takes attempts and demonstrations together"
            )
        if self.method != "self_train" and node.sampled_share is not None:
            got = f"learner.sampled_share: got {node.sampled_share} with method {self.method!r}"
            raise ValueError(f"{got}; only self_train trains on both kinds in one step")
        if node.minibatches > self.batch:
            raise ValueError(
                f"learner.minibatches: got {node.minibatches} with batch {self.batch}, expected at"
                " most one a group"
            )
        if 0 < self.steps <= node.value_warmup:
            raise ValueError(
                f"learner.value_warmup: got {node.value_warmup} of {self.steps} steps, expected"
                " fewer: the adapter would not learn"
            )
        return self


class RewardModel(Frozen):
    """Train a model that tells right samples from wrong ones on what the collect stage before it
    kept (ReFT, arXiv 2401.08967, section 4).

    A sequence classifier with two labels and a LoRA adapter that starts from the run's own; `minirl
    eval --rerank` picks by it. Begun again from its start where a run is taken up in the middle of
    it, and for one process only.
    """

    kind: Literal["reward_model"]
    """Names this kind of stage."""
    epochs: PositiveInt = 3
    """How often the samples are gone through (ReFT: 3)."""
    batch: PositiveInt = 32
    """Samples an update."""
    micro_batch: PositiveInt = 8
    """Samples in one forward pass: a divisor of `batch`, or more than that."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate; it rises over the first twentieth of the updates and then falls to 0
    along a line."""
    held_out: Probability = 0.1
    """Share of the problems whose samples are kept for accuracy and AUC."""
    balance: bool = True
    """Weigh right and wrong samples alike, however many there are of each; else by their numbers.
    """

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch % min(self.batch, self.micro_batch):
            raise ValueError(
                f"micro_batch: got {self.micro_batch} with batch {self.batch}, expected a divisor"
                " of it"
            )
        return self


Stage = Annotated[Collect | Filter | Train | RewardModel, Field(discriminator="kind")]
