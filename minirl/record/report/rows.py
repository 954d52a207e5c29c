"""The rows of a run that the report shows, checked as they are read.

Invariant: a malformed row is rejected, naming its file and line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from minirl.errors import UserError
from minirl.io.files import read_rows

Rows = Sequence[Mapping[str, Any]]
LARGEST = 1e300  # an int may be larger than any float


class _Row(BaseModel):
    """Any row; of the values not named here, numbers are drawn and others left out."""

    model_config = ConfigDict(extra="allow", strict=True)
    stage: int = 0
    step: int = 0
    label: str | None = None


class _Turn(BaseModel):
    tokens: list[int] | None = None
    logprobs: list[float | None] | None = None


class _Episode(_Row):
    problem: dict[str, Any] | None = None
    turns: list[_Turn] | None = None
    texts: list[str] | None = None
    parts: dict[str, Any] | None = None
    reward: float | None = None


class _Evaluation(_Row):
    tries: int = 1
    samples: int = 1
    temperature: float | None = None
    changed: list[str] | None = None
    problems: list[dict[str, Any]]


_SHAPES: dict[str, type[_Row]] = {
    "episodes": _Episode,
    "evals": _Evaluation,
    "later_evals": _Evaluation,
}


def read_checked(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of `name`.jsonl in a run folder, none if it is absent. Raises UserError for a
    malformed row."""
    path, shape = folder / f"{name}.jsonl", _SHAPES.get(name, _Row)
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        try:
            shape.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}:{number}: {where}: {first['msg']}; mend the line") from error
    return rows


def is_number(value: Any) -> bool:
    """Whether a value can be drawn or added up."""
    return isinstance(value, int | float) and abs(value) <= LARGEST
