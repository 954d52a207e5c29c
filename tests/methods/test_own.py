"""One's own method and task in files beside a recipe: trained, resumed, evaluated and reported like
any other, by two processes too, and refused in one line where they cannot be used."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Cli, Start, minirl, recipe
from scripted import Scripted, talk_of
from tiny import byte_tokenizer

from minirl import recipe as recipes
from minirl.chat import Chat
from minirl.episode import Problem
from minirl.errors import UserError
from minirl.io.files import read_rows
from minirl.methods import evaluated_by, method_of, use_own
from minirl.recipe.methods import MethodFacts
from minirl.rollout import Play, Talk, play
from minirl.tasks import Task, open_task

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
METHOD = "draft_critique_revise.py:draft_critique_revise"
TASK = {"name": "count_letters.py:count_letters", "options": {"train": 8, "held_out": 4}}
STAGE = {"kind": "train", "method": METHOD, "steps": 4, "group": 3, "batch": 2}
CHAT = Chat(byte_tokenizer())
PROBLEM = Problem("p", "Two and two?", "4")


def copied(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for path in EXAMPLES.glob("*.py"):
        shutil.copy(path, folder / path.name)
    return folder


def written(folder: Path, model: Path, **parts: Any) -> Path:
    """A recipe beside copies of the examples."""
    path = recipe(
        copied(folder) / "own.yaml",
        model,
        [STAGE | {"learner": {"lr": 5e-3}}],
        eval={"method": METHOD, "start": False, "problems": 4},
        sampling={"attempt_tokens": 8, "reflection_tokens": 6},
        save={"every": 1},
        **parts,
    )
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"task": TASK}))
    return path


def files(folder: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "episodes.jsonl", "evals.jsonl", "adapter/adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def whole(cli: Cli, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the examples."""
    folder = tmp_path_factory.mktemp("own")
    outcome = cli("run", written(folder, tiny), "--out", folder / "run")
    assert outcome.code == 0, outcome.err
    return folder / "run"


def test_the_examples_are_short_and_their_recipe_loads() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 42, path.name
    loaded = recipes.load(EXAMPLES / "draft_critique_revise.yaml")
    use_own(loaded)
    assert open_task(loaded.task, 0).name == "count_letters"


@pytest.mark.slow
def test_a_run_of_own_files(whole: Path) -> None:
    rows = [row for row in read_rows(whole / "episodes.jsonl") if row["label"] == "train"]
    kinds = ["prompt", "draft", "request", "critique", "request", "revision"]
    for row in rows:
        assert [turn["kind"] for turn in row["turns"]] == kinds
        assert [turn["trained"] for turn in row["turns"]] == [k in kinds[3::2] for k in kinds]
        assert set(row["parts"]) == {"first", "first_error", "draft_passed"}
    assert [row["label"] for row in read_rows(whole / "evals.jsonl")] == ["0-draft_critique_revise"]
    stored = yaml.safe_load((whole / "recipe.yaml").read_text())
    assert stored["task"] == TASK
    assert stored["stages"][0]["method"] == stored["eval"]["method"] == METHOD
    for name in ("count_letters.py", "draft_critique_revise.py"):
        assert (whole / name).read_bytes() == (EXAMPLES / name).read_bytes()


@pytest.mark.slow
def test_a_killed_run_of_own_files_resumes_to_the_same_bytes(
    start: Start, cli: Cli, tiny: Path, whole: Path, tmp_path: Path
) -> None:
    path, folder = written(tmp_path / "recipe", tiny), tmp_path / "run"
    job = start(minirl, "run", str(path), "--out", str(folder))
    while len(read_rows(folder / "metrics.jsonl")) < 2 and job.process.is_alive():
        time.sleep(0.005)
    job.signal(signal.SIGKILL)
    job.wait()
    outcome = cli("run", path, "--out", folder)
    assert outcome.code == 0, outcome.err
    assert files(folder) == files(whole)


