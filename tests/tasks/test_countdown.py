"""Countdown: the verifier by hand and against hostile text, the task and its demonstrations against
brute force."""

from __future__ import annotations

import ast
import builtins
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
from bounded import bounded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minirl import recipe
from minirl.episode import Problem, Verdict
from minirl.errors import UserError
from minirl.tasks import Task, draw, open_task
from minirl.tasks.countdown_demonstrations import demonstrate
from minirl.tasks.countdown_expressions import find_solutions
from minirl.verify.countdown import verify

CREDIT = recipe.CountdownCredit(invalid_equation=0.0, wrong_numbers=0.125, missed_target=0.25)
SCORES = {"invalid_equation": 0.0, "wrong_numbers": 0.125, "missed_target": 0.25, None: 1.0}


def check(numbers: Sequence[int], target: int, text: str, operators: str = "+-*/") -> str | None:
    """The error kind, None for a right answer, with score and `passed` checked against it."""
    verdict = verify(numbers, target, text, CREDIT, operators)
    kind = verdict.parts["error_kind"]
    assert verdict.passed == (kind is None)
    assert verdict.score == SCORES[kind]  # type: ignore[index]
    return kind  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("numbers", "target", "answer"),
    [
        ([1, 2, 3, 4], 24, "1*2*3*4"),
        ([1, 2, 3, 4], 24, "  ( 1 + 2 + 3 ) * 4 "),
        ([1, 2, 3, 4], 24, "\n(1 + 3) * (2 + 4)\n"),
        ([4, 3, 2, 1], 24, "((((1))+3))*(2+4)"),
        ([1, 2, 3, 4], 24, "1 × 2 · 3 × 4"),
        ([1, 2, 3, 4], 24, "2 × 3 × 4 ÷ 1"),
        ([1, 2, 3, 4], 24, "1*2*3*4 = 24"),
        ([1, 2, 3, 4], 24, "1*2*3*4=24"),
        ([5, 3], 2, "5 − 3"),
        ([5, 3], 2, "5 – 3"),
        ([5, 3], -2, "3-5"),
        ([2, 2], 4, "2+2"),
        ([3, 3, 8, 8], 24, "8/(3-8/3)"),
        ([1, 3, 3], 1, "1/3*3"),
        ([49, 49, 1, 7], 7, "1/49*49*7"),  # 1/49*49 is not 1 in floating point
        ([1, 5, 5, 5], 24, "5*(5-1/5)"),
        ([999999999, 999999999], 999999998000000001, "999999999*999999999"),
        ([7], 7, "7"),
    ],
)
def test_right_answers(numbers: list[int], target: int, answer: str) -> None:
    assert check(numbers, target, f"<answer>{answer}</answer>") is None


@pytest.mark.parametrize(
    "text",
    [
        "Let me think: 1*2 is 2.\n<answer>1*2*3*4</answer>",
        "<answer>1+2</answer> no, <answer>1*2*3*4</answer>",
        "<answer>1*2*3*4</answer> That is it. <answer>",
        "<answer>never closed <answer>1*2*3*4</answer>",
        "</answer><answer>1*2*3*4</answer>",
    ],
)
def test_the_last_complete_pair_of_tags_counts(text: str) -> None:
    assert check([1, 2, 3, 4], 24, text) is None


