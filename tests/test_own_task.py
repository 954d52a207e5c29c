"""A task made in Python: trained and evaluated like any other, and refused in one line where no run can be made of it."""

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
from minirl.files import read_rows
from minirl.tasks import Task, open_task

STAGE = {"kind": "train", "method": "single", "steps": 3, "group": 4, "batch": 2, "learner": {"lr": 5e-3}}


def score(problem: Problem, text: str) -> Verdict:
    """The share of 4 that the first digit is; a right answer begins with the problem's own number."""
    digit = re.search(r"\d", text)
    found = 0 if digit is None else int(digit[0])
    return Verdict(found / 4, found == problem.answer, {"error_kind": None if found == problem.answer else "digit"})


def made() -> Task:
    train = [Problem(f"train/{n}", f"Say {n}.", n) for n in (1, 2, 3)]
    return Task("digits", train, [Problem("held/4", "Say 4.", 4), Problem("held/5", "Say 1, please.", 1)], score)


def run(path: Path, folder: Path) -> None:
    from minirl.train import train
    from minirl.trial import evaluate_run

    node = recipes.load(path)
    train(node, folder, task=made())
    print("found", evaluate_run(folder, task=made()).summary["first"].value)


def test_a_task_made_in_python_is_trained_and_evaluated(start: Start, tiny: Path, tmp_path: Path, cli: Cli) -> None:
    """The recipe's numbers with one's own problems and verifier. Catches: another verifier scores, or held-out problems are trained on."""
    path = recipe(tmp_path / "own.yaml", tiny, [STAGE], save={"episodes": 12})
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"task": {"name": "own"}}))
    outcome = start(run, path, tmp_path / "run").wait()
    assert outcome.code == 0, outcome.err
    episodes = [row for row in read_rows(tmp_path / "run" / "episodes.jsonl") if row["label"] == "train"]
    assert len(episodes) == 3 * 2 * 4
    assert {row["problem"]["id"] for row in episodes} <= {"train/1", "train/2", "train/3"}
    for row in episodes:
        assert row["reward"] == score(made().train[0], row["texts"][-1]).score
    for step, metrics in enumerate(read_rows(tmp_path / "run" / "metrics.jsonl")):
        rewards = [row["reward"] for row in episodes if row["step"] == step]
        assert metrics["reward"] == pytest.approx(sum(rewards) / len(rewards))
    (evaluated,) = read_rows(tmp_path / "run" / "evals.jsonl")
    assert [problem["id"] for problem in evaluated["problems"]] == ["held/4", "held/5"]
    assert f"found {sum(problem['first'][0] for problem in evaluated['problems']) / 2}" in outcome.out
    for command in (("run", path, "--out", tmp_path / "other"), ("eval", tmp_path / "run")):
        refused = cli(*command)
        assert refused.code == 2
        assert refused.err.strip().endswith("expected train(recipe, folder, task=Task(...))")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda task: replace(task, train=()), "got 0 training and 2 held-out problems, expected at least one of each"),
        (lambda task: replace(task, held_out=()), "got 3 training and 0 held-out problems"),
        (lambda task: replace(task, held_out=task.train[:1]), "1 held-out problems, two of them 'train/1', expected"),
        (lambda task: replace(task, held_out=[Problem("x", "Say 2.", 2)]), "held-out problem 'x' asks what a training problem asks"),
        (lambda task: replace(task, verify=lambda problem, text: 1.0), "verify gave float, expected a Verdict"),
    ],
)
def test_what_no_run_can_be_made_of(change: Callable[[Task], Task], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        open_task(recipes.Own(name="own"), 0, change(made()))


def test_a_task_beside_a_named_one() -> None:
    with pytest.raises(UserError, match=r"got a Task beside task\.name 'countdown', expected the recipe to say task: \{name: own\}"):
        open_task(recipes.Countdown(name="countdown"), 0, made())
    assert open_task(recipes.Own(name="own"), 0, task := made()) is task
