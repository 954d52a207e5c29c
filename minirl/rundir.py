"""A run: the folder that explains itself.

    recipe.yaml    the resolved recipe            state.json      where the run is, and how long each file was then
    metrics.jsonl  numbers a step, no clocks      timings.jsonl   seconds and tokens/s a step
    episodes.jsonl sample episodes                evals.jsonl     evaluations, problem by problem
    kept/N.jsonl   what collect stage N kept      checkpoints/    weights, named <stage>-<step>
    versions.jsonl what it ran on

Invariant: `state.json` is replaced in one rename and names only what is already on the disk. Opening a folder cuts every append-only
file back to the length it records and drops whatever it does not name, so a kill at any moment is undone, and the steps after it are
played again to the same bytes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, Self

import filelock
import yaml

import minirl
from minirl import recipe as recipes
from minirl.episode import Episode
from minirl.errors import UserError
from minirl.recipe import Recipe

NAMES = ("metrics", "timings", "episodes", "evals")
CHECKPOINT = re.compile(r"\d{2,}-\d{6,}b*")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True, slots=True)
class Position:
    """The next thing to do: the number of a stage, and how many of its steps (or collect chunks) are done."""

    stage: int = 0
    step: int = 0


@dataclass(slots=True)
class _State:
    """What state.json holds. checkpoints: those that stay, oldest first; best: the name and score of the best of them."""

    position: Position = Position()
    finished: bool = False
    weights: str | None = None
    best: tuple[str, float] | None = None
    checkpoints: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        position = {"stage": self.position.stage, "step": self.position.step}
        best = None if self.best is None else {"checkpoint": self.best[0], "score": self.best[1]}
        rest = {name: getattr(self, name) for name in ("finished", "weights", "checkpoints", "sizes")}
        return {"position": position, "best": best, **rest}

    @classmethod
    def read(cls, path: Path) -> Self:
        """UserError unless the file is one that `to_json` wrote."""
        try:
            row = json.loads(path.read_bytes())
            position = Position(int(row["position"]["stage"]), int(row["position"]["step"]))
            best = None if row["best"] is None else (str(row["best"]["checkpoint"]), float(row["best"]["score"]))
            weights = None if row["weights"] is None else str(row["weights"])
            sizes = {str(name): int(size) for name, size in row["sizes"].items()}
            return cls(position, bool(row["finished"]), weights, best, [str(name) for name in row["checkpoints"]], sizes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{path}: not a run's state ({type(error).__name__}: {error}); restore the file, or delete the folder and run again"
            raise UserError(message) from error


class Run:
    """An open run folder. `position` is the next thing to do, `finished` whether all stages are done.

    Only the main process holds the lock and writes; in the others every writing method does nothing but keep `position` in step.
    """

    def __init__(self, folder: Path, recipe: Recipe, state: _State, lock: filelock.BaseFileLock | None) -> None:
        self.folder = folder
        self.recipe = recipe
        self._state = state
        self._lock = lock
        self._files: dict[str, BinaryIO] = {}

    @classmethod
    def open(cls, folder: str | Path, recipe: Recipe, *, main: bool = True) -> Self:
        """Begin a run in a new or empty folder, or take up the one that is there.

        main=False is for the other processes of one run: call it after the main process has opened the folder.
        Raises UserError for a folder that is something else, cannot be written, is in use, holds another recipe or is damaged.
        """
        folder = Path(folder)
        try:
            _refuse_foreign(folder)
            lock = _take(folder) if main else None
            try:
                _check_recipe(folder / "recipe.yaml", recipe)
                state = _State.read(folder / "state.json") if (folder / "state.json").exists() else _State()
                _check_files(folder, state)
                if main:
                    _restore(folder, state)
                    if not (folder / "recipe.yaml").exists():
                        write_file(folder / "recipe.yaml", recipe.dump())
                    _note_versions(folder / "versions.jsonl")
            except BaseException:
                if lock is not None:
                    lock.release()
                raise
        except OSError as error:
            raise UserError(f"{folder}: cannot be used as a run folder ({error}); name a folder you can write to with --out") from error
        return cls(folder, recipe, state, lock)

    @property
    def position(self) -> Position:
        return self._state.position

    @property
    def finished(self) -> bool:
        return self._state.finished

    def close(self) -> None:
        """Let go of the files and the lock; the end of the process does the same."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl: numbers that equal runs share bit for bit, so no clocks."""
        self._append("metrics.jsonl", row)

    def log_time(self, row: Mapping[str, Any]) -> None:
        """A row of timings.jsonl: seconds and tokens/s, which differ from run to run."""
        self._append("timings.jsonl", row)

    def log_eval(self, row: Mapping[str, Any]) -> None:
        """A row of evals.jsonl: one evaluation, with every problem's tries (`statistics.summarise` reads it)."""
        self._append("evals.jsonl", row)

    def log_episodes(self, episodes: Iterable[Episode], texts: Sequence[Sequence[str]] | None = None, **labels: Any) -> None:
        """Rows of episodes.jsonl. texts: for each episode the decoded text of each turn, so that a report needs no tokenizer."""
        for number, episode in enumerate(episodes):
            row = {**labels, **episode.to_json()}
            if texts is not None:
                if len(texts[number]) != len(episode.turns):
                    raise ValueError(f"episode {number}: {len(texts[number])} texts for {len(episode.turns)} turns")
                row["texts"] = list(texts[number])
            self._append("episodes.jsonl", row)

    def keep(self, stage: int, episodes: Iterable[Episode]) -> None:
        """Append what a collect stage keeps to kept/<stage>.jsonl."""
        for episode in episodes:
            self._append(f"kept/{stage}.jsonl", episode.to_json())

    def kept(self, stage: int) -> list[Episode]:
        """All that collect stage `stage` has kept so far. Raises UserError naming file and line for a malformed row."""
        path = self.folder / "kept" / f"{stage}.jsonl"
        return [Episode.from_json(row, f"{path}:{line}") for line, row in enumerate(read_rows(path, growing=False), start=1)]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of "metrics", "timings", "episodes" or "evals"; a last line that is still being written is left out."""
        if name not in NAMES:
            raise ValueError(f"rows: got {name!r}, expected one of {NAMES}")
        return read_rows(self.folder / f"{name}.jsonl")

    def checkpoint(self, position: Position, write: Callable[[Path], None], *, score: float | None = None) -> None:
        """Save weights and position together. `write` fills an empty folder; score: higher is better, None for not evaluated.

        Keeps `save.keep_last` newest checkpoints, and the best one with `save.keep_best`.
        """
        if self._lock is None:
            self._state.position = position
            return
        old = self._state
        name = f"{position.stage:02d}-{position.step:06d}"
        while name in old.checkpoints:  # never touch a folder that state.json names: saved twice at one position
            name += "b"
        write_folder(self.folder / "checkpoints" / name, write)
        best = old.best
        if score is not None and isfinite(score) and (best is None or score > best[1]):
            best = (name, score)
        names = [*old.checkpoints, name]
        stay = {*names[-self.recipe.save.keep_last :], *([best[0]] if best and self.recipe.save.keep_best else [])}
        names = [n for n in names if n in stay]
        self._save(_State(position, False, name, best if best and best[0] in stay else None, names))
        for gone in set(old.checkpoints) - stay:
            _remove(self.folder / "checkpoints" / gone)

    def advance(self, position: Position, *, finished: bool = False) -> None:
        """Save the position and all rows so far; the weights stay those of the last checkpoint."""
        if self._lock is None:
            self._state.position, self._state.finished = position, finished
            return
        old = self._state
        self._save(_State(position, finished, old.weights, old.best, old.checkpoints))

    def weights(self) -> Path | None:
        """The checkpoint to resume from; None before the first one."""
        return None if self._state.weights is None else self.folder / "checkpoints" / self._state.weights

    def reference(self, stage: int) -> Path:
        """Where the reference snapshot of a stage is kept; write it with `write_folder`."""
        return self.folder / "checkpoints" / f"reference-{stage}"

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if self._lock is None:
            return
        file = self._files.get(name)
        if file is None:
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            file = self._files[name] = path.open("ab")
        file.write(compact(row) + b"\n")
        file.flush()  # a reader sees the row at once

    def _save(self, state: _State) -> None:
        """Rows reach the disk before the state that counts on them."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        _sync(self.folder / "kept", self.folder)
        state.sizes = {name: (self.folder / name).stat().st_size for name in _append_only(self.folder)}
        self._state = state  # first, so that an interrupt inside the rename cannot leave the file ahead of what we know
        write_file(self.folder / "state.json", compact(state.to_json()).decode() + "\n")


