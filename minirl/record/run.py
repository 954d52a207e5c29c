"""A run: the folder that explains itself.

    recipe.yaml    the resolved recipe            state.json      where the run is, and how long
    each file was then metrics.jsonl  numbers a step, no clocks      timings.jsonl   seconds and
    tokens/s a step episodes.jsonl sample episodes                evals.jsonl     evaluations,
    problem by problem kept/N.jsonl   what collect stage N kept      checkpoints/    weights, named
    <stage>-<step> versions.jsonl what it ran on                 report.html     all of it on one
    page model.json     which base weights             task.json       which problems (both are
    checked on resume) adapter/       for plain peft, at the end     later_evals.jsonl   what
    `minirl eval` found afterwards

Invariant: `state.json` is replaced in one rename, and only after what it names is on the disk;
opening a folder undoes the rest (see `state`). So a kill at any moment costs the steps since the
last save, and these are played again to the same bytes.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Self

import filelock
import yaml

import minirl
from minirl import recipe as recipes
from minirl.episode import Episode
from minirl.errors import UserError
from minirl.io.files import (
    Journal,
    lock_folder,
    read_rows,
    remove_folder,
    write_file,
    write_folder,
    write_rows,
)
from minirl.recipe import Recipe
from minirl.recipe.own import beside
from minirl.record.closed_run import read_note
from minirl.record.state import (
    NAMES,
    Position,
    State,
    append_only,
    check_files,
    read_state,
    restore,
)

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numba")


class Run:
    """An open run folder. `position` is the next thing to do, `finished` whether all stages are
    done.

    Only the main process holds the lock and writes; in the others every writing method does nothing
    but keep `position` in step.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, state: State, lock: filelock.BaseFileLock | None
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self._state = state
        self._lock = lock
        self._journal = Journal(folder)

    @classmethod
    def open(cls, folder: str | Path, recipe: Recipe, *, main: bool = True) -> Self:
        """Begin a run in a new or empty folder, or take up the one that is there.

        main=False is for the other processes of one run: call it after the main process has opened
        the folder. Raises UserError for a folder that is something else, cannot be written, is in
        use, holds another recipe or is damaged.
        """
        folder = Path(folder)
        try:
            _refuse_foreign(folder)
            lock = lock_folder(folder) if main else None
            try:
                state = read_state(folder)
                if (
                    state != State()
                ):  # where nothing was saved there is nothing to lose, and a recipe may be mended and run again
                    _check_recipe(folder / "recipe.yaml", recipe)
                check_files(folder, state)
                if main:
                    restore(folder, state)
                    if state == State():
                        for name, path in recipe.copies().items():
                            write_file(folder / name, path.read_text(encoding="utf-8"))
                        write_file(folder / "recipe.yaml", recipe.rename(beside).dump())
                        write_file(folder / "state.json", state.text())
                    _note_versions(folder / "versions.jsonl")
            except BaseException:
                if lock is not None:
                    lock.release()
                raise
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be used as a run folder ({error}); name a folder you can write"
                " to with --out"
            ) from error
        return cls(folder, recipe, state, lock)

    @property
    def position(self) -> Position:
        """How far the run is."""
        return self._state.position

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self._state.finished

    def close(self) -> None:
        """Let go of the files and the lock; the end of the process does the same."""
        self._journal.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_model(self, fingerprint: str, dtype: str) -> None:
        """Note which base weights the run began with, and in which dtype; UserError where it is
        taken up with others (the hub's, then a local copy; on an A100, then on a T4, which has no
        bf16)."""
        path = self.folder / "model.json"
        known = {} if self._state == State() else read_note(path, "weights")
        if known.get("dtype", dtype) != dtype:
            raise UserError(
                f"{self.folder}: this machine computes in {dtype}, expected {known['dtype']}, in"
                " which the run began; take it up where that can be had, or start again with"
                " another --out (model.dtype names the type that a recipe wants)"
            )
        if known.get("weights", fingerprint) != fingerprint:
            raise UserError(
                f"{self.folder}: {self.recipe.model.name} has other weights here (got"
                f" {fingerprint[:8]}, expected {known['weights'][:8]}, those that the run began"
                " with); make the same copy of the model available, or start again with another"
                " --out"
            )
        if self._lock is not None:
            write_file(path, json.dumps({"weights": fingerprint, "dtype": dtype}))

    def check_task(self, fingerprint: str, train: int, held_out: int) -> None:
        """Note which problems the run began with; UserError where it is taken up with others (a
        data file that was edited since)."""
        path, now = (
            self.folder / "task.json",
            {"problems": fingerprint, "train": train, "held_out": held_out},
        )
        known = {} if self._state == State() else read_note(path, "problems")
        if known.get("problems", fingerprint) != fingerprint:
            raise UserError(
                f"{self.folder}: the task {self.recipe.task.name} has other problems here (got"
                f" {train} and {held_out} held out, digest {fingerprint[:8]}; expected"
                f" {known.get('train')} and {known.get('held_out')}, {str(known['problems'])[:8]},"
                " those that the run began with); bring back the data it began with, or start"
                " again with another --out"
            )
        if self._lock is not None:
            write_file(path, json.dumps(now))

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl: numbers that equal runs share bit for bit, so no clocks."""
        self._append("metrics.jsonl", row)

    def log_time(self, row: Mapping[str, Any]) -> None:
        """A row of timings.jsonl: seconds and tokens/s, which differ from run to run."""
        self._append("timings.jsonl", row)

    def log_eval(self, row: Mapping[str, Any]) -> None:
        """A row of evals.jsonl: one evaluation, with every problem's tries (`evals.summarise`
        reads it)."""
        self._append("evals.jsonl", row)

    def log_episodes(
        self,
        episodes: Iterable[Episode],
        texts: Sequence[Sequence[str]] | None = None,
        **labels: Any,
    ) -> None:
        """Rows of episodes.jsonl. texts: for each episode the decoded text of each turn, so that a
        report needs no tokenizer."""
        for number, episode in enumerate(episodes):
            row = {**labels, **episode.to_json()}
            if texts is not None:
                if len(texts[number]) != len(episode.turns):
                    raise ValueError(
                        f"episode {number}: {len(texts[number])} texts for {len(episode.turns)}"
                        " turns"
                    )
                row["texts"] = list(texts[number])
            self._append("episodes.jsonl", row)

    def keep(self, stage: int, episodes: Iterable[Episode]) -> None:
        """Append what a collect stage keeps to kept/<stage>.jsonl."""
        for episode in episodes:
            self._append(f"kept/{stage}.jsonl", episode.to_json())

    def kept(self, stage: int) -> list[Episode]:
        """All that collect stage `stage` has kept so far. Raises UserError naming file and line for
        a malformed row."""
        path = self.folder / "kept" / f"{stage}.jsonl"
        return [
            Episode.from_json(row, f"{path}:{line}")
            for line, row in enumerate(read_rows(path, growing=False), start=1)
        ]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of "metrics", "timings", "episodes" or "evals"; a last line that is still being
        written is left out."""
        if name not in NAMES:
            raise ValueError(f"rows: got {name!r}, expected one of {NAMES}")
        return read_rows(self.folder / f"{name}.jsonl")

    def checkpoint(
        self, position: Position, write: Callable[[Path], None], *, score: float | None = None
    ) -> None:
        """Save weights and position together. `write` fills an empty folder; score: higher is
        better, None for not evaluated.

        Keeps `save.keep_last` newest checkpoints, and the best one with `save.keep_best`.
        """
        if self._lock is None:
            self._state.position = position
            return
        old = self._state
        name = f"{position.stage:02d}-{position.step:06d}"
        while (
            name in old.checkpoints
        ):  # never touch a folder that state.json names: saved twice at one position
            name += "b"
        write_folder(self.folder / "checkpoints" / name, write)
        best = old.best
        if score is not None and isfinite(score) and (best is None or score > best[1]):
            best = (name, score)
        names = [*old.checkpoints, name]
        stay = {
            *names[-self.recipe.save.keep_last :],
            *([best[0]] if best and self.recipe.save.keep_best else []),
        }
        names = [n for n in names if n in stay]
        self._save(State(position, False, name, best if best and best[0] in stay else None, names))
        for gone in set(old.checkpoints) - stay:
            remove_folder(self.folder / "checkpoints" / gone)

    def advance(self, position: Position, *, finished: bool = False) -> None:
        """Save the position and all rows so far; the weights stay those of the last checkpoint."""
        if self._lock is None:
            self._state.position, self._state.finished = position, finished
            return
        old = self._state
        self._save(State(position, finished, old.weights, old.best, old.checkpoints))

    def weights(self) -> Path | None:
        """The checkpoint to resume from; None before the first one."""
        return (
            None
            if self._state.weights is None
            else self.folder / "checkpoints" / self._state.weights
        )

    def reference(self, stage: int) -> Path:
        """Where the reference snapshot of a stage is kept; write it with `write_folder`."""
        return self.folder / "checkpoints" / f"reference-{stage}"

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if self._lock is not None:
            self._journal.append(name, row)

    def _save(self, state: State) -> None:
        """Rows reach the disk before the state that counts on them."""
        self._journal.sync()
        state.sizes = {
            name: (self.folder / name).stat().st_size for name in append_only(self.folder)
        }
        # first, so that an interrupt inside the rename cannot leave the file ahead of what we know
        self._state = state
        write_file(self.folder / "state.json", state.text())


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, expected a folder; name another with --out")
    if not folder.exists() or (folder / "recipe.yaml").exists():
        return
    # A run killed before it wrote its recipe leaves its lock and temporary files only.
    strange = sorted(
        path.name for path in folder.iterdir() if path.name != ".lock" and not path.match(".*.tmp")
    )
    if strange:
        raise UserError(
            f"{folder}: holds {strange[0]!r} but no recipe.yaml, so it is not a run; name a new or"
            " empty folder with --out"
        )


