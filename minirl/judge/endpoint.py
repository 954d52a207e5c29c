"""A sampler behind HTTP: any server that speaks OpenAI's chat completions, for judges.

Invariant: every ask is answered within (retries + 1) * timeout_s and the pauses between, at most
`concurrency` connections are open (that of a request that was given up is closed before the next),
and a server's fault is one line. A completion from here is text alone: `tokens` and `logprobs` are
empty, for the server's ids are none of ours. So nothing of it can be trained.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Sequence
from typing import Any

from minirl.chat import Chat
from minirl.episode import Ask, Completion, Problem
from minirl.errors import UserError
from minirl.recipe import Other
from minirl.retrieve.remote import MAX_BYTES, passing, within

FIRST_PAUSE_S = 1.0
GIVE_UP = 8
FAILED = Completion((), (), "", "failed")
_EXPECTED = "expected chat completions: {choices: [{message: {content}, finish_reason}]}"


def _line(role: str, content: str) -> bytes:
    return json.dumps({"role": role, "content": content}).encode() + b"\n"


class Messages(Chat):
    """Stands in for a Chat where the server holds the tokenizer: messages as lines of JSON, one
    token a byte."""

    eos: frozenset[int] = frozenset()

    def __init__(self) -> None:
        """No tokenizer, so nothing of a Chat but `prompt`, `user`, `reply` and `inside`."""

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
        """Text by itself, to count and to cut."""
        return tuple(text.encode())

    def text(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """What `inside` encoded, or the part of it that is left."""
        return bytes(tokens).decode(errors="ignore")


class _NoAnswerError(UserError):
    """A fault that may be gone the next time: a time-out, a connection that fails, 408, 429 or
    5xx."""


class EndpointSampler:
    """Posts each ask in a thread of its own. Raises UserError from `poll` for a server that gives
    no answer, refuses, or says nonsense.

    patient: never raise; an ask that comes to nothing is answered by a completion that "failed".
    After GIVE_UP without an answer in a row all that wait fail at once; `reset` gives the server
    another chance: one ask goes ahead, without retries, and the others only once that one is
    answered. So a dead server costs one time-out a call. A refusal of one ask (a prompt that is too
    long, say) is an answer.
    """

    def __init__(self, node: Other, *, patient: bool = False) -> None:
        self._node = node
        self.patient = patient
        self.last_fault = ""
        self._faults = 0  # asks without an answer, in a row
        self._url = str(node.url)
        self._waiting: deque[tuple[int, Ask]] = deque()
        self._running = 0
        self._done: queue.SimpleQueue[tuple[int, Completion | UserError]] = queue.SimpleQueue()
        self._headers = {"Content-Type": "application/json"}
        if node.key_env is not None:
            if not (key := os.environ.get(node.key_env)):
                raise UserError(
                    f"{type(node).__name__.lower()}.key_env: {node.key_env} is not set, expected"
                    f" the key of {self._url} in that variable"
                )
            self._headers["Authorization"] = f"Bearer {key}"

    def add(self, key: int, ask: Ask) -> None:
        """Queue an ask whose tokens are of `Messages`."""
        self._waiting.append((key, ask))

    def reset(self) -> None:
        """Nothing outlives a poll but how a server has done lately."""
        self._faults = min(self._faults, GIVE_UP - 1)

    def poll(self) -> list[tuple[int, Completion]]:
        """Wait until at least one ask is answered; all that are."""
        if self.patient and self._faults >= GIVE_UP and self._waiting:
            given_up = [(key, FAILED) for key, _ in self._waiting]
            self._waiting.clear()
            return given_up
        doubtful = self._faults >= GIVE_UP - 1
        while self._waiting and self._running < (1 if doubtful else self._node.concurrency):
            retries = 0 if doubtful else self._node.retries
            threading.Thread(
                target=self._answer, args=(*self._waiting.popleft(), retries), daemon=True
            ).start()
            self._running += 1
        if not self._running:
            raise RuntimeError("poll: expected at least one ask")
        found = [self._done.get()]
        while not self._done.empty():
            found.append(self._done.get())
        self._running -= len(found)
        answers = []
        for key, answer in found:
            self._faults = self._faults + 1 if isinstance(answer, _NoAnswerError) else 0
            if not isinstance(answer, UserError):
                answers.append((key, answer))
            elif self.patient:
                self.last_fault = str(answer)
                answers.append((key, FAILED))
            else:
                raise answer
        return answers

    def _answer(self, key: int, ask: Ask, retries: int) -> None:
        try:
            self._done.put((key, self._read(self._post(ask, retries))))
        except UserError as error:
            self._done.put((key, error))
        except (
            Exception
        ) as error:  # of a thread: whoever polls must hear of it, or would wait for ever
            self._done.put((key, UserError(f"{self._url}: {type(error).__name__}: {error}")))

    def _post(self, ask: Ask, retries: int) -> bytes:
        messages = [json.loads(line) for line in bytes(ask.tokens).splitlines()]
        body: dict[str, Any] = {
            "model": self._node.model,
            "messages": messages,
            "max_tokens": ask.max_tokens,
        }
        body |= {"temperature": ask.temperature, "seed": ask.seed % 2**31} | (
            {"stop": list(ask.stop)} if ask.stop else {}
        )
        request, said = (
            urllib.request.Request(self._url, json.dumps(body).encode(), self._headers),
            "",
        )
        for number in range(retries + 1):
            if number:
                time.sleep(FIRST_PAUSE_S * 2 ** (number - 1))
            answer = within(request, self._node.timeout_s)
            if isinstance(answer, bytes):
                return answer
            said = f"{type(answer).__name__}: {answer}"[:200]
            if not passing(answer):
                raise UserError(
                    f"{self._url}: the server refused ({said}), {_EXPECTED}; see to the address,"
                    " the model's name and the key"
                )
        raise _NoAnswerError(
            f"{self._url}: no answer in {retries + 1} tries ({said}); see that the server runs, or"
            " raise timeout_s"
        )

    def _read(self, answer: bytes) -> Completion:
        try:
            if len(answer) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES} bytes")
            choice: dict[str, Any] = json.loads(answer)["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError(f"content is {type(text).__name__}")
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise UserError(
                f"{self._url}: got {answer[:40]!r} ({type(error).__name__}: {error}), {_EXPECTED};"
                " mend the server"
            ) from error
        text = text.encode(
            "utf-8", "replace"
        ).decode()  # half of a surrogate pair would break a tokenizer later on
        return Completion(
            (), (), text, "length" if choice.get("finish_reason") == "length" else "stop"
        )
