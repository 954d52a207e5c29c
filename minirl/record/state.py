"""state.json: where a run stands, and how its folder is brought back to that point.

Invariant: what state.json does not name never happened. Opening a folder cuts every append-only
file back to the length it records and drops what it does not name; where it is missing nothing is
dropped at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from minirl.errors import UserError
from minirl.io.files import compact

NAMES = ("metrics", "timings", "episodes", "evals")
CHECKPOINT = re.compile(r"\d{2,}-\d{6,}b*")


@dataclass(frozen=True, slots=True)
class Position:
    """The next thing to do: the number of a stage, and how many of its steps (or collect chunks)
    are done."""

    stage: int = 0
    step: int = 0


@dataclass(slots=True)
class State:
    """What state.json holds. checkpoints: those that stay, oldest first; best: the name and score
    of the best of them."""

    position: Position = Position()
    finished: bool = False
    weights: str | None = None
    best: tuple[str, float] | None = None
    checkpoints: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the state file."""
        position = {"stage": self.position.stage, "step": self.position.step}
        best = None if self.best is None else {"checkpoint": self.best[0], "score": self.best[1]}
        rest = {
            name: getattr(self, name) for name in ("finished", "weights", "checkpoints", "sizes")
        }
        return {"position": position, "best": best, **rest}

    def text(self) -> str:
        """The contents of state.json."""
        return compact(self.to_json()).decode() + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """UserError unless the file is one that `to_json` wrote."""
        try:
            row = json.loads(path.read_bytes())
            position = Position(int(row["position"]["stage"]), int(row["position"]["step"]))
            best = (
                None
                if row["best"] is None
                else (str(row["best"]["checkpoint"]), float(row["best"]["score"]))
            )
            weights = None if row["weights"] is None else str(row["weights"])
            sizes = {str(name): int(size) for name, size in row["sizes"].items()}
            return cls(
                position,
                bool(row["finished"]),
                weights,
                best,
                [str(name) for name in row["checkpoints"]],
                sizes,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = (
                f"{path}: not a run's state ({type(error).__name__}: {error}); restore the file, or"
                " delete the folder and run again"
            )
            raise UserError(message) from error


def read_state(folder: Path) -> State:
    """A folder's state; a fresh one only where nothing can have been saved yet, because what a
    state does not name is dropped.

    Raises UserError for a damaged state.json, or where it is gone and a run's rows or checkpoints
    are not.
    """
    path = folder / "state.json"
    if path.exists():
        return State.read(path)
    if orphans := [
        *append_only(folder),
        *(f"checkpoints/{p.name}" for p in folder.glob("checkpoints/*")),
    ]:
        raise UserError(
            f"{path}: missing, yet {orphans[0]} is there; restore the file, or delete the folder"
            " and run again"
        )
    return State()


def check_files(folder: Path, state: State) -> None:
    """What state.json counts on must be there."""
    for name, size in state.sizes.items():
        got = (folder / name).stat().st_size if (folder / name).exists() else 0
        if got < size:
            raise UserError(
                f"{folder / name}: has {got} bytes, state.json counts on {size}; restore it, or"
                f" delete {folder} and run again"
            )
    if state.weights is not None and not (folder / "checkpoints" / state.weights).is_dir():
        where = folder / "checkpoints" / state.weights
        raise UserError(
            f"{where}: missing, state.json names it; restore it, or delete {folder} and run again"
        )


def restore(folder: Path, state: State) -> None:
    """Undo everything that happened after state.json was written."""
    for name in append_only(folder):
        if size := state.sizes.get(name, 0):
            os.truncate(folder / name, size)
        else:
            (folder / name).unlink()
    temps = [*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")]
    unnamed = [
        p
        for p in folder.glob("checkpoints/*")
        if CHECKPOINT.fullmatch(p.name) and p.name not in state.checkpoints
    ]
    for path in temps + unnamed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def append_only(folder: Path) -> list[str]:
    """The append-only files that are there, as paths below the folder."""
    kept = sorted(path.name for path in (folder / "kept").glob("*.jsonl"))
    return [n for n in (f"{name}.jsonl" for name in NAMES) if (folder / n).exists()] + [
        f"kept/{name}" for name in kept
    ]