INVALID, NUMBERS, TARGET = "invalid_equation", "wrong_numbers", "missed_target"
# Against numbers 1, 2, 3, 4 and target 24; most of them are worth 24.
NEAR_MISSES = {
    "a number twice": ("1*2*3*4*1", NUMBERS),
    "a number missing": ("2*3*4", NUMBERS),
    "two numbers as one": ("12+3*4", NUMBERS),
    "a number that is not there": ("4*6", NUMBERS),
    "the target itself": ("24", NUMBERS),
    "a zero too many": ("1*2*3*4+0", NUMBERS),
    "one number swapped for another": ("1*2*3*3+6", NUMBERS),
    "wrong numbers and a wrong value": ("5+5", NUMBERS),
    "another value": ("1+2+3+4", TARGET),
    "one off": ("2*3*4-1", TARGET),
    "a fraction": ("1/2/3/4", TARGET),
    "precedence": ("1+2+3*4", TARGET),
    "a negative value": ("(1-2-3)*4", TARGET),
    "a false claim of the target": ("1+2+3+4 = 24", TARGET),
    "a true equation of another value": ("1+2+3+4=10", TARGET),
    "a false equation": ("1*2*3*4=25", INVALID),
    "a chain of equations": ("1*2*3*4=6*4=24", INVALID),
    "the target first": ("24=1*2*3*4", INVALID),
    "an unknown": ("x=1*2*3*4", INVALID),
    "words after the equals sign": ("1*2*3*4 = twenty-four", INVALID),
    "a float after the equals sign": ("1*2*3*4 = 24.0", INVALID),
    "code after the equals sign": ("1*2*3*4 = __import__('os').getpid()", INVALID),
    "nothing after the equals sign": ("1*2*3*4 =", INVALID),
    "two equals signs": ("1*2*3*4 == 24", INVALID),
    "a huge number after the equals sign": ("1*2*3*4 = " + "9" * 5000, INVALID),
    "power": ("1**2*3*4*2", INVALID),
    "power of powers": ("9**9**9**9", INVALID),
    "power in disguise": ("2××3×4×1", INVALID),
    "whole division": ("2*3*4//1", INVALID),
    "remainder": ("24%25*1", INVALID),
    "caret": ("2^3*(4-1)", INVALID),
    "unary minus": ("-1*2*3*-4", INVALID),
    "unary plus": ("+1*2*3*4", INVALID),
    "minus minus": ("4*2*3--1", INVALID),
    "tilde": ("~1*2*3*4", INVALID),
    "float": ("1.0*2*3*4", INVALID),
    "exponent": ("1e0*2*3*4", INVALID),
    "large exponent": ("1e999999999", INVALID),
    "hexadecimal": ("0x1*2*3*4", INVALID),
    "binary": ("0b1*2*3*4", INVALID),
    "underscore": ("1_*2*3*4", INVALID),
    "imaginary": ("1j*2*3*4", INVALID),
    "leading zero": ("01*2*3*4", INVALID),
    "thousands": ("1,000", INVALID),
    "commas": ("1,2,3,4", INVALID),
    "numbers side by side": ("1 2 3 4", INVALID),
    "multiplication left out": ("(1)(2)(3)(4)", INVALID),
    "a call": ("1(2*3*4)", INVALID),
    "factorial": ("4!*(3-2)*1", INVALID),
    "a function": ("max(1,2,3,4)", INVALID),
    "a name": ("one*2*3*4", INVALID),
    "import": ("__import__('os').system('true')", INVALID),
    "a statement": ("import os", INVALID),
    "a lambda": ("(lambda: 24)()", INVALID),
    "a list": ("[24][0]", INVALID),
    "a condition": ("1*2*3*4 if 1 else 0", INVALID),
    "an assignment": ("(a:=1)*2*3*4", INVALID),
    "a string": ("'24'", INVALID),
    "a comment": ("1*2*3*4 # 24", INVALID),
    "two expressions": ("1*2*3*4; 24", INVALID),
    "two lines": ("1*2\n*3*4", INVALID),
    "a tab": ("1*2\t*3*4", INVALID),
    "a null byte": ("1*2*3*4\x00", INVALID),
    "a surrogate": ("1*2*3*4\ud800", INVALID),
    "an invisible space": ("1*2*3\u200b*4", INVALID),
    "an open bracket": ("(1*2*3*4", INVALID),
    "a closed bracket": ("1*2*3*4)", INVALID),
    "square brackets": ("[1+2+3]*4", INVALID),
    "empty brackets": ("()", INVALID),
    "an operator at the end": ("1*2*3*4*", INVALID),
    "an operator at the start": ("*1*2*3*4", INVALID),
    "nothing": ("", INVALID),
    "spaces": ("   ", INVALID),
    "zero divided": ("4/(3-2-1)", INVALID),
    "zero divided in the middle": ("1*2*3*4+1/(1-1)", INVALID),
    "Arabic-Indic digits": ("١*٢*٣*٤", INVALID),
    "full-width digits": ("１*２*３*４", INVALID),
    "superscript": ("1*2²*3*2", INVALID),
    "a Roman numeral": ("Ⅳ*3*2*1", INVALID),
    "mathematical digits": ("𝟏*𝟐*𝟑*𝟒", INVALID),
    "LaTeX": ("1 \\times 2 \\times 3 \\times 4", INVALID),
    "boxed": ("\\boxed{1*2*3*4}", INVALID),
    "words": ("The answer is 1*2*3*4", INVALID),
    "ten digits": ("1*2*3*4*1000000000", INVALID),
    "very many digits": ("9" * 190, INVALID),
    "very long": ("1*2*3*4" + "+0" * 100_000, INVALID),
    "long by spaces": ("1*2*3" + " " * 200 + "*4", INVALID),
    "deep brackets": ("(" * 100_000 + "24" + ")" * 100_000, INVALID),
    "deep and unclosed": ("(" * 190, INVALID),
    "deep and long": ("1-(" * 60 + "1" + ")" * 60, INVALID),
    "as deep as allowed": ("(" * 98 + "24" + ")" * 98, NUMBERS),
    "as long as allowed": ("+".join("1" * 100), NUMBERS),
    "large but bounded": ("*".join(["999999999"] * 20), NUMBERS),
    "nested tags": ("<answer>1*2*3*4</answer>", INVALID),
    "another tag": ("<b>1*2*3*4</b>", INVALID),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    answer, kind = NEAR_MISSES[name]
    with bounded(), sealed():
        assert check([1, 2, 3, 4], 24, f"<answer>{answer}</answer>") == kind


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1*2*3*4",
        "1*2*3*4</answer>",
        "<answer>1*2*3*4",
        "<answer>1*2*3*4<answer>",
        "</answer>1*2*3*4<answer>",
        "<ANSWER>1*2*3*4</ANSWER>",
        "< answer>1*2*3*4</ answer>",
        "[answer]1*2*3*4[/answer]",
        "<answer>" * 50_000,
        "<answer>1*2*3*4</answer>" + "</answer>",
    ],
)
def test_no_complete_tags(text: str) -> None:
    assert check([1, 2, 3, 4], 24, text) == INVALID


