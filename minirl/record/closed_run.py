"""A run's folder read without opening the run (run.py): its position, what it began with, and the
evaluations made afterwards.

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
from minirl.record.evals import settings
from minirl.record.state import Position, read_state

LATER = "later_evals.jsonl"  # the evaluations of `minirl eval`


def read_position(folder: Path) -> tuple[Position, bool]:
    """The position of a run, and whether it is finished."""
    state = read_state(folder)
    return state.position, state.finished


def weights_digest(folder: Path) -> str | None:
    """The fingerprint of the base weights that a run began with; None if none was noted."""
    return read_note(folder / "model.json", "weights").get("weights")


def problems_digest(folder: Path) -> str | None:
    """The digest of the problems that a run began with; None if none was noted."""
    return read_note(folder / "task.json", "problems").get("problems")


def read_note(path: Path, key: str) -> dict[str, Any]:
    """The JSON object of a file that is checked on resume, with text under `key`; empty if there is
    no file yet. Raises UserError for a damaged one."""
    if not path.exists():
        return {}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); restore it, or delete it to resume unchecked"
        ) from error
    if not isinstance(note, dict) or not isinstance(note.get(key), str):
        raise UserError(
            f"{path}: got {str(note)[:60]!r}, expected an object with {key!r}; restore it, or"
            " delete it to resume unchecked"
        )
    return note


def add_later_eval(folder: Path, row: Mapping[str, Any]) -> None:
    """Put an evaluation that `minirl eval` made beside the run's own, in place of one of the same
    label, settings and number of problems. Needs no open run. row: as for `Run.log_eval`."""

    def kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row.get("label"), len(row["problems"]), settings(row)

    try:
        with filelock.FileLock(folder / ".evals.lock"):
            others = [old for old in read_rows(folder / LATER) if kind(old) != kind(row)]
            write_rows(folder / LATER, [*others, row])
    except OSError as error:
        raise UserError(
            f"{folder / LATER}: cannot be written ({error}), so this evaluation is lost; make the"
            " folder writable and evaluate again"
        ) from error
