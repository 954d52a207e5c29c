"""A retriever behind HTTP.

Invariant: a search ends within (retries + 1) * timeout_s and the pauses between, and holds at most
MAX_BYTES of an answer, whatever the server does: with passages, or with one line that says what it
did.
"""

from __future__ import annotations

import http.client
import json
import reprlib
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from minirl.errors import UserError
from minirl.recipe.retriever import RemoteRetriever
from minirl.retrieve.passage import Passage

MAX_BYTES = 64 * 2**20
CHUNK_BYTES = 2**16
FIRST_PAUSE_S = 1.0
_EXPECTED = "expected a JSON list with a list of {title, text, id} for each query"


class Remote:
    """Posts `{"queries": [...], "k": n}` to `node.url`; the answer is a list of passages `{text,
    title?, id?}` for each query."""

    def __init__(self, node: RemoteRetriever) -> None:
        self._node = node

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The first `k` passages that the server gives for each query; none, without asking it, for
        a query of spaces.

        Raises UserError for a server that gives no answer (after `node.retries` more tries),
        refuses, or answers something else.
        """
        asked = [query for query in queries if query.strip()]
        found = iter(
            self._read(self._ask({"queries": asked, "k": k}), len(asked), k) if asked else ()
        )
        return [next(found) if query.strip() else [] for query in queries]

    def _ask(self, question: dict[str, Any]) -> bytes:
        url, tries = self._node.url, self._node.retries + 1
        request = urllib.request.Request(
            url, json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        said = ""
        for number in range(tries):
            if number:
                time.sleep(FIRST_PAUSE_S * 2 ** (number - 1))
            answer = within(request, self._node.timeout_s)
            if isinstance(answer, bytes):
                if len(answer) > MAX_BYTES:
                    raise UserError(
                        f"{url}: got an answer of more than {MAX_BYTES} bytes, {_EXPECTED}; mend"
                        " the server, or ask for a smaller k"
                    )
                return answer
            said = f"{type(answer).__name__}: {answer}"[:200]
            if not passing(answer):
                raise UserError(
                    f"{url}: the server refused ({said}), {_EXPECTED}; see that the address is that"
                    " of its search"
                )
        raise UserError(
            f"{url}: no answer in {tries} tries ({said}); see that the server runs, or raise"
            " `timeout_s` of the retriever"
        )

    def _read(self, answer: bytes, count: int, k: int) -> list[list[Passage]]:
        try:
            rows = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self._node.url}: got {answer[:40]!r} ({error}), {_EXPECTED}; mend the server"
            ) from error
        if (
            not isinstance(rows, list)
            or len(rows) != count
            or not all(isinstance(row, list) for row in rows)
        ):
            raise UserError(
                f"{self._node.url}: got {reprlib.repr(rows)} for {count} queries, {_EXPECTED}; mend"
                " the server"
            )
        return [[self._passage(item) for item in row[:k]] for row in rows]

    def _passage(self, item: Any) -> Passage:
        title, text, identifier = (
            (item.get(name) for name in ("title", "text", "id"))
            if isinstance(item, dict)
            else (None,) * 3
        )
        identifier = str(identifier) if type(identifier) is int else identifier
        if not (
            isinstance(text, str)
            and isinstance(title, str | None)
            and isinstance(identifier, str | None)
        ):
            raise UserError(
                f"{self._node.url}: got the passage {reprlib.repr(item)}, {_EXPECTED}; mend the"
                " server"
            )
        # Half of a surrogate pair would break a tokenizer later on.
        return Passage(
            *(
                field.encode("utf-8", "replace").decode()
                for field in (title or "", text, identifier or "")
            )
        )


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET without its question: better an error that shows the 30x."""

    def redirect_request(self, *args: Any) -> None:
        return None


class _Line:
    """The connections of one request, so that another thread can hang up."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._cut = False

    def took(self, sock: socket.socket) -> None:
        """A connection was made; it ends at once where the line has been cut."""
        self._sockets.append(sock)
        if self._cut:
            self.cut()

    def cut(self) -> None:
        """End what there is and what is still to come."""
        self._cut = True  # before the list is gone through, so that no connection slips in between
        for sock in list(self._sockets):
            with suppress(OSError):  # the other side was first
                sock.shutdown(socket.SHUT_RDWR)


class _Wired:
    """Mixed into a handler of urllib: a line hears of each connection."""

    def __init__(self, line: _Line) -> None:
        super().__init__()
        self._line = line

    def do_open(self, http_class: Any, req: urllib.request.Request, **http_conn_args: Any) -> Any:
        """As the handler's own."""

        def made(*args: Any, **more: Any) -> Any:
            connection = http_class(*args, **more)
            connect = connection.connect

            def connected() -> None:
                connect()
                self._line.took(connection.sock)

            connection.connect = connected
            return connection

        return super().do_open(made, req, **http_conn_args)  # type: ignore[misc]


class _Http(_Wired, urllib.request.HTTPHandler):
    pass


class _Https(_Wired, urllib.request.HTTPSHandler):
    pass


def within(request: urllib.request.Request, limit_s: float) -> bytes | Exception:
    """The answer's first MAX_BYTES + 1 bytes, or why there is none after `limit_s`; then the
    connection is closed, for the server to see.

    What a server still does for a connection that is closed is its own affair.
    """
    got: list[bytes | Exception] = []
    line = _Line()
    # A socket's timeout bounds neither the look-up of a name nor a server that drips bytes; not
    # waiting for a thread bounds both.
    thread = threading.Thread(target=lambda: got.append(_post(request, limit_s, line)), daemon=True)
    thread.start()
    thread.join(limit_s)
    if got:
        return got[0]
    line.cut()
    return TimeoutError(f"no whole answer within {limit_s:g} s")


def _post(request: urllib.request.Request, limit_s: float, line: _Line) -> bytes | Exception:
    end = time.monotonic() + limit_s
    body = bytearray()
    try:
        with urllib.request.build_opener(_Stay, _Http(line), _Https(line)).open(
            request, timeout=limit_s
        ) as response:
            while len(body) <= MAX_BYTES and time.monotonic() < end:
                chunk = response.read1(CHUNK_BYTES)
                body += chunk
                if not chunk:
                    break
            if response.length and len(body) <= MAX_BYTES:
                return ConnectionError(f"{response.length} bytes of the answer are missing")
            return bytes(body)
    except urllib.error.HTTPError as error:
        error.close()
        return error
    except (OSError, http.client.HTTPException, ValueError) as error:
        return error


def passing(error: Exception) -> bool:
    """Whether it may be well the next time."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in (408, 429) or error.code >= 500
    return isinstance(error, OSError | http.client.HTTPException) and not isinstance(
        error, ValueError
    )
