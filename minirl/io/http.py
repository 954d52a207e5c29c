"""The one HTTP client: posts JSON to an address and reads JSON back.

Invariant: a post ends within (retries + 1) * timeout_s and the pauses between, whatever the server
does; at most MAX_BYTES and one chunk of an answer are held; a redirect is refused, not followed;
the connection of one try is closed before the next try.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from functools import cache
from typing import Any

import httpx2

from minirl.errors import UserError, first_line

MAX_BYTES = 64 * 2**20
FIRST_PAUSE_S = 1.0
_MAY_PASS = (
    httpx2.TimeoutException,
    httpx2.NetworkError,
    httpx2.ProxyError,
    httpx2.RemoteProtocolError,
)


class NoAnswerError(UserError):
    """Every try failed in a way that may pass: a time-out, a broken connection, 408, 429, 5xx."""


class JsonClient:
    """Posts to one address, through the proxies that the environment names.

    expected: the answer that the server should give. check: the settings that a user should check
    when the server refuses. Both stand in error messages.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        expected: str,
        check: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._expected = expected
        self._check = check
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._client = _open_client()

    def post(self, body: Any, retries: int) -> Future[Any]:
        """Start a post; the future gives the parsed answer. It raises NoAnswerError, or UserError
        for a server that refuses, answers too much or answers no JSON."""
        return _start(self._post(json.dumps(body).encode(), retries))

    async def _post(self, body: bytes, retries: int) -> Any:
        fault = ""
        for number in range(retries + 1):
            if number:
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (number - 1))
            try:
                async with asyncio.timeout(self._timeout_s):
                    status, reason, answer = await self._try(body)
            except TimeoutError:
                fault = f"no whole answer within {self._timeout_s:g} s"
            except _MAY_PASS as error:
                fault = f"{type(error).__name__}: {first_line(error)}"
            except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
                raise self._refusal(f"{type(error).__name__}: {first_line(error)}") from error
            else:
                if 200 <= status < 300:
                    return self._parse(answer)
                fault = f"HTTP {status} {reason}"
                if status not in (408, 429) and status < 500:
                    raise self._refusal(fault)
        raise NoAnswerError(
            f"{self._url}: no answer in {retries + 1} tries ({fault}); check that the server runs,"
            " or raise timeout_s"
        )

    async def _try(self, body: bytes) -> tuple[int, str, bytes]:
        """Status, reason and the first MAX_BYTES of the answer, or a little more."""
        answer = bytearray()
        async with self._client.stream(
            "POST", self._url, content=body, headers=self._headers
        ) as response:
            async for chunk in response.aiter_bytes():
                answer += chunk
                if len(answer) > MAX_BYTES:
                    break
            return response.status_code, response.reason_phrase, bytes(answer)

    def _parse(self, answer: bytes) -> Any:
        try:
            if len(answer) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES} bytes")
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self._url}: got {answer[:40]!r} ({error}), expected {self._expected}; correct"
                " the server"
            ) from error

    def _refusal(self, fault: str) -> UserError:
        return UserError(
            f"{self._url}: the server refused ({fault}), expected {self._expected}; check"
            f" {self._check}"
        )


def head(url: str, timeout_s: float) -> int | None:
    """The status of a HEAD request; None if there is no reply within `timeout_s`."""

    async def ask() -> int:
        async with asyncio.timeout(timeout_s), _open_client() as client:
            return (await client.head(url)).status_code

    try:
        status: int = _start(ask()).result()
        return status
    except (TimeoutError, httpx2.HTTPError, httpx2.InvalidURL, ValueError, UserError):
        return None


def _open_client() -> httpx2.AsyncClient:
    # asyncio.timeout bounds a whole try, look-up of the name included; httpx's own limits hold for
    # one socket operation, so a server that drips bytes would never meet them.
    try:
        return httpx2.AsyncClient(timeout=None, limits=httpx2.Limits(max_keepalive_connections=0))
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        raise UserError(
            f"the environment names a proxy that cannot be used ({first_line(error)}); correct or"
            " unset HTTP_PROXY, HTTPS_PROXY and ALL_PROXY"
        ) from error


def _start(work: Coroutine[Any, Any, Any]) -> Future[Any]:
    return asyncio.run_coroutine_threadsafe(work, _loop())


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """An event loop in a thread of its own: the caller's thread may run one already, as a notebook
    does."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="minirl http", daemon=True).start()
    return loop
