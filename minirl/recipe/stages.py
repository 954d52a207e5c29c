"""The stages of a recipe: what is played, what is kept, what is trained."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from minirl.recipe.base import Frozen, Probability
from minirl.recipe.learner import Learner

IMITATING = ("demonstrate", "self_train")
"""Methods that raise the likelihood of right answers, whoever wrote them (loss nll)."""


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
    method: Literal["single", "reflect", "search", "demonstrate", "self_train"]
    """single: one attempt. reflect: a reflection on a failed attempt, then a retry. search: thoughts, searches and an answer (ReSearch).
    demonstrate: gold solutions, or for a question-answering task searches that lead to the answer (SFT). self_train: attempts, of which the
    right ones are trained, and beside each problem's its gold solution (ReFT's online self-training)."""
    steps: NonNegativeInt
    """Steps: each plays `batch` groups and updates the adapter. 0 leaves the stage out, e.g. a warm-up that `model.adapter` has had."""
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
    examples: Literal["demonstrations", "kept", "both"] = "demonstrations"
    """demonstrate after a collect stage: gold solutions of the problems that it kept; the kept samples themselves, token by token; or gold
    solutions of all the task's problems and the kept samples in one pool (ReFT's offline self-training)."""
    learner: Learner = Learner()
    """The loss and the optimizer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.learner.loss != "nll" and self.learner.baseline != "none" and self.group < 2:
            raise ValueError(f"group: got {self.group}, expected at least 2 for baseline {self.learner.baseline!r}")
        if self.learner.loss == "nll" and self.learner.entropy:
            raise ValueError(f"learner.entropy: got {self.learner.entropy} with loss 'nll', which has no entropy bonus; expected 0")
        if (self.method in IMITATING) != (self.learner.loss == "nll"):
            raise ValueError(
                f"method {self.method!r} cannot take loss {self.learner.loss!r}; {' and '.join(IMITATING)} go with nll, and only they do"
            )
        if self.method != "demonstrate" and self.examples != "demonstrations":
            raise ValueError(f"examples: got {self.examples!r} with method {self.method!r}; only demonstrate draws kept samples")
        if self.examples != "demonstrations" and self.reflections:
            raise ValueError(f"reflections: got {self.reflections} with examples {self.examples!r}, expected 0: samples show no reflection")
        return self


class RewardModel(Frozen):
    """Train a model that tells right samples from wrong ones on what the collect stage before it kept (ReFT, arXiv 2401.08967, section 4).

    A sequence classifier with two labels and a LoRA adapter that starts from the run's own; `minirl eval --rerank` picks by it. Begun again
    from its start where a run is taken up in the middle of it, and for one process only.
    """

    kind: Literal["reward_model"]
    """Names this kind of stage."""
    epochs: PositiveInt = 3
    """How often the samples are gone through (ReFT: 3)."""
    batch: PositiveInt = 32
    """Samples an update."""
    micro_batch: PositiveInt = 8
    """Samples in one forward pass."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate; it rises over the first twentieth of the updates and then falls to 0 along a line."""
    held_out: Probability = 0.1
    """Share of the problems whose samples are kept for accuracy and AUC."""
    balance: bool = True
    """Weigh right and wrong samples alike, however many there are of each; else by their numbers."""


Stage = Annotated[Collect | Train | RewardModel, Field(discriminator="kind")]
