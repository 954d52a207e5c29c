"""A run: the folder that explains itself.

* recipe.yaml: the resolved recipe; *.py: copies of one's own code that it names
* state.json: the position of the run, and the length of each append-only file at that point
* metrics.jsonl: a step's numbers, no clocks; timings.jsonl: seconds and tokens/s
* episodes.jsonl: sample episodes; evals.jsonl: evaluations, problem by problem
* kept/N.jsonl: the episodes that collect stage N kept
* checkpoints/: weights, named <stage>-<step>; adapter/: for plain peft, at the end
* model.json, task.json: which base weights and which problems, checked on resume
* versions.jsonl: the software and machine it ran on
* later_evals.jsonl: evaluations by `minirl eval`
* report.html: all of it on one page

Invariant: `state.json` is replaced in one rename, and only after everything that it names is on the
disk; opening a folder undoes the rest (see `state`). So a kill at any moment costs the steps since
the last save, and these are played again to the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Self

import filelock

from minirl.episode import Episode
from minirl.errors import UserError
from minirl.io.files import (
    Journal,
    lock_folder,
    read_rows,
    remove_folder,
    write_file,
    write_folder,
)
from minirl.recipe import Recipe
from minirl.recipe.own import beside
from minirl.record.checks import check_recipe, note_versions, refuse_foreign
from minirl.record.state import (
    Position,
    State,
    append_only,
    check_files,
    read_note,
    read_state,
    restore,
)


class Run:
    """An open run folder.

    Only the main process holds the lock and writes; in the others the writing methods only keep
    `position` and `finished` in step.
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
        """Begin a run in a new or empty folder, or resume the one that is there.

        main=False is for the other processes of one run, after the main process has opened the
        folder. Raises UserError for a folder that is something else, cannot be written, is in use,
        holds another recipe or is damaged.
        """
        folder = Path(folder)
        try:
            refuse_foreign(folder)
            lock = lock_folder(folder) if main else None
            try:
                state = _open_state(folder, recipe, main=main)
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
        """The next thing to do."""
        return self._state.position

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return self._state.finished

    def close(self) -> None:
        """Close the files and release the lock, as the end of the process would."""
        self._journal.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_model(self, fingerprint: str, dtype: str) -> None:
        """Note the base weights and their dtype when the run begins. Raises UserError if it is
        resumed with others (the hub's, then a local copy; on an A100, then on a T4, which lacks
        bf16)."""
        known = self._known("model.json", "weights")
        if known.get("dtype", dtype) != dtype:
            raise UserError(
                f"{self.folder}: this machine computes in {dtype}, expected {known['dtype']}, in"
                " which the run began; resume it on a machine that has it, or start again with"
                " another --out (model.dtype in a recipe sets the dtype)"
            )
        if known.get("weights", fingerprint) != fingerprint:
            raise UserError(
                f"{self.folder}: {self.recipe.model.name} has other weights here (got"
                f" {fingerprint[:8]}, expected {known['weights'][:8]}, those that the run began"
                " with); make the same copy of the model available, or start again with another"
                " --out"
            )
        self._note("model.json", {"weights": fingerprint, "dtype": dtype})

    def check_task(self, fingerprint: str, train: int, held_out: int) -> None:
        """Note the problems when the run begins. Raises UserError if it is resumed with others (a
        data file that was edited since)."""
        known = self._known("task.json", "problems")
        if known.get("problems", fingerprint) != fingerprint:
            raise UserError(
                f"{self.folder}: the task {self.recipe.task.name} has other problems here (got"
                f" {train} and {held_out} held out, digest {fingerprint[:8]}; expected"
                f" {known.get('train')} and {known.get('held_out')}, {known['problems'][:8]},"
                " those that the run began with); restore the data it began with, or start again"
                " with another --out"
            )
        self._note("task.json", {"problems": fingerprint, "train": train, "held_out": held_out})

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl: numbers that equal runs share bit for bit, so no clocks."""
        self._append("metrics.jsonl", row)

    def log_time(self, row: Mapping[str, Any]) -> None:
        """A row of timings.jsonl: seconds and tokens/s, which differ from run to run."""
        self._append("timings.jsonl", row)

    def log_eval(self, row: Mapping[str, Any]) -> None:
        """A row of evals.jsonl: an evaluation with all tries, for `evals.summarise`."""
        self._append("evals.jsonl", row)

    def log_episodes(
        self, episodes: Iterable[Episode], texts: Iterable[list[str]], **labels: Any
    ) -> None:
        """Rows of episodes.jsonl. texts: the decoded text of each turn of each episode, so that the
        report needs no tokenizer."""
        for episode, turns in zip(episodes, texts, strict=True):
            self._append("episodes.jsonl", labels | episode.to_json() | {"texts": turns})

    def keep(self, stage: int, episodes: Iterable[Episode]) -> None:
        """Append the episodes that a collect stage keeps to kept/<stage>.jsonl."""
        for episode in episodes:
            self._append(f"kept/{stage}.jsonl", episode.to_json())

    def kept(self, stage: int) -> list[Episode]:
        """The episodes that a collect stage has kept so far. Raises UserError naming file and line
        of a malformed row."""
        path = self.folder / "kept" / f"{stage}.jsonl"
        return [
            Episode.from_json(row, f"{path}:{line}")
            for line, row in enumerate(read_rows(path, growing=False), start=1)
        ]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of "metrics", "timings", "episodes" or "evals"; a last line that is still being
        written is left out."""
        return read_rows(self.folder / f"{name}.jsonl")

    def checkpoint(
        self, position: Position, write: Callable[[Path], None], *, score: float | None = None
    ) -> None:
        """Save weights and position together. write: fills an empty folder. score: higher is
        better, None if not evaluated.

        Keeps the `save.keep_last` newest checkpoints, and with `save.keep_best` the best one.
        """
        if self._lock is None:
            self._state.position = position
            return
        old = self._state
        name = f"{position.stage:02d}-{position.step:06d}"
        while name in old.checkpoints:  # saved twice at one position
            name += "b"  # never touch a folder that state.json names
        write_folder(self.folder / "checkpoints" / name, write)
        best = old.best
        if score is not None and isfinite(score) and (best is None or score > best[1]):
            best = (name, score)
        names = [*old.checkpoints, name]
        stay = set(names[-self.recipe.save.keep_last :])
        if best is not None and self.recipe.save.keep_best:
            stay.add(best[0])
        if best is not None and best[0] not in stay:
            best = None
        self._save(State(position, False, name, best, [n for n in names if n in stay]))
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
        name = self._state.weights
        return None if name is None else self.folder / "checkpoints" / name

    def reference(self, stage: int) -> Path:
        """The folder of a stage's reference snapshot; write it with `write_folder`."""
        return self.folder / "checkpoints" / f"reference-{stage}"

    def _known(self, name: str, key: str) -> dict[str, Any]:
        """A note of the run, empty while nothing is saved."""
        return {} if self._state == State() else read_note(self.folder / name, key)

    def _note(self, name: str, note: Mapping[str, Any]) -> None:
        if self._lock is not None:
            write_file(self.folder / name, json.dumps(note))

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if self._lock is not None:
            self._journal.append(name, row)

    def _save(self, state: State) -> None:
        """Rows reach the disk before the state that counts on them."""
        self._journal.sync()
        state.sizes = {
            name: (self.folder / name).stat().st_size for name in append_only(self.folder)
        }
        # First, so that an interrupt inside the rename cannot leave the file ahead of this object.
        self._state = state
        write_file(self.folder / "state.json", state.text())


def _open_state(folder: Path, recipe: Recipe, *, main: bool) -> State:
    """Check a folder against its state, and bring it back to that point."""
    state = read_state(folder)
    if state != State():  # else nothing would be lost, and a recipe may be mended and run again
        check_recipe(folder, recipe)
    check_files(folder, state)
    if main:
        restore(folder, state)
        if state == State():
            for name, path in recipe.copies().items():
                write_file(folder / name, path.read_text(encoding="utf-8"))
            write_file(folder / "recipe.yaml", recipe.rename(beside).dump())
            write_file(folder / "state.json", state.text())
        note_versions(folder / "versions.jsonl")
    return state
