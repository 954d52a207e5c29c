"""Demonstrations of function calling: the gold calls, a plausible attempt that the verifier
rejects, and a reflection that names its fault.

Invariant: pure, and every attempt has been put to the verifier.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

from minirl.episode import Problem
from minirl.tasks.task import Demonstration
from minirl.verify.function_calling import CLOSE, OPEN, error_kind, write_calls

Calls = Sequence[dict[str, Any]]
Fault = tuple[str, str]  # the attempt's text, the reflection's


def demonstrate(problem: Problem, rng: Random) -> Demonstration:
    """The gold calls, a rejected attempt and a reflection on it, drawn by `rng`."""
    calls, tools = problem.answer["calls"], problem.answer["tools"]
    faults = [_call_wrong_tool, _spoil_argument, _leave_out_call]
    rng.shuffle(faults)
    # A fault may turn out to be none (an argument dropped at its default), so each is put to the
    # verifier; words alone never pass.
    for make in [*faults, _only_talk]:
        fault = make(calls, tools, rng)
        if fault and error_kind(calls, tools, fault[0]):
            return Demonstration(write_calls(calls), *fault)
    raise AssertionError("a text without a call was accepted")


def _call_wrong_tool(calls: Calls, tools: Calls, rng: Random) -> Fault | None:
    at = rng.randrange(len(calls))
    right, given = calls[at]["name"], calls[at]["arguments"]
    others = [tool for tool in tools if tool["name"] != right]
    if not others:
        return None
    other = rng.choice(others)
    wanted = list(other.get("parameters") or {})
    arguments = {name: given[name] for name in wanted if name in given} or dict(
        zip(wanted, given.values(), strict=False)
    )
    return _replace_call(calls, at, other["name"], arguments), (
        f"I called {other['name']}, which is not the tool for this request. The tool that does what"
        f" is asked is {right}."
    )


def _spoil_argument(calls: Calls, tools: Calls, rng: Random) -> Fault | None:
    at = rng.randrange(len(calls))
    name, arguments = calls[at]["name"], calls[at]["arguments"]
    if not arguments:
        return None
    key = rng.choice(list(arguments))
    right = json.dumps(arguments[key], ensure_ascii=False)
    if rng.random() < 0.5:
        rest = {k: v for k, v in arguments.items() if k != key}
        return _replace_call(calls, at, name, rest), (
            f"My call of {name} left out {key}. The request calls for it, so it must be there:"
            f" {key} is {right}."
        )
    wrong = _alter(arguments[key])
    return _replace_call(calls, at, name, arguments | {key: wrong}), (
        f"In my call of {name} I gave {key} as {json.dumps(wrong, ensure_ascii=False)}. It should"
        f" be exactly {right}."
    )


def _leave_out_call(calls: Calls, tools: Calls, rng: Random) -> Fault | None:
    if len(calls) == 1:
        return None
    at = rng.randrange(len(calls))
    return write_calls([*calls[:at], *calls[at + 1 :]]), (
        f"The request needs {len(calls)} calls and I made {len(calls) - 1}: a call of"
        f" {calls[at]['name']} is missing."
    )


def _only_talk(calls: Calls, tools: Calls, rng: Random) -> Fault:
    name = calls[0]["name"]
    return f"I would use {name} for this.", (
        f"I only talked about {name} and called nothing. A call must be written as JSON between"
        f" {OPEN} and {CLOSE}."
    )


def _alter(value: Any) -> Any:
    """A value near `value` and not equal to it: the mistakes that are common in a call."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        first = value.split()[0] if value.strip() else "none"
        near = (first, value.lower(), value.capitalize(), value + "0")
        return next(wrong for wrong in near if wrong != value)
    return value[:-1] if isinstance(value, list) and value else "none"


def _replace_call(calls: Calls, at: int, name: str, arguments: dict[str, Any]) -> str:
    """The calls as text, with another one in place of number `at`."""
    return write_calls([*calls[:at], {"name": name, "arguments": arguments}, *calls[at + 1 :]])
