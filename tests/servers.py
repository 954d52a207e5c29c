"""A server that speaks chat completions, for tests; a fixture of conftest starts and stops it.

Invariant: a reply is a function of the request's body; nothing leaves this machine.
"""

from __future__ import annotations

import http.server
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from minirl import recipe

Reply = Callable[[dict[str, Any]], tuple[int, bytes]]


class Server:
    """Answers each POST with `reply(body)`; counts what is under way at once."""

    def __init__(self, reply: Reply) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.now, self.most, self.lock = 0, 0, threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.bodies.append(body)
                    server.keys.append(self.headers["Authorization"])
                    server.now += 1
                    server.most = max(server.most, server.now)
                time.sleep(0.02)
                status, answer = reply(body)
                with server.lock:
                    server.now -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                with suppress(OSError):  # the client may have gone
                    self.wfile.write(answer)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1/chat/completions"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


class Hanging:
    """Begins an answer to whoever connects and never ends it: a byte of a header now and then, so
    that no socket's time-out ends it either.

    seen: connections; most: how many were open at once, those that the client has closed not among
    them.
    """

    def __init__(self) -> None:
        self.seen = self.most = 0
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1/chat/completions"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Hanging:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        clients: set[socket.socket] = set()
        with selectors.DefaultSelector() as poller:
            poller.register(self._listener, selectors.EVENT_READ)
            while not self._closed:
                ready = {key.fileobj for key, _ in poller.select(0.02)}
                for client in list(clients):
                    if client in ready and _hung_up(client):
                        poller.unregister(client)
                        clients.remove(client)
                        client.close()
                if self._listener in ready:  # after the others: whoever hung up did so before
                    client, _ = self._listener.accept()
                    client.setblocking(False)
                    client.send(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                    clients.add(client)
                    poller.register(client, selectors.EVENT_READ)
                    self.seen, self.most = self.seen + 1, max(self.most, len(clients))
                for client in clients:
                    with suppress(OSError):
                        client.send(b"a")
        for client in clients:
            client.close()


def _hung_up(client: socket.socket) -> bool:
    try:
        while client.recv(2**16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def completion(text: str, finish: str = "stop") -> tuple[int, bytes]:
    return (
        200,
        json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}]}).encode(),
    )


def node(url: str, **more: Any) -> recipe.Judge:
    return recipe.Judge(
        kind="endpoint", url=url, model="judge-1", **({"retries": 1, "timeout_s": 5} | more)
    )
