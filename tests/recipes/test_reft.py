"""ReFT's recipes: each runs through all its stages, in its form for a CPU, with a tiny model and
few steps."""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Start, minirl

from minirl import recipe as recipes
from minirl.io.files import read_rows

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
RECIPES = sorted((ROOT / "recipes").glob("reft_*.yaml"))
SOURCES = {
    "svamp": ("svamp/train_pcot.json", "svamp/test.json"),
    "gsm8k": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
    "mathqa": ("mathqa/dev.json", "mathqa/test.json"),
    # The paper's GSM8K programs are not at hand; SVAMP's have the same columns.
    "reft_gsm8k_pcot": ("svamp/train_pcot.json", "gsm8k/test.jsonl"),
}

pytestmark = [
    pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data"),
    pytest.mark.skipif(
        find_spec("pydantic_monty") is None, reason="pydantic-monty is not installed"
    ),
]


def run_with_luck(*argv: str) -> None:
    """The command line, with verifiers that pass what was shown and a third of what was sampled: a
    tiny model solves nothing."""
    from hashlib import blake2b

    from minirl.engine.sample.draw import Reply
    from minirl.episode import Verdict
    from minirl.verify import numeric, option, program

    taken = Reply.append

    def append(self: Reply, *token: Any) -> None:
        taken(self, *token)
        self.finish = (
            self.finish and "stop"
        )  # a tiny model ends nothing, and `keep: passed` takes nothing that was cut

    def verify(*args: object, **_: object) -> Verdict:
        text = str(args[2] if len(args) == 4 else args[1])
        shown = text.startswith("def solution") or "The answer is" in text
        passed = shown or blake2b(text.encode()).digest()[0] % 3 == 0
        parts = {"error_kind": None if passed else "wrong_answer", "answer": text[:1]}
        return Verdict(
            float(passed),
            passed,
            parts | ({"value_agrees": False, "lucky": True} if passed and len(args) == 4 else {}),
        )

    Reply.append = append  # type: ignore[method-assign]
    program.verify = numeric.verify = option.verify = verify  # type: ignore[assignment]
    minirl(*argv)


