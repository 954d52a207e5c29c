"""state.json: the position of a run, and how its folder is brought back to that point; and the
notes that are checked on resume.

Invariant: what state.json does not name never happened. Opening a folder cuts every append-only
file back to the length recorded there and removes the checkpoints not named there; without a
state.json nothing is removed.
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
    """The contents of state.json. weights: the checkpoint to resume from; best: name and score of
    the best one; checkpoints: all names, oldest first; sizes: bytes of each append-only file."""

    position: Position = Position()
    finished: bool = False
    weights: str | None = None
    best: tuple[str, float] | None = None
    checkpoints: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def text(self) -> str:
        """The text of the file."""
        best = None if self.best is None else {"checkpoint": self.best[0], "score": self.best[1]}
        row = {
            "position": {"stage": self.position.stage, "step": self.position.step},
            "best": best,
            "finished": self.finished,
            "weights": self.weights,
            "checkpoints": self.checkpoints,
            "sizes": self.sizes,
        }
        return compact(row).decode() + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file. Raises UserError for one that `text` did not write."""
        try:
            row = json.loads(path.read_bytes())
            best, weights = row["best"], row["weights"]
            return cls(
                Position(int(row["position"]["stage"]), int(row["position"]["step"])),
                bool(row["finished"]),
                None if weights is None else str(weights),
                None if best is None else (str(best["checkpoint"]), float(best["score"])),
                [str(name) for name in row["checkpoints"]],
                {str(name): int(size) for name, size in row["sizes"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: not a run's state ({type(error).__name__}: {error}); restore the file, or"
                " delete the folder and run again"
            ) from error


def read_state(folder: Path) -> State:
    """The state of a folder; a fresh one only if it holds no rows and no checkpoints, because what
    a state does not name is removed.

    Raises UserError for a damaged state.json, and for rows or checkpoints without one.
    """
    path = folder / "state.json"
    if path.exists():
        return State.read(path)
    checkpoints = [f"checkpoints/{p.name}" for p in folder.glob("checkpoints/*")]
    if orphans := append_only(folder) + checkpoints:
        raise UserError(
            f"{path}: missing, yet {orphans[0]} is there; restore the file, or delete the folder"
            " and run again"
        )
    return State()


def read_note(path: Path, key: str) -> dict[str, Any]:
    """The JSON object of model.json or task.json, with text under `key`; empty if there is no file
    yet. Raises UserError for a damaged one."""
    if not path.exists():
        return {}
    advice = "restore it, or delete it to resume unchecked"
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {advice}") from error
    if not isinstance(note, dict) or not isinstance(note.get(key), str):
        raise UserError(
            f"{path}: got {str(note)[:60]!r}, expected an object with {key!r}; {advice}"
        )
    return note


def check_files(folder: Path, state: State) -> None:
    """Raise UserError unless all rows and weights that the state counts on are there."""
    for name, size in state.sizes.items():
        got = (folder / name).stat().st_size if (folder / name).exists() else 0
        if got < size:
            raise UserError(
                f"{folder / name}: has {got} bytes, state.json counts on {size}; restore it, or"
                f" delete {folder} and run again"
            )
    if state.weights is None or (path := folder / "checkpoints" / state.weights).is_dir():
        return
    raise UserError(
        f"{path}: missing, state.json names it; restore it, or delete {folder} and run again"
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
    """The append-only files that exist, as paths below the folder."""
    rows = [f"{name}.jsonl" for name in NAMES if (folder / f"{name}.jsonl").exists()]
    kept = sorted(path.name for path in (folder / "kept").glob("*.jsonl"))
    return rows + [f"kept/{name}" for name in kept]
