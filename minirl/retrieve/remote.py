"""A retriever behind HTTP.

Invariant: a search ends with one list of passages for each query, or with a UserError that says
what the server did; `io.http` bounds its time and memory.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

from minirl.errors import UserError
from minirl.io.http import JsonClient
from minirl.recipe.retriever import RemoteRetriever
from minirl.retrieve.passage import Passage

_EXPECTED = "a JSON list with a list of {title, text, id} for each query"


class Remote:
    """Posts `{"queries": [...], "k": n}`; the answer is a list of passages `{text, title?, id?}`
    for each query."""

    def __init__(self, retriever: RemoteRetriever) -> None:
        self._url = retriever.url
        self._retries = retriever.retries
        self._client = JsonClient(
            retriever.url, timeout_s=retriever.timeout_s, expected=_EXPECTED, check="the url"
        )

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The first `k` passages that the server gives for each query; a blank query is not sent
        and finds nothing.

        Raises UserError for a server that gives no answer, refuses, or answers something else.
        """
        sent = [query for query in queries if query.strip()]
        if not sent:
            return [[] for _ in queries]
        rows = self._client.post({"queries": sent, "k": k}, self._retries).result()
        if (
            not isinstance(rows, list)
            or len(rows) != len(sent)
            or not all(isinstance(row, list) for row in rows)
        ):
            raise self._error(f"{reprlib.repr(rows)} for {len(sent)} queries")
        results = iter(rows)
        return [
            [self._passage(item) for item in next(results)[:k]] if query.strip() else []
            for query in queries
        ]

    def _passage(self, item: Any) -> Passage:
        fields = item if isinstance(item, dict) else {}
        title, text, identifier = (fields.get(name) for name in ("title", "text", "id"))
        identifier = str(identifier) if type(identifier) is int else identifier
        if not (
            isinstance(text, str)
            and isinstance(title, str | None)
            and isinstance(identifier, str | None)
        ):
            raise self._error(f"the passage {reprlib.repr(item)}")
        # Half of a surrogate pair would break a tokenizer later on.
        return Passage(
            *(
                field.encode("utf-8", "replace").decode()
                for field in (title or "", text, identifier or "")
            )
        )

    def _error(self, got: str) -> UserError:
        return UserError(f"{self._url}: got {got}, expected {_EXPECTED}; correct the server")