@pytest.mark.parametrize(
    ("operators", "answer"),
    [("+-*", "2*3*4/1"), ("+", "1*2*3*4"), ("*/", "(1+3)*(2+4)"), ("+*/", "4*(3*2-0)")],
)
def test_only_the_allowed_operators(operators: str, answer: str) -> None:
    assert check([1, 2, 3, 4], 24, f"<answer>{answer}</answer>", operators) == INVALID


def test_exact_where_floating_point_is_not() -> None:
    a = 999999999  # (a * a + 1) / a rounds to a in floating point
    assert (a * a + 1) / a == a
    assert check([a, a, a, 1], a, f"<answer>({a}*{a}+1)/{a}</answer>") == TARGET


@contextmanager
def sealed() -> Iterator[None]:
    """Inside, nothing can be executed, imported or opened; text may be compiled to a syntax tree
    and no further."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a verifier ran something")

    def to_tree(
        source: Any, filename: Any, mode: str, flags: int = 0, *args: Any, **kwargs: Any
    ) -> Any:
        assert flags & ast.PyCF_ONLY_AST, "compiled to code"
        return compiled(source, filename, mode, flags, *args, **kwargs)

    compiled = compile
    with (
        patch.object(builtins, "eval", refuse),
        patch.object(builtins, "exec", refuse),
        patch.object(builtins, "open", refuse),
        patch.object(builtins, "__import__", refuse),
        patch.object(builtins, "compile", to_tree),
    ):
        yield


def test_the_seal_holds() -> None:
    for deed in (lambda: eval("1"), lambda: __import__("os"), lambda: compile("1", "", "eval")):
        with pytest.raises(AssertionError), sealed():
            deed()
    with sealed():
        ast.parse("1+1", mode="eval")


Tree = tuple[
    str, Fraction | None, list[int]
]  # text, value (None where it divides by zero), numbers used

NUMBER = st.integers(0, 12).map(lambda n: (str(n), Fraction(n), [n]))


def _joined(op: str, left: Tree, right: Tree, space: str) -> Tree:
    (a, x, used), (b, y, more) = left, right
    value = None
    if x is not None and y is not None and (op != "/" or y != 0):
        value = {"+": lambda: x + y, "-": lambda: x - y, "*": lambda: x * y, "/": lambda: x / y}[
            op
        ]()
    return f"({a}{space}{op}{space}{b})", value, used + more


TREES = st.recursive(
    NUMBER,
    lambda inner: st.builds(
        _joined, st.sampled_from("+-*/"), inner, inner, st.sampled_from(["", " "])
    ),
    max_leaves=7,
)


@settings(max_examples=300, deadline=None)
@given(TREES, st.randoms(use_true_random=False))
def test_any_expression_against_its_own_tree(tree: Tree, rng: Any) -> None:
    text, value, used = tree
    if len(text) > 190:
        return
    numbers = rng.sample(used, len(used))
    whole = value is not None and value.denominator == 1
    target = int(value) if whole and value is not None else 5
    answer = f"<answer>{text}</answer>"
    assert check(numbers, target, answer) == (
        INVALID if value is None else None if whole else TARGET
    )
    assert check([*numbers, 1], target, answer) == (INVALID if value is None else NUMBERS)
    assert check(numbers, target + 1, answer) == (INVALID if value is None else TARGET)


PIECES = st.sampled_from(
    [
        *(
            "<answer>",
            "</answer>",
            "(",
            ")",
            "+",
            "-",
            "*",
            "/",
            "**",
            "//",
            " ",
            "=",
            "0",
            "1",
            "2",
            "3",
            "4",
            "24",
            "1*2*3*4",
            "(1+2+3)*4",
        ),
        *(
            "9" * 9,
            "9" * 400,
            "(" * 300,
            ")" * 300,
            "٣",
            "²",
            "１",
            "×",
            "÷",
            "−",
            "e",
            "0x",
            "_",
            ".",
            ",",
            "!",
            "\n",
            "\x00",
            "\ud800",
        ),
        *(
            "__import__('os').system('true')",
            "().__class__",
            "lambda: 0",
            "9**9**9",
            "x",
            "import os",
            "f'{1}'",
            "#",
            ";",
            "if",
            "<",
        ),
    ]
)
COMPLETIONS = st.one_of(
    st.text(),
    st.text().map(lambda text: f"<answer>{text}</answer>"),
    st.lists(PIECES, max_size=40).map("".join),
    st.lists(PIECES, max_size=12).map(lambda pieces: f"so <answer>{''.join(pieces)}</answer>"),
    st.text("0123456789+-*/() =", max_size=60).map(lambda text: f"<answer>{text}</answer>"),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(COMPLETIONS)
def test_any_completion_gets_a_verdict_at_once_and_nothing_is_run(text: str) -> None:
    with bounded(), sealed():
        kind = check([1, 2, 3, 4], 24, text)
    if kind is None:
        inside = text[: text.rindex("</answer>")]
        assert Counter(
            re.findall("[0-9]", inside[inside.rindex("<answer>") :].partition("=")[0])
        ) == Counter("1234")


# The task


def opened(seed: int = 0, **numbers: Any) -> Task:
    return open_task(recipe.Countdown.model_validate({"name": "countdown", **numbers}), seed)


def key(problem: Problem) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(problem.answer["numbers"])), problem.answer["target"]


def reachable(numbers: tuple[Fraction, ...], operators: str) -> set[Fraction]:
    """Every value of an expression over all the numbers: the brute force of this test, apart from
    the task's own."""
    if len(numbers) == 1:
        return {numbers[0]}
    found: set[Fraction] = set()
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            left = reachable(tuple(numbers[i] for i in chosen), operators)
            right = reachable(tuple(n for i, n in enumerate(numbers) if i not in chosen), operators)
            for x, y in itertools.product(left, right):
                found |= {x + y} if "+" in operators else set()
                found |= {x - y} if "-" in operators else set()
                found |= {x * y} if "*" in operators else set()
                found |= {x / y} if "/" in operators and y else set()
    return found


