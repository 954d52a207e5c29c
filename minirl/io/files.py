"""Files that survive a kill: replaced in one rename or only ever appended to, JSONL rows, and the
lock of a folder.

Invariant: `write_file` and `write_folder` leave the old or the new thing, whole and on the disk,
never half of either; a torn end of an append-only file is told from its rows and left out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from minirl.errors import UserError


def cache_dir() -> Path:
    """$MINIRL_CACHE, else `minirl` in the user's cache folder."""
    own = os.environ.get("MINIRL_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minirl"


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
    """Put a folder at `path` by a rename: it is there whole, filled by `write` and on the disk, or
    not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = _temp(path)
    if temp.exists():
        shutil.rmtree(temp)
    temp.mkdir()
    write(temp)
    for parent, _, files in os.walk(temp, topdown=False):
        _sync(*(Path(parent) / name for name in files), Path(parent))
    remove_folder(path)
    os.replace(temp, path)
    _sync(path.parent)


def remove_folder(path: Path) -> None:
    """Take a folder away, if it is there; a reader never sees half of it."""
    temp = path.with_name(f".{path.name}.old.tmp")
    if temp.exists():
        shutil.rmtree(temp)
    if path.exists():
        os.replace(path, temp)
        shutil.rmtree(temp)


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """Make the folder and take its lock: the operating system's, so that it ends with the process
    however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(
            f"{folder}: another process is running in it; wait for it, stop it, or name another"
            " folder with --out"
        ) from error
    return lock


class Journal:
    """The append-only files of a folder, opened when first written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """A row at the end of the file `name`; a reader sees it at once."""
        file = self._files.get(name)
        if file is None:
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            file = self._files[name] = path.open("ab")
        file.write(compact(row) + b"\n")
        file.flush()

    def sync(self) -> None:
        """All rows so far are on the disk when this returns, and so are the names of their
        files."""
        for file in self._files.values():
            os.fsync(file.fileno())
        _sync(*{self.folder, *((self.folder / name).parent for name in self._files)})

    def close(self) -> None:
        """Let go of the files; the end of the process does the same."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def compact(row: Mapping[str, Any]) -> bytes:
    """One line of JSON: floats by repr, so equal numbers are equal bytes; NaN and infinities, which
    JSON lacks, become null."""
    try:
        return json.dumps(row, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        return json.dumps(_without_nan(row), allow_nan=False, separators=(",", ":")).encode()


def write_rows(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """Replace a JSONL file by these rows in one rename."""
    write_file(path, "".join(compact(row).decode() + "\n" for row in rows))


def read_rows(path: Path, *, growing: bool = True) -> list[dict[str, Any]]:
    """The rows of a JSONL file, none if it is absent. UserError names file and line of a row that
    is not a JSON object.

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
            raise UserError(
                f"{path}:{number}: not a JSON row ({error}); mend or delete the line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:{number}: got {type(row).__name__}, expected a JSON object; mend or delete"
                " the line"
            )
        rows.append(row)
    return rows


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _temp(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _sync(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
