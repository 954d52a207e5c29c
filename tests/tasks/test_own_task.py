"""A task made in Python: trained and evaluated like any other, and refused in one line where no run
can be made of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import Cli, Start, recipe

from minirl import recipe as recipes
from minirl.episode import Problem, Verdict
from minirl.errors import UserError
from minirl.io.files import read_rows
from minirl.tasks import Task, fingerprint, open_task

STAGE = {
    "kind": "train",
    "method": "single",
    "steps": 3,
    "group": 4,
    "batch": 2,
    "learner": {"lr": 5e-3},
}


def score(problem: Problem, text: str) -> Verdict:
    """The share of 4 that the first digit is; a right answer begins with the problem's own
    number."""
    digit = re.search(r"\d", text)
    found = 0 if digit is None else int(digit[0])
    return Verdict(
        found / 4,
        found == problem.answer,
        {"error_kind": None if found == problem.answer else "digit"},
    )


def made() -> Task:
    train = [Problem(f"train/{n}", f"Say {n}.", n) for n in (1, 2, 3)]
    return Task(
        "digits",
        train,
        [Problem("held/4", "Say 4.", 4), Problem("held/5", "Say 1, please.", 1)],
        score,
    )


def run(path: Path, folder: Path) -> None:
    from minirl import evaluate_run, train

    node = recipes.load(path)
    train(node, folder, task=made())
    print("found", evaluate_run(folder, task=made()).summary["first"].value)


def test_a_task_made_in_python_is_trained_and_evaluated(
    start: Start, tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    """The recipe's numbers with one's own problems and verifier. Catches: another verifier scores,
    or held-out problems are trained on."""
    path = recipe(tmp_path / "own.yaml", tiny, [STAGE], save={"episodes": 12})
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"task": {"name": "own"}}))
    outcome = start(run, path, tmp_path / "run").wait()
    assert outcome.code == 0, outcome.err
    episodes = [
        row for row in read_rows(tmp_path / "run" / "episodes.jsonl") if row["label"] == "train"
    ]
    assert len(episodes) == 3 * 2 * 4
    assert {row["problem"]["id"] for row in episodes} <= {"train/1", "train/2", "train/3"}
    assert len({row["reward"] for row in episodes}) > 1
    for row in episodes:
        assert row["reward"] == score(made().train[0], row["texts"][-1]).score
    for step, metrics in enumerate(read_rows(tmp_path / "run" / "metrics.jsonl")):
        rewards = [row["reward"] for row in episodes if row["step"] == step]
        assert metrics["reward"] == pytest.approx(sum(rewards) / len(rewards))
    (evaluated,) = read_rows(tmp_path / "run" / "evals.jsonl")
    assert [problem["id"] for problem in evaluated["problems"]] == ["held/4", "held/5"]
    assert (
        f"found {sum(problem['first'][0] for problem in evaluated['problems']) / 2}" in outcome.out
    )
    for command in (("run", path, "--out", tmp_path / "other"), ("eval", tmp_path / "run")):
        refused = cli(*command)
        assert refused.code == 2
        assert refused.err.strip().endswith("of minirl.train or minirl.evaluate_run")
        assert "computes in" not in refused.out, "no model is loaded for it"


def always(verdict: object) -> Callable[[Task], Task]:
    return lambda task: replace(task, verify=lambda problem, text: verdict)  # type: ignore[arg-type, return-value]


def held_out(*problems: Problem) -> Callable[[Task], Task]:
    return lambda task: replace(task, held_out=problems)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda task: replace(task, train=()),
            "got 0 training and 2 held-out problems, expected at least one of each",
        ),
        (held_out(), "got 3 training and 0 held-out problems"),
        (
            held_out(Problem("train/1", "Say 9.", 9)),
            "got the id 'train/1' twice, expected an id of its own",
        ),
        (
            held_out(Problem("", "Say 2.", 2)),
            "held-out problem '' asks what a training problem asks",
        ),
        (
            held_out(Problem("x", "?", {1, 2})),
            "problem 'x' has the answer '{1, 2}', expected plain JSON",
        ),
        (
            held_out(Problem("x", "?", (1, 2))),
            "problem 'x' has the answer '(1, 2)', expected plain JSON",
        ),
        (
            held_out(Problem("x", "?", {1: 2})),
            "problem 'x' has the answer '{1: 2}', expected plain JSON",
        ),
        (
            held_out(Problem("x", "?", float("nan"))),
            "problem 'x' has the answer 'nan', expected plain JSON",
        ),
        (always(1.0), "verify on problem 'train/1' gave float, expected a Verdict"),
        (always(Verdict("high", True)), "gave the score 'high', expected a number"),  # type: ignore[arg-type]
        (always(Verdict(float("inf"), True)), "gave the score inf, expected a finite number"),
        (always(Verdict(1.0, True, {"first": True})), "gave the part 'first': True, expected"),
        (always(Verdict(1.0, True, {"f1": 87.0})), "gave the part 'f1': 87.0, expected"),
        (always(Verdict(1.0, True, {"steps": -1})), "gave the part 'steps': -1, expected"),
        (always(Verdict(1.0, True, {"why": [1]})), "gave the part 'why': [1], expected"),  # type: ignore[dict-item]
        (
            lambda task: replace(task, verify=lambda problem, text: Verdict(float(text), True)),
            (
                "verify on problem 'train/1' of the text '' failed with ValueError: could not"
                " convert string to float: ''"
            ),
        ),
    ],
)
def test_what_no_run_can_be_made_of(change: Callable[[Task], Task], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        open_task(recipes.Own(name="own"), 0, change(made()))


def test_a_question_put_otherwise_is_another_question() -> None:
    """Equal words under another system message or with other tools are no leak."""
    other = [
        Problem("a", "Say 1.", 1, system="Shout."),
        Problem("b", "Say 1.", 1, tools=({"name": "x"},)),
    ]
    assert open_task(recipes.Own(name="own"), 0, replace(made(), held_out=other)).held_out == other


def test_verdicts_are_what_a_run_folder_can_hold() -> None:
    """A reward of True, or one of numpy's, is a number. Catches: a run that trains to its end and
    cannot be reported."""
    numpy = pytest.importorskip("numpy")
    for score_, passed in ((True, 1), (numpy.float32(1.0), numpy.bool_(True))):
        task = open_task(
            recipes.Own(name="own"),
            0,
            always(Verdict(score_, passed, {"f1": 1, "steps": 3, "why": None}))(made()),
        )
        verdict = task.verify(task.train[0], "x")
        assert (type(verdict.score), type(verdict.passed)) == (float, bool)
        assert verdict == Verdict(1.0, True, {"f1": 1, "steps": 3, "why": None})


def test_a_verifier_that_fails_later_names_the_problem() -> None:
    task = open_task(
        recipes.Own(name="own"),
        0,
        replace(made(), verify=lambda p, text: Verdict(1 / (1 - len(text)), True)),
    )
    with pytest.raises(
        UserError,
        match=(
            r"task 'digits': verify on problem 'train/2' of the text 'x' failed with"
            r" ZeroDivisionError"
        ),
    ) as caught:
        task.verify(task.train[1], "x")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_digest_of_a_task_is_that_of_its_problems() -> None:
    """What a run is checked against when it is taken up again. Catches: a field that is left out,
    or a problem that changes sides."""
    task = made()
    same = fingerprint(made())
    assert fingerprint(task) == same
    first, *others = task.train
    changes = {
        "id": "x",
        "prompt": "x",
        "answer": 9,
        "solution": "x",
        "system": "x",
        "tools": ({"name": "x"},),
    }
    for name, value in changes.items():
        assert (
            fingerprint(replace(task, train=[replace(first, **{name: value}), *others])) != same
        ), name
    assert fingerprint(replace(task, train=[*others, first])) != same
    assert (
        fingerprint(
            replace(task, train=[*task.train, task.held_out[0]], held_out=task.held_out[1:])
        )
        != same
    )


def test_a_task_beside_a_named_one() -> None:
    with pytest.raises(
        UserError,
        match=(
            r"got a Task beside task\.name 'countdown', expected the recipe to say task: \{name:"
            r" own\}"
        ),
    ):
        open_task(recipes.Countdown(name="countdown"), 0, made())
    with pytest.raises(
        UserError,
        match=r"expected it as task=Task\(\.\.\.\) of minirl\.train or minirl\.evaluate_run",
    ):
        open_task(recipes.Own(name="own"), 0)