@pytest.mark.parametrize(
    ("numbers", "operators", "high", "sample"),
    [
        ((3,), "+-*", 12, 150),
        ((3, 4), "+-*/", 99, 12),
        ((2,), "/", 99, 100),
        ((3,), "-", 99, 60),
        ((4,), "+-", 20, 12),
    ],
)
def test_every_problem_can_be_solved(
    numbers: tuple[int, ...], operators: str, high: int, sample: int
) -> None:
    task = opened(numbers=numbers, operators=operators, high=high, train=200, held_out=50)
    assert (len(task.train), len(task.held_out)) == (200, 50)
    problems = [*task.train, *task.held_out]
    assert {len(p.answer["numbers"]) for p in problems} == set(numbers)
    for problem in problems:
        assert 1 <= problem.answer["target"] <= 99
        assert all(1 <= n <= high for n in problem.answer["numbers"])
    for problem in Random(0).sample(problems, sample):
        given_, target = problem.answer["numbers"], problem.answer["target"]
        assert Fraction(target) in reachable(tuple(map(Fraction, given_)), operators), problem.id


def test_every_solution_of_the_demonstrations_is_one() -> None:
    for numbers, target in (([1, 2, 3, 4], 24), ([3, 7, 7], 46), ([2, 2, 2], 6)):
        ways = list(find_solutions(numbers, target, "+-*/"))
        assert ways
        assert all(check(numbers, target, f"<answer>{way[-1]}</answer>") is None for way in ways)
    assert list(find_solutions([1, 1], 5, "+-*/")) == []


