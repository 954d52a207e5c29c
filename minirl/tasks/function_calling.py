"""Function calling, R3's second task: rows in the xLAM schema (`query, tools, answers`; APIGen,
arXiv 2406.18518).

Invariant: every problem's gold calls pass the verifier and call only offered tools, and no held-out
query, whatever its case and spacing, is among the training ones. Rows that cannot keep this are
left out and counted in the task's notes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from random import Random
from typing import Any

from minirl import recipe
from minirl.episode import Problem, Verdict
from minirl.errors import UserError
from minirl.io.rows import read_dataset
from minirl.tasks.task import Demonstration, Task
from minirl.verify.function_calling import CLOSE, OPEN, error_kind, verify

SYSTEM = (
    "You act for the user by calling tools. Reply with tool calls only, and make every call that"
    " the request needs. Write each call as one "
    f'JSON object between {OPEN} and {CLOSE}: {{"name": the tool, "arguments": an object that gives'
    " each parameter its value}."
)

# Types as xLAM writes them (Python's) and as JSON schema does.
_JSON_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
}
_JSON_TYPES |= {
    "list": "array",
    "tuple": "array",
    "set": "array",
    "sequence": "array",
    "dict": "object",
    "mapping": "object",
}
_JSON_TYPES |= {
    name: name for name in ("string", "integer", "number", "boolean", "array", "object", "null")
}


def open_task(node: recipe.FunctionCalling, seed: int) -> Task:
    """The task over `node.source`; split by the queries alone, so that runs with different seeds
    share their held-out set.

    Raises UserError for data that cannot be had or read, or for too few rows.
    """
    problems: list[Problem] = []
    left_out: Counter[str] = Counter()
    rows = read_dataset(node.source, ("query", "tools", "answers"))
    for number, (where, row) in enumerate(rows, 1):
        query, tools, calls = _read(row, where)
        reason = _unusable(query, tools, calls, node.max_tools)
        if reason:
            left_out[reason] += 1
            continue
        answer = {"calls": calls, "tools": tools}
        problems.append(
            Problem(
                f"function_calling/{number}",
                query,
                answer,
                calls_text(calls),
                system=SYSTEM,
                tools=tool_schemas(tools),
            )
        )
    train, held_out = _split(problems, node.held_out)
    if not train or len(held_out) < node.held_out:
        raise UserError(
            f"{node.source}: got {len(problems)} usable rows ({left_out.total()} left out),"
            f" expected {node.held_out + 1} or more (task.held_out and one to train on) with"
            " different queries; pass more data, or a smaller `--set task.held_out=N`"
        )
    repeated = len(problems) - len(train) - len(held_out)
    if repeated:
        left_out["ask what a held-out row asks"] = repeated

    def check(problem: Problem, text: str) -> Verdict:
        return verify(problem.answer["calls"], problem.answer["tools"], text, node.credit)

    notes = tuple(
        f"{node.source}: rows left out because they {reason}: {count}"
        for reason, count in sorted(left_out.items())
    )
    return Task(
        "function_calling",
        train[: node.train],
        held_out,
        check,
        demonstrate=demonstrate,
        notes=notes,
    )


def calls_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls as a model is to write them: one tagged JSON object after another."""
    objects = ({"name": call["name"], "arguments": call["arguments"]} for call in calls)
    return "\n".join(f"{OPEN}\n{json.dumps(item, ensure_ascii=False)}\n{CLOSE}" for item in objects)