def standing(folder: Path) -> tuple[Position, bool]:
    """Where a run folder stands, and whether the run is finished, without opening it."""
    state = _State.read(folder / "state.json") if (folder / "state.json").exists() else _State()
    return state.position, state.finished


def compact(row: Mapping[str, Any]) -> bytes:
    """One line of JSON: floats by repr, so equal numbers are equal bytes; NaN and infinities, which JSON lacks, become null."""
    try:
        return json.dumps(row, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        return json.dumps(_finite(row), allow_nan=False, separators=(",", ":")).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def read_rows(path: Path, *, growing: bool = True) -> list[dict[str, Any]]:
    """The rows of a JSONL file, none if it is absent. UserError names file and line of a row that is not a JSON object.

    growing: another process may be writing, so an unfinished last line is left out.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if lines and (growing or not lines[-1]):
        lines.pop()  # what follows the last newline
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a JSON row ({error}); mend or delete the line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: got {type(row).__name__}, expected a JSON object; mend or delete the line")
        rows.append(row)
    return rows


def write_file(path: Path, text: str) -> None:
    """Replace a file in one rename, on the disk when this returns."""
    temp = _temp(path)
    with temp.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)
    _sync(path.parent)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Put a folder at `path` by a rename: it is there whole, filled by `write` and on the disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = _temp(path)
    if temp.exists():
        shutil.rmtree(temp)
    temp.mkdir()
    write(temp)
    for parent, _, files in os.walk(temp, topdown=False):
        _sync(*(Path(parent) / name for name in files), Path(parent))
    if path.exists():
        _remove(path)
    os.replace(temp, path)
    _sync(path.parent)


def _remove(path: Path) -> None:
    """Take a folder away; a reader never sees half of it."""
    temp = path.with_name(f".{path.name}.old.tmp")
    if temp.exists():
        shutil.rmtree(temp)
    if path.exists():
        os.replace(path, temp)
        shutil.rmtree(temp)


def _temp(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _sync(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _append_only(folder: Path) -> list[str]:
    kept = sorted(path.name for path in (folder / "kept").glob("*.jsonl"))
    return [n for n in (f"{name}.jsonl" for name in NAMES) if (folder / n).exists()] + [f"kept/{name}" for name in kept]


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, expected a folder; name another with --out")
    if not folder.exists() or (folder / "recipe.yaml").exists():
        return
    # A run killed before it wrote its recipe leaves its lock and temporary files only.
    strange = sorted(path.name for path in folder.iterdir() if path.name != ".lock" and not path.match(".*.tmp"))
    if strange:
        raise UserError(f"{folder}: holds {strange[0]!r} but no recipe.yaml, so it is not a run; name a new or empty folder with --out")


def _take(folder: Path) -> filelock.BaseFileLock:
    """A lock of the operating system's, so that it ends with the process however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f"{folder}: another process is running in it; wait for it, stop it, or name another folder with --out") from error
    return lock


def _check_recipe(path: Path, recipe: Recipe) -> None:
    if not path.exists():
        return
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid YAML ({error}); name another folder with --out or delete this one") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: got {type(data).__name__}, expected a mapping; name another folder with --out or delete this one")
    stored = recipes.parse(data, str(path)).model_dump(mode="json")
    changes = list(_differences(stored, recipe.model_dump(mode="json"), ""))
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        changed = ", ".join(changes[:3]) + more
        raise UserError(f"{path.parent}: holds a run of another recipe: {changed}; name another folder with --out or delete this one")