@pytest.mark.parametrize(
    "shape", [{"numbers": [3, 4]}, {"numbers": [2], "high": 30, "train": 900, "held_out": 100}]
)
def test_train_and_held_out_share_no_multiset(shape: dict[str, Any]) -> None:
    task = opened(**shape)
    train, held_out = [key(p) for p in task.train], [key(p) for p in task.held_out]
    assert not set(train) & set(held_out)
    assert len({*train, *held_out}) == len(train) + len(held_out)
    assert len({p.id for p in (*task.train, *task.held_out)}) == len(train) + len(held_out), (
        "an id names one problem"
    )


def test_the_problems_are_a_function_of_the_recipe() -> None:
    shape = {"numbers": [3], "high": 12, "operators": "+-*", "train": 60, "held_out": 20}
    task = opened(0, **shape)
    for seed in (0, 1):  # runs with different seeds share their held-out set
        again = opened(seed, **shape)
        assert (again.train, again.held_out) == (task.train, task.held_out)
    assert opened(0, **{**shape, "train": 90}).held_out == task.held_out
    assert opened(0, **{**shape, "high": 13}).held_out != task.held_out
    # Pinned: another version of the generator would make results incomparable without a word.
    assert [p.id for p in task.held_out[:3]] == [
        "countdown/1-5-7=11",
        "countdown/3-5-9=17",
        "countdown/2-6-8=60",
    ]
    first = task.held_out[0]
    assert (
        first.prompt == f"Make {first.answer['target']} from the numbers"
        f" {', '.join(map(str, first.answer['numbers']))}. Use each number exactly once, with +"
        " - * and brackets. End with the expression inside <answer> </answer> tags."
    )
    assert task.stop == ("</answer>",)


def test_draw_goes_through_every_problem_once_an_epoch() -> None:
    task = opened(numbers=[3], train=10, held_out=5)
    drawn = draw(task.train, 30, 0, seed=3)
    for epoch in range(3):
        assert {p.id for p in drawn[10 * epoch : 10 * epoch + 10]} == {p.id for p in task.train}
    assert drawn[:10] != drawn[10:20]
    # Any position can be drawn without what was before it.
    assert [p for at in range(0, 30, 6) for p in draw(task.train, 6, at, seed=3)] == drawn


