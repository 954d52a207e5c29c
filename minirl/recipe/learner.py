"""The learner of a stage: one loss with switches, and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from minirl.recipe.base import Frozen, NonNegative, Probability

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
