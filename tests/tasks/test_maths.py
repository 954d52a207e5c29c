"""GSM8K, SVAMP and MathQA: rows by hand, every fault by its name, and the real files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from minirl.episode import Problem
from minirl.errors import UserError
from minirl.recipe.maths import Gsm8k, Mathqa, MathsCredit, Svamp
from minirl.tasks import Task
from minirl.tasks.maths import ASK_LETTER, ASK_LETTER_PROGRAM, ASK_NUMBER, ASK_PROGRAM, open_task
from minirl.tasks.maths_rows import read_options

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
needs_sandbox = pytest.mark.skipif(
    find_spec("pydantic_monty") is None, reason="pydantic-monty is not installed"
)

OPTIONS = "a ) 38 , b ) 27.675 , c ) 1,000 , d ) 5 / 36 , e ) none of these"
PROGRAM = "def solution():\n    return {}"


def gsm(question: str, answer: str) -> dict[str, Any]:
    return {"question": question, "answer": answer}


def mathqa(question: str, rationale: str, correct: str, options: str = OPTIONS) -> dict[str, Any]:
    return {"Problem": question, "Rationale": rationale, "options": options, "correct": correct}


def reft(question: str, value: Any, chain: str | None = None) -> dict[str, Any]:
    return {"question": question, "answer_value": value} | (
        {} if chain is None else {"answer_cot": chain}
    )


def saved(folder: Path, rows: list[dict[str, Any]], name: str = "rows.json") -> str:
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def opened(
    kind: type[Gsm8k | Svamp | Mathqa], source: str, test: str | None = None, **fields: Any
) -> Task:
    fields = {"held_out": 1} | fields
    return open_task(
        kind(name=kind.__name__.lower(), source=source, test_source=test, **fields), seed=0
    )


def shown(task: Task, problem: Problem) -> str:
    assert task.demonstrate is not None
    demonstration = task.demonstrate(problem, Random(0))
    assert (demonstration.attempt, demonstration.reflection) == ("", "")
    return demonstration.answer


def test_gsm8k_by_hand(tmp_path: Path) -> None:
    test = saved(tmp_path, [gsm("How many?", "One.\n#### 1")], "test.json")
    train = saved(
        tmp_path,
        [
            gsm(
                "48 clips, then half?",
                "She sold 48/2 = <<48/2=24>>24.\nSo 48+24=$<<48+24=72>>1,072.\n#### 1,072",
            )
        ],
    )
    task = opened(Gsm8k, train, test)
    assert task.name == "gsm8k"
    assert [p.id for p in (*task.train, *task.held_out)] == ["gsm8k/train/1", "gsm8k/test/1"]
    problem = task.train[0]
    assert problem.prompt == f"48 clips, then half?\n\n{ASK_NUMBER}"
    assert problem.answer == {"value": "1072"}
    assert (
        shown(task, problem)
        == problem.solution
        == "She sold 48/2 = 24.\nSo 48+24=$1,072.\nThe answer is 1,072."
    )
    assert task.verify(problem, shown(task, problem)).score == 1.0
    assert task.verify(problem, "The answer is 1071.").score == 0.1
    assert task.verify(problem, "I do not know.").score == 0.0
    assert task.notes == ()


def test_svamp_by_hand(tmp_path: Path) -> None:
    rows = [
        reft("How many pairs?", "203.0", "29 * 7 = 203\n\nTherefore, the answer is <203>."),
        reft("What percent?", "25.0", "25 of 100.\n\nThe answer is <25%>."),
        reft("Which share?", "0.6666666666666666", "2 of 3. the answer is <0.67>."),
        reft("How many more?", 5, "It is so. The answer is 5 more."),
        reft("Is it wrong?", "8.93", "Rounded up.\n\nTherefore, the answer is <9>."),
    ]
    body = {
        "ID": "1",
        "Body": "Each pack costs 76 dollars",
        "Question": "How much is one?",
        "Answer": 51.0,
    }
    task = opened(Svamp, saved(tmp_path, rows), saved(tmp_path, [body], "test.json"))
    found = {p.prompt.partition("\n")[0]: (p.answer["value"], p.solution) for p in task.train}
    assert found == {
        "How many pairs?": ("203", "29 * 7 = 203\nThe answer is 203."),
        "What percent?": ("25", "25 of 100.\nThe answer is 25."),
        "Which share?": ("0.6666666666666666", "2 of 3.\nThe answer is 0.67."),
        "How many more?": ("5", "It is so. The answer is 5 more."),
    }
    assert task.notes == (
        "svamp: rows left out because they have a chain that ends in another answer: 1",
    )
    assert (
        task.held_out[0].prompt == f"Each pack costs 76 dollars. How much is one?\n\n{ASK_NUMBER}"
    )
    assert task.held_out[0].answer == {"value": "51"}
    with pytest.raises(
        UserError,
        match=(
            r"svamp/test/1: .*rows.json has no chain to show for task.chain 'prose'; give a"
            r" task.source with chains"
        ),
    ):
        shown(task, task.held_out[0])


MATHQA = [
    mathqa("how many ?", '"5 * 200 = 1000 . answer : c ."', "c"),
    mathqa("what chance ?", "so 5 / 36 . hence , the correct option is ( d )", "d"),
    mathqa("what rate ?", "it is 27.675 b", "b"),
    mathqa("why not ?", "no idea", "e"),
    mathqa("which one ?", "it is 38 . the answer is c .", "a"),
    mathqa("which letter ?", "a", "a"),
    mathqa("what sum ?", "it is 2 million d", "d", "a ) 1 , b ) 2 , c ) 3 , d ) 2 million , e ) 4"),
]


def test_mathqa_by_hand(tmp_path: Path) -> None:
    test = saved(tmp_path, [reft(f"what profit ?\n{OPTIONS}", "a")], "test.json")
    task = opened(Mathqa, saved(tmp_path, MATHQA), test)
    found = {p.prompt.partition("\n")[0]: (p.answer["letter"], p.solution) for p in task.train}
    assert found == {
        "how many ?": ("c", "5 * 200 = 1000\nThe answer is (c)."),
        "what chance ?": ("d", "so 5 / 36\nThe answer is (d)."),
        "what rate ?": ("b", "it is 27.675\nThe answer is (b)."),
        "what sum ?": ("d", "it is 2 million\nThe answer is (d)."),
        "why not ?": ("e", "no idea\nThe answer is (e)."),
    }
    reasons = ("have a chain that ends in another answer", "have no chain, unlike the others")
    assert task.notes == tuple(
        f"mathqa: rows left out because they {reason}: 1" for reason in reasons
    )
    problem = task.held_out[0]
    listed = "(a) 38\n(b) 27.675\n(c) 1,000\n(d) 5 / 36\n(e) none of these"
    assert problem.prompt == f"what profit ?\n{listed}\n\n{ASK_LETTER}"
    assert problem.answer == {
        "letter": "a",
        "options": ["38", "27.675", "1,000", "5 / 36", "none of these"],
    }
    verdict = task.verify(problem, "It is 1000.\nThe answer is (a).")
    assert (verdict.score, verdict.parts) == (
        1.0,
        {"error_kind": None, "answer": "a", "value_agrees": False, "lucky": True},
    )
    assert task.verify(problem, "It is 1000.\nThe answer is (c).").score == 0.1


def test_mathqa_as_numbers(tmp_path: Path) -> None:
    rows = [
        reft("what profit ?", "38.0"),
        reft(f"what loss ?\n{OPTIONS}", "D"),
        reft(f"what else ?\n{OPTIONS}", "e"),
    ]
    task = opened(
        Mathqa,
        saved(tmp_path, MATHQA),
        saved(tmp_path, rows, "test.json"),
        numeric=True,
        held_out=9,
    )
    found = {p.prompt.partition("\n")[0]: (p.answer["value"], p.solution) for p in task.train}
    assert found == {
        "how many ?": ("1000", "5 * 200 = 1000\nThe answer is 1000."),
        "what chance ?": ("0.1388888888888889", "so 5 / 36\nThe answer is 5/36."),
        "what rate ?": ("27.675", "it is 27.675\nThe answer is 27.675."),
    }
    assert (
        "mathqa: rows left out because they have no number as their right option: 3" in task.notes
    )
    assert {p.prompt: p.answer["value"] for p in task.held_out} == {
        f"what profit ?\n\n{ASK_NUMBER}": "38",
        f"what loss ?\n\n{ASK_NUMBER}": "0.1388888888888889",
    }


@needs_sandbox
def test_programs_by_hand(tmp_path: Path) -> None:
    rows = [
        reft("Four?", "4.0", PROGRAM.format("2 + 2")),
        reft("Five?", 5, PROGRAM.format("6")),
        reft("Six?", 6, "The answer is 6."),
    ]
    rows += [reft("Seven?", 7, PROGRAM.format("open('/etc/passwd')"))]
    test = saved(tmp_path, [reft("Eight?", 8)], "test.json")
    for kind in (Svamp, Gsm8k):
        task = opened(kind, saved(tmp_path, rows), test, chain="program")
        assert [(p.prompt, p.answer) for p in task.train] == [
            (f"Four?\n\n{ASK_PROGRAM}", {"value": "4"})
        ]
        assert shown(task, task.train[0]) == "def solution():\n    return 2 + 2"
        assert sorted(note.partition("they ")[2] for note in task.notes) == [
            "have a chain that ends in another answer: 2",
            "have no chain, unlike the others: 1",
        ]
        assert task.verify(task.train[0], f"```python\n{PROGRAM.format('8 / 2')}\n```").score == 1.0
        assert task.verify(task.train[0], PROGRAM.format("3")).score == 0.1
        assert task.verify(task.train[0], "The answer is 4.").score == 0.0


@needs_sandbox
def test_mathqa_programs_return_a_letter(tmp_path: Path) -> None:
    """ReFT's P-CoT of multiple choice. Catches: a letter beside a number, the prose prompt, the
    option's value taken for its letter."""
    rows = [reft(f"How many?\n{OPTIONS}", "C", PROGRAM.format("'c' if 5 * 200 == 1000 else 'e'"))]
    rows += [
        reft(f"What else?\n{OPTIONS}", "a", PROGRAM.format("38")),
        reft(f"And then?\n{OPTIONS}", "a", "It is 38."),
    ]
    test = saved(tmp_path, [reft(f"What profit?\n{OPTIONS}", "b")], "test.json")
    task = opened(Mathqa, saved(tmp_path, rows), test, chain="program")
    listed = "(a) 38\n(b) 27.675\n(c) 1,000\n(d) 5 / 36\n(e) none of these"
    (problem,) = task.train
    assert problem.prompt == f"How many?\n{listed}\n\n{ASK_LETTER_PROGRAM}"
    assert task.verify(problem, shown(task, problem)).parts == {"error_kind": None, "answer": "c"}
    (held_out,) = task.held_out
    assert [
        task.verify(held_out, PROGRAM.format(found)).score for found in ("'(B)'", "'c'", "27.675")
    ] == [1.0, 0.1, 0.0]


