"""The option verifier: by hand, against near misses and hostile text, and on every gold letter of
MathQA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bounded import bounded
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl.recipe.maths import MathsCredit
from minirl.verify.option import LETTERS, read_option, verify

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "mathqa"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="no mathqa in ../shared/data")
CREDIT = MathsCredit(wrong_answer=0.25, no_answer=0.125)
OPTIONS = ("38", "27.675", "30", "1 / 4", "none of these")


def kind(gold: str, text: str) -> str | None:
    """The error kind, with the score, `passed` and `letter` checked against it."""
    verdict = verify(gold, OPTIONS, text, CREDIT)
    found = verdict.parts["error_kind"]
    assert verdict.passed is (found is None) is (verdict.parts["answer"] == gold)
    assert (found == "no_answer") is (verdict.parts["answer"] is None)
    assert verdict.score == {None: 1.0, "wrong_answer": 0.25, "no_answer": 0.125}[found]  # type: ignore[index]
    return found  # type: ignore[return-value]


def says(statement: str) -> str:
    return f"So 3 times 9 it is.\nThe answer is {statement}"


def listed(block: str) -> list[str]:
    return [statement.strip() for statement in block.split("¦")]


B = listed("""
b ¦ B ¦ b. ¦ b . ¦ b! ¦ (b) ¦ (B). ¦ [b] ¦ <b> ¦ b) ¦ b ) ¦ "b" ¦ `b` ¦ **b** ¦ **(B)**. ¦ $b$ ¦
: b ¦ b ) 27.675 ¦ (b) 27.675. ¦
b: 27.675 ¦ b. 27.675 ¦ b (27.675) ¦ option b ¦ Option (B) ¦ choice b. ¦ the letter b ¦
answer choice B ¦ option b : 27.675 ¦
b, because 3 * 9 is more ¦ b ; done ¦ (b) 27.675, which is more than a third ¦
b ) data inadequate ¦ b ) 38
""")
B += [
    "\n\n(b)",
    "(b)\nNext question: what is c?",
    "\\boxed{b}",
    "\\boxed{\\text{B}}",
    "\\boxed{(B)}",
    "$\\boxed{B}$.",
    "\\(b\\)",
]
NOT_B = listed("a ¦ c ¦ (a) ¦ (E) ¦ a ) 27.675 ¦ option c ¦ D. ¦ not b, the answer is c")
NO_LETTER = listed("""
. ¦ ? ¦ f ¦ (f) ¦ g ¦ 2 ¦ option 2 ¦ 27.675 ¦ none ¦ unknown ¦ the second ¦ the option ¦ not b ¦
not (b) ¦ isn't b ¦ neither b ¦ b? ¦
b or c ¦ a or b ¦ b and c ¦ either b or c ¦ a, b ¦ b, c ¦ (a) or (b) ¦ (b) or 5 ¦ (b)(c) ¦
b), (c) ¦ [a, b] ¦ b/c ¦ b & c ¦ b c ¦ a b ¦
b-c ¦ b+c ¦ ab ¦ bee ¦ be ¦ best ¦ B2 ¦ b2 ¦ b's ¦ a banana ¦ a number ¦ a number b ¦ b 27.675 ¦
b = 27.675 ¦ b ) 27.675 , c ) 30 ¦
b, not a ¦ b is wrong ¦ (b) is not right ¦ b.c ¦ B.C. ¦ β ¦ в ¦ ｂ ¦ ⓑ ¦ e.g. 5 ¦ that b holds ¦ C++
""")
NO_LETTER += [
    "",
    "\\boxed{b",
    "\\boxed{}",
    "\\boxed{b, c}",
    "\\boxed{b or c}",
    "\\boxed{b} or \\boxed{c}",
    "not \\boxed{b}",
]


@pytest.mark.parametrize("statement", B)
def test_forms_of_b(statement: str) -> None:
    assert kind("b", says(statement)) is None


@pytest.mark.parametrize("statement", NOT_B)
def test_other_letters_are_wrong(statement: str) -> None:
    assert kind("b", says(statement)) == "wrong_answer"


@pytest.mark.parametrize("statement", NO_LETTER)
def test_what_does_not_choose_one_letter_is_no_answer(statement: str) -> None:
    assert kind("b", says(statement)) == "no_answer"


@pytest.mark.parametrize(
    "text",
    [
        "b",
        "(b)",
        "I choose b.",
        "Answer: b",
        "The answer is c or the answer is b",
        "I doubt the answer is b",
    ],
)
def test_only_a_statement_counts(text: str) -> None:
    assert kind("b", text) == "no_answer"


@pytest.mark.parametrize(
    "text",
    [
        "The answer is (b). The other options are not correct.",
        "The answer is (b). Options (a) and (c) are too small.",
    ],
)
def test_what_is_said_of_other_things_takes_nothing_back(text: str) -> None:
    assert kind("b", text) is None


@pytest.mark.parametrize(
    "text",
    [
        "The answer is b; d.",
        "The answer is (b). Or (c).",
        "The answer is b and c",
        "The answer is b and not sure",
    ],
)
def test_what_takes_the_letter_back(text: str) -> None:
    assert kind("b", text) == "no_answer"


def test_the_last_statement_counts() -> None:
    assert kind("b", "The answer is b. No: the answer is c.") == "wrong_answer"
    assert kind("c", "The answer is b. No: the answer is c.") is None
    assert kind("b", "The answer is b. So the answer is unknown.") == "no_answer"


def test_letters_beyond_the_options_are_none() -> None:
    assert verify("d", OPTIONS[:4], "The answer is d.", CREDIT).passed
    assert verify("d", OPTIONS[:4], "The answer is e.", CREDIT).parts["answer"] is None
    assert verify("a", OPTIONS[:2], "The answer is c.", CREDIT).parts["error_kind"] == "no_answer"


@pytest.mark.parametrize(
    ("text", "agrees"),
    [
        ("Then 2 * 19 = 38.\nThe answer is (a).", True),
        ("Then 2 * 15 = 30.\nThe answer is (a).", False),  # the lucky letter of section 3.6
        ("It must be so.\nThe answer is (a).", None),
        ("That leaves 1/4.\nThe answer is (d).", True),
        ("That leaves 0.25 of it.\nThe answer is (d).", True),
        ("Then 38.\nThe answer is (e).", None),
        ("Then 30.\nThe answer is (a) 38.", True),  # what is said beside the letter comes first
        ("Then 38.\nThe answer is a ) 30.", False),
        ("The value is 40 - 78 = -38, so $\\boxed{a}$.", True),
    ],
)
def test_whether_the_chain_agrees_with_the_letter(text: str, agrees: bool | None) -> None:
    right = verify("b", OPTIONS, text, CREDIT).parts["answer"]
    assert isinstance(right, str)
    for gold in {right, "b"}:
        verdict = verify(gold, OPTIONS, text, CREDIT)
        assert verdict.passed is (gold == right)  # it never changes the verdict
        assert verdict.parts["value_agrees"] is agrees
        assert verdict.parts["lucky"] is (
            not agrees if gold == right and agrees is not None else None
        )
        assert verdict.parts["answer"] == right
    # In a chain a minus may be an operation, so the sign of an option does not matter.
    assert (
        verify(
            "a", ["- 120", "120", "1", "2", "3"], "It is -120.\nThe answer is (a).", CREDIT
        ).parts["value_agrees"]
        is True
    )
    assert (
        verify("a", ["- 120", "120", "1", "2", "3"], "The answer is (a) -120.", CREDIT).parts[
            "value_agrees"
        ]
        is True
    )
    assert verify("a", OPTIONS, "Then 38.", CREDIT).parts == dict.fromkeys(
        ("answer", "value_agrees", "lucky")
    ) | {"error_kind": "no_answer"}


TIMES = ("1 hour and 40 minutes", "2 hours", "1 hour and 41 minutes", "a and b", "20 or 30")


@pytest.mark.parametrize(
    ("statement", "chosen"),
    [
        ("(c) 1 hour and 41 minutes.", "c"),
        ("c ) 1 Hour and 41 Minutes", "c"),
        ("(c) (1 hour and 41 minutes), which is less than 2", "c"),
        ("(c): 1 hour and 41 minutes, as said.", "c"),
        ("(d) a and b.", "d"),
        ("(e) 20 or 30", "e"),
        ("(c) 1 hour and 40 minutes.", None),  # what (a) says
        ("(c) 1 hour and 41 minutes or (a)", None),
        ("(c) 1 hour and 41 minutes and more", None),
        ("(b) or 2 hours", None),
        ("(b) and (c) 1 hour and 41 minutes", None),
        ("(e) 20 or 30 or 40", None),
        ("(e) 20 or", None),
    ],
)
def test_an_option_that_is_repeated_is_no_second_one(statement: str, chosen: str | None) -> None:
    assert verify("c", TIMES, says(statement), CREDIT).parts["answer"] == chosen


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rs . 9000", 9000),
        ("s . 180", 180),
        ("$ 3,375", 3375),
        ("25 sec", 25),
        ("15 %", 15),
        ("− 120", -120),
        ("288 cm 2", 288),
        ("1200 m ^ 2", 1200),
        ("c ) 5 inches", 5),
        ("e = 3", 3),
        ("4 : 1", None),
        ("30 , 10", None),
        ("2 and 3", None),
        ("none of these", None),
        ("4 π", None),
        ("2 ^ 5", None),
    ],
)
def test_values_of_options(option: str, value: int | None) -> None:
    found = read_option(option)
    assert (None if found is None else found.value) == value


HOSTILE = [
    "the answer is " * 5000,
    "the " * 8000,
    "\\boxed{" * 5000,
    "b" * 1_000_000,
    "1" * 16_000 + " The answer is b",
]
HOSTILE += [
    "The answer is " + tail
    for tail in (
        "(" * 16_000,
        "option " * 4000,
        "b" + " , b" * 5000,
        "(b) " + "( " * 8000,
        "b )" * 5000,
    )
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_quick(text: str) -> None:
    with bounded():
        verify("b", OPTIONS, text, CREDIT)


PIECES = [
    *"abcdefABCDE().,:;!?/*$<>=-[]{}0123\n\"' ",
    "the answer is ",
    "The answer is (",
    "\\boxed{",
    "option ",
    "not ",
    " or ",
    " and ",
    "38",
    "\\text{",
]
completions = st.one_of(
    st.text(max_size=300), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
)


@settings(max_examples=300, deadline=1000)
@given(completions)
def test_any_completion_gets_a_verdict(text: str) -> None:
    """No letter is its answer, or exactly one."""
    assert sorted(str(kind(gold, text)) for gold in LETTERS) in (
        ["no_answer"] * len(LETTERS),
        ["None", *["wrong_answer"] * (len(LETTERS) - 1)],
    )


@settings(max_examples=100, deadline=1000)
@given(completions, st.sampled_from(LETTERS))
def test_a_plain_statement_on_a_line_of_its_own_is_read_after_any_text(
    text: str, gold: str
) -> None:
    assert kind(gold, f"{text}\nThe answer is ({gold}).") is None


@needs_data
def test_every_gold_letter_of_mathqa() -> None:
    golds = [row["correct"] for row in json.loads((DATA / "dev.json").read_text(encoding="utf-8"))]
    golds += [
        row["answer_value"] for row in json.loads((DATA / "test.json").read_text(encoding="utf-8"))
    ]
    assert len(golds) == 4475 + 1605
    for gold in golds:
        assert kind(gold, says(f"({gold}).")) is None
        assert kind(LETTERS[LETTERS.index(gold) - 1], says(f"({gold}).")) == "wrong_answer"