@pytest.mark.parametrize(
    "shape",
    [
        {"numbers": [2], "high": 2},
        {"numbers": [3], "high": 5, "target_high": 20},
        {"numbers": [2], "operators": "/"},
        {"numbers": [6], "operators": "/", "train": 100},
        {"numbers": [4], "operators": "*", "high": 99, "target_high": 1},
        {"numbers": [2], "high": 1, "target_high": 1, "train": 1, "held_out": 1, "operators": "*"},
    ],
)
def test_a_recipe_too_narrow_is_refused_at_once(shape: dict[str, Any]) -> None:
    said = r"^task: numbers up to \d+ and targets up to \d+ gave \d+ different problems, expected"
    with bounded(20.0), pytest.raises(UserError, match=said):
        opened(**shape)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"operators": "+^"}, r"task.operators: got '\+\^', expected some of \+ - \* /"),
        ({"operators": ""}, "task.operators: got ''"),
        ({"numbers": [1]}, r"task.numbers: got \[1\], expected counts between 2 and 6"),
        ({"numbers": [3, 7]}, r"task.numbers: got \[3, 7\]"),
        ({"numbers": []}, r"task.numbers: got \[\]"),
    ],
)
def test_a_recipe_that_makes_no_sense(shape: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        opened(**shape)


def test_partial_credit_is_the_recipe_s() -> None:
    task = opened(
        numbers=[3], train=5, held_out=5, credit={"missed_target": 0.1, "wrong_numbers": 0.05}
    )
    problem = task.train[0]
    numbers = problem.answer["numbers"]
    way = next(find_solutions(numbers, problem.answer["target"], "+-*/"))[-1]
    assert task.verify(problem, f"<answer>{way}</answer>") == Verdict(
        1.0, True, {"error_kind": None}
    )
    assert task.verify(problem, f"<answer>{numbers[0]}</answer>") == Verdict(
        0.05, False, {"error_kind": NUMBERS}
    )
    assert task.verify(problem, "no idea") == Verdict(0.0, False, {"error_kind": INVALID})
    over = (
        "+".join(map(str, numbers))
        if sum(numbers) != problem.answer["target"]
        else "*".join(map(str, numbers))
    )
    assert task.verify(problem, f"<answer>{over}</answer>") == Verdict(
        0.1, False, {"error_kind": TARGET}
    )


ROWS: list[dict[str, Any]] = [
    {"nums": [44, 19, 35], "target": 98},
    {"nums": [63, 95, 96], "target": 64},
    {"nums": [35, 44, 19], "target": 98},  # the first one again
    {"nums": [35, 44, 19], "target": 28},
    {"nums": [1, 2, 3, 4], "target": 24},
]


def saved(folder: Path, rows: Sequence[Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text(
        json.dumps(rows) if path.suffix == ".json" else "\n".join(lines) + "\n", encoding="utf-8"
    )
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_local_file(tmp_path: Path, name: str) -> None:
    task = opened(source=saved(tmp_path, ROWS, name), held_out=2)
    assert [key(p) for p in task.held_out] == [((19, 35, 44), 98), ((63, 95, 96), 64)]
    assert [key(p) for p in task.train] == [((19, 35, 44), 28), ((1, 2, 3, 4), 24)]
    assert task.train[0].answer == {"numbers": [35, 44, 19], "target": 28}
    assert len(opened(source=saved(tmp_path, ROWS, name), held_out=2, train=1).train) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"nums": "1, 2", "target": 3},
        {"nums": [1, "2"], "target": 3},
        {"nums": [1, 2.0], "target": 3},
        {"nums": [1, True], "target": 3},
        {"nums": [-1, 2], "target": 1},
        {"nums": [], "target": 3},
        {"nums": [3], "target": 3},
        {"nums": [1] * 7, "target": 3},
        {"nums": [1, 2], "target": "3"},
        {"nums": [1, 2], "target": True},
        {"nums": [1, 2], "target": None},
        {"nums": None, "target": 3},
        {"nums": ["x" * 10_000], "target": 3},
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path, row: Any) -> None:
    with pytest.raises(UserError) as caught:
        opened(source=saved(tmp_path, [ROWS[0], row, ROWS[1]]), held_out=1)
    said = str(caught.value)
    assert f"{tmp_path / 'rows.jsonl'}, line 2: got nums=" in said
    assert said.endswith(
        "expected 2 to 6 whole numbers of 0 or more and a whole number; mend or delete the row"
    )
    assert len(said) < 400


def test_rows_that_are_none(tmp_path: Path) -> None:
    for row, said in (
        ({"numbers": [1, 2], "target": 3}, "line 1: no column 'nums'"),
        ("{", "line 1: not valid JSON"),
        ([1], "line 1: got a list"),
    ):
        with pytest.raises(UserError, match=said):
            opened(source=saved(tmp_path, [row]), held_out=1)
    with pytest.raises(
        UserError, match=r"got 4 different problems, expected more than task.held_out = 4"
    ):
        opened(source=saved(tmp_path, ROWS), held_out=4)
    with pytest.raises(UserError, match="no such file"):
        opened(source=str(tmp_path / "none.jsonl"))


# Demonstrations


@pytest.mark.parametrize(
    "shape",
    [
        {"numbers": [3], "high": 12, "operators": "+-*"},
        {"numbers": [3, 4]},
        {"numbers": [5, 6], "high": 20, "train": 20},
    ],
)
def test_demonstrations(shape: dict[str, Any]) -> None:
    task = opened(**{"train": 120, "held_out": 10, **shape})
    assert task.demonstrate is not None
    found, below, vague, lengths = 0, 0, 0, []
    for seed, problem in enumerate(task.train):
        target = problem.answer["target"]
        shown = task.demonstrate(problem, Random(seed))
        assert shown == task.demonstrate(problem, Random(seed))
        assert task.verify(problem, shown.answer).passed
        assert task.verify(problem, shown.attempt).parts["error_kind"] == TARGET
        if not shown.reflection.startswith(re.sub(r"</?answer>", "", shown.attempt)):
            assert not shown.settled
            assert "{" not in shown.reflection
            vague += 1
            continue
        said, *tried = shown.reflection.removesuffix(".").split(". ")
        expression, value = worked_out(
            problem.answer["numbers"], said.removesuffix(f", not {target}")
        )
        below += value < 0
        assert shown.attempt == f"<answer>{expression}</answer>"
        assert value != target
        for n, trial in enumerate(tried, start=1):
            sums, word = trial.rsplit(", ", 1)
            expression, value = worked_out(problem.answer["numbers"], sums)
            assert value >= 0
            assert word == ("yes" if value == target else "no")
            assert word == "no" or (
                n == len(tried) and shown.answer == f"<answer>{expression}</answer>"
            )
        assert shown.settled == (word == "yes")
        found += shown.settled
        lengths.append(len(tried))
    assert below > 0, "attempts below zero are shown too"
    assert 1 == min(lengths) < max(lengths) <= 4
    assert 0.3 < vague / len(task.train) < 0.7, "half of them are of no use"
    assert 0.2 < found / len(lengths) < 0.95, "some reflections find a solution, some give up"


def worked_out(numbers: list[int], text: str) -> tuple[str, int]:
    """ "8 + (3 - 2): 3 - 2 = 1, 8 + 1 = 9" -> its expression and the value that it comes to, every
    step of it checked."""
    expression, steps = text.split(": ")
    for step in steps.split(", "):
        a, operator, b, value = re.fullmatch(r"(-?\d+) ([-+*/]) (-?\d+) = (-?\d+)", step).groups()  # type: ignore[union-attr]
        assert {
            "+": int(a) + int(b),
            "-": int(a) - int(b),
            "*": int(a) * int(b),
            "/": Fraction(int(a), int(b) or 1),
        }[operator] == int(value)
    assert steps.count(",") == len(numbers) - 2
    assert check(numbers, int(value), f"<answer>{expression}</answer>") is None
    return expression, int(value)


@pytest.mark.parametrize(
    ("numbers", "target", "operators"),
    [([2, 2], 4, "+*"), ([1, 1, 1], 1, "*"), ([3, 4, 5], 12, "+"), ([0, 0], 0, "+-*")],
)
def test_where_every_expression_is_right_the_attempt_leaves_a_number_out(
    numbers: list[int], target: int, operators: str
) -> None:
    problem = Problem("p", "", {"numbers": numbers, "target": target})
    seen = [demonstrate(problem, Random(seed), operators=operators) for seed in range(20)]
    assert all(check(numbers, target, shown.answer, operators) is None for shown in seen)
    assert all(check(numbers, target, shown.attempt, operators) == NUMBERS for shown in seen)
    assert (
        0
        < sum(
            shown.reflection.startswith(f"{numbers[0]} leaves out {numbers[1]}") for shown in seen
        )
        < 20
    )


def test_what_cannot_be_solved_cannot_be_demonstrated() -> None:
    with pytest.raises(
        UserError,
        match=r"^p: no solution with \+-; demonstrations need problems that can be solved$",
    ):
        demonstrate(Problem("p", "", {"numbers": [2, 3], "target": 6}), Random(0), operators="+-")
