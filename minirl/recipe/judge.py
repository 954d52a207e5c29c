"""Judges in a recipe: who says whether an answer is right or a step good."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from minirl.recipe.base import Dtype, Frozen, Probability

# Which kinds have a key; those of the first line cannot do without it.
_NEEDED = {"url": ("endpoint",), "model": ("endpoint", "model")}
_ALLOWED = {
    "key_env": ("endpoint",),
    "quantize": ("model",),
    "dtype": ("model",),
    "gold": ("verifier",),
}


class Other(Frozen):
    """How another model is reached."""

    kind: str
    """Where it is."""
    url: str | None = Field(None, pattern=r"^https?://[^\s/?#]\S*$")
    """endpoint: the address that is posted to, e.g. `http://127.0.0.1:8000/v1/chat/completions`."""
    model: str | None = None
    """endpoint: the name that the server knows its model by. model: a hub id, a local folder or
    `smollm2-135m`."""
    key_env: str | None = None
    """endpoint: the environment variable that holds the key, where the server wants one."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """model: bitsandbytes quantisation of its weights."""
    dtype: Dtype = "auto"
    """model: what it computes in; auto takes the fastest that the device does well."""
    timeout_s: PositiveFloat = 60.0
    """endpoint: longest wait for a whole answer."""
    retries: NonNegativeInt = 3
    """endpoint: how often to ask again when no answer comes or the server is at fault; the pause is
    1 s, then twice as long each time."""
    concurrency: PositiveInt = 8
    """endpoint: most requests under way at once, of each process."""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        for name, kinds in _NEEDED.items():
            if (getattr(self, name) is None) == (self.kind in kinds):
                needs = " and ".join(f"kind {kind}" for kind in kinds)
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} for kind {self.kind!r}; {needs} needs it,"
                    " and only that has it"
                )
        for name, kinds in _ALLOWED.items():
            if (
                name in type(self).model_fields
                and self.kind not in kinds
                and getattr(self, name) != type(self).model_fields[name].default
            ):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} for kind {self.kind!r}, expected it for"
                    f" kind {kinds[0]} alone"
                )
        return self


class Judge(Other):
    """A language model as a judge, or rules in its place. Judging is greedy."""

    kind: Literal["base", "model", "endpoint", "verifier"]
    """base: the run's own model without its adapter. model: another local model. endpoint: a server
    that speaks OpenAI's chat completions.
    verifier: rules in place of a model, for steps alone (see rules.py)."""
    verdict: Literal["words", "probability"] = "words"
    """Of a step. words: the judge explains itself and ends in GOOD or BAD. probability: nothing is
    sampled; its probability of GOOD against BAD, from its own logits (not for an endpoint): a
    smoother reward, and far cheaper."""
    approve_at: Probability = 0.5
    """probability: a step is approved from this on."""
    gold: bool = False
    """verifier: approve an answer when it is right, not when what the tool said supports it, and a
    call only if it gets something that the gold solution needs. Not for a process filter, which
    never sees the gold answer."""
    max_tokens: PositiveInt = 256
    """Most tokens of a verdict with its rationale."""

    @model_validator(mode="after")
    def _check_verdict(self) -> Self:
        if self.verdict == "probability" and self.kind in ("endpoint", "verifier"):
            raise ValueError(
                f"verdict: got 'probability' for kind {self.kind!r}, expected a judge whose logits"
                " are here: base or model"
            )
        return self
