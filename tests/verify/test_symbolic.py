"""Expressions that are no plain number: values by hand, what is never handed to math-verify, and a
process that is slow, interrupted or missing."""

from __future__ import annotations

import importlib.util

import pytest

from minirl.errors import UserError
from minirl.recipe.maths import MathsCredit
from minirl.verify.numeric import read_number, verify
from minirl.verify.symbolic import Symbolic, to_latex

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)
CREDIT = MathsCredit(wrong_answer=0.25, no_answer=0.125)


def says(statement: str) -> str:
    return f"So 7 and 8 it was.\nThe answer is {statement}"


def listed(block: str) -> list[str]:
    return [statement.strip() for statement in block.split("¦")]


@needs_math_verify
@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("4\\pi", 12.566370614),
        ("4 π", 12.566370614),
        ("$2\\sqrt{3}$.", 3.464101615),
        ("2√3", 3.464101615),
        ("\\(\\frac{1+2}{7}\\)", 0.428571429),
        ("\\frac{22}{7} \\times 7^2", 154.0),
        ("78 + ( 4 / 7 )", 78.571428571),
        ("1,000π", 3141.592653590),
        ("100(1.1)^2", 121.0),
        ("-3^2", -9.0),
        ("\\sqrt 2 + 1", 2.414213562),
        ("2\\left(3+4\\right)", 14.0),
        ("\\sqrt[3]{8} + 1", 3.0),
        ("(3+4)/(1+1)", 3.5),
        ("\\frac{1}{0}", None),
        ("\\sqrt{-1}", None),
        ("2^{(3+1)^99}", None),
    ],
)
def test_symbolic_values_by_hand(symbolic: Symbolic, expression: str, value: float | None) -> None:
    assert read_number(expression) is None
    assert symbolic(expression) == (None if value is None else pytest.approx(value, abs=1e-8))


@pytest.fixture(scope="module")
def symbolic() -> Symbolic:
    return Symbolic()


@pytest.mark.parametrize(
    "expression",
    listed(
        "¦ x + 1 ¦ 5 6 ¦ 3 1/2 ¦ 5, 6 ¦ (1)(2) ¦ 1.5.2 ¦ 9^9^9 ¦ 9^999 ¦ 9999999999 ¦ 12 π cm ¦"
        " \\text{import os} ¦ ((((((((((1)))))))))) ¦ \\int 5 ¦ __import__('os') ¦ 5 or 6 ¦"
        " \\input{/etc/passwd} ¦ five ¦ () ¦ {1}{2} ¦ 3{4} ¦ 1-[2]¦ 20-30 ¦ 20–30 ¦ 20 - 30. ¦"
        " (20-30) ¦ \\left(20-30\\right) ¦ \\(20-30\\) ¦ 48 + 48/2 ¦ ((48 + 48/2)) ¦ $48+24$ ¦ 3 ×"
        " 4 ¦ 3 \\times 4 ¦ 12 / 5 * 2 ¦ 5**2 ¦ (20)-(30) ¦ (-20)-(30) ¦ 1/0 ¦ 2+3"
    ),
)
def test_only_what_can_be_a_number_is_handed_to_math_verify(expression: str) -> None:
    assert to_latex(expression) is None


@needs_math_verify
def test_a_slow_process_gives_no_value_and_the_next_call_does() -> None:
    symbolic = Symbolic(timeout_s=0.0)
    assert symbolic("2(1+3)") is None
    symbolic.timeout_s = 5.0
    assert symbolic("2(1+3)") == 8.0
    assert verify("12.566", says("4π"), CREDIT).parts["error_kind"] == "no_answer"
    assert verify("12.566", says("4π"), CREDIT, symbolic=symbolic).passed
    assert (
        verify("12.566", says("5π"), CREDIT, symbolic=symbolic).parts["error_kind"]
        == "wrong_answer"
    )
    assert (
        verify("12.566", says("not 4π"), CREDIT, symbolic=symbolic).parts["error_kind"]
        == "no_answer"
    )
    assert (
        verify("-10", says("20-30."), CREDIT, symbolic=symbolic).parts["error_kind"] == "no_answer"
    )
    assert (
        verify("72", says("48 + 48/2"), CREDIT, symbolic=symbolic).parts["error_kind"]
        == "no_answer"
    )
    symbolic.close()


@needs_math_verify
def test_an_interrupt_loses_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a process that goes on after an interrupt, whose answer the next question would
    get."""
    symbolic = Symbolic()
    assert symbolic("4\\pi") == pytest.approx(12.566370614)
    line = symbolic._helper._line
    assert line is not None
    wait, waited = line.poll, list[float]()

    def poll(timeout_s: float) -> bool:
        waited.append(timeout_s)
        if len(waited) == 1:
            raise KeyboardInterrupt
        return wait(timeout_s)

    monkeypatch.setattr(line, "poll", poll)
    with pytest.raises(KeyboardInterrupt):
        symbolic("5\\pi")
    assert symbolic("6\\pi") == pytest.approx(18.849555922)
    symbolic.close()


def test_math_verify_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"math-verify is not installed; run `pip install 'math-verify>=0.9'`"
    ):
        Symbolic()
