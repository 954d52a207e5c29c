"""Two processes: the update is the one-process update, only the main process writes, and both stop
together."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import ENVIRONMENT, Cli, Job, Start, minirl, recipe

from minirl.io.files import read_rows

REFLECT = {
    "kind": "train",
    "method": "reflect",
    "steps": 3,
    "group": 4,
    "batch": 3,
    "learner": {"lr": 5e-3, "beta": 0.01},
}
STAGES = [{"kind": "collect", "problems": 7, "samples": 2, "batch": 3}, REFLECT]
SETTINGS = {
    "sequence": {"aggregate": "sequence", "beta": 0.1},
    "token": {"loss": "dapo", "minibatches": 2, "passes": 2, "entropy": 0.01},
    "constant": {"loss": "dr_grpo", "minibatches": 3, "beta": 0.1},
    "gspo": {"loss": "gspo", "passes": 2},
    "ppo": {"loss": "ppo", "beta": 0.1, "passes": 2},
    "halves": {"loss": "nll", "sampled_share": 0.5},
}


def two(start: Start, function: Any, *args: Any) -> list[Job]:
    """The function in two processes that find each other as `accelerate launch` would have them
    do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(ranked, rank, port, function, *args) for rank in range(2)]


def ranked(rank: int, port: int, function: Any, *args: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    function(*args)


def update(model: Path, out: Path) -> None:
    """Two learner steps on this process's share of seven made-up groups, for each of SETTINGS;
    weights and means to `out`."""
    import torch
    from accelerate import Accelerator
    from safetensors.torch import save_file

    from minirl import recipe
    from minirl.engine.learn.learner import Learner
    from minirl.engine.model import load as models
    from minirl.engine.model.policy import Policy

    accelerator = Accelerator()
    loaded = models.load_model(
        recipe.Model.model_validate({"name": str(model), "dtype": "fp32", "lora": {"rank": 4}})
    )
    policy = Policy(loaded.model, loaded.device, loaded.dtype)
    fresh = {name: p.detach().clone() for name, p in policy.trainable.items()}
    share = groups()[accelerator.process_index :: accelerator.num_processes]
    means = {}
    for name, settings in SETTINGS.items():
        for key, p in policy.trainable.items():
            p.data.copy_(fresh[key])
        policy.freeze_reference()
        node = recipe.Learner.model_validate({"lr": 0.1, "micro_tokens": 200} | settings)
        learner = Learner(
            policy, node, accelerator, steps=4, limit_tokens=12, temperature=1.0, pad=258
        )
        # Plain descent, so that weights differ as gradients do; Adam makes a whole step of what
        # rounding leaves of a zero.
        optimizer = learner.optimizer
        optimizer.adapter = torch.optim.SGD(optimizer.parameters)
        if optimizer.value_head is not None:
            optimizer.value_head = torch.optim.SGD(optimizer.value_parameters, lr=0.1)
        means[name] = [learner.update(share) for _ in range(2)]
        if accelerator.is_main_process:
            heads = dict(
                zip(["value"], optimizer.value_parameters, strict=False)
            )  # its weight; the bias comes second
            save_file(
                {key: p.detach().clone() for key, p in (policy.trainable | heads).items()},
                out.with_suffix(f".{name}"),
            )
    out.with_suffix(f".{accelerator.num_processes}.{accelerator.process_index}").write_text(
        json.dumps(means)
    )
    accelerator.end_training()


def groups() -> list[Any]:
    """Seven groups of three episodes: unequal lengths, one group without signal, one episode that
    is not scored."""
    from minirl.episode import Episode, Group, Problem, Turn

    rng, made = Random(3), []
    for number in range(7):
        problem = Problem(f"p{number}", "?", None)
        prompt = Turn("prompt", tuple(rng.randrange(256) for _ in range(rng.randrange(3, 30))))
        episodes = []
        for sample in range(3):
            count = rng.randrange(2, 12)
            tokens = tuple(rng.randrange(256) for _ in range(count))
            attempt = Turn(
                "attempt",
                tokens,
                tuple(-math.log(256) + rng.gauss(0, 0.3) for _ in range(count)),
                trained=True,
            )
            reward = 0.5 if number == 2 else None if (number, sample) == (4, 1) else rng.random()
            episodes.append(Episode(problem, (prompt, attempt), reward))
        made.append(Group(problem, tuple(episodes)))
    return made


def test_update_equals_that_of_one_process(start: Start, tiny: Path, tmp_path: Path) -> None:
    outcome = start(update, tiny, tmp_path / "one").wait()
    assert outcome.code == 0, outcome.err
    for job in two(start, update, tiny, tmp_path / "two"):
        outcome = job.wait()
        assert outcome.code == 0, outcome.err
    outcome = start(compare_weights, tmp_path).wait()
    assert outcome.code == 0, outcome.err
    one, left, right = (
        json.loads((tmp_path / name).read_text()) for name in ("one.1.0", "two.2.0", "two.2.1")
    )
    assert left == right  # every process reports the means over all
    for name, steps in one.items():
        for mine, theirs in zip(steps, left[name], strict=True):
            assert theirs == pytest.approx(mine, rel=1e-4, abs=1e-6), name
            assert mine["grad_norm"] > 1e-3


def compare_weights(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    for name in SETTINGS:
        one, two = load_file(folder / f"one.{name}"), load_file(folder / f"two.{name}")
        torch.testing.assert_close(
            two, one, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert (
            max(weight.abs().max() for key, weight in one.items() if "lora_B" in key) > 2e-3
        )  # B starts at zero: it has moved
        assert ("value" in one) == (name == "ppo")
        assert "value" not in one or one["value"].abs().max() > 1e-4


@pytest.mark.slow
def test_whole_run_under_accelerate_launch(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    path = recipe(
        tmp_path / "r.yaml", tiny, STAGES, eval={"tries": 2, "start": True}, save={"episodes": 12}
    )
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    command = [
        sys.executable,
        *launch,
        "-m",
        "minirl",
        "run",
        str(path),
        "--out",
        str(tmp_path / "two"),
    ]
    env = os.environ | ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter: ") == 1
    assert done.stdout.count("1 train reflect (grpo): 3 steps") == 1  # one display
    assert cli("run", path, "--out", tmp_path / "one").code == 0
    one, two = (
        {
            name: read_rows(tmp_path / run / f"{name}.jsonl")
            for name in ("metrics", "evals", "kept/0")
        }
        for run in ("one", "two")
    )
    assert json.loads((tmp_path / "two/state.json").read_text())["finished"]
    assert (tmp_path / "two/adapter/adapter_model.safetensors").is_file()
    # Collecting and the first step play the same episodes: each has a seed of its own, whatever
    # process plays it.
    assert [row["turns"][1]["tokens"] for row in two["kept/0"]] == [
        row["turns"][1]["tokens"] for row in one["kept/0"]
    ]
    assert len(two["metrics"]) == len(one["metrics"]) == 3 + 3
    for mine, theirs in zip(one["metrics"][:4], two["metrics"][:4], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4, abs=1e-6)
    assert [row["groups"] for row in two["metrics"][3:]] == [3, 3, 3]
    assert [[p["id"] for p in row["problems"]] for row in two["evals"]] == [
        [p["id"] for p in row["problems"]] for row in one["evals"]
    ]
    assert two["evals"][0]["problems"] == one["evals"][0]["problems"]


@pytest.mark.slow
def test_ctrl_c_in_one_process_stops_both_and_both_resume(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    path = recipe(
        tmp_path / "r.yaml", tiny, [STAGES[0], REFLECT | {"steps": 8}], save={"every": 100}
    )
    for job in two(start, minirl, "run", str(path), "--out", str(tmp_path / "whole")):
        assert job.wait().code == 0
    folder = tmp_path / "run"
    jobs = two(start, minirl, "run", str(path), "--out", str(folder))
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and '"stage":1,"step":1' in metrics.read_text()):
        assert jobs[0].process.is_alive(), jobs[0].wait()
        time.sleep(0.002)
    jobs[1].signal(signal.SIGINT)
    assert [job.wait().code for job in jobs] == [130, 130]
    position = json.loads((folder / "state.json").read_text())["position"]
    assert position["stage"] == 1
    assert position["step"] == len(read_rows(metrics)) - 3
    for job in two(start, minirl, "run", str(path), "--out", str(folder)):
        outcome = job.wait()
        assert outcome.code == 0, outcome.err
    for name in (
        "metrics.jsonl",
        "evals.jsonl",
        "kept/0.jsonl",
        "adapter/adapter_model.safetensors",
    ):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
