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
from typing import Any

from minirl import recipe
from minirl.episode import Problem, Verdict
from minirl.errors import UserError
from minirl.io.rows import read_dataset
from minirl.tasks.function_calling_demonstrations import demonstrate
from minirl.tasks.task import Task, note_left_out
from minirl.tasks.tool_schemas import tool_schemas
from minirl.verify.function_calling import CLOSE, OPEN, error_kind, verify, write_calls

SYSTEM = (
    "You act for the user by calling tools. Reply with tool calls only, and make every call that"
    " the request needs. Write each call as one "
    f'JSON object between {OPEN} and {CLOSE}: {{"name": the tool, "arguments": an object that gives'
    " each parameter its value}."
)

Objects = list[dict[str, Any]]


def open_task(task: recipe.FunctionCalling, seed: int) -> Task:
    """The task over `task.source`; split by the queries alone, so that runs with different seeds
    share their held-out set.

    Raises UserError for data that cannot be had or read, or for too few rows.
    """
    left_out: Counter[str] = Counter()
    problems = _read_problems(task, left_out)
    train, held_out = _split(problems, task.held_out)
    if not train or len(held_out) < task.held_out:
        raise UserError(
            f"{task.source}: got {len(problems)} usable rows ({left_out.total()} left out),"
            f" expected {task.held_out + 1} or more (task.held_out and one to train on) with"
            " different queries; pass more data, or a smaller `--set task.held_out=N`"
        )
    left_out["ask what a held-out row asks"] = len(problems) - len(train) - len(held_out)

    def check(problem: Problem, text: str) -> Verdict:
        return verify(problem.answer["calls"], problem.answer["tools"], text, task.credit)

    notes = note_left_out(task.source, left_out)
    train = train[: task.train]
    return Task("function_calling", train, held_out, check, demonstrate=demonstrate, notes=notes)


def _read_problems(task: recipe.FunctionCalling, left_out: Counter[str]) -> list[Problem]:
    """The usable rows; the others are counted by the reason."""
    problems: list[Problem] = []
    rows = read_dataset(task.source, ("query", "tools", "answers"))
    for number, (where, row) in enumerate(rows, 1):
        query, tools, calls = _read_row(row, where)
        if reason := _find_fault(query, tools, calls, task.max_tools):
            left_out[reason] += 1
            continue
        identity, answer = f"function_calling/{number}", {"calls": calls, "tools": tools}
        gold, schemas = write_calls(calls), tool_schemas(tools)
        problems.append(Problem(identity, query, answer, gold, system=SYSTEM, tools=schemas))
    return problems


def _read_row(row: Mapping[str, Any], where: str) -> tuple[str, Objects, Objects]:
    """query, tools and answers of a row, their shapes checked."""
    query, tools = row["query"], _read_objects(row, "tools", where)
    calls = _read_objects(row, "answers", where)
    if not isinstance(query, str) or not query.strip():
        raise UserError(
            f"{where}: query: got {str(query)[:40]!r}, expected the user's request as text"
        )
    for tool in tools:
        parameters = tool.get("parameters") or {}
        if not isinstance(parameters, dict) or not all(
            isinstance(spec, dict) for spec in parameters.values()
        ):
            raise UserError(
                f"{where}: tool {tool['name']!r}: got parameters {str(parameters)[:80]}, expected"
                " {parameter: {description, type, default}}"
            )
    for call in calls:
        if not isinstance(call.get("arguments"), dict):
            raise UserError(
                f"{where}: answers: got {str(call)[:80]}, expected {{name, arguments: {{parameter:"
                " value}}"
            )
    return query, tools, calls


def _read_objects(row: Mapping[str, Any], column: str, where: str) -> Objects:
    """A column of named objects; the hub's rows hold it as JSON text."""
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


def _find_fault(query: str, tools: Objects, calls: Objects, max_tools: int) -> str | None:
    """Why a row is left out, as the end of a sentence that begins with "they"; None if it is
    usable."""
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
    if error_kind(calls, tools, write_calls(calls)):
        return "have an answer that the verifier cannot read"
    return None


def _split(
    problems: Sequence[Problem], size: int
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """(train, held out), shuffled: `size` problems with different queries are held out, and no
    query of theirs stays in training.

    The order is that of the queries' digests: a row that is added or left out moves no other row to
    the other side, but at the border.
    """
    held_out: dict[str, Problem] = {}
    shuffled = sorted(problems, key=lambda p: blake2b(_normalise(p.prompt).encode()).digest())
    for problem in shuffled:
        if len(held_out) < size:
            held_out.setdefault(_normalise(problem.prompt), problem)
    train = (problem for problem in shuffled if _normalise(problem.prompt) not in held_out)
    return tuple(train), tuple(held_out.values())


def _normalise(query: str) -> str:
    return " ".join(query.casefold().split())
