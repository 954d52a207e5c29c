"""The stages of a recipe: what is played, what is kept, what is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from minirl.recipe.base import Check, Frozen, Probability, refuse
from minirl.recipe.judge import Judge
from minirl.recipe.learner import Learner
from minirl.recipe.methods import METHODS, MethodFacts, facts_of, method_for

_OPTIONS = sorted({option for facts in METHODS.values() for option in facts.options})


class Collect(Frozen):
    """Play problems with frozen weights and keep some episodes: they are the next stage's
    problems."""

    kind: Literal["collect"]
    """Names this kind of stage."""
    method: Annotated[str, method_for("collect")] = "single"
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

    @property
    def facts(self) -> MethodFacts:
        """Those of its method."""
        return facts_of(self.method)


class Filter(Frozen):
    """Judge the trajectories of a collect stage and keep some of them for the next stage (SWiRL,
    arXiv 2504.04736)."""

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
        judge, asked = self.judge, self.keep in ("process", "both") or self.outcome == "judge"
        refuse(
            [
                (
                    "judge",
                    judge is None and asked,
                    f"none with keep {self.keep!r} and outcome {self.outcome!r}",
                    "one, e.g. judge: {kind: base}",
                ),
                (
                    "judge.gold",
                    judge is not None and judge.gold,
                    "true",
                    "false: a process filter never sees the gold answer",
                ),
                (
                    "outcome",
                    judge is not None and judge.kind == "verifier" and self.outcome == "judge",
                    "'judge' with judge.kind 'verifier', which are rules for steps",
                    "outcome: verifier",
                ),
            ]
        )
        return self


class Train(Frozen):
    """Play groups, score them, update the adapter."""

    kind: Literal["train"]
    """Names this kind of stage."""
    method: Annotated[str, method_for("train")]
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

    @property
    def facts(self) -> MethodFacts:
        """Those of its method."""
        return facts_of(self.method)

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self._checks_of_learner())
        if self.method in METHODS:
            self.check_method(METHODS[self.method])
        return self

    def check_method(self, facts: MethodFacts) -> None:
        """Raises ValueError for what does not go with a method of such facts."""
        refuse((*self._checks_of_options(facts), *self._checks_of_loss(facts)))

    def _checks_of_options(self, facts: MethodFacts) -> Iterator[Check]:
        method, by_step = f"with method {self.method!r}", self.credit == "step"
        loss = self.learner.loss
        yield (
            "credit",
            by_step and (not facts.actions or facts.needs_judge or loss == "ppo"),
            f"'step' {method} and loss {loss!r}",
            "method search or stepwise and a loss with a group baseline",
        )
        yield (
            "judge",
            (self.judge is None) == (facts.needs_judge or by_step),
            f"{'none' if self.judge is None else 'one'} {method}",
            "one with method step and with credit by step, and only there",
        )
        yield (
            "states",
            self.states is not None and facts.starts_from != "states",
            f"{self.states} {method}",
            "method step or imitate, which train on states",
        )
        for name in _OPTIONS:
            value, usual = getattr(self, name), type(self).model_fields[name].default
            takers = [other for other, of in METHODS.items() if name in of.options]
            yield (
                name,
                value != usual and name not in facts.options,
                f"{value} {method}",
                f"{usual}: only {' and '.join(takers)} takes it",
            )
        kept = self.examples != "demonstrations"
        yield (
            "examples",
            kept and not facts.replays,
            f"{self.examples!r} {method}",
            "demonstrations: only demonstrate shows kept samples",
        )
        yield (
            "reflections",
            kept and self.reflections > 0,
            f"{self.reflections} with examples {self.examples!r}",
            "0: samples show no reflection",
        )

    def _checks_of_loss(self, facts: MethodFacts) -> Iterator[Check]:
        method, loss = f"with method {self.method!r}", self.learner.loss
        likely = [name for name, of in METHODS.items() if of.takes_nll]
        yield (
            "learner.loss",
            facts.takes_nll != (loss == "nll"),
            f"{loss!r} {method}",
            f"nll with {', '.join(likely)}, and only with them",
        )
        yield (
            "learner.minibatches",
            facts.shows_gold and self.learner.minibatches > 1,
            f"{self.learner.minibatches} {method}",
            "1: each update takes attempts and demonstrations together",
        )
        yield (
            "learner.sampled_share",
            not facts.shows_gold and self.learner.sampled_share is not None,
            f"{self.learner.sampled_share} {method}",
            "none: only self_train trains on samples and demonstrations in one step",
        )

    def _checks_of_learner(self) -> Iterator[Check]:
        learner, is_nll = self.learner, self.learner.loss == "nll"
        yield (
            "group",
            not is_nll and learner.baseline != "none" and self.group < 2,
            self.group,
            f"at least 2 for baseline {learner.baseline!r}",
        )
        yield (
            "learner.entropy",
            is_nll and learner.entropy != 0,
            f"{learner.entropy} with loss 'nll', which has no entropy bonus",
            "0",
        )
        yield (
            "learner.minibatches",
            learner.minibatches > self.batch,
            f"{learner.minibatches} with batch {self.batch}",
            "at most one a group",
        )
        yield (
            "learner.value_warmup",
            0 < self.steps <= learner.value_warmup,
            f"{learner.value_warmup} of {self.steps} steps",
            "fewer: the adapter would not learn",
        )


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
