"""The command line: what a mistake says, in one line and with exit code 2, and that it costs nobody
any data."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TASK, Cli, Outcome, Start, minirl, recipe
from typer.testing import CliRunner

from minirl import recipe as recipes
from minirl.bench import against_trl
from minirl.cli import app
from minirl.record.run import Run
from minirl.verify import sandbox, symbolic

ROOT = Path(__file__).resolve().parents[1]
SINGLE = {"kind": "train", "method": "single", "steps": 1, "group": 2, "batch": 2}
COLLECT = {"kind": "collect", "problems": 4, "batch": 2}


def refused(outcome: Outcome, *said: object) -> None:
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("minirl: ")
    assert outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.out
    for part in said:
        assert str(part) in outcome.err, outcome.err


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(cli: Cli, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and the folder of its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    path = recipe(folder / "recipe.yaml", tiny, [COLLECT, SINGLE])
    outcome = cli("run", path, "--out", folder / "run")
    assert outcome.code == 0, outcome.err
    return path, folder / "run"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sede": 1}, "unknown key 'sede'; the nearest known key is 'seed'"),
        (
            {"sampling": {"temprature": 1}},
            "sampling: unknown key 'temprature'; the nearest known key is 'temperature'",
        ),
        (
            {"stages": [SINGLE | {"learner": {"learning_rate": 1}}]},
            "stages[0].learner: unknown key 'learning_rate'",
        ),
        ({"seed": "twelve"}, "seed: "),
        ({"model": {"lora": {"rank": 1.5}}}, "model.lora.rank: "),
        ({"stages": []}, "stages: "),
        ({"stages": [SINGLE | {"kind": "teach"}]}, "stages[0]"),
        ({"stages": [SINGLE | {"method": "demonstrate"}]}, "learner.loss: got 'grpo'"),
        ({"stages": [SINGLE | {"group": 1}]}, "expected at least 2"),
        ({"track": ["clearml"]}, "track[0]"),
        ({"on_cpu": {"seed": 3}}, "got the key on_cpu, expected a file of its own"),
    ],
)
def test_faulty_recipes(cli: Cli, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = recipe(tmp_path / "r.yaml", tmp_path, [SINGLE], **change)
    refused(cli("run", path, "--out", tmp_path / "run"), path, said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {name: a\nstages: [", "not valid YAML"),
        ("- just\n- a list\n", "got list, expected a mapping"),
        ("", "got NoneType, expected a mapping"),
        (b"\xff\xfe\x00", "cannot read the recipe"),
        (None, "No such file or directory"),
    ],
)
def test_files_that_are_no_recipe(
    cli: Cli, tmp_path: Path, text: str | bytes | None, said: str
) -> None:
    path = tmp_path / "r.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(cli("run", path, "--out", tmp_path / "run"), path, said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed", "expected a.b=value"),
        ("=3", "expected a.b=value"),
        ("seed=[", "the value is not valid YAML"),
        ("model.name.deeper=1", "lies under a plain value"),
        ("stages.7.steps=1", "'7', expected the number of a list item, 0 to 0"),
        ("stages.first.steps=1", "'first', expected the number of a list item"),
        ("model.lora.rnak=4", "model.lora: unknown key 'rnak'; the nearest known key is 'rank'"),
        ("seed=-1", "seed: "),
    ],
)
def test_faulty_overrides(cli: Cli, tmp_path: Path, text: str, said: str) -> None:
    refused(
        cli("run", recipe(tmp_path / "r.yaml", tmp_path, [SINGLE]), "--set", text, "--dry"), said
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "rows.jsonl",
            '{"nums": [1, 2], "target": 3}\n{"nums": [1, 2], "target"\n',
            "rows.jsonl, line 2: not valid JSON",
        ),
        (
            "rows.jsonl",
            '{"nums": [1, 2], "target": 3}\n\n{"nums": [1, 2]}\n',
            "rows.jsonl, line 3: no column 'target'",
        ),
        ("rows.jsonl", '{"nums": ["1", 2], "target": 3}\n', "rows.jsonl, line 1: "),
        (
            "rows.json",
            '[{"nums": [1, 2], "target": 3}, 7]',
            "rows.json, row 2: got a number, expected an object",
        ),
        ("rows.parquet", "no parquet at all", "rows.parquet, row 1: not readable as Parquet"),
        ("rows.jsonl", None, "rows.jsonl: no such file"),
    ],
)
def test_malformed_data(
    cli: Cli, tiny: Path, tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    path = recipe(tmp_path / "r.yaml", tiny, [SINGLE], task=TASK | {"source": str(tmp_path / name)})
    refused(cli("run", path, "--out", tmp_path / "run"), tmp_path / name, said)
    # The mended recipe may use the same folder: nothing was saved in it.
    good = recipe(tmp_path / "r.yaml", tiny, [SINGLE])
    if name == "rows.parquet":
        assert cli("run", good, "--out", tmp_path / "run").code == 0


def test_models_that_cannot_be_had(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    shutil.copytree(tiny, mute)
    (mute / "chat_template.jinja").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    torn = tmp_path / "torn"
    shutil.copytree(tiny, torn)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    for number, (model, said) in enumerate(
        [
            (mute, "has no chat template, expected a chat model"),
            (empty, "empty"),
            (torn, "cannot be loaded"),
            (tmp_path / "absent", "expected a folder that exists"),
            ("nobody/nothing", "the hub does not answer"),
        ]
    ):
        path = recipe(tmp_path / "r.yaml", Path("unused"), [SINGLE], model={"name": str(model)})
        refused(cli("run", path, "--out", tmp_path / str(number)), model, said)


def test_what_this_machine_cannot_do(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    path = recipe(
        tmp_path / "r.yaml", tiny, [SINGLE | {"learner": {"optimizer": "paged_adamw_8bit"}}]
    )
    refused(
        cli("run", path, "--out", tmp_path / "run"),
        "learner.optimizer: got 'paged_adamw_8bit', which needs a CUDA GPU",
    )
    path = recipe(tmp_path / "r.yaml", tiny, [SINGLE], model={"adapter": str(tmp_path)})
    refused(
        cli("run", path, "--out", tmp_path / "other"),
        "model.adapter: ",
        "has no adapter_config.json",
    )


def test_run_folders_that_cannot_be_used(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path / "r.yaml", tiny, [SINGLE])
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("It was a dark and stormy night.")
    for out, said in (
        (thesis, "holds 'chapter.txt' but no recipe.yaml"),
        (thesis / "chapter.txt", "is a file, expected a folder"),
        (thesis / "chapter.txt" / "run", "cannot be used as a run folder"),
        (Path("/proc/minirl"), "cannot be used as a run folder"),
    ):
        refused(cli("run", path, "--out", out), out, said, "--out")
    assert contents(thesis) == {"chapter.txt": b"It was a dark and stormy night."}


def test_recipe_changed_under_a_run(cli: Cli, finished: tuple[Path, Path]) -> None:
    path, folder = finished
    before = contents(folder)
    outcome = cli("run", path, "--out", folder, "--set", "stages.1.steps=9", "--set", "seed=4")
    refused(
        outcome,
        folder,
        "holds a run of another recipe: seed: 0 -> 4, stages.1.steps: 1 -> 9; name another folder"
        " with --out",
    )
    assert contents(folder) == before


def test_run_folder_in_use(cli: Cli, finished: tuple[Path, Path]) -> None:
    path, folder = finished
    with Run.open(folder, recipes.load(path)):
        before = contents(folder)
        refused(cli("run", path, "--out", folder), folder, "another process is running in it")
        assert contents(folder) == before


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("state.json", "{", "state.json: not a run's state"),
        ("state.json", None, "state.json: missing, yet metrics.jsonl is there"),
        ("metrics.jsonl", "", "metrics.jsonl: has 0 bytes, state.json counts on"),
        ("recipe.yaml", "model: [", "recipe.yaml: not valid YAML"),
        ("recipe.yaml", None, "but no recipe.yaml, so it is not a run"),
    ],
)
def test_damaged_run_folders(
    cli: Cli, finished: tuple[Path, Path], tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[1], folder)
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    before = contents(folder)
    refused(cli("run", finished[0], "--out", folder), folder, said)
    assert contents(folder) == before


def test_damaged_row_of_a_collect_stage(
    cli: Cli, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    """Taken up just after collecting, with one row of what was kept spoilt but as long as
    before."""
    folder = tmp_path / "run"
    shutil.copytree(finished[1], folder)
    state = json.loads((folder / "state.json").read_text())
    state |= {
        "position": {"stage": 1, "step": 0},
        "finished": False,
        "weights": None,
        "checkpoints": [],
        "best": None,
    }
    (folder / "state.json").write_text(json.dumps(state))
    rows = (folder / "kept/0.jsonl").read_text().splitlines()
    (folder / "kept/0.jsonl").write_text("\n".join([rows[0], "?" * len(rows[1]), *rows[2:], ""]))
    refused(cli("run", finished[0], "--out", folder), "kept/0.jsonl:2: not a JSON row")


@pytest.mark.parametrize("command", ["eval", "report"])
def test_folders_that_hold_no_run(cli: Cli, tmp_path: Path, command: str) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        refused(cli(command, folder), folder, "no recipe.yaml")
    assert list(tmp_path.iterdir()) == []


def test_evaluating_a_run_that_is_not_finished(
    cli: Cli, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[1], folder)
    shutil.rmtree(folder / "adapter")
    refused(cli("eval", folder), folder, "no adapter yet", "--base")
    refused(
        cli("eval", folder, "--set", "eval.tires=2"),
        "eval: unknown key 'tires'; the nearest known key is 'tries'",
    )
    assert cli("eval", folder, "--base").code == 0


@pytest.mark.slow
def test_evaluating_on_other_problems_is_said(
    cli: Cli, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    """Catches: data that was edited after a run, so that problems it was trained on pass for
    held-out ones."""
    folder = tmp_path / "run"
    shutil.copytree(finished[1], folder)
    said = "WARNING: the task countdown has other problems here than the run had (digest "
    assert said not in " ".join(cli("eval", folder).out.split())
    noted = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(noted | {"problems": "0" * 32}))
    outcome = cli("eval", folder)
    assert outcome.code == 0, outcome.err
    assert f"{said}{noted['problems'][:8]}, the run's 00000000)" in " ".join(outcome.out.split())
    assert said not in " ".join(cli("eval", folder, "--set", "task.held_out=2").out.split()), (
        "asked for"
    )


def within(folder: Path, *argv: str) -> None:
    os.chdir(folder)
    minirl(*argv)


def test_dry_run_prints_and_touches_nothing(start: Start, tmp_path: Path) -> None:
    path = recipe(
        tmp_path / "r.yaml",
        Path("some/model"),
        [COLLECT, SINGLE],
        seed=3,
    )
    outcome = start(
        within, tmp_path, "run", str(path), "--dry", "--set", "model.lora.rank=7"
    ).wait()
    assert (outcome.code, outcome.err) == (0, "")
    resolved, plan = outcome.out.split("\nplan: ")
    node = recipes.parse(yaml.safe_load(resolved), "printed")
    assert (node.model.name, node.seed, node.model.lora.rank) == ("some/model", 3, 7)
    assert node == recipes.load(path, ["model.lora.rank=7"])
    assert f"{path} runs as it is, there is no cpu/r.yaml beside it" in resolved
    assert plan.startswith(
        "some/model on countdown, seed 3\n  0  collect  single: 4 problems x 1 attempts"
    )
    assert "\n  1  train    single: 1 steps of 2 groups x 2 episodes, loss grpo" in plan
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def test_second_run_says_that_all_is_done(start: Start, tiny: Path, tmp_path: Path) -> None:
    """The default folder is runs/<recipe's name>."""
    path = recipe(tmp_path / "r.yaml", tiny, [SINGLE])
    first = start(within, tmp_path, "run", "r.yaml").wait()
    assert first.code == 0, first.err
    assert first.out.endswith("adapter: runs/r/adapter\n")
    before = contents(tmp_path)
    second = start(within, tmp_path, "run", str(path)).wait()
    assert (second.code, second.err) == (0, "")
    assert "runs/r: finished already; use another --out to run again\n" in second.out
    assert second.out.endswith("adapter: runs/r/adapter\n")
    assert contents(tmp_path) == before


