"""A server that speaks chat completions, for tests; a fixture of conftest starts and stops it.

Invariant: a reply is a function of the request's body; nothing leaves this machine.
"""

from __future__ import annotations

import http.server
import json
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


def completion(text: str, finish: str = "stop") -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}]}).encode()


def node(url: str, **more: Any) -> recipe.Judge:
    return recipe.Judge(kind="endpoint", url=url, model="judge-1", **({"retries": 1, "timeout_s": 5} | more))
