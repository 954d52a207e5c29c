"""A run's folder as others see it, without opening the run (rundir.py): where it stands, what it
began with, and what may be put beside it.

Invariant: nothing here changes what the run itself wrote, or waits for its lock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from minirl.errors import UserError
from minirl.io.files import read_rows, write_rows
from minirl.record.state import Position, read_state

LATER = "later_evals.jsonl"  # what `minirl eval` found


def standing(folder: Path) -> tuple[Position, bool]:
    """Where a run folder stands, and whether the run is finished, without opening it."""
    state = read_state(folder)
    return state.position, state.finished


def weights_of(folder: Path) -> str | None:
    """The fingerprint of the base weights of a run; None where it began with none."""
    found = noted(folder / "model.json", "weights").get("weights")
    return None if found is None else str(found)


def problems_of(folder: Path) -> str | None:
    """The digest of a run's problems; None where it began before any was noted."""
    found = noted(folder / "task.json", "problems").get("problems")
    return None if found is None else str(found)


def noted(path: Path, key: str) -> dict[str, Any]:
    """What a file checked on resume says; nothing where a run has none yet. Raises UserError for
    one that holds something else."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); bring it back, or delete it to go on unchecked"
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get(key), str):
        raise UserError(
            f"{path}: got {str(found)[:60]!r}, expected an object with {key!r}; bring it back, or"
            " delete it to go on unchecked"
        )
    return found


def add_later_eval(folder: Path, row: Mapping[str, Any]) -> None:
    """Put an evaluation that `minirl eval` made beside the run's own, in place of one of the same
    kind. Needs no open run.

    row: as for `Run.log_eval`. Its kind is its `label`, `tries`, `samples`, `temperature`,
    `changed` and number of problems.
    """

    def kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return len(row["problems"]), *(
            row.get(key) for key in ("label", "tries", "samples", "temperature", "changed")
        )

    try:
        with filelock.FileLock(folder / ".evals.lock"):
            others = [old for old in read_rows(folder / LATER) if kind(old) != kind(row)]
            write_rows(folder / LATER, [*others, row])
    except OSError as error:
        raise UserError(
            f"{folder / LATER}: cannot be written ({error}); the evaluation was made but not kept,"
            " mend that and repeat"
        ) from error