def test_a_run_folder_is_all_that_an_evaluation_needs(
    start: Start, whole: Path, tmp_path: Path
) -> None:
    """From another folder, after the run was moved and the files beside the recipe are gone."""
    moved = shutil.copytree(whole, tmp_path / "moved")
    outcome = start(elsewhere, str(tmp_path), "eval", "moved").wait()
    assert outcome.code == 0, outcome.err
    (row,) = read_rows(moved / "later_evals.jsonl")
    (own,) = read_rows(whole / "evals.jsonl")
    assert row["problems"] == own["problems"]


def elsewhere(folder: str, *argv: str) -> None:
    os.chdir(folder)
    minirl(*argv)


def test_a_report_runs_no_file(cli: Cli, whole: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(whole, tmp_path / "moved")
    for name in ("count_letters.py", "draft_critique_revise.py"):
        (moved / name).write_text("raise SystemExit(9)\n")
    outcome = cli("report", moved)
    assert outcome.code == 0, outcome.err
    assert "draft_critique_revise" in (moved / "report.html").read_text()


def test_an_edited_file_is_another_run(cli: Cli, tiny: Path, whole: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "recipe", tiny)
    file = path.parent / "draft_critique_revise.py"
    file.write_text(file.read_text() + "\n# better\n")
    outcome = cli("run", path, "--out", shutil.copytree(whole, tmp_path / "run"))
    assert outcome.code == 2
    assert "draft_critique_revise.py: other text than the copy in" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.slow
def test_two_processes_load_own_files(
    start: Start, whole: Path, tiny: Path, tmp_path: Path
) -> None:
    path, folder = written(tmp_path / "recipe", tiny), tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [start(ranked, rank, port, str(path), str(folder)) for rank in range(2)]
    for outcome in [job.wait() for job in jobs]:
        assert outcome.code == 0, outcome.err
    first = [row["reward"] for row in read_rows(folder / "metrics.jsonl")][:1]
    assert first == [row["reward"] for row in read_rows(whole / "metrics.jsonl")][:1]


def ranked(rank: int, port: int, path: str, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    minirl("run", path, "--out", folder)


def given(path: str, folder: str) -> None:
    """The same in Python: a function and a task handed over."""
    from minirl.loop.train import train
    from minirl.loop.trial import evaluate_run
    from minirl.recipe.own import load_function

    loaded = recipes.load(path)
    method = load_function(f"{EXAMPLES}/{METHOD}", "method")
    task = load_function(f"{EXAMPLES}/count_letters.py:count_letters", "task")(8, 4)
    train(loaded, Path(folder), task=task, method=method)
    found = evaluate_run(Path(folder), task=task, method=method)
    print("found", found.row["problems"] == read_rows(Path(folder) / "evals.jsonl")[0]["problems"])


@pytest.mark.slow
def test_a_function_and_a_task_given_in_python(
    start: Start, tiny: Path, whole: Path, tmp_path: Path
) -> None:
    path = written(tmp_path / "recipe", tiny)
    data = yaml.safe_load(path.read_text()) | {"task": {"name": "own"}}
    data["stages"][0]["method"] = data["eval"]["method"] = "own"
    path.write_text(yaml.safe_dump(data))
    outcome = start(given, str(path), str(tmp_path / "run")).wait()
    assert outcome.code == 0, outcome.err
    assert "found True" in outcome.out
    theirs, ours = (read_rows(f / "metrics.jsonl") for f in (whole, tmp_path / "run"))
    assert ours == theirs


def parsed(folder: Path, **changes: Any) -> recipes.Recipe:
    data = {"model": {"name": "m"}, "task": TASK, "stages": [STAGE]} | changes
    (folder / "r.yaml").write_text(yaml.safe_dump(data))
    return recipes.load(folder / "r.yaml")


def stage(method: str, **changes: Any) -> list[dict[str, Any]]:
    return [STAGE | {"method": method} | changes]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("none.py:f", "stages[0].method: no file "),
        ("broken.py:f", "broken.py does not import (SyntaxError: "),
        ("raises.py:f", "raises.py does not import (ZeroDivisionError: division by zero)"),
        ("mine.py:g", "mine.py has no function 'g', expected one of plain, shown, states"),
        ("mine.py:plain", "mine.py:plain is not a method; expected a generator function"),
        ("mine.py:shown", "learner.loss: got 'grpo' with method"),
        ("mine.py:states", "judge: got none with method"),
        ("own", "stages[0].method: got 'own', which is given in Python"),
    ],
)
def test_a_method_that_cannot_be_used(tmp_path: Path, method: str, said: str) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "mine.py").write_text(
        "import minirl\n\ndef plain(talk, task): return None\n\n"
        "@minirl.method(samples=False, takes_nll=True)\ndef shown(talk, task): yield\n\n"
        "@minirl.method(starts_from='states')\ndef states(talk, task): yield\n"
    )
    with pytest.raises(UserError) as caught:
        use_own(parsed(tmp_path, stages=stage(method)))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"name": "none.py:f"}, "task.name: no file "),
        ({"name": "mine.py:f", "options": {"size": 3}}, "task.options: got size, expected the arg"),
        ({"name": "mine.py:f"}, "f failed with KeyError: "),
        ({"name": "mine.py:g"}, "mine.py:g returned int, expected a minirl.Task"),
        ({"name": "mine.py:h"}, "has no function 'h', expected one of f, g"),
    ],
)
def test_a_task_that_cannot_be_used(tmp_path: Path, task: dict[str, Any], said: str) -> None:
    (tmp_path / "mine.py").write_text("def f(): return {}['x']\n\ndef g(seed): return seed\n")
    with pytest.raises(UserError) as caught:
        open_task(parsed(tmp_path, task=task).task, 0)
    assert said in str(caught.value)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    whole = parsed(tmp_path, task={"name": "a/x.py:f"}, stages=stage("b/x.py:g"))
    with pytest.raises(UserError, match=r"got two files x.py \(.*\), expected files with diff"):
        whole.copies()