def as_module(*argv: str) -> None:
    sys.argv = ["minirl", *argv]
    runpy.run_module("minirl", run_name="__main__", alter_sys=True)


def test_python_dash_m(start: Start, tmp_path: Path) -> None:
    outcome = start(as_module, "--help").wait()
    assert outcome.code == 0
    for command in ("run", "eval", "report"):
        assert f" {command} " in outcome.out
    refused(start(as_module, "report", str(tmp_path)).wait(), "no recipe.yaml")


def test_either_form_of_a_recipe_can_be_had_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path / "r.yaml", Path("some/model"), [SINGLE])
    (tmp_path / "cpu").mkdir()
    small = recipe(tmp_path / "cpu" / "r.yaml", Path("some/model"), [SINGLE], seed=3)
    for has_gpu in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        for flags, seed in ((["--cpu"], 3), (["--gpu"], 0), ([], 0 if has_gpu else 3)):
            found = CliRunner().invoke(app, ["run", str(path), "--dry", *flags])
            assert found.exit_code == 0
            assert f"\nplan: some/model on countdown, seed {seed}\n" in found.stdout
            why = "--cpu" if flags else "no GPU found"
            assert found.stdout.startswith(f"# {why}: taking {small}\n") == (seed == 3)
        found = CliRunner().invoke(app, ["run", str(small), "--dry"])
        assert found.stdout.startswith("seed: 3\n")


