"""Rows of a data set: a local JSON, JSONL or Parquet file, or one of the hub.

Invariant: data is parsed, never executed, and each row comes with its place: file and line or row
number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from minirl.errors import UserError, first_line
from minirl.io.hub import endpoint, hub_answers, offline

SUFFIXES = (".json", ".jsonl", ".parquet")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


def read_dataset(
    source: str, columns: Sequence[str], split: str = "train", *, setting: str = "task.source=PATH"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) in the order of `source`; `where` is like "data.jsonl, line 17" or
    "data.json, row 3", counted from 1.

    source: a file that ends in one of SUFFIXES (.json holds one list of objects), or a hub id,
    "owner/name" or "owner/name:config". split: of a hub id. setting: the setting that an error
    tells the user to change. Raises UserError for a source that cannot be read and for the first
    row that does not parse, is not an object or lacks one of `columns`.
    """
    todo = f"pass a local .json, .jsonl or .parquet file with `--set {setting}`"
    for where, row in _open(source, split, todo):
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: got {_kind(row)}, expected an object with the columns"
                f" {', '.join(columns)}"
            )
        missing = [name for name in columns if name not in row]
        if missing:
            got = ", ".join(map(str, row))[:120] or "none"
            raise UserError(
                f"{where}: no column {missing[0]!r} (got {got}), expected {', '.join(columns)};"
                " correct or delete the row"
            )
        yield where, row


def _open(source: str, split: str, todo: str) -> Iterator[tuple[str, Any]]:
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if not (suffix in SUFFIXES or source.startswith((".", "/", "~")) or path.exists()) and (
        hub_id := _HUB_ID.fullmatch(source)
    ):
        return _hub(source, hub_id[1], hub_id[2], split, todo)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such file"
        raise UserError(
            f"{source}: {problem}, expected a data file or a hub id (owner/name); {todo}"
        )
    if suffix not in SUFFIXES:
        raise UserError(
            f"{source}: got a file ending in {suffix!r}, expected one of {', '.join(SUFFIXES)};"
            f" {todo}"
        )
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); {todo}") from error
    if suffix == ".parquet":
        return _parquet(path, source, todo)
    return _json(path, source) if suffix == ".json" else _jsonl(path, source)


def _jsonl(path: Path, source: str) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        # Bytes, so that a line that is not UTF-8 is named by its number like any other fault.
        for number, line in enumerate(file, 1):
            text = decode(line, f"{source}, line {number}")
            if text.strip():
                row = parse_json(text, source, expected="one object a line", line=number)
                yield f"{source}, line {number}", row


def _json(path: Path, source: str) -> Iterator[tuple[str, Any]]:
    expected = "a list of objects; name the file .jsonl if it has one object a line"
    rows = parse_json(decode(path.read_bytes(), source), source, expected=expected)
    if not isinstance(rows, list):
        raise UserError(f"{source}: got {_kind(rows)}, expected {expected}")
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


def _parquet(path: Path, source: str, todo: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{source}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{source}, row {number + 1}: not readable as Parquet ({first_line(error)}); {todo}"
        ) from error


def _hub(
    source: str, name: str, config: str | None, split: str, todo: str
) -> Iterator[tuple[str, Any]]:
    import datasets

    online = hub_answers()
    try:
        with _datasets_offline(not online):
            rows = datasets.load_dataset(name, config, split=split)
    # the library raises a dozen unrelated kinds, and each of them means that the data cannot be had
    except Exception as error:
        if online:
            raise UserError(
                f"{source}: {endpoint()} does not give the data set ({type(error).__name__}:"
                f" {first_line(error)}); log in with `hf auth login` if it is gated, or {todo}"
            ) from error
        why = (
            "the hub is switched off (HF_HUB_OFFLINE)"
            if offline()
            else f"{endpoint()} does not answer"
        )
        raise UserError(
            f"{source}: split {split!r} is not in the local cache and {why}; {todo}"
        ) from error
    return ((f"{source} ({split}), row {number}", row) for number, row in enumerate(rows, 1))


@contextmanager
def _datasets_offline(active: bool) -> Iterator[None]:
    """Context in which `datasets` looks in its cache alone if `active`. It reads the environment at
    import, which is too early for us."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or active
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def parse_json(
    text: str, source: str, *, expected: str, line: int | None = None, **hooks: Any
) -> Any:
    """The JSON value `text`. Raises UserError that names the line: `line` if it is given, else the
    line of the fault within `text`. hooks: arguments of json.loads."""
    try:
        return json.loads(text, parse_constant=_refuse, **hooks)
    except (ValueError, RecursionError) as error:
        fault = str(error)
        if isinstance(error, json.JSONDecodeError):
            line = line or error.lineno
            fault = f"{error.msg} at column {error.colno}"
        where = source if line is None else f"{source}, line {line}"
        raise UserError(f"{where}: not valid JSON ({fault}), expected {expected}") from error


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def decode(data: bytes, where: str) -> str:
    """`data` as UTF-8 text, a byte order mark taken off. Raises UserError that names `where` and
    the byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save the file as"
            " UTF-8"
        ) from error


def _kind(value: object) -> str:
    names = {
        "NoneType": "null",
        "str": "a string",
        "list": "a list",
        "bool": "a boolean",
        "int": "a number",
        "float": "a number",
    }
    return names.get(type(value).__name__, type(value).__name__)