def _check_recipe(path: Path, recipe: Recipe) -> None:
    if not path.exists():
        return
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: not valid YAML ({error}); name another folder with --out or delete this one"
        ) from error
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: got {type(data).__name__}, expected a mapping; name another folder with --out"
            " or delete this one"
        )
    stored = recipes.parse(data, str(path)).model_dump(mode="json")
    changes = list(_differences(stored, recipe.rename(beside).model_dump(mode="json"), ""))
    changes += [
        f"{file}: other text than the copy in {path.parent / name}"
        for name, file in recipe.copies().items()
        if not changes and file.read_bytes() != (path.parent / name).read_bytes()
    ]
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        changed = ", ".join(changes[:3]) + more
        raise UserError(
            f"{path.parent}: holds a run of another recipe: {changed}; name another folder with"
            " --out or delete this one"
        )


def _differences(old: Any, new: Any, path: str) -> Iterable[str]:
    """`a.b: old -> new` for each leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(
                old.get(key), new.get(key), f"{path}.{key}" if path else str(key)
            )
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from _differences(left, right, f"{path}.{number}")
    elif old != new:
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _note_versions(path: Path) -> None:
    """Append what this process runs on, unless it is what the last one ran on."""
    now = {
        "minirl": minirl.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for name in PACKAGES:
        try:
            now[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed
    seen = read_rows(path)
    if not seen or seen[-1] != now:
        write_rows(path, [*seen, now])
