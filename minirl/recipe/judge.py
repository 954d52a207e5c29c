"""The judge of a recipe: which model says whether an answer means what the gold answer means, and how it is reached."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from minirl.recipe.base import Frozen


class Judge(Frozen):
    """A language model as a judge. Judging is greedy."""

    kind: Literal["base", "endpoint"]
    """base: the run's own model without its adapter. endpoint: a server that speaks OpenAI's chat completions."""
    url: str | None = Field(None, pattern=r"^https?://[^\s/?#]\S*$")
    """endpoint: the address that is posted to, e.g. `http://127.0.0.1:8000/v1/chat/completions`."""
    model: str | None = None
    """endpoint: the name that the server knows its model by."""
    key_env: str | None = None
    """endpoint: the environment variable that holds the key, where the server wants one."""
    max_tokens: PositiveInt = 256
    """Most tokens of a verdict with its rationale."""
    timeout_s: PositiveFloat = 60.0
    """endpoint: longest wait for a whole answer."""
    retries: NonNegativeInt = 3
    """endpoint: how often to ask again when no answer comes or the server is at fault; the pause is 1 s, then twice as long each time."""
    concurrency: PositiveInt = 8
    """endpoint: most requests under way at once."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("url", "model"):
            if (getattr(self, name) is None) == (self.kind == "endpoint"):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} for kind {self.kind!r}; kind endpoint needs it, and only that has it"
                )
        return self
