"""How the model writes: token limits, temperature, and the tags of method stepwise."""

from __future__ import annotations

import re
from typing import Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from minirl.recipe.base import Frozen


class Stepwise(Frozen):
    """How an action is written, and how many there can be (SWiRL, arXiv 2504.04736). The task says
    which tool there is: a search, or a calculator."""

    steps: PositiveInt = 5
    """Most actions of an episode, the answer among them (SWiRL: 5 for questions, 10 for maths)."""
    query: str = "search_query"
    """The tag around a search query."""
    expression: str = "math_exp"
    """The tag around an expression for the calculator."""
    answer: str = "answer"
    """The tag around the answer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        tags = {"query": self.query, "expression": self.expression, "answer": self.answer}
        for name, value in tags.items():
            if not re.fullmatch(r"[a-z][a-z0-9_-]*", value):
                raise ValueError(
                    f"{name}: got {value!r}, expected a tag's name in small letters, such as answer"
                )
        if len(set(tags.values())) < len(tags):
            raise ValueError(f"got the tags {', '.join(tags.values())}, expected three that differ")
        return self


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