def tool_schemas(tools: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """A row's tools of the xLAM schema as the JSON-schema tools that chat templates read."""
    # xLAM marks nothing, so a bare parameter is required; ToolAlpaca marks the required ones, so a
    # bare parameter beside them is not.
    marked = any(
        "required" in spec for tool in tools for spec in (tool.get("parameters") or {}).values()
    )
    return tuple(_tool_schema(tool, marked) for tool in tools)


def _tool_schema(tool: Mapping[str, Any], marked: bool) -> dict[str, Any]:
    parameters = tool.get("parameters") or {}
    body = {
        "type": "object",
        "properties": {name: _property(spec) for name, spec in parameters.items()},
        "required": [name for name, spec in parameters.items() if not is_optional(spec, marked)],
    }
    return {
        "type": "function",
        "function": {
            "name": tool["name"],
            "description": tool.get("description") or "",
            "parameters": body,
        },
    }


def is_optional(spec: Mapping[str, Any], marked: bool) -> bool:
    """Whether a parameter may be left out. `required` decides where it stands; else a default or an
    "optional" in the type does.

    marked: the row marks its required parameters, so that one without a mark is optional.
    """
    if isinstance(spec.get("required"), bool):
        return not spec["required"]
    kind = str(spec.get("type", "")).lower()
    return (
        marked or "default" in spec or kind.startswith("optional[") or "optional" in _commas(kind)
    )


def type_schema(kind: str, depth: int = 8) -> dict[str, Any]:
    """JSON schema of a type as xLAM writes it: "int, optional", "List[int]", "Dict[str, float]"; {}
    (any value) for one it cannot say."""
    head, bracket, rest = (_commas(kind) or [""])[0].partition("[")
    head = head.strip().lower().removeprefix("typing.")
    inner = _commas(rest.rpartition("]")[0]) if bracket else []
    if depth == 0:
        return {}
    if head in ("optional", "union"):
        branches = [type_schema(item, depth - 1) for item in inner if item != "None"]
        return (
            branches[0]
            if len(branches) == 1
            else {"anyOf": branches}
            if branches and all(branches)
            else {}
        )
    if head not in _JSON_TYPES:
        return {}
    schema: dict[str, Any] = {"type": _JSON_TYPES[head]}
    if schema["type"] == "array" and len({item for item in inner if item != "..."}) == 1:
        schema["items"] = type_schema(inner[0], depth - 1)
    if schema["type"] == "object" and len(inner) == 2:
        schema["additionalProperties"] = type_schema(inner[1], depth - 1)
    return schema


def _commas(text: str) -> list[str]:
    """`text` split at the commas outside brackets."""
    parts, level = [""], 0
    for char in text:
        level += (char == "[") - (char == "]")
        if char == "," and level == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _property(spec: Mapping[str, Any]) -> dict[str, Any]:
    kind = spec.get("type")
    said = {key: spec[key] for key in ("description", "enum", "default") if key in spec}
    return type_schema(kind if isinstance(kind, str) else "") | said


def _read(
    row: Mapping[str, Any], where: str
) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """query, tools and answers of a row, their shapes checked; the hub's rows hold the last two as
    JSON text."""
    query, tools, calls = (
        row["query"],
        _objects(row, "tools", where),
        _objects(row, "answers", where),
    )
    if not isinstance(query, str) or not query.strip():
        raise UserError(
            f"{where}: query: got {str(query)[:40]!r}, expected the user's request as text"
        )
    for tool in tools:
        parameters = tool.get("parameters") or {}
        if not isinstance(parameters, dict) or not all(
            isinstance(spec, dict) for spec in parameters.values()
        ):
            got = str(parameters)[:80]
            raise UserError(
                f"{where}: tool {tool['name']!r}: got parameters {got}, expected {{parameter:"
                " {description, type, default}}"
            )
    for call in calls:
        if not isinstance(call.get("arguments"), dict):
            raise UserError(
                f"{where}: answers: got {str(call)[:80]}, expected {{name, arguments: {{parameter:"
                " value}}"
            )
    return query, tools, calls


def _objects(row: Mapping[str, Any], column: str, where: str) -> list[dict[str, Any]]:
    value = row[column]
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: {column}: not valid JSON ({error}), expected a list of objects"
        ) from error
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and isinstance(item.get("name"), str) for item in value
    ):
        raise UserError(
            f"{where}: {column}: got {str(value)[:60]!r}, expected a list of objects that each have"
            " a name"
        )
    return value


