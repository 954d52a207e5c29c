"""The learner of a stage: one loss with switches, and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from minirl.recipe.base import Frozen, NonNegative, Probability

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300: group mean and std, per-sample mean.
    "grpo": {},
    # arXiv 2503.20783: no std, one constant denominator.
    "dr_grpo": {"scale": "none", "aggregate": "constant"},
    # arXiv 2503.14476: token mean, clip-higher, no KL, overlong filtering.
    "dapo": {"aggregate": "token", "clip_high": 0.28, "beta": 0.0, "drop_overlong": True},
    # arXiv 2507.18071: sequence-level ratio with its far smaller clip range.
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    # arXiv 2402.14740: leave-one-out baseline; the sequence is one action, so its token gradients
    # are summed, not averaged.
    "rloo": {"baseline": "leave_one_out", "scale": "none", "aggregate": "constant"},
    # Williams 1992: the reward is the advantage, no clipping.
    "reinforce": {
        "baseline": "none",
        "scale": "none",
        "clip_low": None,
        "clip_high": None,
        "beta": 0.0,
    },
    # arXiv 1707.06347 as ReFT (2401.08967, section 3.2) has it: a value head in place of the group,
    # the KL inside the reward.
    "ppo": {"baseline": "none", "scale": "none", "beta": 0.05, "passes": 2},
    # Negative log-likelihood of the trained tokens (SFT): episodes need no reward.
    "nll": {"aggregate": "token", "beta": 0.0},
}


PPO_ALONE = (
    "value_lr",
    "value_coef",
    "value_clip",
    "value_detach",
    "value_warmup",
    "value_lambda",
    "gamma",
    "gae_lambda",
)


class Learner(Frozen):
    """One loss with switches. `loss` names a preset; any number written beside it overrides the
    preset's."""

    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce", "ppo", "nll"] = "grpo"
    """The preset; nll is SFT's, ppo the one with a value head."""
    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    """What is subtracted from a reward: the group's mean, the mean of the others, nothing."""
    scale: Literal["std", "none"] = "std"
    """Divide advantages by the group's standard deviation, or not."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or the geometric mean over a sequence (GSPO)."""
    aggregate: Literal["sequence", "token", "constant"] = "sequence"
    """Mean over each episode's tokens and then over episodes; over all tokens of the step; or over
    episodes x the token limit."""
    clip_low: NonNegative | None = 0.2
    """The ratio is clipped below at 1 - clip_low; None for no clipping on that side."""
    clip_high: NonNegative | None = 0.2
    """The ratio is clipped above at 1 + clip_high; None for no clipping on that side."""
    beta: NonNegative = 0.001
    """Weight of the k3 estimate of KL(policy || reference); under ppo, of the penalty log(policy /
    reference) that is taken off the reward of each trained token. 0 leaves the reference out of the
    step."""
    entropy: float = 0.0
    """Weight of an entropy bonus."""
    drop_overlong: bool = False
    """Leave episodes that were cut by their token limit out of the loss (DAPO). Without it a cut
    episode is one that ended: it is trained with the reward that its verifier gave, and under ppo
    nothing is expected to come after the cut."""
    sampled_share: Probability | None = None
    """self_train: share of the loss that falls on what was sampled in the step, the rest falling on
    demonstrations (ReFT's online self-training: 0.5); None: every trained token counts alike."""
    gamma: Probability = 1.0
    """ppo: discount of rewards to come, a token."""
    gae_lambda: Probability = 0.95
    """ppo: GAE's lambda of the advantages; 1 takes whole returns, 0 only the next value."""
    value_lambda: Probability = 1.0
    """ppo: lambda of the returns that the value head learns, apart from that of the advantages
    (decoupled GAE: VC-PPO, arXiv 2503.01491). 1 takes whole returns: below it a head that starts at
    0 is taught its own zeros, the more of them the longer the chain."""
    value_coef: NonNegative = 5.0
    """ppo: weight of the value loss beside the policy's. It is for the trunk: under AdamW the
    head's own step hardly depends on it."""
    value_clip: PositiveFloat | None = 0.2
    """ppo: a value is trained no further than this from what it was before the step; None for no
    clipping. With `value_lr` 0.05 it hardly binds in 2 passes of 1 minibatch: the second update
    sees values that one update has moved by about 0.1 at most."""
    value_lr: PositiveFloat = 0.05
    """ppo: learning rate of the value head, the same at every step; one update of the head moves a
    value by about twice as much at most (see minirl/engine/model/value_head.py). Its optimizer is
    AdamW in float32, without weight decay."""
    value_detach: bool = False
    """ppo: keep the value loss out of the trunk, so that the adapter learns from the policy's loss
    alone."""
    value_warmup: NonNegativeInt = 0
    """ppo: steps of the stage in which only the value head learns; the adapter's schedule starts
    after them."""
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
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """AdamW's decay rates."""
    grad_clip: PositiveFloat = 1.0
    """Largest norm of the adapter's whole gradient; and, apart from it, of the value head's."""
    passes: PositiveInt = 1
    """How often a step's episodes are gone through."""
    minibatches: PositiveInt = 1
    """Optimizer updates a pass: a step's groups are split into this many."""
    micro_tokens: PositiveInt = 8192
    """Most padded tokens in one forward pass; halved by itself when a GPU runs out of memory. Does
    not change the gradient."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {**PRESETS.get(str(data.get("loss", "grpo")), {}), **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.loss != "nll" and self.sampled_share is not None:
            raise ValueError(
                f"sampled_share: got {self.sampled_share}, which loss {self.loss!r} does not use;"
                " only loss 'nll' does"
            )
        if self.loss == "ppo":
            for name in ("baseline", "scale"):
                if getattr(self, name) != "none":
                    raise ValueError(
                        f"{name}: got {getattr(self, name)!r}, expected none: under loss 'ppo' the"
                        " value head is the baseline"
                    )
        else:
            for name in PPO_ALONE:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}: got {getattr(self, name)}, which loss {self.loss!r} does not use;"
                        " only loss 'ppo' does"
                    )
        return self

    @property
    def penalises_loss(self) -> bool:
        """Whether the KL to the reference is a term of the loss (and not of the reward, nor left
        out)."""
        return self.beta > 0 and self.loss != "ppo"
