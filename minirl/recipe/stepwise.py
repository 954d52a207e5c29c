"""Method stepwise in a recipe: one action a turn, a tool call or the answer (SWiRL, arXiv
2504.04736)."""

from __future__ import annotations

import re
from typing import Self

from pydantic import PositiveInt, model_validator

from minirl.recipe.base import Frozen


class Stepwise(Frozen):
    """How an action is written, and how many there can be. The task says which tool there is: a
    search, or a calculator."""

    steps: PositiveInt = 5
    """Most actions of an episode, the answer among them (SWiRL: 5 for questions, 10 for maths)."""
    query: str = "search_query"
    """The tag around what is searched for."""
    expression: str = "math_exp"
    """The tag around what the calculator works out."""
    answer: str = "answer"
    """The tag around the answer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = (self.query, self.expression, self.answer)
        for name, value in zip(("query", "expression", "answer"), names, strict=True):
            if not re.fullmatch(r"[a-z][a-z0-9_-]*", value):
                raise ValueError(
                    f"{name}: got {value!r}, expected a tag's name in small letters, such as answer"
                )
        if len(set(names)) < len(names):
            raise ValueError(f"got the tags {', '.join(names)}, expected three that differ")
        return self