def smaller(path: Path, model: Path) -> list[str]:
    """Overrides that leave every stage in, with little to do."""
    node = recipes.load(recipes.cpu_form(path))
    train, test = SOURCES.get(path.stem, SOURCES[node.task.name])
    sets = {
        "model.name": model,
        "model.dtype": "fp32",
        "task.source": DATA / train,
        "task.test_source": DATA / test,
    }
    sets |= {
        "task.train": 30,
        "task.held_out": 3,
        "sampling.attempt_tokens": 16,
        "eval.problems": 3,
        "save.episodes": 30,
    }
    for number, stage in enumerate(node.stages):
        if isinstance(stage, recipes.Collect):
            sets |= {f"stages.{number}.problems": 6, f"stages.{number}.batch": 3}
        elif isinstance(stage, recipes.Train):
            sets |= {
                f"stages.{number}.steps": 2,
                f"stages.{number}.batch": 4,
                f"stages.{number}.group": min(stage.group, 3),
            }
            if stage.learner.value_warmup:
                sets[f"stages.{number}.learner.value_warmup"] = 1
    return [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(start: Start, tiny: Path, tmp_path: Path, path: Path) -> None:
    folder = tmp_path / "run"
    outcome = start(
        run_with_luck, "run", str(path), *smaller(path, tiny), "--out", str(folder)
    ).wait()
    assert outcome.code == 0, outcome.err
    node = recipes.load(folder / "recipe.yaml")
    metrics = read_rows(folder / "metrics.jsonl")
    assert {row["stage"] for row in metrics} == set(range(len(node.stages)))
    if node.task.name == "mathqa":
        assert {row.get("lucky") for row in metrics if row["stage"] == 1 and row["first"]} == {1.0}
        assert "Right letters below another value" in (folder / "report.html").read_text()
    if path.stem == "reft_svamp_offline":
        assert (
            len(read_rows(folder / "kept/1.jsonl"))
            == sum(row["kept"] for row in metrics if row["stage"] == 1)
            > 0
        )
    assert (folder / "adapter" / "value_head.safetensors").exists() == any(
        isinstance(stage, recipes.Train) and stage.learner.loss == "ppo" for stage in node.stages
    )
    if path.stem == "reft_svamp":
        votes(start, folder)


def votes(start: Start, folder: Path) -> None:
    outcome = start(run_with_luck, "eval", str(folder), "--samples", "4", "--vote").wait()
    assert outcome.code == 0, outcome.err
    (row,) = read_rows(folder / "later_evals.jsonl")
    assert (row["samples"], row["temperature"], row["changed"]) == (4, 1.0, ["vote"])
    share = sum(problem["scores"]["majority"][0] for problem in row["problems"]) / 3
    assert f"majority@4 {share:.1%} [" in outcome.out
    assert "pass@4 " in outcome.out
    assert "first errors: " in outcome.out
    assert "second" not in outcome.out, "there is no second try"
    assert all(len(problem["answer"]) == 4 for problem in row["problems"])
    assert start(minirl, "report", str(folder)).wait().code == 0
    assert "Majority of the samples" in (folder / "report.html").read_text()


def commands(path: Path) -> list[list[str]]:
    """The `minirl run` lines of a recipe's header, as words."""
    lines = [
        line.removeprefix("#") for line in path.read_text().splitlines() if line.startswith("#")
    ]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        shlex.split(line, comments=True)
        for line in joined.splitlines()
        if line.startswith("   minirl run ")
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_command_of_a_header_can_be_run(path: Path) -> None:
    """Catches: overrides that only one of the two machines takes."""
    found = commands(path)
    assert found
    for words in found:
        assert ROOT / words[2] == path
        assert set(words[3::2]) <= {"--set", "--out"}
        overrides = [
            value
            for option, value in zip(words[3::2], words[4::2], strict=True)
            if option == "--set"
        ]
        for form in (path, recipes.cpu_form(path)):
            assert recipes.load(form, overrides).stages


def test_the_baselines_share_their_warm_up() -> None:
    """What differs between the recipes for SVAMP stands in the stages after the first, on a GPU and
    on a CPU."""
    for form in (Path, recipes.cpu_form):
        found = {}
        for path in RECIPES:
            node = json.loads(json.dumps(recipes.load(form(path)).model_dump(mode="json")))
            if path.stem.startswith("reft_svamp"):
                found[path.stem] = node | {"stages": node["stages"][:1]}
        assert len(found) == 5
        assert all(node == found["reft_svamp"] for node in found.values()), yaml.safe_dump(found)


@pytest.mark.slow
def test_a_warm_up_is_shared_by_its_adapter(start: Start, tiny: Path, tmp_path: Path) -> None:
    path = ROOT / "recipes" / "reft_svamp.yaml"
    options = smaller(path, tiny)
    warm = tmp_path / "warm"
    outcome = start(
        run_with_luck, "run", str(path), *options, "--set", "stages.1.steps=0", "--out", str(warm)
    ).wait()
    assert outcome.code == 0, outcome.err
    assert [row["stage"] for row in read_rows(warm / "metrics.jsonl")] == [0, 0]
    later = [
        "--set",
        "stages.0.steps=0",
        "--set",
        f"model.adapter={warm / 'adapter'}",
        "--out",
        str(tmp_path / "ppo"),
    ]
    outcome = start(run_with_luck, "run", str(path), *options, *later).wait()
    assert outcome.code == 0, outcome.err
    outcome = start(
        run_with_luck, "run", str(path), *options, "--out", str(tmp_path / "whole")
    ).wait()
    assert outcome.code == 0, outcome.err
    ppo, whole = (
        [row for row in read_rows(tmp_path / run / "metrics.jsonl") if row["stage"] == 1]
        for run in ("ppo", "whole")
    )
    assert ppo == whole, "in one run or in two, to the same numbers"