@needs_sandbox
def test_docstrings_are_left_out_where_the_recipe_says_so(tmp_path: Path) -> None:
    text = 'def solution():\n    """{}"""\n    return {}'
    rows = [
        reft("Four?", 4, text.format("Four?", "len('''four''')")),
        reft("Five?", 5, text.format("Five?\n\n    And why?\n    ", "5")),
    ]
    rows += [
        reft("Six?", 6, "def solution():\n    return 6"),
        reft("Seven?", 7, 'def solution():\n    x = """no docstring"""\n    return 7'),
    ]
    found = {}
    for docstring in (True, False):
        task = opened(
            Svamp,
            saved(tmp_path, rows),
            saved(tmp_path, [reft("Q?", 8)], "test.json"),
            chain="program",
            docstring=docstring,
        )
        found[docstring] = {p.prompt.partition("\n")[0]: p.solution for p in task.train}
    assert found[True] == {row["question"]: row["answer_cot"] for row in rows}
    assert found[False] == {
        "Four?": "def solution():\n    return len('''four''')",
        "Five?": "def solution():\n    return 5",
        "Six?": "def solution():\n    return 6",
        "Seven?": rows[3]["answer_cot"],
    }


@needs_sandbox
def test_gsm8k_itself_has_no_programs_to_show(tmp_path: Path) -> None:
    rows = [gsm(f"What is {n}?", f"It is {n}.\n#### {n}") for n in range(3)]
    task = opened(Gsm8k, saved(tmp_path, rows), chain="program")
    assert len(task.train) == 2
    with pytest.raises(
        UserError,
        match=(
            r"no chain to show for task.chain 'program'; give a task.source with Python programs"
            r" .*`answer_cot`"
        ),
    ):
        shown(task, task.train[0])
    assert task.verify(task.train[0], PROGRAM.format(task.train[0].answer["value"])).passed


