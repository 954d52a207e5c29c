"""The program verifier: which text is the program, what is right, and what each failure is
called."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from bounded import bounded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minirl.recipe.maths import MathsCredit
from minirl.verify import sandbox
from minirl.verify.program import find_program, run_text, verify, verify_letter
from minirl.verify.sandbox import Limits, Result

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "svamp" / "train_pcot.json"
CREDIT = MathsCredit(wrong_answer=0.25, no_answer=0.125)


@pytest.fixture(autouse=True, scope="module")
def _closed() -> Iterator[None]:
    yield
    sandbox.close()


def check(gold: str | float, text: str) -> str | None:
    """The error kind, None for a right answer, with score and `passed` checked against it."""
    verdict = verify(gold, text, CREDIT)
    kind = verdict.parts["error_kind"]
    assert verdict.passed == (kind is None)
    assert verdict.score == {None: 1.0, "wrong_answer": 0.25}.get(kind, 0.125)  # type: ignore[call-overload]
    return kind  # type: ignore[return-value]


def returns(expression: str) -> str:
    return f"def solution():\n    return {expression}\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("def solution():\n    return 1", 1),
        ("  \n\ndef solution():\n    return 2\n", 2),
        ("def solution(): return 3", 3),
        ("def solution() -> float:\n\treturn 4\r\n", 4),
        ("def solution():\r\n    x = 4\r\n\r\n    return x + 1\r\n", 5),
        ("import decimal\r\n\r\ndef solution():\r\n    return decimal.Decimal(5)\r\n", 5.0),
        ("I add the two.\n\ndef solution():\n    a = 2\n\n    return a + 4\n\nThe answer is 9.", 6),
        (
            (
                "import math\nRATE = 3.5\n\ndef twice(x):\n    return 2 * x\n\ndef solution():\n   "
                " return math.floor(twice(RATE))\n"
            ),
            7,
        ),
        (
            (
                "from math import floor, ceil\ndef same(f): return f\n@same\ndef solution():\n   "
                " return floor(8.5)\n"
            ),
            8,
        ),
        (
            (
                "def solution():\n    return late()\n\ndef late():\n    return"
                " 9\n\nprint(solution())\n"
            ),
            9,
        ),
        (
            (
                "x = 5 apples, says Tom.\nfrom here it is easy: import nothing.\ndef solution():\n "
                "   return 10\n"
            ),
            10,
        ),
        # The docstring is the question, whose lines may stand anywhere.
        ("Total = 5 apples times 3.\n\ndef solution():\n    return 15\n", 15),
        ("def solution():\n    return 15\n\nAnswer = 15 apples", 15),
        (
            (
                "RATE = 2 if True else 3\nNAME = 'two words'  # and more words\nX = not RATE in"
                " (1,)\ndef solution():\n    return RATE"
            ),
            2,
        ),
        ('def solution():\n    """Tom has 3.\nHow many?\nprint(1)\n"""\n    return 11\n', 11),
        ("def solution():\n    '''It's \"\"\" odd.\nHow many?'''\n    return 12\nSo 12.", 12),
        (
            "def solution():\n    return sum([\n1, 2,\n10,\n])",
            "program_error",
        ),  # brackets over lines at the margin are not followed
        ("def solution():\n    return sum([\n        3, 11,\n])\n", 14),
        # Models write on.
        (
            (
                "def solution():\n    return 15\n\nQuestion: And then?\n\ndef solution():\n   "
                " return 0\n"
            ),
            15,
        ),
        ("def solution():\n    return 16\n\ndef solution():\n    return 0\n", 16),
        ("def solution():\n    return 17\n```\n", 17),
        # Fences.
        ("Here it is:\n```python\ndef solution():\n    return 18\n```\nThe answer is 3.", 18),
        (
            (
                "```\ndef solution():\n    return 1\n```\nNo, wrong:\n```py\ndef solution():\n   "
                " return 19\n```"
            ),
            19,
        ),
        ("```python\ndef solution():\n    return 20\n```\nwhich prints\n```\n3\n```", 20),
        ("def solution():\n    return 1\n```python\ndef solution():\n    return 21\n```", 21),
        ("1. First:\n   ```python\n   def solution():\n       return 22\n   ```", 22),
        ("   ```python\n   def solution():\n       return 23", 23),
        ("```python\nx = 1\n```\n\ndef solution():\n    return 24\n", 24),
        ("<think>def solution():\n    return 1</think>\ndef solution():\n    return 25", 25),
        ("<think>```python\ndef solution():\n    return 1\n```</think>The answer is 26.", None),
        # No program.
        ("", None),
        ("The answer is 5.", None),
        ("5", None),
        ("I would write def solution(): return 5", None),
        ("def solve():\n    return 5", None),
        ("def solutions():\n    return 5", None),
        ("    def solution():\n        return 5", None),
        ("```python\nprint(5)\n```", None),
    ],
)
def test_the_program_is_found(text: str, value: float | str | None) -> None:
    result = run_text(text)
    if value is None:
        assert (result, find_program(text)) == (None, None)
    elif isinstance(value, str):
        assert result is not None
        assert result.error == value
    else:
        assert result == Result(value)


def test_a_program_is_handed_over_as_it_stands() -> None:
    program = 'def solution():\n    """Tom\x0c has\u2028 3.\n\n\n  \tmore """\n    return "é\x00"\n'
    assert find_program(program.rstrip("\n")) == program
    assert find_program(f"```python\n{program}```") == program
    assert (
        find_program(
            "```\n" + textwrap.indent(program, "    ", lambda line: bool(line.strip())) + "```"
        )
        is not None
    )


@pytest.mark.parametrize(
    ("gold", "expression", "kind"),
    [
        (5, "5", None),
        ("5.0", "5", None),
        (" 5 ", "5.0", None),
        (-5, "-5", None),
        ("1e3", "1000", None),
        (5, "'5'", None),
        (
            1,
            "1.01",
            None,
        ),  # the tolerance is inclusive, in decimal numbers: 1.01 - 1 is more in binary
        (1, "0.99", None),
        (1.005, "1.015", None),
        (1, "1.0100001", "wrong_answer"),
        (1, "0.9899999", "wrong_answer"),
        (0.015, "0.006", None),
        (1e9, "1e9 + 0.01", None),
        (1e9, "1e9 + 0.02", "wrong_answer"),
        ("333333333.3333333", "10 ** 9 / 3", None),
        (2**100, "2 ** 100 + 1", "wrong_answer"),  # floats would call them equal
        (2**100, "2 ** 100", None),
        (5, "-5", "wrong_answer"),
        (5, "50", "wrong_answer"),
        (0, "1e-300", None),
        (5, "None", "no_number"),
        (1, "True", "no_number"),
        (5, "[5]", "no_number"),
        (5, "'5 apples'", "no_number"),
        (5, "float('inf')", "no_number"),
        (5, "float('nan')", "no_number"),
        (5, "10 ** 400", "no_number"),
        (5, "1 / 0", "program_error"),
        (5, "five", "program_error"),
        (5, "(", "program_error"),
        (5, "__import__('numpy').mean([5])", "program_error"),
        (5, "sum(range(10 ** 12))", "timeout"),
        (5, "len('a' * 10 ** 10)", "memory"),
    ],
)
def test_verdicts(gold: str | float, expression: str, kind: str | None) -> None:
    assert check(gold, returns(expression)) == kind


@pytest.mark.parametrize(
    ("returned", "kind"),
    [
        ("'c'", None),
        ("'C'", None),
        ("'(c)'", None),
        ("' c ) '", None),
        ("'c.'", None),
        ("['a', 'b', 'c', 'd', 'e'][2]", None),
        ("'b'", "wrong_answer"),
        ("'(D)'", "wrong_answer"),
        ("'e'", "no_letter"),  # there are four options
        ("'f'", "no_letter"),
        ("'cc'", "no_letter"),
        ("'c d'", "no_letter"),
        ("'c) 38'", "no_letter"),
        ("'option c'", "no_letter"),
        ("''", "no_letter"),
        ("'c' * 10 ** 6", "no_letter"),
        ("'(' * 8", "no_letter"),
        ("'\\n c'", "no_letter"),
        ("'с'", "no_letter"),  # Cyrillic
        ("b'c'", "no_letter"),
        ("['c']", "no_letter"),
        ("38", "no_letter"),
        ("None", "no_letter"),
        ("'\\'c'", "no_letter"),
        ("c", "program_error"),
        ("'c' * 10 ** 10", "memory"),
        ("sum(range(10 ** 12))", "timeout"),
    ],
)
def test_letters(returned: str, kind: str | None) -> None:
    quick = Limits(time_s=0.2)
    verdict = verify_letter("c", 4, returns(returned), CREDIT, limits=quick)
    assert verdict.parts["error_kind"] == kind
    assert verdict.passed == (kind is None)
    assert verdict.score == {None: 1.0, "wrong_answer": 0.25}.get(kind, 0.125)  # type: ignore[call-overload]
    assert verdict.parts["answer"] == (
        "c" if kind is None else verdict.parts["answer"] if kind == "wrong_answer" else None
    )


def test_a_letter_in_prose_is_no_program() -> None:
    assert verify_letter("c", 5, "The answer is (c).", CREDIT).parts == {
        "error_kind": "no_program",
        "answer": None,
    }


def test_prose_is_no_program() -> None:
    assert check(5, "The answer is 5.") == "no_program"


def test_the_limits_are_an_argument() -> None:
    text = returns("len([0] * 2 * 10 ** 6)")
    assert (
        verify(2 * 10**6, text, CREDIT, limits=Limits(memory_mb=8)).parts["error_kind"] == "memory"
    )
    assert verify(2 * 10**6, text, CREDIT, limits=Limits(memory_mb=256)).passed


def test_the_tolerance_is_an_argument() -> None:
    assert verify(5, returns("5.4"), CREDIT, tolerance=0.5).passed
    assert not verify(5, returns("5.005"), CREDIT, tolerance=0.0).passed
    assert verify(0.1, returns("0.1"), CREDIT, tolerance=0.0).passed


@pytest.mark.parametrize(
    "gold",
    ["", "five", "1,000", "nan", "inf", "1e999", "A", "1/2", float("nan"), float("inf"), True],
)
def test_a_gold_answer_must_be_a_number(gold: str | float) -> None:
    with pytest.raises(ValueError, match="expected a plain finite number"):
        verify(gold, returns("5"), CREDIT)


def test_svamp_programs_pass_and_near_misses_do_not() -> None:
    if not DATA.exists():
        pytest.skip(f"no {DATA.name} in ../shared/data")
    for row in json.loads(DATA.read_text(encoding="utf-8"))[::20]:
        gold, program = row["answer_value"], row["answer_cot"]
        assert check(gold, program) is None
        assert check(gold, f"Let me write it.\n```python\n{program}\n```\nDone.") is None
        assert check(float(gold) + 0.02, program) == "wrong_answer"
        assert (
            check(gold, program.replace("return result", "return -1 - abs(result)"))
            == "wrong_answer"
        )
        assert check(gold, program.replace("    return result", "")) == "no_number"
        assert check(gold, program.replace("return result", "return resul")) == "program_error"
        assert check(gold, program.replace("def solution", "def answer")) == "no_program"


LINES = st.sampled_from(
    [
        "def solution():",
        "    return 1",
        "```",
        "```python",
        "   ```",
        '    """doc',
        '"""',
        "'''",
        "import math",
        "So it is 5.",
        "</think>",
        ")",
        "",
    ]
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.one_of(
        st.text(max_size=300),
        st.lists(st.one_of(LINES, st.text(max_size=20)), max_size=15).map("\n".join),
    )
)
def test_any_text_gets_a_verdict(text: str) -> None:
    kind = check(1, text)
    assert kind in {
        None,
        "no_program",
        "program_error",
        "timeout",
        "memory",
        "no_number",
        "wrong_answer",
    }
    assert (kind == "no_program") == (find_program(text) is None)


def test_extraction_is_linear() -> None:
    for piece in (
        "def solution():\n",
        "```\n",
        "```\ndef solution():\n",
        '    """ \'\'\' """\n',
        "x = 1\n",
        "a",
        " ",
        "import a, ",
    ):
        text = piece * (1_000_000 // len(piece))
        with bounded():  # 60,000 lines or a million words each looked at again would take minutes
            find_program(text + "\ndef solution():\n    return 1")


def test_equal_values_vote_for_one_answer() -> None:
    def said(value: str) -> object:
        return verify(7, f"def solution():\n    return {value}", CREDIT).parts["answer"]

    assert said("12") == said("24 / 2") == said("12.0") == "12"
    assert said("0.1 + 0.2") == said("0.3") == "0.3"
    assert said("'12'") == "12"
    assert said("None") is said("[1]") is said("1 / 0") is None
    assert verify(7, "seven", CREDIT).parts["answer"] is None