def _unusable(
    query: str,
    tools: Sequence[Mapping[str, Any]],
    calls: Sequence[Mapping[str, Any]],
    max_tools: int,
) -> str | None:
    """Why a row is left out, as the end of a sentence that begins with "they"; None when it is
    not."""
    if len(tools) > max_tools:
        return f"offer more than {max_tools} tools (task.max_tools)"
    if not calls:
        return "call nothing"
    if {call["name"] for call in calls} - {tool["name"] for tool in tools}:
        return "call a tool that is not offered"
    try:
        json.dumps([query, tools, calls], ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return "hold a value that JSON cannot (NaN, an infinity, broken Unicode)"
    return (
        "have an answer that the verifier cannot read"
        if error_kind(calls, tools, calls_text(calls))
        else None
    )


def _split(
    problems: Sequence[Problem], size: int
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """(train, held out), shuffled: `size` problems with different queries are held out, and no
    query of theirs stays in training.

    The order is that of the queries' digests: a row that is added or left out moves no other row to
    the other side, but at the border.
    """
    held_out: dict[str, Problem] = {}
    shuffled = sorted(
        problems, key=lambda problem: blake2b(_normal(problem.prompt).encode()).digest()
    )
    for problem in shuffled:
        if len(held_out) < size:
            held_out.setdefault(_normal(problem.prompt), problem)
    return tuple(problem for problem in shuffled if _normal(problem.prompt) not in held_out), tuple(
        held_out.values()
    )


def _normal(query: str) -> str:
    return " ".join(query.casefold().split())


def demonstrate(problem: Problem, rng: Random) -> Demonstration:
    """The gold calls, a plausible attempt that the verifier rejects, and a reflection that names
    its fault."""
    calls, tools = problem.answer["calls"], problem.answer["tools"]
    faults = [_wrong_tool, _wrong_argument, _missing_call]
    rng.shuffle(faults)
    # A fault may turn out to be none (an argument dropped at its default), so each is put to the
    # verifier; words alone never pass.
    for fault in [*faults, _words_only]:
        made = fault(calls, tools, rng)
        if made and error_kind(calls, tools, made[0]):
            return Demonstration(calls_text(calls), *made)
    raise AssertionError("a text without a call was accepted")


Calls = Sequence[dict[str, Any]]
Fault = tuple[str, str]  # the attempt's text, the reflection's


def _wrong_tool(calls: Calls, tools: Calls, rng: Random) -> Fault | None:
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
    attempt = _with(calls, at, {"name": other["name"], "arguments": arguments})
    return (
        attempt,
        (
            f"I called {other['name']}, which is not the tool for this request. The tool that does"
            f" what is asked is {right}."
        ),
    )


def _wrong_argument(calls: Calls, tools: Calls, rng: Random) -> Fault | None:
    at = rng.randrange(len(calls))
    name, arguments = calls[at]["name"], calls[at]["arguments"]
    if not arguments:
        return None
    key = rng.choice(list(arguments))
    right = json.dumps(arguments[key], ensure_ascii=False)
    if rng.random() < 0.5:
        attempt = _with(
            calls, at, {"name": name, "arguments": {k: v for k, v in arguments.items() if k != key}}
        )
        return (
            attempt,
            (
                f"My call of {name} left out {key}. The request calls for it, so it must be there:"
                f" {key} is {right}."
            ),
        )
    wrong = _altered(arguments[key])
    attempt = _with(calls, at, {"name": name, "arguments": arguments | {key: wrong}})
    return (
        attempt,
        (
            f"In my call of {name} I gave {key} as {json.dumps(wrong, ensure_ascii=False)}. It"
            f" should be exactly {right}."
        ),
    )


def _missing_call(calls: Calls, tools: Calls, rng: Random) -> Fault | None:
    if len(calls) == 1:
        return None
    at = rng.randrange(len(calls))
    attempt = calls_text([*calls[:at], *calls[at + 1 :]])
    return (
        attempt,
        (
            f"The request needs {len(calls)} calls and I made {len(calls) - 1}: a call of"
            f" {calls[at]['name']} is missing."
        ),
    )


def _words_only(calls: Calls, tools: Calls, rng: Random) -> Fault:
    name = calls[0]["name"]
    attempt = f"I would use {name} for this."
    return (
        attempt,
        (
            f"I only talked about {name} and called nothing. A call must be written as JSON between"
            f" {OPEN} and {CLOSE}."
        ),
    )


def _altered(value: Any) -> Any:
    """A value near `value` and not equal to it: the mistakes that are common in a call."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        first = value.split()[0] if value.strip() else "none"
        return next(
            wrong
            for wrong in (first, value.lower(), value.capitalize(), value + "0")
            if wrong != value
        )
    return value[:-1] if isinstance(value, list) and value else "none"


def _with(calls: Calls, at: int, call: dict[str, Any]) -> str:
    return calls_text([*calls[:at], call, *calls[at + 1 :]])