def test_limits_and_credit_are_the_recipe_s(tmp_path: Path) -> None:
    rows = saved(tmp_path, [gsm(f"What is {n}?", f"#### {n}0") for n in range(1, 4)])
    task = opened(Gsm8k, rows, tolerance=1.0, credit=MathsCredit(wrong_answer=0.5, no_answer=0.25))
    problem = task.train[0]
    gold = int(problem.answer["value"])
    assert [task.verify(problem, f"#### {gold + more}").score for more in (0, 1, 2)] == [
        1.0,
        1.0,
        0.5,
    ]
    assert task.verify(problem, "").score == 0.25


@needs_sandbox
def test_tolerance_and_limits_reach_the_sandbox(tmp_path: Path) -> None:
    rows = saved(tmp_path, [gsm(f"What is {n}?", "#### 7") for n in range(2)])
    # Far longer than 0.1 s: CPU time is counted in hundredths of a second.
    slow = "def solution():\n    for n in range(20_000_000):\n        pass\n    return 8.5"
    kinds = []
    for limits, tolerance in (
        ({"time_s": 0.1}, 2.0),
        ({"time_s": 30.0}, 2.0),
        ({"time_s": 30.0}, 1.0),
    ):
        task = opened(Gsm8k, rows, chain="program", limits=limits, tolerance=tolerance)
        kinds.append(task.verify(task.train[0], slow).parts["error_kind"])
    assert kinds == ["timeout", None, "wrong_answer"]


