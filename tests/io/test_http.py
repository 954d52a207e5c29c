"""The HTTP client: notebooks, proxies, compressed answers. Slow, silent and broken servers are
tested with the retriever and the judge that stand on it."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from servers import Hanging, Reply, Server

from minirl.errors import UserError
from minirl.io import http

NO_PROXY = ("no_proxy", "NO_PROXY")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NO_PROXY:
        monkeypatch.setenv(name, "127.0.0.1")


def client(url: str, timeout_s: float = 5.0, **headers: str) -> http.JsonClient:
    return http.JsonClient(
        url, timeout_s=timeout_s, expected="a list", check="the url", headers=headers
    )


def test_a_post_works_where_an_event_loop_runs_already(serve: Callable[[Reply], Server]) -> None:
    """As in a cell of a notebook."""
    url = serve(lambda body: (200, json.dumps([body]).encode())).url

    async def cell() -> object:
        return client(url).post({"a": "\ud800"}, 0).result()

    assert asyncio.run(cell()) == [{"a": "\ud800"}]


def test_posts_run_side_by_side(serve: Callable[[Reply], Server]) -> None:
    barrier = threading.Barrier(3, timeout=10)

    def reply(body: object) -> tuple[int, bytes]:
        barrier.wait()
        return 200, json.dumps(body).encode()

    one = client(serve(reply).url)
    posts = [one.post({"n": n}, 0) for n in range(3)]
    assert [post.result() for post in posts] == [{"n": n} for n in range(3)]


def test_a_header_that_cannot_be_sent_is_refused_at_once(
    serve: Callable[[Reply], Server],
) -> None:
    url = serve(lambda body: (200, b"1")).url
    for key in ("two\nlines", "“quoted”"):
        with pytest.raises(UserError, match=r"the server refused \(.*check the url"):
            client(url, Authorization=f"Bearer {key}").post({}, 9).result()


class _Answer(BaseHTTPRequestHandler):
    body = gzip.compress(b" " * 4_000_000)
    seen: list[str]

    def do_POST(self) -> None:
        self.seen.append(self.path)
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server that answers with a small body that is large when it is unpacked; the paths that it
    was asked for."""
    seen: list[str] = []
    handler = type("Answer", (_Answer,), {"seen": seen})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as one:
        threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{one.server_port}", seen
        one.shutdown()


def test_an_answer_is_bounded_after_unpacking(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "MAX_BYTES", 1_000_000)
    with pytest.raises(UserError, match="more than 1000000 bytes"):
        client(server[0]).post({}, 0).result()


def test_proxies_are_those_of_the_environment(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Answer, "body", gzip.compress(b"[1]"))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, server[0])
    assert client("http://judge.invalid/v1").post({}, 0).result() == [1]
    assert client(f"{server[0]}/near").post({}, 0).result() == [1]
    assert server[1] == ["http://judge.invalid/v1", "/near"]
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "ftp://127.0.0.1:9")
    with pytest.raises(UserError, match="a proxy that cannot be used"):
        client("http://judge.invalid/v1")


CAUGHT = """
import sys
from minirl.io.http import JsonClient
post = JsonClient(sys.argv[1], timeout_s=60, expected="", check="").post({}, 0)
sys.exit(3)
"""


def test_a_process_ends_while_an_answer_is_awaited() -> None:
    with Hanging() as hanging:
        done = subprocess.run(
            [sys.executable, "-c", CAUGHT, hanging.url], capture_output=True, text=True, timeout=30
        )
    assert (done.returncode, done.stderr) == (3, "")


def test_a_hanging_server_is_left_before_it_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 0.1)
    with Hanging() as hanging:
        post = client(hanging.url, timeout_s=0.2).post({}, 2)
        wait([post])
        assert isinstance(post.exception(), http.NoAnswerError)
        assert (hanging.seen, hanging.most) == (3, 1)
