"""Rows of a data set: a local JSON, JSONL or Parquet file, or one of the hub.

Invariant: data is parsed, never executed, and whoever gets a row can name where it stands (file and
line or row number).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from minirl.errors import UserError
from minirl.io.hub import endpoint, hub_answers, offline

SUFFIXES = (".json", ".jsonl", ".parquet")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
_SPACE = re.compile(r"[ \t\r\n]*")


def read_dataset(
    source: str, columns: Sequence[str], split: str = "train", *, setting: str = "task.source=PATH"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) in the order of `source`; `where` is like "data.jsonl, line 17" or
    "data.json, row 3", counted from 1.

    source: a file that ends in one of SUFFIXES (.json holds one list of objects), or a hub id,
    "owner/name" or "owner/name:config".
    split: of a hub id.
    setting: what of the recipe an error tells the user to `--set`. Raises UserError for a source
    that cannot be had and for the first row that does not parse, is no object or lacks one of
    `columns`.
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
                " mend or delete the row"
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
            where = f"{source}, line {number}"
            text = decode(line, where)
            if not text.strip():
                continue
            row, end = _parse(text, 0, where)
            if end != len(text):
                raise UserError(
                    f"{where}: got {text[end : end + 20].strip()!r} after the object, expected one"
                    " object a line"
                )
            yield where, row


def _json(path: Path, source: str) -> Iterator[tuple[str, Any]]:
    """One list of objects, decoded element by element so that a syntax error is named by its
    row."""
    text = decode(path.read_bytes(), source)
    at = _skip(text, 0)
    if not text.startswith("[", at):
        raise UserError(
            f"{source}: got {text[at : at + 20]!r}..., expected a list of objects; call the file"
            " .jsonl if it has one a line"
        )
    number, at = 0, _skip(text, at + 1)
    while not (number == 0 and text.startswith("]", at)):
        number += 1
        where = f"{source}, row {number}"
        row, at = _parse(text, at, where)
        yield where, row
        if text.startswith("]", at):
            break
        if not text.startswith(",", at):
            line = text.count("\n", 0, at) + 1
            raise UserError(
                f"{where}: got {text[at : at + 20] or 'the end of the file'!r} at line {line},"
                " expected a comma or ]"
            )
        at = _skip(text, at + 1)
    if text[at + 1 :].strip():
        raise UserError(
            f"{source}: text after the list (after row {number}); expected one list of objects"
        )


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
            f"{source}, row {number + 1}: not readable as Parquet ({str(error)[:160]}); {todo}"
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
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(
                f"{source}: {endpoint()} does not give the data set ({said}); log in with `hf auth"
                f" login` if it is gated, or {todo}"
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
    """Within it, `datasets` looks in its cache and nowhere else; it reads the environment at
    import, which is too early for us."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or active
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _parse(text: str, at: int, where: str) -> tuple[Any, int]:
    """The JSON value at `at`, and where the token after it begins."""
    try:
        value, end = _DECODER.raw_decode(text, _skip(text, at))
    except (ValueError, RecursionError) as error:
        said = str(error)
        if isinstance(error, json.JSONDecodeError):
            line = (
                f"line {error.lineno}, " if "\n" in text.rstrip() else ""
            )  # a JSONL line is named by `where` already
            said = f"{error.msg} at {line}column {error.colno}"
        raise UserError(
            f"{where}: not valid JSON ({said}), expected an object; mend or delete the row"
        ) from error
    return value, _skip(text, end)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


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