def test_symbolic_answers_only_where_the_recipe_says_so(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    rows = saved(tmp_path, [reft(f"Area {n}?", "12.566") for n in range(2)])
    for symbolic in (False, True):
        task = opened(Svamp, rows, symbolic=symbolic)
        assert task.verify(task.train[0], "The answer is $4\\pi$.").passed is symbolic


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        (Mathqa, {"symbolic": True, "chain": "program"}, "symbolic: got true with chain 'program'"),
        (Mathqa, {"symbolic": True}, "symbolic: got true, but the answer is a letter"),
        (Svamp, {"symbolic": True, "chain": "program"}, "symbolic: got true with chain 'program'"),
        (Gsm8k, {"numeric": True}, "unknown key 'numeric'"),
        (
            Gsm8k,
            {"credit": {"wrong": 0.1}},
            "unknown key 'wrong'; the nearest known key is 'wrong_answer'",
        ),
        (Gsm8k, {"credit": {"wrong_answer": 1.5}}, "less than or equal to 1"),
        (Gsm8k, {"tolerance": -1}, "greater than or equal to 0"),
    ],
)
def test_recipes_that_cannot_be(kind: type[Gsm8k], fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        kind(name=kind.__name__.lower(), **fields)


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        (Gsm8k, {"question": "q"},
         "got the columns question, expected question, answer, or question, answer_value and"
         " perhaps answer_cot"),
        (Svamp, {"Body": "b"},
         "got the columns Body, expected Body, Question, Answer, or question"),
        (Mathqa, {"Problem": "q"},
         "got the columns Problem, expected Problem, Rationale, options, correct, or question"),
        (Svamp, mathqa("q", "r", "a"),
         "got the columns Problem, Rationale, options, correct, expected Body"),
        (Gsm8k, gsm("q", "It is 5."), "answer: got '', expected a number"),
        (Gsm8k, gsm("q", "It is 5.\n#### five"), "answer: got ' five', expected a number"),
        (Gsm8k, gsm(" ", "#### 5"), "question: got ' ', expected text"),
        (Gsm8k, {"question": ["q"], "answer": "#### 5"}, "question: got \"['q']\", expected text"),
        (Gsm8k, gsm("q \ud800", "#### 5"), "question: got 'q \\ud800', expected text"),
        (Svamp, reft("q", None), "answer_value: got 'None', expected text"),
        (Svamp, reft("q", True), "answer_value: got 'True', expected text"),
        (Svamp, reft("q", "NaN"), "answer_value: got 'NaN', expected a number"),
        (Svamp, reft("q", "1e301"), "answer_value: got '1e301', expected a number"),
        (Svamp, reft("q", 5, ""), "answer_cot: got '', expected text"),
        (Mathqa, mathqa("q", "r", "f"),
         "with the right one 'f', expected a question, `a ) ... , b ) ...` up to e and a"
         " letter"),
        (Mathqa, mathqa("q", "r", "a", "a ) 1 , b ) 2"),
         "got options 'a ) 1 , b ) 2' with the right one 'a'"),
        (Mathqa, mathqa("q", "r", "a", "a ) 1 , b ) 2 , c ) , d ) 4 , e ) 5"),
         "expected a question"),
        (Mathqa, mathqa("q", "r", "a", OPTIONS + " " * 2000), "expected a question"),
        (Mathqa, reft("no options", "a"), "or set task.numeric=true for data without options"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_named(
    tmp_path: Path, kind: type[Gsm8k], row: dict[str, Any], said: str
) -> None:
    good = {Gsm8k: gsm("fine", "#### 1"), Svamp: reft("fine", 1), Mathqa: mathqa("fine", "r", "a")}[
        kind
    ]
    source = saved(tmp_path, [good, row])
    with pytest.raises(UserError) as caught:
        opened(kind, source)
    assert str(caught.value).startswith(f"{source}, row 2: ")
    assert said in str(caught.value)


def test_too_few_rows_and_missing_files(tmp_path: Path) -> None:
    source = saved(tmp_path, [reft(f"q{n}", n) for n in range(3)])
    with pytest.raises(
        UserError,
        match=(
            r"got 0 training rows and 3 held-out questions .*, expected at least 1 and 3; give more"
            r" data"
        ),
    ):
        opened(Svamp, source, held_out=3)
    with pytest.raises(
        UserError,
        match=r"got 0 training rows and 3 held-out questions .*, expected at least 1 and 4",
    ):
        opened(Svamp, source, held_out=4)
    with pytest.raises(UserError, match=r"--set task.test_source=PATH"):
        opened(Svamp, source, str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"--set task.source=PATH"):
        opened(Svamp, str(tmp_path / "none.json"), source)


def test_one_source_is_divided_by_questions(tmp_path: Path) -> None:
    rows = [reft(f"What is {n} + {n % 7}?", n + n % 7) for n in range(60)]
    again = [reft(f"what  IS {n} + {n % 7} ?", n + n % 7) for n in range(60)]
    task = opened(Svamp, saved(tmp_path, rows + again), held_out=20)
    asked = [
        {"".join(p.prompt.casefold().split()) for p in part} for part in (task.train, task.held_out)
    ]
    assert len(task.held_out) == len(asked[1]) == 20
    assert len(task.train) == 2 * 40
    assert asked[0].isdisjoint(asked[1])
    assert task.notes == ("svamp: rows left out because they ask what a held-out row asks: 20",)
    # A question more or less moves no other to the other side, and the order of the rows does not
    # matter.
    fewer = opened(Svamp, saved(tmp_path, rows[::-1][1:]), held_out=20, train=7)
    assert len(fewer.train) == 7
    assert {p.prompt for p in fewer.train}.isdisjoint(p.prompt for p in task.held_out)


def test_a_test_file_is_held_out_and_never_trained_on(tmp_path: Path) -> None:
    test = saved(
        tmp_path,
        [reft("What is 3 + 4?", 7), reft("What is 3 + 4?", 7), reft("What is 5?", 5)],
        "test.json",
    )
    train = saved(
        tmp_path, [reft("what is 3 + 4 ?", 7), reft("What is 3 - 4?", -1), reft("What is 6?", 6)]
    )
    task = opened(Svamp, train, test, held_out=50)
    assert len(task.held_out) == 3
    assert sorted(p.prompt.partition("\n")[0] for p in task.train) == [
        "What is 3 - 4?",
        "What is 6?",
    ]
    assert len(opened(Svamp, train, test, held_out=1).held_out) == 1


def test_a_hub_source_has_its_own_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def read_dataset(
        source: str, columns: tuple[str, ...], split: str, *, setting: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        asked.append((source, split))
        return (
            (f"{source} ({split}), row {n}", gsm(f"{split} {n}?", f"#### {n}")) for n in range(4)
        )

    monkeypatch.setattr("minirl.tasks.maths.read_dataset", read_dataset)
    task = open_task(Gsm8k(name="gsm8k"), seed=0)
    assert asked == [("openai/gsm8k:main", "train"), ("openai/gsm8k:main", "test")]
    assert [len(task.train), len(task.held_out)] == [4, 4]
    asked.clear()
    task = open_task(Gsm8k(name="gsm8k", test_split="train", held_out=1), seed=0)
    assert asked == [("openai/gsm8k:main", "train")]
    assert [len(task.train), len(task.held_out)] == [3, 1]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (OPTIONS, ("38", "27.675", "1,000", "5 / 36", "none of these")),
        (
            "['a ) 23', 'b ) 2 , 1', 'c ) 20', 'd ) 26', 'e ) 27 cm']",
            ("23", "2 , 1", "20", "26", "27 cm"),
        ),
        ("a ) a ) 2 , b ) b ) 3 , c ) c ) 4 , d ) d ) 5 , e ) e ) 6", ("2", "3", "4", "5", "6")),
        ("a)1,b)2,c)3,d)4,e)5", ("1", "2", "3", "4", "5")),
        ("a ) 1 , c ) 2 , b ) 3 , d ) 4 , e ) 5", None),
        ("1 , 2 , 3 , 4 , 5", None),
        ("", None),
    ],
)
def test_options(text: str, options: tuple[str, ...] | None) -> None:
    assert read_options(text) == options


def real(kind: type[Gsm8k | Svamp | Mathqa], source: str, test: str, **fields: Any) -> Task:
    task = opened(kind, str(DATA / source), str(DATA / test), held_out=2000, **fields)
    asked = [
        {" ".join(p.prompt.casefold().split()) for p in part}
        for part in (task.train, task.held_out)
    ]
    assert asked[0].isdisjoint(asked[1])
    ids = [p.id for p in (*task.train, *task.held_out)]
    assert len(set(ids)) == len(ids)
    return task


@pytest.mark.slow
@needs_data
def test_real_gsm8k() -> None:
    task = real(Gsm8k, "gsm8k/train.jsonl", "gsm8k/test.jsonl")
    assert (len(task.train), len(task.held_out), task.notes) == (7473, 1319, ())
    assert all(
        p.solution and "<<" not in p.solution and "####" not in p.solution for p in task.train
    )


@needs_data
def test_real_svamp() -> None:
    task = real(Svamp, "svamp/train_ncot.json", "svamp/test.json")
    assert (len(task.train), len(task.held_out)) == (3074, 1000)
    assert task.notes == (
        "svamp: rows left out because they have a chain that ends in another answer: 2",
    )
    # Both are the data's: svamp_929 rounds 134 / 15 = 8.93 up to whole lorries where 8.93 is gold,
    # svamp_2000 gets 69.32 % for 69.36 %.
    shown = {p.prompt.partition("\n")[0] for p in task.train}
    left_out = [
        r["item_id"]
        for r in json.loads((DATA / "svamp/train_ncot.json").read_text())
        if r["question"].partition("\n")[0] not in shown
    ]
    assert left_out == ["svamp_929", "svamp_2000"]
    assert all(
        p.solution and p.solution.rpartition("\n")[2].startswith("The answer is ")
        for p in task.train
    )


@needs_data
@needs_sandbox
def test_real_svamp_programs() -> None:
    task = real(Svamp, "svamp/train_pcot.json", "svamp/test.json", chain="program", train=300)
    assert len(task.train) == 300
    assert all(task.verify(p, shown(task, p)).passed for p in task.train[:50])


@pytest.mark.slow
@needs_data
def test_real_mathqa_letters() -> None:
    task = real(Mathqa, "mathqa/dev.json", "mathqa/test.json")
    assert (len(task.train), len(task.held_out)) == (
        4456,
        1605,
    )  # that every chain passes is checked as it opens
    train = task.train[:1000]
    verdicts = [task.verify(p, p.solution or "") for p in train]
    assert all(verdict.passed for verdict in verdicts)
    agrees = [v.parts["value_agrees"] for v in verdicts if v.parts["value_agrees"] is not None]
    assert len(agrees) > 900
    assert sum(map(bool, agrees)) / len(agrees) > 0.88
    # The same chains with another letter: a lucky letter would stand out.
    others = [
        task.verify(
            p, (p.solution or "")[:-3] + "abcdea"["abcde".index(p.answer["letter"]) + 1] + ")."
        )
        for p in train
    ]
    wrong = [v.parts["value_agrees"] for v in others if v.parts["value_agrees"] is not None]
    assert sum(map(bool, wrong)) / len(wrong) < 0.03


@pytest.mark.slow
@needs_data
def test_real_mathqa_numbers() -> None:
    task = real(Mathqa, "mathqa/dev.json", "mathqa/test_numeric.json", numeric=True, train=500)
    assert (len(task.train), len(task.held_out)) == (500, 1605)
    assert all(
        task.verify(p, f"The answer is {p.answer['value']}.").passed
        for p in (*task.train, *task.held_out)
    )
    # The published numeric test against the options of the lettered one: seven of its golds lost
    # their sign or what follows a comma.
    lettered = real(Mathqa, "mathqa/dev.json", "mathqa/test.json", numeric=True, train=1)
    values = {p.prompt: p.answer["value"] for p in lettered.held_out}
    known = [p for p in task.held_out if p.prompt in values]
    differ = [p for p in known if not task.verify(p, f"The answer is {values[p.prompt]}.").passed]
    assert (len(known), len(differ)) == (1599, 7)
