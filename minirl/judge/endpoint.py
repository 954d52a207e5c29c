"""A sampler behind HTTP: any server that speaks OpenAI's chat completions, for judges.

Invariant: every ask is answered within (retries + 1) * timeout_s and the pauses between, at most
`concurrency` requests are under way, and a server's fault is one line. A completion from here is
text alone: `tokens` and `logprobs` are empty, since the server's ids are not ours, so it cannot be
trained.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from minirl.chat import Chat
from minirl.episode import Ask, Completion, Problem
from minirl.errors import UserError
from minirl.io.http import JsonClient, NoAnswerError
from minirl.recipe import Other

GIVE_UP = 8
FAILED = Completion((), (), "", "failed")
_EXPECTED = "chat completions: {choices: [{message: {content}, finish_reason}]}"


def _line(role: str, content: str) -> bytes:
    return json.dumps({"role": role, "content": content}).encode() + b"\n"


class Messages(Chat):
    """Stands in for a Chat where the server holds the tokenizer: messages as lines of JSON, one
    token a byte."""

    eos: frozenset[int] = frozenset()

    def __init__(self) -> None:
        """Without a tokenizer only the methods below work."""

    def prompt(self, problem: Problem) -> tuple[int, ...]:
        """The first messages of a problem."""
        system = _line("system", problem.system) if problem.system else b""
        return tuple(system + _line("user", problem.prompt))

    def user(self, text: str, *, after: Sequence[int]) -> tuple[int, ...]:
        """A user message to append."""
        return tuple(_line("user", text))

    def reply(self, text: str) -> tuple[int, ...]:
        """An assistant message."""
        return tuple(_line("assistant", text))

    def inside(self, text: str) -> tuple[int, ...]:
        """Text without a role, to count and to cut."""
        return tuple(text.encode())

    def text(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text that `inside` encoded, or the part of it that is left."""
        return bytes(tokens).decode(errors="ignore")


class EndpointSampler:
    """Posts asks, several at a time. Raises UserError from `poll` for a server that gives no
    answer, refuses, or answers something else.

    patient: never raise; an ask without a usable answer gets a completion that "failed". After
    GIVE_UP asks without an answer in a row all waiting asks fail at once; `reset` gives the server
    another chance: one ask goes ahead, without retries, and the others once that one is answered.
    So a dead server costs one time-out a call. A refusal (of too long a prompt, say) is an answer.
    """

    def __init__(self, server: Other, *, patient: bool = False) -> None:
        self.patient = patient
        self.last_fault = ""
        self._server = server
        self._faults = 0  # asks without an answer, in a row
        self._waiting: deque[tuple[int, Ask]] = deque()
        self._posts: dict[Future[Any], int] = {}
        headers = {}
        if server.key_env is not None:
            if not (key := os.environ.get(server.key_env)):
                raise UserError(
                    f"{type(server).__name__.lower()}.key_env: {server.key_env} is not set,"
                    f" expected the key of {server.url} in that variable"
                )
            headers["Authorization"] = f"Bearer {key}"
        self._client = JsonClient(
            str(server.url),
            timeout_s=server.timeout_s,
            expected=_EXPECTED,
            check="the url, the model's name and the key",
            headers=headers,
        )

    def add(self, key: int, ask: Ask) -> None:
        """Queue an ask whose tokens are of `Messages`."""
        self._waiting.append((key, ask))

    def reset(self) -> None:
        """Give a server that was given up another chance."""
        self._faults = min(self._faults, GIVE_UP - 1)

    def poll(self) -> list[tuple[int, Completion]]:
        """Wait until at least one ask is answered; return all answers that are there."""
        if self.patient and self._faults >= GIVE_UP and self._waiting:
            failures = [(key, FAILED) for key, _ in self._waiting]
            self._waiting.clear()
            return failures
        self._start_posts()
        if not self._posts:
            raise RuntimeError("poll: expected at least one ask")
        wait(self._posts, return_when=FIRST_COMPLETED)
        done = [post for post in self._posts if post.done()]
        return [(self._posts.pop(post), self._completion(post)) for post in done]

    def _start_posts(self) -> None:
        is_doubtful = self._faults >= GIVE_UP - 1
        most, retries = (1, 0) if is_doubtful else (self._server.concurrency, self._server.retries)
        while self._waiting and len(self._posts) < most:
            key, ask = self._waiting.popleft()
            body = {
                "model": self._server.model,
                "messages": [json.loads(line) for line in bytes(ask.tokens).splitlines()],
                "max_tokens": ask.max_tokens,
                "temperature": ask.temperature,
                "seed": ask.seed % 2**31,
            } | ({"stop": list(ask.stop)} if ask.stop else {})
            self._posts[self._client.post(body, retries)] = key

    def _completion(self, post: Future[Any]) -> Completion:
        try:
            completion = self._read(post.result())
        except UserError as error:
            self._faults = self._faults + 1 if isinstance(error, NoAnswerError) else 0
            if not self.patient:
                raise
            self.last_fault = str(error)
            return FAILED
        self._faults = 0
        return completion

    def _read(self, answer: Any) -> Completion:
        try:
            choice: dict[str, Any] = answer["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError(f"content is {type(text).__name__}")
            is_cut = choice.get("finish_reason") == "length"
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise UserError(
                f"{self._server.url}: got {reprlib.repr(answer)} ({type(error).__name__}: {error}),"
                f" expected {_EXPECTED}; correct the server"
            ) from error
        # Half of a surrogate pair would break a tokenizer later on.
        text = text.encode("utf-8", "replace").decode()
        return Completion((), (), text, "length" if is_cut else "stop")
