"""Are the tool calls in a text the gold calls? (R3's second task: APIGen/xLAM, arXiv 2406.18518.)

Invariant: pure, total and bounded. Whatever the text, `verify` returns a Verdict in time linear in
its length times the number of gold calls; text is parsed as strict JSON and never executed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from minirl.episode import Verdict
from minirl.recipe import FunctionCallingCredit

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CHARS = 65_536
MAX_DEPTH = 32
MAX_CALLS = 64
MAX_DIGITS = 300

ErrorKind = Literal["format", "tool", "parameter"]
Call = tuple[str, dict[str, Any]]


def verify(
    answers: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    text: str,
    credit: FunctionCallingCredit,
) -> Verdict:
    """Score 1.0 if `text` makes exactly the calls of `answers`, else by `credit` of the error kind.

    answers: the gold calls, each {"name", "arguments"}. tools: the offered tools in the xLAM
    schema; only their defaults are read. parts["error_kind"]: "format" (no parsable call), "tool"
    (not the gold multiset of tool names), "parameter" (a name or a value), or None. The order of
    calls and of keys is free; a parameter at its stated default may be written or left out.
    """
    kind = error_kind(answers, tools, text)
    score = 1.0 if kind is None else float(getattr(credit, kind))
    return Verdict(score, kind is None, {"error_kind": kind})


def error_kind(
    answers: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], text: str
) -> ErrorKind | None:
    """The first fault of `text`; None if it is right."""
    calls = parse_calls(text)
    if calls is None:
        return "format"
    if Counter(name for name, _ in calls) != Counter(answer["name"] for answer in answers):
        return "tool"
    defaults = {tool["name"]: _read_defaults(tool) for tool in tools}
    # With every default filled in, `same` is an equivalence, so taking the first equal call left
    # over is an exact assignment.
    left = [(name, defaults.get(name, {}) | arguments) for name, arguments in calls]
    for answer in answers:
        name = answer["name"]
        gold = defaults.get(name, {}) | answer["arguments"]
        equal = (i for i, call in enumerate(left) if call[0] == name and same(gold, call[1]))
        at = next(equal, None)
        if at is None:
            return "parameter"
        del left[at]
    return None


def write_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls as a model is to write them: one tagged JSON object after another."""
    objects = ({"name": call["name"], "arguments": call["arguments"]} for call in calls)
    return "\n".join(f"{OPEN}\n{json.dumps(item, ensure_ascii=False)}\n{CLOSE}" for item in objects)


def parse_calls(text: str) -> list[Call] | None:
    """The (name, arguments) of each call in `text`; None if it holds no call, or anything that
    claims to be one and is not.

    Accepted: <tool_call> blocks, each with one call or a list of them, among any other text; else
    one JSON call or list of calls that is the whole text or the only ``` fence in it. A call has
    the keys "name" and "arguments" (or "parameters"). Text before </think> is thought, not a call.
    An empty list is well formed: it declares that nothing is called.
    """
    if len(text) > MAX_CHARS:
        return None
    blocks = _split_blocks(text.rpartition("</think>")[2].strip())
    if blocks is None:
        return None
    calls: list[Call] = []
    for block in blocks:
        value = _parse_json(block)
        for item in value if isinstance(value, list) else [value]:
            call = _read_call(item)
            if call is None or len(calls) == MAX_CALLS:
                return None
            calls.append(call)
    return calls


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal: 1 equals 1.0, but neither "1" nor true; lists in order,
    objects in any order."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _split_blocks(text: str) -> list[str] | None:
    """The pieces of `text` that must each be JSON; None if its tags or fences do not pair up."""
    if OPEN in text:
        # Split, not searched with a pattern: linear even where thousands of tags are never closed.
        before, *pieces = text.split(OPEN)
        if CLOSE in before or any(piece.count(CLOSE) != 1 for piece in pieces):
            return None
        return [piece.partition(CLOSE)[0] for piece in pieces]
    if text.startswith(("[", "{")):
        return [text]
    fences = text.split("```")
    return [fences[1].removeprefix("json")] if len(fences) == 3 else None


def _parse_json(text: str) -> Any:
    """The JSON value of `text`; None, which is no call either, if it is no strict JSON: Python
    would read more, which means different things to different readers."""
    try:
        value = _DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return None
    # Anything deep enough for a RecursionError is too deep anyway, so the verdict does not depend
    # on the caller's stack.
    return value if _is_shallow(value, MAX_DEPTH) else None


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _read_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError("huge integer")
    return int(digits)


def _read_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("number too large for a float")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_read_object,
    parse_int=_read_int,
    parse_float=_read_float,
    parse_constant=_refuse_constant,
)


def _is_shallow(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    items = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in items)


def _read_call(value: Any) -> Call | None:
    if not isinstance(value, dict) or len(value) != 2:
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _read_defaults(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a tool in the xLAM schema; a parameter that is marked required has none."""
    parameters = tool.get("parameters") or {}
    return {
        name: spec["default"]
        for name, spec in parameters.items()
        if "default" in spec and spec.get("required") is not True
    }