def test_a_function_for_a_recipe_that_names_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method: got a function, but the recipe names no method"):
        use_own(parsed(tmp_path, stages=stage("single")), lambda talk, task: None)


def no_verdict(talk: Talk, task: Task) -> Play:
    yield from talk.ask("attempt", max_tokens=5, trained=True)
    return talk.end(None)


def fails(talk: Talk, task: Task) -> Play:
    yield from talk.ask("attempt", max_tokens=5, trained=True)
    raise KeyError("x")


def returns_text(talk: Talk, task: Task) -> Play:
    return (yield from talk.ask("attempt", max_tokens=5))  # type: ignore[return-value]


def trains_what_nobody_sampled(talk: Talk, task: Task) -> Play:
    talk.reply("attempt", "4", trained=True)
    yield from talk.ask("attempt", max_tokens=5)
    return talk.end(None)


def odd_part(talk: Talk, task: Task) -> Play:
    yield from talk.ask("attempt", max_tokens=5)
    return talk.end(None, f1=87.0)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (fails, "method own on problem 'p' failed with KeyError: 'x'"),
        (returns_text, "returned str, expected `return talk.end(verdict)`"),
        (trains_what_nobody_sampled, "trains a turn that nobody sampled"),
        (odd_part, "gave the part 'f1': 87.0"),
    ],
)
def test_a_fault_of_an_own_method_names_the_problem(
    tmp_path: Path, method: Callable[..., Play], said: str
) -> None:
    whole = parsed(tmp_path, stages=stage("own"))
    use_own(whole, method)
    (train,) = whole.stages
    assert isinstance(train, recipes.Train)
    assert train.facts == MethodFacts()
    task = Task("sums", (PROBLEM,), (), lambda p, t: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(UserError) as caught:
        play([method_of(train)(talk_of(PROBLEM, CHAT), task)], Scripted(CHAT, lambda t, a: "4"))
    assert said in str(caught.value)


def test_an_evaluation_needs_a_verdict(tmp_path: Path) -> None:
    whole = parsed(tmp_path, stages=stage("own"), eval={"method": "own"})
    use_own(whole, no_verdict)
    task = Task("sums", (PROBLEM,), (), lambda p, t: None)  # type: ignore[arg-type, return-value]
    method = evaluated_by(whole.eval, task)
    with pytest.raises(UserError, match="ended without a verdict, expected one where it is eval"):
        play([method(talk_of(PROBLEM, CHAT), task)], Scripted(CHAT, lambda t, a: "4"))