@pytest.mark.parametrize(
    ("visible", "cuda", "said"),
    [
        (
            None,
            "13.0",
            (
                "# WARNING: an NVIDIA driver (550.54.15) is here, but torch 9.9, built for CUDA"
                " 13.0, sees no GPU"
            ),
        ),
        (
            "0",
            None,
            (
                "# WARNING: an NVIDIA driver (550.54.15) is here, but torch 9.9, built without"
                " CUDA, sees no GPU"
            ),
        ),
        ("", "13.0", ""),
        ("-1", "13.0", ""),
    ],
)
def test_a_gpu_that_torch_does_not_see(
    visible: str | None,
    cuda: str | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: hours on a CPU beside an idle GPU and nothing said; a warning to somebody who hides
    the GPU on purpose."""
    driver = tmp_path / "version"
    driver.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC"
        " 2024\nGCC version:  12.2.0\n"
    )
    monkeypatch.setattr("minirl.loop.machine.DRIVER", driver)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.__version__", "9.9")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = CliRunner().invoke(
        app, ["run", str(recipe(tmp_path / "r.yaml", Path("some/model"), [SINGLE])), "--dry"]
    )
    assert found.exit_code == 0
    assert found.stderr.startswith(said)
    assert found.stderr.count("\n") == bool(said)


def test_out_of_memory_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("minirl.loop.train.train", fail)
    path = recipe(tmp_path / "r.yaml", Path("some/model"), [SINGLE])
    found = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "run")])
    refused(
        Outcome(found.exit_code, found.stdout, found.stderr),
        "lower sampling.rows",
        "(CUDA out of memory. Tried to allocate 2.00 GiB.)",
    )


def test_what_an_error_says_to_install_is_what_the_project_wants() -> None:
    """By the dependency's own name: `minirl` on the package index is another project. Catches: a
    version that was raised in one place."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for text, extra in (
        (sandbox.INSTALL, "programs"),
        (symbolic.INSTALL, "maths"),
        (against_trl.INSTALL, "trl"),
    ):
        assert f"pip install '{extras[extra][0]}'" in text