def _differences(old: Any, new: Any, path: str) -> Iterable[str]:
    """`a.b: old -> new` for each leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from _differences(left, right, f"{path}.{number}")
    elif old != new:
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_files(folder: Path, state: _State) -> None:
    """What state.json counts on must be there."""
    for name, size in state.sizes.items():
        got = (folder / name).stat().st_size if (folder / name).exists() else 0
        if got < size:
            raise UserError(f"{folder / name}: has {got} bytes, state.json counts on {size}; restore it, or delete {folder} and run again")
    if state.weights is not None and not (folder / "checkpoints" / state.weights).is_dir():
        where = folder / "checkpoints" / state.weights
        raise UserError(f"{where}: missing, state.json names it; restore it, or delete {folder} and run again")


def _restore(folder: Path, state: _State) -> None:
    """Undo everything that happened after state.json was written."""
    for name in _append_only(folder):
        if size := state.sizes.get(name, 0):
            os.truncate(folder / name, size)
        else:
            (folder / name).unlink()
    temps = [*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")]
    unnamed = [p for p in folder.glob("checkpoints/*") if CHECKPOINT.fullmatch(p.name) and p.name not in state.checkpoints]
    for path in temps + unnamed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _note_versions(path: Path) -> None:
    """Append what this process runs on, unless it is what the last one ran on."""
    now = {"minirl": minirl.__version__, "python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            now[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed
    seen = read_rows(path)
    if not seen or seen[-1] != now:
        write_file(path, "".join(compact(row).decode() + "\n" for row in [*seen, now]))
