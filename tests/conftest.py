"""What the tests of whole runs share: a tiny model that answers in form, small recipes, and
processes forked from a warm one.

Invariant: every run here is on the CPU, on one thread and without a hub, whatever the machine has,
so its numbers can be compared bit for bit. A fork costs a fraction of a second where a fresh
interpreter spends five on imports.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import yaml
from servers import Reply, Server

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "11",
    "PYTHONWARNINGS": "ignore",
}
PRELOAD = [
    "minirl.cli",
    "minirl.loop.train",
    "minirl.tasks.countdown",
    "minirl.record.report",
    "transformers.models.llama.modeling_llama",
]
TASK = {
    "name": "countdown",
    "numbers": [2],
    "high": 4,
    "target_high": 16,
    "operators": "+*",
    "train": 10,
    "held_out": 4,
}
TASK["credit"] = {"wrong_numbers": 0.1, "missed_target": 0.3}
SAMPLING = {"attempt_tokens": 26, "reflection_tokens": 24, "rows": 64}


class Outcome(NamedTuple):
    """How a process ended: exit code (negative for a signal) and all that it wrote, libraries
    included."""

    code: int
    out: str
    err: str


class Job:
    """A function in a process of its own, forked from the warm one."""

    def __init__(self, folder: Path, function: Callable[..., object], *args: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.streams = folder / "stdout", folder / "stderr"
        for stream in self.streams:
            stream.write_text("")
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_inside, args=(self.streams, function, args)
        )
        self.process.start()

    @property
    def out(self) -> str:
        return self.streams[0].read_text()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self, timeout_s: float = 120.0) -> Outcome:
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(
                f"still running after {timeout_s} s:\n{self.out}{self.streams[1].read_text()}"
            )
        return Outcome(self.process.exitcode, self.out, self.streams[1].read_text())


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip `cuda` tests where there is no card."""
    if item.get_closest_marker("cuda") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU")


Start = Callable[..., Job]
Cli = Callable[..., Outcome]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """start(function, *args) -> Job: run a function of a test module in a fresh process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()
    jobs: list[Job] = []

    def start(function: Callable[..., object], *args: Any) -> Job:
        jobs.append(Job(tmp_path_factory.mktemp("job"), function, *args))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.is_alive():
            job.process.kill()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reply], Server]]:
    monkeypatch.setattr("minirl.io.http.FIRST_PAUSE_S", 0.01)
    servers: list[Server] = []

    def start(reply: Reply) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(scope="session")
def cli(start: Start) -> Cli:
    """cli("run", recipe, ...) -> Outcome of that command line."""
    return lambda *args, timeout_s=120.0: start(minirl, *map(str, args)).wait(timeout_s)


@pytest.fixture(scope="session")
def tiny(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model that answers `<answer>2 + 3</answer>` with random digits: right at
    times, and wrong in several ways."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    outcome = start(teach, folder).wait()
    assert outcome.code == 0, outcome.err
    return folder


def recipe(path: Path, model: Path, stages: list[dict[str, Any]], /, **parts: Any) -> Path:
    """Write a recipe; `parts` are laid over small defaults one level deep."""
    data: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "fp32", "lora": {"rank": 4, "alpha": 8}},
        "task": TASK,
        "sampling": SAMPLING,
        "stages": stages,
        "eval": {"problems": 4, "start": False},
        "save": {"every": 2, "episodes": 2},
    }
    for name, part in parts.items():
        data[name] = data.get(name, {}) | part if isinstance(part, dict) else part
    path.write_text(yaml.safe_dump(data))
    return path


def minirl(*argv: str) -> None:
    """The command line, as the installed script runs it."""
    from minirl.cli import app

    app(argv)


def teach(
    folder: Path, steps: int = 60, replies: tuple[str, ...] = ("<answer>{a} {sign} {b}</answer>",)
) -> None:
    """Train all of a tiny model to say one of `replies` after every opening of an assistant's
    turn."""
    import torch
    from tiny import byte_tokenizer, tiny_model

    from minirl import recipe as recipes
    from minirl.chat import Chat
    from minirl.methods.reflect import REFLECT, RETRY
    from minirl.tasks import open_task

    chat, rng = Chat(byte_tokenizer()), Random(0)
    task = open_task(recipes.Countdown.model_validate(TASK), 0)
    model = tiny_model(initializer_range=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)

    def conversation() -> tuple[list[int], list[bool]]:
        tokens = [*chat.prompt(rng.choice(task.train))]
        mask = [False] * len(tokens)
        for request in (REFLECT, RETRY, None):
            numbers = {"a": rng.randint(1, 4), "sign": rng.choice("+*"), "b": rng.randint(1, 4)}
            reply = chat.reply(
                (rng.choice(replies) if len(replies) > 1 else replies[0]).format(**numbers)
            )
            after = chat.user(request, after=reply) if request else ()
            tokens += [*reply, *after]
            mask += [True] * len(reply) + [False] * len(after)
        return tokens, mask

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-2 * min(1.0, (step + 1) / 10) * (1 - step / steps)
        rows = [conversation() for _ in range(4)]
        longest = max(len(tokens) for tokens, _ in rows)
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows])
        mask = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in rows])
        logits = model(input_ids=ids).logits[:, :-1][mask[:, 1:]]
        torch.nn.functional.cross_entropy(logits, ids[:, 1:][mask[:, 1:]]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _inside(
    streams: tuple[Path, Path], function: Callable[..., object], args: tuple[Any, ...]
) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND), number)
    function(*args)
