"""Corpora: passages out of files, folders, the hub or a task's own paragraphs.

Invariant: data is parsed, never executed; the same content gives the same passages in the same
order, wherever its files are; a malformed row is named by file and line.
"""

from __future__ import annotations

import os
import re
import reprlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minirl.errors import UserError
from minirl.io.rows import SUFFIXES, decode, parse_json, read_dataset
from minirl.recipe.retriever import Bm25Retriever
from minirl.retrieve.passage import Passage

CONTEXT = "context"
TEXT_SUFFIXES = (".txt", ".md")
SETTING = "task.retriever.sources=[PATH]"
_BLANK_LINES = re.compile(r"\n\s*\n")
_QUOTED_TITLE = re.compile(r'"([^\n]*)"\n')


def read(retriever: Bm25Retriever, context: Sequence[Passage]) -> Iterator[Passage]:
    """All passages of the sources in order; `context` stands for the source of that name, without
    repeats.

    Raises UserError for a source that cannot be read and for the first malformed row.
    """
    number = 0
    for source in retriever.sources:
        for passage in pool(context) if source == CONTEXT else _source(source, retriever):
            yield passage if passage.id else replace(passage, id=str(number))
            number += 1


def pool(passages: Iterable[Passage]) -> list[Passage]:
    """The passages without repeats: each title and text once, at its first place."""
    seen: dict[tuple[str, str], Passage] = {}
    for passage in passages:
        seen.setdefault((passage.title, passage.text), passage)
    return list(seen.values())


def _source(source: str, retriever: Bm25Retriever) -> Iterator[Passage]:
    path = Path(source).expanduser()
    if not path.is_dir():
        yield from _file(path, source, path.name, retriever)
        return
    files = sorted(_files(path), key=lambda file: file.relative_to(path).as_posix())
    if not files:
        wanted = ", ".join((*SUFFIXES, *TEXT_SUFFIXES))
        raise UserError(
            f"{source}: no data in this folder, expected files ending in {wanted}; pass others with"
            f" `--set {SETTING}`"
        )
    for file in files:
        yield from _file(file, str(file), file.relative_to(path).as_posix(), retriever)


def _files(folder: Path) -> Iterator[Path]:
    """The data files below a folder; without hidden ones; links to folders are not followed."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith((*SUFFIXES, *TEXT_SUFFIXES)):
                yield Path(parent) / name


def _file(path: Path, source: str, name: str, retriever: Bm25Retriever) -> Iterator[Passage]:
    """name: the name of a plain-text file in its passages' ids."""
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        for number, text in enumerate(_cut(decode(_bytes(path, source), source), retriever.words)):
            yield Passage(path.stem, text, f"{name}#{number}")
    elif (
        suffix == ".json"
        and path.is_file()
        and (data := _bytes(path, source)).removeprefix(BOM_UTF8).lstrip()[:1] == b"{"
    ):
        for number, (title, value) in enumerate(_pairs(data, source), 1):
            yield _passage(
                {retriever.title: title, retriever.text: value},
                f"{source}, key {number} ({title[:40]!r})",
                retriever,
            )
    else:
        for where, row in read_dataset(source, (retriever.text,), retriever.split, setting=SETTING):
            yield _passage(row, where, retriever)


def _passage(row: Mapping[str, Any], where: str, retriever: Bm25Retriever) -> Passage:
    title, text, identifier = row.get(retriever.title), row[retriever.text], row.get(retriever.id)
    if isinstance(text, list) and all(isinstance(sentence, str) for sentence in text):
        text = " ".join(sentence.strip() for sentence in text)
    if not isinstance(text, str):
        raise UserError(
            f"{where}: {retriever.text}: got {reprlib.repr(text)}, expected a text or a list of"
            " sentences; correct or delete the row"
        )
    if title is None and (quoted := _QUOTED_TITLE.match(text)):
        # How Search-R1's and FlashRAG's Wikipedia writes a title.
        title, text = quoted[1], text[quoted.end() :]
    if not isinstance(title, str | None):
        raise UserError(f"{where}: {retriever.title}: got {reprlib.repr(title)}, expected a text")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | None):
        raise UserError(
            f"{where}: {retriever.id}: got {reprlib.repr(identifier)}, expected a text or a whole"
            " number; correct or delete the row"
        )
    passage = Passage(title or "", text.strip(), "" if identifier is None else str(identifier))
    if not (passage.title.strip() or passage.text):
        raise UserError(
            f"{where}: an empty passage, expected words in {retriever.title} or {retriever.text}"
        )
    try:
        (passage.title + passage.text + passage.id).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half of a surrogate pair ({error.object[error.start]!r}) is no character;"
            " correct the row"
        ) from error
    return passage


def _pairs(data: bytes, source: str) -> list[tuple[str, Any]]:
    """The pairs of one JSON object {title: text}, repeated titles included (HippoRAG's form of the
    HotpotQA corpus)."""
    expected = "one object {title: text} or a list of objects"
    text = decode(data, source)
    pairs: list[tuple[str, Any]] = parse_json(
        text, source, expected=expected, object_pairs_hook=list
    )
    return pairs


def _bytes(path: Path, source: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{source}: cannot be read ({error.strerror}); pass another file with `--set {SETTING}`"
        ) from error


def _cut(text: str, limit: int) -> Iterator[str]:
    """Passages of at most `limit` words: as many whole paragraphs as fit; a longer paragraph is cut
    at the limit."""
    words: list[str] = []
    for paragraph in map(str.split, _BLANK_LINES.split(text)):
        if words and len(words) + len(paragraph) > limit:
            yield " ".join(words)
            words = []
        words += paragraph
        full = len(words) // limit * limit
        for start in range(0, full, limit):
            yield " ".join(words[start : start + limit])
        words = words[full:]
    if words:
        yield " ".join(words)
