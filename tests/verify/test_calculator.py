"""The calculator: exact values of free text, near misses that are refused, bounded on anything at
all."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from bounded import bounded
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl.verify.calculator import MAX_CHARS, CalculatorError, evaluate, format_value, reply


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48/2", "24"),
        ("0.1 + 0.2", "0.3"),
        ("10/3", "3.333333..."),
        ("-1/8", "-0.125"),
        ("2/3", "0.666667..."),
        ("1/3000000", "0.0000003333333..."),
        ("$1,234.50 * 2", "2469"),
        ("USD 5 + $2", "7"),
        ("\\$100 - €20", "80"),
        ("20% of 50", "10"),
        ("100% - 20%", "0.8"),
        ("1 / 50%", "2"),
        ("(1 + 1)%", "0.02"),
        ("20 percent of 40", "8"),
        ("(1 - 20%) * 50", "40"),
        ("80 - 25% of 80", "60"),
        ("2⅕ * 5", "11"),
        ("3⅛*2", "6.25"),
        ("20 fifth graders * 3", "60"),
        ("25 = 48/2", "24"),
        ("x = 48/2", "24"),
        ("48/2 = 25", "24"),
        ("12 apples * 3", "36"),
        ("(3 apples + 2 pears) * $4", "20"),
        ("60 km/h * 2 h", "120"),
        ("$5/hour * 3 hours", "15"),
        ("5 m^2 * 2", "10"),
        ("100 dollars / 4 people", "25"),
        ("10 miles per gallon * 3", "30"),
        ("1 1/2 * 4", "6"),
        ("½ of 30", "15"),
        ("2 million / 4", "500000"),
        ("100 / ½", "200"),
        ("½ dozen", "6"),
        ("½ million", "500000"),
        ("½%", "0.005"),
        ("2½ * 4", "10"),
        ("3 x 1 ¾", "5.25"),
        ("x = ¼", "0.25"),
        ("1 1/2 million", "1500000"),
        ("100 / (2 dozen)", "4.166667..."),
        ("20 per cent of 50", "10"),
        ("$2M / 4", "500000"),
        ("$2.5m", "2500000"),
        ("€3 b / 3", "1000000000"),
        ("3bn / 3", "1000000000"),
        ("5 m * 2 m", "10"),
        ("5 m/s^2 * 2", "10"),
        ("USD 5/hour * 2", "10"),
        ("3. * 4", "12"),
        ("1,000. / 4.", "250"),
        ("5 dozen eggs", "60"),
        ("5k", "5000"),
        ("3 x 4", "12"),
        ("3×4÷2", "6"),
        ("3 divided by 4", "0.75"),
        ("6 times 7 minus 2", "40"),
        ("48/2 = 24", "24"),
        ("2(3+4)", "14"),
        ("[2 + {3}] * 2", "10"),
        ("2^10", "1024"),
        ("2^-1", "0.5"),
        ("-2^2", "-4"),
        ("5 - -3", "8"),
        (".5 + 5.", "5.5"),
        ("1,000,000", "1000000"),
        ("3e2", "300"),
        ("3.333333... * 3", "9.999999"),
        ("What is 5?", "error: cannot read 'What'; use numbers, + - * / ^ and brackets"),
        ("1/0", "error: division by zero"),
        ("", "error: no numbers to work with"),
    ],
)
def test_values(text: str, value: str) -> None:
    assert reply(text) == value


NEAR_MISSES = [
    *(
        "1,23",
        "12,34,567",
        "1, 234",
        "1 000",
        "1.2.3",
        "1..2",
        "2 3",
        "2 pounds 3 ounces",
        "10 1/0",
        "10 4/2",
    ),
    *(
        "7 % 3",
        "7 mod 3",
        "5!",
        "sqrt(16)",
        "2^0.5",
        "9^9^9",
        "2^65",
        "4//2",
        "3 << 2",
        "1 if 2 else 3",
    ),
    *(
        "2x + 3",
        "2a + 3b",
        "x",
        "n0",
        "pi * 2",
        "5 squared",
        "twice 4",
        "3 hundred twenty",
        "half of 4",
        "one + 2",
    ),
    *("12 and 13", "5 or 6", "12 - ", "* 3", "(2", "2)", "()", "+", "5 5", "1e999"),
    *(
        "1/2 million",
        "1 over 2 dozen",
        "100 / (1 + 1) million",
        "100/5k",
        "$5/dozen",
        "5 eggs/dozen",
        "0.5½",
        "½½",
        "2^½",
    ),
    *(
        "100 / people",
        "2 * 120 / friends",
        "$100 / people",
        "(4 + 2)/people",
        "2M / 4",
        "2 mil",
        "3b",
        "50 percentage of 2",
    ),
    *("5²", "2*10³", "2π * 5", "2 fifths of 100", "1 tenth of 50", "3 hundredths"),
    *("100 - 20%", "80 + 25 percent", "(50 + 50) - 20%", "2 * 100 + 10%"),
    *(
        "10:30 - 9:15",
        "__import__('os')",
        "(1).real",
        "5 more than 3",
        "0x10",
        "1_000",
        "five",
        "$",
        "%",
        "1;2",
    ),
]


@pytest.mark.parametrize("text", NEAR_MISSES)
def test_near_misses_are_refused(text: str) -> None:
    """Catches: what could mean two things being guessed, an unknown word taken for a unit, code."""
    with pytest.raises(CalculatorError):
        evaluate(text)
    assert reply(text).startswith("error: ")


@pytest.mark.parametrize(
    "text",
    [
        "(" * 140 + "1" + ")" * 140,
        "-" * 250 + "1",
        "9^64^1" + "*9^64" * 40,
        "1" * MAX_CHARS,
        "1+" * 1000 + "1",
        "9" * 200 + "^64",
        "1 " * 140,
    ],
)
def test_large_inputs_end_at_once(text: str) -> None:
    with bounded():
        assert len(reply(text)) < 400


Node = tuple[str, Any]
LEAVES = st.decimals(0, 10_000, places=2, allow_nan=False, allow_infinity=False)
TREES = st.recursive(
    LEAVES, lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner), max_leaves=12
)


def spoken(tree: Any) -> str:
    return (
        f"({spoken(tree[0])} {tree[1]} {spoken(tree[2])})"
        if isinstance(tree, tuple)
        else f"{tree:,f}"
    )


def valued(tree: Any) -> Fraction:
    if not isinstance(tree, tuple):
        return Fraction(tree)
    a, b = valued(tree[0]), valued(tree[2])
    return {"+": a.__add__, "-": a.__sub__, "*": a.__mul__, "/": a.__truediv__}[tree[1]](b)


@given(TREES)
def test_values_are_exact(tree: Any) -> None:
    """Catches: floats on the way, commas read as two numbers, precedence."""
    text = spoken(tree)
    try:
        value = valued(tree)
    except ZeroDivisionError:
        value = None
    if value is None or len(text) > MAX_CHARS:
        assert reply(text).startswith("error: ")
    else:
        assert evaluate(text) == value


@given(st.fractions(max_denominator=10**9))
def test_what_is_written_is_the_value_to_six_digits(value: Fraction) -> None:
    said = format_value(value)
    exact = Fraction(said.removesuffix("..."))
    assert (
        exact == value
        if not said.endswith("...")
        else abs(exact - value) <= max(Fraction(1, 10**6), 0) / 2 + abs(value) / 10**6
    )
    assert evaluate(said) == exact


@settings(max_examples=300)
@given(
    st.one_of(st.text(max_size=80), st.text(alphabet="0123456789.,+-*/^()%$= xkefo", max_size=60))
)
def test_total_and_pure(text: str) -> None:
    said = reply(text)
    assert said == reply(text)
    assert said.startswith("error: ") or evaluate(said) is not None


def test_a_long_sum_of_percentages_is_quick() -> None:
    """Catches: a side worked out twice at every level, which no run would outlive."""
    assert evaluate("1" + "+0%" * 50) == 1
