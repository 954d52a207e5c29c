"""Function calling: the verifier by hand and against hostile text, the task over real rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from bounded import bounded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from minirl import recipe
from minirl.chat import Chat
from minirl.episode import Problem
from minirl.errors import UserError
from minirl.tasks import Task, open_task
from minirl.tasks.function_calling_demonstrations import demonstrate
from minirl.tasks.tool_schemas import tool_schemas, type_schema
from minirl.verify.function_calling import (
    MAX_CALLS,
    MAX_CHARS,
    MAX_DEPTH,
    MAX_DIGITS,
    error_kind,
    same,
    verify,
    write_calls,
)

DATA = (
    Path(__file__).resolve().parents[3]
    / "shared"
    / "data"
    / "function_calling"
    / "toolalpaca_xlam_schema_114.json"
)
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA.name} in ../shared/data")
CREDIT = recipe.FunctionCallingCredit(format=0.0, tool=0.25, parameter=0.5)

Row = dict[str, Any]


def rows() -> list[Row]:
    found: list[Row] = json.loads(DATA.read_text(encoding="utf-8"))
    return found


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


WEATHER = {
    "name": "weather",
    "parameters": {
        "city": {"type": "str"},
        "days": {"type": "int, optional", "default": 3},
        "unit": {"type": "str", "default": "C"},
    },
}
TRIP = {
    "name": "trip",
    "parameters": {"via": {"type": "List[str]"}, "who": {"type": "dict"}, "fast": {"type": "bool"}},
}
TOOLS = [WEATHER, TRIP]
ROME = [call("weather", city="Rome")]


def kind(gold: list[Row], text: str | list[Row]) -> str | None:
    """The error kind, with the score and `passed` checked against it."""
    verdict = verify(gold, TOOLS, text if isinstance(text, str) else json.dumps(text), CREDIT)
    found = verdict.parts["error_kind"]
    assert (found is None) == verdict.passed
    assert verdict.score == {"format": 0.0, "tool": 0.25, "parameter": 0.5, None: 1.0}[found]  # type: ignore[index]
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "weather", "arguments": {"city": "Rome"}}',
        '  [{"arguments": {"city": "Rome"}, "name": "weather"}]\n',
        '```json\n[{"name": "weather", "parameters": {"city": "Rome"}}]\n```',
        'Here:\n```\n{"name": "weather", "arguments": {"city": "Rome"}}\n```\nDone.',
        'So be it. <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call> Done.',
        '<tool_call>\n[{"name": "weather", "arguments": {"city": "Rome"}}]\n</tool_call>',
        (
            '<think>not <tool_call>{}</tool_call></think>\n<tool_call>{"name": "weather",'
            ' "arguments": {"city": "Rome"}}</tool_call>'
        ),
        '{"name": "weather", "arguments": {"city": "\\u0052ome", "days": 3, "unit": "C"}}',
    ],
)
def test_every_accepted_form(text: str) -> None:
    assert kind(ROME, text) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Rome will be sunny.",
        "weather(city='Rome')",
        'Here: {"name": "weather", "arguments": {"city": "Rome"}}',
        '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}',
        '{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>',
        '<tool_call><tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>',
        (
            '<tool_call>{"name": "weather", "arguments": {"city":'
            ' "Rome"}}</tool_call><tool_call>oops</tool_call>'
        ),
        (
            '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}} {"name": "weather",'
            ' "arguments": {}}</tool_call>'
        ),
        '{"name": "weather", "arguments": {"city": "Rome", "city": "Rome"}}',
        '{"name": "weather", "name": "weather", "arguments": {"city": "Rome"}}',
        '{"name": "weather", "arguments": {"city": "Rome"}, "parameters": {"city": "Rome"}}',
        '{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}',
        '{"name": "weather", "arguments": {"city": "Rome", "days": NaN}}',
        '{"name": "weather", "arguments": {"city": "Rome", "days": -Infinity}}',
        '{"name": "weather", "arguments": {"city": "Rome", "days": 1e999}}',
        '{"name": "weather", "arguments": {"city": "Rome", "days": ' + "9" * 5000 + "}}",
        "{'name': 'weather', 'arguments': {'city': 'Rome'}}",
        '{"name": "weather"}',
        '{"name": 3, "arguments": {"city": "Rome"}}',
        "null",
        '["weather"]',
    ],
)
def test_what_is_no_call_is_a_format_error(text: str) -> None:
    assert kind(ROME, text) == "format"


def test_tool_errors_come_before_parameter_errors() -> None:
    assert kind(ROME, [call("trip", city="Rome")]) == "tool"
    assert kind(ROME, [call("not_offered", city="Rome")]) == "tool"
    assert kind(ROME, ROME * 2) == "tool"
    assert kind(ROME, []) == "tool"
    assert kind(ROME * 2, ROME) == "tool"
    assert kind([*ROME, call("trip")], [call("trip"), call("trip")]) == "tool"
    assert kind([*ROME, call("trip")], [call("trip"), call("weather", city="Oslo")]) == "parameter"


def test_order_and_assignment() -> None:
    gold = [
        call("weather", city="Rome"),
        call("weather", city="Oslo", days=3),
        call("trip", via=["a", "b"]),
    ]
    assert kind(gold, gold[::-1]) is None
    assert (
        kind(
            gold,
            [
                gold[2],
                call("weather", city="Oslo"),
                call("weather", unit="C", days=3.0, city="Rome"),
            ],
        )
        is None
    )
    # One right call may not stand for two gold calls, nor two equal gold calls be met by one right
    # and one wrong.
    assert kind(gold, [gold[2], gold[0], gold[0]]) == "parameter"
    assert kind([gold[0], gold[0]], [gold[0], gold[1]]) == "parameter"
    assert kind(gold, [gold[0], gold[1], call("trip", via=["b", "a"])]) == "parameter"


def test_defaults() -> None:
    plain, full = call("weather", city="Rome"), call("weather", city="Rome", days=3, unit="C")
    assert kind([plain], [full]) is None
    assert kind([full], [plain]) is None
    assert kind([plain], [call("weather", city="Rome", days=4)]) == "parameter"
    assert kind([call("weather", city="Rome", days=4)], [plain]) == "parameter"
    assert kind([plain], [call("weather", days=3, unit="C")]) == "parameter"
    required = [{"name": "f", "parameters": {"x": {"type": "int", "default": 1, "required": True}}}]
    assert error_kind([call("f", x=1)], required, json.dumps(call("f"))) == "parameter"


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (1, 1.0, True),
        (1, "1", False),
        (1, True, False),
        (0, False, False),
        (True, True, True),
        (True, False, False),
        (None, "", False),
        (None, 0, False),
        (None, None, True),
        (0.1, 0.1, True),
        (10**17, 1e17, True),
        (10**17 + 1, 1e17, False),
        ("Rome", "rome", False),
        ("Rome", "Rome ", False),
        ([1, [2.0]], [1.0, [2]], True),
        ([1, 2], [2, 1], False),
        ([1], [1, 1], False),
        ([1], 1, False),
        ([], {}, False),
        ({"a": {"b": [1]}, "c": None}, {"c": None, "a": {"b": [1.0]}}, True),
        ({"a": {"b": [1]}}, {"a": {"b": [True]}}, False),
        ({"a": None}, {}, False),
    ],
)
def test_values_are_compared_with_their_types(a: Any, b: Any, equal: bool) -> None:
    assert same(a, b) is equal
    assert same(b, a) is equal
    assert kind([call("trip", who=a)], [call("trip", who=b)]) == (None if equal else "parameter")


def test_bounds() -> None:
    def nested(levels: int) -> list[Row]:
        value: Any = 1
        for _ in range(levels):
            value = [value]
        return [call("trip", who=value)]

    fits = nested(MAX_DEPTH - 3)  # below it stand the list of calls, the call and its arguments
    assert kind(fits, fits) is None
    assert kind(nested(MAX_DEPTH - 2), nested(MAX_DEPTH - 2)) == "format"
    longest, longer = [call("trip", who=10**MAX_DIGITS - 1)], [call("trip", who=10**MAX_DIGITS)]
    assert kind(longest, longest) is None
    assert kind(longer, longer) == "format"
    assert kind(ROME, json.dumps(ROME) + " " * (MAX_CHARS - len(json.dumps(ROME)))) is None
    assert kind(ROME, json.dumps(ROME) + " " * MAX_CHARS) == "format"
    assert kind(ROME * MAX_CALLS, ROME * MAX_CALLS) is None
    assert kind(ROME * (MAX_CALLS + 1), ROME * (MAX_CALLS + 1)) == "format"


@pytest.mark.parametrize(
    "text",
    [
        "[" * MAX_CHARS,
        '{"a":' * (MAX_CHARS // 5),
        "<tool_call>" * (MAX_CHARS // 11),
        "<tool_call></tool_call>" * (MAX_CHARS // 23),
        "<tool_call>[]</tool_call>" * (MAX_CHARS // 25),
        "</think>" * (MAX_CHARS // 8),
        "```" * (MAX_CHARS // 3),
        '"\\' * (MAX_CHARS // 2),
        "[" + "9" * (MAX_CHARS - 2) + "]",
        "[0." + "9" * (MAX_CHARS - 4) + "]",
        '{"name": "' + "\\u0000" * (MAX_CHARS // 7),
        json.dumps([call("weather", city="x" * 900, days=i) for i in range(MAX_CALLS)]),
        "{" + ",".join(f'"{i}": 1' for i in range(7000)) + "}",
        '{"name": "weather", "arguments": {"city": "\\ud800"}}',
        "__import__('os').abort()",
    ],
)
def test_hostile_text_costs_little_and_never_passes(text: str) -> None:
    gold = [call("weather", city="x" * 900, days=100 + i) for i in range(MAX_CALLS)]
    with bounded():
        assert kind(gold, text) is not None


PIECES = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<think>",
            "</think>",
            "```json",
            "```",
            "[",
            "]",
            "{",
            "}",
            ",",
            ":",
            "\n",
            '"',
            "\\",
            "\x00",
            "\ud800",
        ),
        *(
            '"name"',
            '"arguments"',
            '"parameters"',
            '"weather"',
            '"city"',
            '"Rome"',
            "NaN",
            "-Infinity",
            "1e999",
            "null",
            "true",
            "1" * 500,
        ),
        *(
            '{"name": "weather", "arguments": ',
            '{"city": "Rome"}}',
            json.dumps(ROME[0]),
            "[" * 3000,
            "{'a': 1}",
            "().__class__",
        ),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)
TEXTS = st.one_of(
    st.text(),
    st.lists(PIECES, max_size=30).map("".join),
    st.builds(
        lambda a, b: f"<tool_call>{json.dumps({'name': a, 'arguments': b})}</tool_call>",
        st.sampled_from(["weather", "trip"]),
        JSON,
    ),
    st.lists(JSON.map(json.dumps) | PIECES | st.text(max_size=9), max_size=8).map(" ".join),
)


@settings(
    max_examples=300, deadline=2000, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(TEXTS)
def test_any_text_gets_a_verdict(text: str) -> None:
    found = kind(ROME, text)
    assert found in ("format", "tool", "parameter", None)
    assert found is not None or '"Rome"' in text  # nothing passes that does not hold the gold value


def _renamed_key(calls: list[Row]) -> list[Row]:
    return [{"tool": c["name"], "arguments": c["arguments"]} for c in calls]


def _each_value(change: Callable[[Any], Any]) -> Callable[[list[Row]], list[Row]]:
    return lambda calls: [
        call(c["name"], **{k: change(v) for k, v in c["arguments"].items()}) for c in calls
    ]


# name -> (what is done to the gold calls, error kinds it may have; those that change values do
# nothing to calls without arguments)
NEAR_MISSES: dict[str, tuple[Callable[[list[Row]], Any], str]] = {
    "other tool": (lambda c: [call("components", **c[0]["arguments"]), *c[1:]], "tool"),
    "tool name in lower case with a dash": (
        lambda c: [call(c[0]["name"].lower() + "-", **c[0]["arguments"]), *c[1:]],
        "tool",
    ),
    "tool name with a space": (
        lambda c: [call(c[0]["name"] + " ", **c[0]["arguments"]), *c[1:]],
        "tool",
    ),
    "last call left out": (lambda c: c[:-1], "tool"),
    "one call twice": (lambda c: [*c, c[0]], "tool"),
    "a call that nobody asked for": (lambda c: [*c, call("help")], "tool"),
    "an argument that nobody asked for": (
        lambda c: [call(c[0]["name"], **c[0]["arguments"], extra=None), *c[1:]],
        "parameter",
    ),
    "arguments inside another object": (
        lambda c: [call(c[0]["name"], arguments=c[0]["arguments"]), *c[1:]],
        "parameter",
    ),
    "arguments left out": (lambda c: [call(x["name"]) for x in c], "parameter"),
    "last argument left out": (
        lambda c: [call(x["name"], **dict(list(x["arguments"].items())[:-1])) for x in c],
        "parameter",
    ),
    "parameter renamed": (
        lambda c: [call(x["name"], **{f"{k}_": v for k, v in x["arguments"].items()}) for x in c],
        "parameter",
    ),
    "parameter in another case": (
        lambda c: [
            call(x["name"], **{k.swapcase(): v for k, v in x["arguments"].items()}) for x in c
        ],
        "parameter",
    ),
    "value in a list": (_each_value(lambda v: [v]), "parameter"),
    "value is null": (_each_value(lambda v: None), "parameter"),
    "value with a space": (_each_value(lambda v: f"{v} "), "parameter"),
    "value is true": (_each_value(lambda v: True), "parameter"),
    "number for text, text for number": (
        _each_value(lambda v: len(v) if isinstance(v, (str, list)) else str(v)),
        "parameter",
    ),
    "value as JSON text": (_each_value(lambda v: json.dumps(v)), "parameter"),
    "name under another key": (_renamed_key, "format"),
    "name alone": (lambda c: [x["name"] for x in c], "format"),
    "arguments as JSON text": (
        lambda c: [{"name": x["name"], "arguments": json.dumps(x["arguments"])} for x in c],
        "format",
    ),
    "wrapped once more": (lambda c: {"tool_calls": c}, "format"),
    "Python for JSON": (lambda c: str([call(x["name"], none=None) for x in c]), "format"),
    "cut short": (lambda c: json.dumps(c)[:-1], "format"),
    "no closing tag": (lambda c: write_calls(c).removesuffix("</tool_call>"), "format"),
    "prose before bare JSON": (lambda c: "Sure! " + json.dumps(c), "format"),
}


@needs_data
def test_every_real_row_accepts_its_gold_answer_in_each_form() -> None:
    found = rows()
    assert len(found) == 114
    for row in found:
        gold, tools = row["answers"], row["tools"]
        for text in (
            write_calls(gold),
            json.dumps(gold),
            f"```json\n{json.dumps(gold[::-1], indent=2)}\n```",
        ):
            assert verify(gold, tools, text, CREDIT).passed


@needs_data
@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_every_real_row_rejects_near_misses(miss: str) -> None:
    change, expected = NEAR_MISSES[miss]
    tried = 0
    for row in rows():
        gold = row["answers"]
        near = change(json.loads(json.dumps(gold)))
        if near == gold:
            continue  # calls without arguments have none to spoil
        tried += 1
        text = near if isinstance(near, str) else json.dumps(near)
        assert error_kind(gold, row["tools"], text) == expected, row["query"]
    assert tried >= 89, "114 rows, of which 25 calls have no arguments"


def open_rows(tmp_path: Path, found: list[Row], seed: int = 0, **numbers: int) -> Task:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return open_task(
        recipe.FunctionCalling(
            name="function_calling", source=str(path), **{"held_out": 1, **numbers}
        ),
        seed,
    )  # type: ignore[arg-type]


def local(seed: int, **numbers: int) -> Task:
    return open_task(
        recipe.FunctionCalling(
            name="function_calling", source=str(DATA), **{"held_out": 30, **numbers}
        ),
        seed,
    )  # type: ignore[arg-type]


@needs_data
def test_the_task_over_real_rows() -> None:
    task = local(0)
    assert (len(task.train), len(task.held_out), task.stop) == (78, 30, ())
    assert task.notes == (f"{DATA}: rows left out because they call a tool that is not offered: 6",)
    assert len(local(0, train=5).train) == 5
    assert (
        local(0, max_tools=8).notes[1].endswith("they offer more than 8 tools (task.max_tools): 17")
    )
    for problem in (*task.train, *task.held_out):
        assert problem.solution is not None
        assert task.verify(problem, problem.solution).passed
        assert json.loads(json.dumps(problem.answer)) == problem.answer
        assert problem.system is not None


@needs_data
def test_the_split_is_disjoint_and_a_function_of_the_data_alone() -> None:
    task, other = local(0), local(1)
    assert (task.train, task.held_out) == (
        other.train,
        other.held_out,
    ), "runs with different seeds share their held-out set"
    assert len({p.id for p in task.train} | {p.id for p in task.held_out}) == 108
    assert [p.id for p in task.held_out[:9]] == [p.id for p in local(0, held_out=9).held_out]
    at = [int(p.id.rpartition("/")[2]) for p in (*task.held_out, *task.train)]
    assert at != sorted(at), "shuffled: the file's order may mean something"
    # Rows that another limit leaves out move no other row from one side to the other, but where the
    # border moves.
    fewer = local(0, max_tools=8, held_out=20)
    assert not {p.id for p in fewer.held_out} & {p.id for p in task.train}


def test_the_split_does_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    found = [{"query": f"q{i}", "tools": [WEATHER], "answers": ROME} for i in range(40)]
    held_out = [p.prompt for p in open_rows(tmp_path, found, held_out=10).held_out]
    assert [
        p.prompt for p in open_rows(tmp_path, found[::-1], seed=3, held_out=10).held_out
    ] == held_out
    assert held_out != [f"q{i}" for i in range(10)]


@needs_data
def test_each_demonstration_shows_a_right_answer_and_a_wrong_attempt() -> None:
    kinds = set()
    for row in rows():  # all 114, those that the task leaves out too
        problem = Problem("x", row["query"], {"calls": row["answers"], "tools": row["tools"]})
        for seed in range(4):
            shown = demonstrate(problem, Random(seed))
            assert shown == demonstrate(problem, Random(seed))
            assert error_kind(row["answers"], row["tools"], shown.answer) is None
            kinds.add(error_kind(row["answers"], row["tools"], shown.attempt))
            assert any(name in shown.reflection for name in (c["name"] for c in row["answers"]))
    assert kinds == {"tool", "parameter"}


def test_a_fault_that_is_none_is_not_shown() -> None:
    gold = [call("weather", unit="C")]  # left out, the unit is still at its default
    problem = Problem("x", "How warm is it?", {"calls": gold, "tools": TOOLS})
    for seed in range(20):
        assert error_kind(gold, TOOLS, demonstrate(problem, Random(seed)).attempt) is not None


def test_a_demonstration_where_nothing_can_be_spoilt_but_the_form() -> None:
    shown = demonstrate(
        Problem("x", "Help!", {"calls": [call("help")], "tools": [{"name": "help"}]}), Random(0)
    )
    assert error_kind([call("help")], [], shown.attempt) == "format"
    assert "<tool_call>" in shown.reflection


def test_rows_with_one_query_never_stand_on_both_sides(tmp_path: Path) -> None:
    queries = ["Weather in Rome?", "weather  in rome?", " WEATHER in\nRome? ", "b", "c", "B", "d"]
    for seed in range(20):
        # Other words put other queries on the held-out side.
        found = [{"query": f"{q} {seed}", "tools": [WEATHER], "answers": ROME} for q in queries]
        task = open_rows(tmp_path, found, held_out=2)
        held_out, train = (
            {" ".join(p.prompt.lower().split()) for p in side}
            for side in (task.held_out, task.train)
        )
        assert len(held_out) == len(task.held_out) == 2
        assert not held_out & train
        left_out = 7 - len(task.train) - 2
        assert any(
            note.endswith(f"they ask what a held-out row asks: {left_out}") for note in task.notes
        ) == (left_out > 0)


def test_the_hub_schema_holds_json_text(tmp_path: Path) -> None:
    text_row = {"id": 1, "query": "q", "tools": json.dumps(TOOLS), "answers": json.dumps(ROME)}
    task = open_rows(tmp_path, [text_row, {"query": "r", "tools": TOOLS, "answers": ROME}])
    (train,), (held_out,) = task.train, task.held_out
    assert train.tools == held_out.tools
    assert train.answer == held_out.answer == {"calls": ROME, "tools": TOOLS}


def test_rows_that_cannot_be_learned_are_left_out_and_counted(tmp_path: Path) -> None:
    good = [{"query": f"q{i}", "tools": [WEATHER], "answers": ROME} for i in range(3)]
    bad = [
        {"query": "n", "tools": [WEATHER], "answers": []},
        {"query": "n", "tools": [TRIP], "answers": ROME},
        {
            "query": "n",
            "tools": [WEATHER],
            "answers": '[{"name": "weather", "arguments": {"city": NaN}}]',
        },
        {"query": "\ud800", "tools": [WEATHER], "answers": ROME},
        {"query": "n", "tools": [WEATHER], "answers": [call("weather", city="</tool_call>")]},
    ]
    notes = open_rows(tmp_path, [*good, *bad]).notes
    assert [note.split(": ", 1)[1] for note in notes] == [
        "rows left out because they call a tool that is not offered: 1",
        "rows left out because they call nothing: 1",
        "rows left out because they have an answer that the verifier cannot read: 1",
        (
            "rows left out because they hold a value that JSON cannot (NaN, an infinity, broken"
            " Unicode): 2"
        ),
    ]
    with pytest.raises(UserError, match=r"got 3 usable rows \(5 left out\), expected 4 or more"):
        open_rows(tmp_path, [*good, *bad], held_out=3)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"query": "q", "tools": []}, "no column 'answers'"),
        (
            {"query": 3, "tools": [], "answers": []},
            "query: got '3', expected the user's request as text",
        ),
        ({"query": "q", "tools": "[{", "answers": []}, "tools: not valid JSON"),
        (
            {"query": "q", "tools": "{}", "answers": []},
            "tools: got '{}', expected a list of objects",
        ),
        (
            {"query": "q", "tools": [{"parameters": {}}], "answers": []},
            "expected a list of objects that each have a name",
        ),
        (
            {"query": "q", "tools": [{"name": "f", "parameters": {"x": "int"}}], "answers": []},
            "tool 'f': got parameters {'x': 'int'}",
        ),
        (
            {"query": "q", "tools": [], "answers": [{"name": "f"}]},
            "answers: got {'name': 'f'}, expected {name, arguments:",
        ),
        ({"query": "q", "tools": [], "answers": 7}, "answers: got '7'"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path, row: Row, said: str) -> None:
    with pytest.raises(UserError) as caught:
        open_rows(tmp_path, [{"query": "q", "tools": TOOLS, "answers": ROME}, row])
    assert "rows.jsonl, line 2: " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("written", "schema"),
    [
        ("str", {"type": "string"}),
        ("int, optional", {"type": "integer"}),
        ("float", {"type": "number"}),
        ("bool", {"type": "boolean"}),
        ("dict", {"type": "object"}),
        ("integer", {"type": "integer"}),
        ("List[int]", {"type": "array", "items": {"type": "integer"}}),
        (
            "List[List[str]], optional",
            {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
        ),
        ("Tuple[int, str]", {"type": "array"}),
        ("Tuple[float, ...]", {"type": "array", "items": {"type": "number"}}),
        (
            "Dict[str, List[float]]",
            {
                "type": "object",
                "additionalProperties": {"type": "array", "items": {"type": "number"}},
            },
        ),
        ("Optional[bool]", {"type": "boolean"}),
        ("Union[int, str]", {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
        (
            "List[Union[int, float]]",
            {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "number"}]}},
        ),
        ("Callable[[float], float]", {}),
        ("", {}),
        ("]][,", {}),
    ],
)
def test_types(written: str, schema: dict[str, Any]) -> None:
    assert type_schema(written) == schema


def test_a_hostile_type_ends() -> None:
    assert json.dumps(type_schema("List[" * 5000 + "]" * 5000)).count("array") == 8


def test_tools_become_json_schema() -> None:
    weather = tool_schemas(TOOLS)[0]
    assert weather == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer", "default": 3},
                    "unit": {"type": "string", "default": "C"},
                },
                "required": ["city"],
            },
        },
    }

    def required(*parameters: dict[str, Any]) -> list[str]:
        tool = {"name": "f", "parameters": {f"p{i}": spec for i, spec in enumerate(parameters)}}
        found: list[str] = tool_schemas([tool])[0]["function"]["parameters"]["required"]
        return found

    assert required(
        {"type": "str"},
        {"type": "str, optional"},
        {"type": "Optional[int]"},
        {"type": "int", "default": None},
    ) == ["p0"]
    # Where a row marks what is required, what it does not mark is not.
    assert required(
        {"type": "string", "required": True},
        {"type": "string"},
        {"type": "string", "required": False},
    ) == ["p0"]


def test_the_tools_reach_a_model_whose_template_has_no_place_for_them(tmp_path: Path) -> None:
    # The embedded model's template is such a one; what it is shown is all that it needs for a right
    # call.
    task = open_rows(
        tmp_path, [{"query": q, "tools": TOOLS, "answers": ROME} for q in ("Rome?", "And in Rome?")]
    )
    chat = Chat(byte_tokenizer())
    assert not chat.renders_tools
    said = chat.text(chat.prompt(task.train[0]), special=True)
    system, user, _ = said.split("<|im_start|>")[1:]
    assert system.startswith("system\nYou act for the user by calling tools.")
    listed = [json.loads(line) for line in system.removesuffix("<|im_end|>\n").splitlines()[-2:]]
    assert listed == [tool["function"] for tool in tool_schemas(TOOLS)]
    assert user == f"user\n{task.train[0].prompt}<|im_end|>\n"
