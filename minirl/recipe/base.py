"""The base of every part of a recipe. It is immutable, and refuses an unknown key with the nearest
known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
NonNegative = Annotated[float, Field(ge=0.0)]
Check = tuple[str, bool, object, str]
"""Where, whether it is wrong there, what was got, what is expected."""


def refuse(checks: Iterable[Check]) -> None:
    """Raises ValueError for the first check that is wrong."""
    for where, wrong, got, expected in checks:
        if wrong:
            raise ValueError(f"{where}: got {got}, expected {expected}")


class Frozen(BaseModel):
    """Base of every part."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                    hint = (
                        f"the nearest known key is {near[0]!r}"
                        if near
                        else f"expected one of {', '.join(cls.model_fields)}"
                    )
                    raise ValueError(f"unknown key {str(key)!r}; {hint}")
        return data
