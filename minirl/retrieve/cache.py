"""Indexes kept on the disk, found again by the content of their passages.

Invariant: a folder of the cache is a whole index of exactly the passages, numbers and versions that
its name is the digest of; two processes at once build it once. The cache may be deleted at any
time: it changes how soon an index is there, nothing else.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path

import bm25s
from filelock import FileLock, Timeout

from minirl.errors import UserError
from minirl.io.files import cache_dir, write_folder
from minirl.recipe.retriever import Bm25Retriever
from minirl.retrieve.bm25 import WORDS_VERSION, Bm25
from minirl.retrieve.passage import Passage

LOCK_LIMIT_S = 3600
# Raise the number whenever the files of a folder change their form.
FORMAT = 1

log = logging.getLogger(__name__)


def open_index(corpus: Callable[[], Iterable[Passage]], node: Bm25Retriever) -> Bm25:
    """The index over what `corpus()` gives, mapped from the cache if it is there, else built and
    put there.

    corpus: may be called twice, and must give the same both times. Raises UserError for an empty
    corpus or one that changes, and for a lock that another process holds too long. A cache that
    cannot be written or read is told in the log and done without.
    """
    if not node.cache:
        return Bm25.build(list(corpus()), node)
    folder = cache_dir() / "bm25" / digest(corpus(), node)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=LOCK_LIMIT_S):
            return _load(folder, node) or _kept(folder, corpus, node)
    except Timeout as error:
        raise UserError(
            f"retriever: another process has held {folder}.lock for {LOCK_LIMIT_S} s; end it and"
            " try again"
        ) from error
    except OSError as error:
        log.warning(
            "retriever: no lock in the cache %s (%s); indexing in memory", folder.parent, error
        )
        return Bm25.build(list(corpus()), node)


def digest(passages: Iterable[Passage], node: Bm25Retriever) -> str:
    """32 hexadecimal digits of all that an index depends on: passages, numbers, and the versions of
    what cuts and scores words."""
    made_by = (
        FORMAT,
        WORDS_VERSION,
        bm25s.__version__,
        unicodedata.unidata_version,
        node.title_weight,
        node.k1,
        node.b,
    )
    total = blake2b(repr(made_by).encode(), digest_size=16)
    for passage in passages:
        for field in (passage.title, passage.text, passage.id):
            data = field.encode("utf-8", "surrogatepass")
            total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()


def _load(folder: Path, node: Bm25Retriever) -> Bm25 | None:
    if not folder.is_dir():
        return None
    try:
        return Bm25.load(folder, node)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        log.warning(
            "retriever: the index in %s is damaged (%s: %s); building it anew",
            folder,
            type(error).__name__,
            error,
        )
        return None


def _kept(folder: Path, corpus: Callable[[], Iterable[Passage]], node: Bm25Retriever) -> Bm25:
    passages = list(corpus())
    if digest(passages, node) != folder.name:
        raise UserError(
            f"retriever: {', '.join(node.sources)} changed while it was read; try again when it is"
            " at rest"
        )
    index = Bm25.build(passages, node)
    try:
        write_folder(folder, index.save)
    except OSError as error:
        log.warning(
            "retriever: the index cannot be kept in %s (%s); it stays in memory", folder, error
        )
        return index
    return Bm25.load(folder, node)
