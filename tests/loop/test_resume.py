"""A run that is killed and taken up again is, bit for bit, the run that was not.

The reference is made by a fresh interpreter with another hash seed than the forked ones: an order
of sets that leaks into a file shows.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from conftest import ENVIRONMENT, Cli, Start, minirl, recipe

WARM_UP = {
    "kind": "train",
    "method": "demonstrate",
    "steps": 3,
    "group": 1,
    "batch": 4,
    "reflections": 0.5,
}
SFT = {"kind": "train", "steps": 3, "batch": 4, "learner": {"loss": "nll", "lr": 1e-3}}
PPO = {"loss": "ppo", "lr": 5e-3, "minibatches": 2, "value_warmup": 1}
STAGES = [
    WARM_UP | {"learner": {"loss": "nll", "lr": 1e-3}},
    {"kind": "collect", "problems": 8, "samples": 2, "batch": 2},
    {
        "kind": "train",
        "method": "reflect",
        "steps": 5,
        "group": 4,
        "batch": 3,
        "learner": {"lr": 5e-3, "beta": 0.01, "minibatches": 2},
    },
    {
        "kind": "train",
        "method": "reflect",
        "steps": 3,
        "group": 3,
        "batch": 2,
        "attempts": 2,
        "learner": {"lr": 5e-3, "loss": "rloo"},
    },
    {"kind": "train", "method": "single", "steps": 4, "group": 1, "batch": 4, "learner": PPO},
    {"kind": "collect", "problems": 8, "samples": 16, "batch": 4, "keep": "passed", "keep_each": 3},
    SFT | {"method": "demonstrate", "examples": "both", "group": 1},
    SFT
    | {
        "method": "self_train",
        "group": 6,
        "learner": {"loss": "nll", "sampled_share": 0.5, "lr": 1e-3},
    },
]
ROWS = ("metrics.jsonl", "evals.jsonl", "episodes.jsonl", "kept/1.jsonl", "kept/5.jsonl")
ADAPTER = (
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter/value_head.safetensors",
)
FILES = (*ROWS, "recipe.yaml", *ADAPTER)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe that saves every other step, and the folder of its uninterrupted run."""
    folder = tmp_path_factory.mktemp("resume")
    path = recipe(
        folder / "recipe.yaml",
        tiny,
        STAGES,
        eval={"every": 3, "tries": 2, "start": True},
        save={"every": 2, "keep_last": 1},
    )
    command = [sys.executable, "-m", "minirl", "run", str(path), "--out", str(folder / "whole")]
    done = subprocess.run(
        command,
        env=os.environ | ENVIRONMENT | {"PYTHONHASHSEED": "12"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return path, folder / "whole"


def written(folder: Path) -> int:
    """How many rows the run has written so far: a clock that does not depend on the machine's
    load."""
    return sum(
        (folder / name).read_bytes().count(b"\n") for name in ROWS if (folder / name).exists()
    )


@pytest.mark.slow
def test_kill_at_twenty_moments(
    start: Start, cli: Cli, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """Runs that are each killed four times, ever later: after a random number of rows, and a random
    moment on."""
    path, reference = whole
    rng, total, struck, positions = Random(0), written(reference), 0, set()
    for folder in (tmp_path / str(number) for number in range(10)):
        for quarter in range(
            4
        ):  # the first moments may fall before there is any row, or any folder
            rows, wait_s = int(total * (quarter + rng.random()) / 4), rng.uniform(0.0, 0.1)
            job = start(minirl, "run", str(path), "--out", str(folder))
            while job.process.is_alive() and written(folder) < rows:
                time.sleep(0.002)
            time.sleep(wait_s)
            job.signal(signal.SIGKILL)
            outcome = job.wait()
            assert outcome.code in (-signal.SIGKILL, 0), outcome.err
            struck += outcome.code != 0  # else it was done before
            if (folder / "state.json").exists():
                positions.add(str(json.loads((folder / "state.json").read_text())["position"]))
        outcome = cli("run", path, "--out", folder)
        assert outcome.code == 0, outcome.err
        for name in FILES:
            assert (folder / name).read_bytes() == (reference / name).read_bytes(), (
                f"{folder.name}/{name}"
            )
        if struck >= 20:
            break
    assert struck >= 20
    assert len(positions) >= 5, positions
