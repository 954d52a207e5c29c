"""Indexes on the disk, found again by the content of their passages.

Invariant: the name of a folder is the digest of the passages, settings and versions that its index
was built from; two processes at once build it once. The cache saves time alone and may be deleted.
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
# Raise this number with every change of the files' form.
FORMAT = 1

log = logging.getLogger(__name__)


def open_index(corpus: Callable[[], Iterable[Passage]], retriever: Bm25Retriever) -> Bm25:
    """The index over the passages of `corpus()`, mapped from the cache or built and put there.

    corpus: may be called twice. Raises UserError for an empty corpus or one that changes between
    the calls, and for a lock that another process holds too long. A cache that cannot be used is
    reported in the log, and the index built in memory.
    """
    if not retriever.cache:
        return Bm25.build(list(corpus()), retriever)
    folder = cache_dir() / "bm25" / digest(corpus(), retriever)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=LOCK_LIMIT_S):
            return _load(folder, retriever) or _build(folder, corpus, retriever)
    except Timeout as error:
        raise UserError(
            f"retriever: another process has held {folder}.lock for {LOCK_LIMIT_S} s; end it and"
            " try again"
        ) from error
    except OSError as error:
        log.warning(
            "retriever: no lock in the cache %s (%s); indexing in memory", folder.parent, error
        )
        return Bm25.build(list(corpus()), retriever)


def digest(passages: Iterable[Passage], retriever: Bm25Retriever) -> str:
    """32 hexadecimal digits of everything that an index depends on: passages, settings, and the
    versions of the code that cuts and scores words."""
    settings = (
        FORMAT,
        WORDS_VERSION,
        bm25s.__version__,
        unicodedata.unidata_version,
        retriever.title_weight,
        retriever.k1,
        retriever.b,
    )
    total = blake2b(repr(settings).encode(), digest_size=16)
    for passage in passages:
        for field in (passage.title, passage.text, passage.id):
            data = field.encode("utf-8", "surrogatepass")
            total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()


def _load(folder: Path, retriever: Bm25Retriever) -> Bm25 | None:
    if not folder.is_dir():
        return None
    try:
        return Bm25.load(folder, retriever)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        log.warning(
            "retriever: the index in %s is damaged (%s: %s); building it anew",
            folder,
            type(error).__name__,
            error,
        )
        return None


def _build(folder: Path, corpus: Callable[[], Iterable[Passage]], retriever: Bm25Retriever) -> Bm25:
    passages = list(corpus())
    if digest(passages, retriever) != folder.name:
        raise UserError(
            f"retriever: {', '.join(retriever.sources)} changed while it was read; run it again"
        )
    index = Bm25.build(passages, retriever)
    try:
        write_folder(folder, index.save)
    except OSError as error:
        log.warning(
            "retriever: the index cannot be kept in %s (%s); it stays in memory", folder, error
        )
        return index
    return Bm25.load(folder, retriever)
