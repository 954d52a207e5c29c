"""Whole runs on a tiny model: what they leave behind, what their numbers say, and how they are
stopped and taken up again."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import Cli, Job, Start, minirl, recipe
from safetensors.torch import load_file, save_file

from minirl import recipe as recipes
from minirl.episode import Episode, Problem, Turn
from minirl.errors import UserError
from minirl.io.files import read_rows
from minirl.loop.collect_stage import choose_kept
from minirl.recipe import Collect
from minirl.record.evals import summarise
from minirl.record.measures import MEASURES
from minirl.record.run import Run
from minirl.record.state import Position

Rows = list[dict[str, Any]]
SINGLE = {
    "kind": "train",
    "method": "single",
    "steps": 2,
    "group": 4,
    "batch": 3,
    "learner": {"lr": 5e-3},
}
REFLECT = {
    "kind": "train",
    "method": "reflect",
    "steps": 4,
    "group": 4,
    "batch": 3,
    "learner": {"lr": 5e-3, "beta": 0.01},
}
WARM_UP = {
    "kind": "train",
    "method": "demonstrate",
    "steps": 3,
    "group": 1,
    "batch": 4,
    "reflections": 0.5,
}
STAGES = [
    WARM_UP | {"learner": {"loss": "nll", "lr": 1e-3}},
    {
        "kind": "collect",
        "problems": 8,
        "samples": 3,
        "batch": 3,
        "keep_each": 2,
        "temperature": 0.9,
    },
    REFLECT,
]


@pytest.fixture(scope="module")
def whole(cli: Cli, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all three kinds of stage, every episode logged."""
    folder = tmp_path_factory.mktemp("whole")
    path = recipe(
        folder / "recipe.yaml",
        tiny,
        STAGES,
        eval={"every": 2, "tries": 2, "samples": 3, "temperature": 1.0, "start": True},
        save={"every": 1, "keep_last": 1, "episodes": 12},
    )
    outcome = cli("run", path, "--out", folder / "run")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert outcome.out.endswith(f"adapter: {folder / 'run' / 'adapter'}\n")
    return folder / "run"


def rows(folder: Path, name: str) -> Rows:
    return read_rows(folder / f"{name}.jsonl")


def test_whole_run_leaves_all_it_promises(whole: Path) -> None:
    names = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    expected = {
        "recipe.yaml",
        "state.json",
        "versions.jsonl",
        "report.html",
        "kept/1.jsonl",
        "adapter/adapter_model.safetensors",
    }
    expected |= {f"{name}.jsonl" for name in ("metrics", "timings", "episodes", "evals")}
    assert names >= expected
    state = json.loads((whole / "state.json").read_text())
    assert state["finished"]
    assert state["position"] == {"stage": 3, "step": 0}
    assert [(row["stage"], row["step"]) for row in rows(whole, "metrics")] == [
        (0, s) for s in range(3)
    ] + [(1, s) for s in range(3)] + [(2, s) for s in range(4)]
    labels = [row["label"] for row in rows(whole, "evals")]
    assert labels == ["start", "0-demonstrate@2", "0-demonstrate", "2-reflect@2", "2-reflect"]
    assert (
        len({tuple(problem["id"] for problem in row["problems"]) for row in rows(whole, "evals")})
        == 1
    )
    report = (whole / "report.html").read_text()
    assert all(label in report for label in labels)
    assert "all stages done" in report


def test_metrics_are_those_of_the_logged_episodes(whole: Path) -> None:
    episodes = rows(whole, "episodes")
    for row in rows(whole, "metrics"):
        if row["stage"] != 2:
            continue
        played = [
            e
            for e in episodes
            if e["label"] == "train" and (e["stage"], e["step"]) == (row["stage"], row["step"])
        ]
        assert len(played) == 12
        trained = [
            sum(len(turn["tokens"]) for turn in e["turns"] if turn["trained"]) for e in played
        ]
        groups = [played[i : i + 4] for i in range(0, 12, 4)]
        dead = [len({e["reward"] for e in group}) == 1 for group in groups]
        assert row["reward"] == pytest.approx(sum(e["reward"] for e in played) / 12)
        assert row["second"] == sum(e["parts"]["second"] for e in played) / 12
        assert row["first"] == 0.0
        assert row["overlong"] == sum(e["finish"] == "length" for e in played) / 12
        assert row["length"] == pytest.approx(sum(trained) / 12)
        assert (row["groups"], row["dead"]) == (3, sum(dead))
        assert row["trained_tokens"] == sum(
            sum(trained[4 * i : 4 * i + 4]) for i in range(3) if not dead[i]
        )
        new = [
            turn
            for e in played
            for turn in e["turns"][e["problem"]["context"] :]
            if turn["logprobs"] is not None
        ]
        assert row["sampled"] == sum(len(turn["tokens"]) for turn in new)


def test_metrics_of_every_stage(whole: Path) -> None:
    metrics = rows(whole, "metrics")
    learnt = {
        "loss",
        "grad_norm",
        "lr",
        "trained_tokens",
        "skipped",
        "overlong",
        "length",
        "sampled",
        "stage",
        "step",
    }
    scored = {"entropy", "clip", "mismatch_kl", "kl", "reward", "first", "second", "groups", "dead"}
    assert all(set(row) == learnt for row in metrics[:3])
    assert all(
        set(row) == {"stage", "step", "kept", "reward", "first", "overlong", "length", "sampled"}
        for row in metrics[3:6]
    )
    assert all(set(row) == learnt | scored for row in metrics[6:])
    assert [row["lr"] for row in metrics[6:]] == pytest.approx(
        [5e-3, 5e-3, 3.75e-3, 1.25e-3]
    )  # one step up, then a cosine over three
    assert (
        metrics[6]["kl"] == 0.0
    )  # the anchor is the adapter as the stage found it, not "adapter off"
    assert max(row["kl"] for row in metrics[7:]) > 1e-7
    assert all(row["mismatch_kl"] < 1e-9 for row in metrics[6:])
    assert all(
        0 < row["grad_norm"] < 10 and row["skipped"] == 0
        for row in metrics
        if row["stage"] != 1 and row.get("dead", 0) < 3
    )
    keys = {key for row in [*metrics, *rows(whole, "timings")] for key in row}
    drawn = {m.key for m in MEASURES if m.curve and m.source != "score"}
    assert drawn - {"dead_share", "fixed", "accuracy", "auc", "approved"} <= keys, (
        "every curve of the report has its numbers"
    )
    assert not any(key.endswith(("_s", "_tps")) for row in metrics for key in row)


def test_a_report_that_cannot_be_written_leaves_the_run_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches: the report written first, so that one odd row keeps a trained run from ever being
    finished."""
    from minirl.loop import train

    def fail(folder: Path) -> Path:
        raise UserError(f"{folder}: odd")

    marks: list[tuple[Any, bool]] = []
    run = SimpleNamespace(
        folder=tmp_path, advance=lambda position, *, finished: marks.append((position, finished))
    )
    main, shown = SimpleNamespace(is_main_process=True), SimpleNamespace(say=print)
    session = SimpleNamespace(
        accelerator=main,
        run=run,
        recipe=SimpleNamespace(stages=[1, 2]),
        policy=None,
        progress=shown,
    )
    monkeypatch.setattr(train, "write_report", fail)
    monkeypatch.setattr(
        train, "_export", lambda policy, folder: (folder / "adapter_config.json").write_text("{}")
    )
    with pytest.raises(UserError, match="odd"):
        train._finish(session)  # type: ignore[arg-type]
    assert marks == [(Position(2, 0), True)]
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_failures_collected_are_what_reflect_starts_from(whole: Path) -> None:
    kept = rows(whole, "kept/1")
    assert sum(row.get("kept", 0) for row in rows(whole, "metrics")) == len(kept)
    assert all(row["parts"]["first"] is False for row in kept)
    contexts = [tuple(token for turn in row["turns"] for token in turn["tokens"]) for row in kept]
    assert len(set(contexts)) == len(contexts)
    assert (
        max(sum(row["problem"]["id"] == other["problem"]["id"] for other in kept) for row in kept)
        <= 2
    )  # keep_each
    for episode in rows(whole, "episodes"):
        if (episode["label"], episode["stage"]) == ("train", 2):
            turns = episode["turns"]
            assert (
                tuple(t for turn in turns[: episode["problem"]["context"]] for t in turn["tokens"])
                in contexts
            )
            assert [turn["kind"] for turn in turns] == [
                "prompt",
                "attempt",
                "request",
                "reflection",
                "request",
                "retry",
            ]
            assert [turn["trained"] for turn in turns] == [False, False, False, True, False, False]


def test_best_checkpoint_stays(whole: Path) -> None:
    scores = [summarise(row)["second"].value for row in rows(whole, "evals")]
    names = ["00-000000", "00-000002", "01-000000", "02-000002", "03-000000"]
    best = json.loads((whole / "state.json").read_text())["best"]
    assert best == {
        "checkpoint": names[scores.index(max(scores))],
        "score": max(scores),
    }  # the first of equals
    there = {
        path.name
        for path in (whole / "checkpoints").iterdir()
        if not path.name.startswith("reference")
    }
    assert there == {best["checkpoint"], "03-000000"}


@pytest.mark.slow
def test_adapter_loads_in_plain_peft(start: Start, tiny: Path, whole: Path) -> None:
    outcome = start(compare_with_peft, tiny, whole).wait()
    assert outcome.code == 0, outcome.err


def compare_with_peft(model: Path, folder: Path) -> None:
    """Logits of base + adapter in plain peft, against the policy's own from the last checkpoint."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from minirl import recipe
    from minirl.engine.model import load as models
    from minirl.engine.model.policy import Policy

    loaded = models.load_model(recipe.load(folder / "recipe.yaml").model)
    policy = Policy(loaded.model, loaded.device, loaded.dtype)
    policy.load(folder / "checkpoints" / "03-000000")
    base = AutoModelForCausalLM.from_pretrained(model)
    tokens = torch.arange(40, 90)[None]
    with torch.no_grad():
        without = base(input_ids=tokens).logits
        ours = policy.model(input_ids=tokens).logits
        plain = PeftModel.from_pretrained(base, folder / "adapter")(input_ids=tokens).logits
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert (without - plain).abs().max() > 0.05


def test_evaluating_afterwards_finds_the_same(cli: Cli, whole: Path, tmp_path: Path) -> None:
    """`minirl eval` with the run's own settings is the run's own evaluation: same weights, same
    seeds, same problems."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for options, label in (
        ([], "adapter"),
        (["--base"], "base"),
        (["--set", "eval.temperature=0", "--set", "eval.samples=1"], "adapter"),
    ):
        outcome = cli("eval", folder, *options)
        assert outcome.code == 0, outcome.err
        assert f"evaluation {label} on 4 problems: 1st try" in outcome.out
        assert "pass@1 " in outcome.out
        assert "second errors: " in outcome.out
    adapter, base, greedy = rows(folder, "later_evals")
    assert adapter["problems"] == rows(whole, "evals")[-1]["problems"]
    assert base["problems"] == rows(whole, "evals")[0]["problems"]
    assert (greedy["temperature"], greedy["samples"], len(greedy["problems"][0]["first"])) == (
        0.0,
        1,
        1,
    )
    assert cli("report", folder).code == 0
    text = (folder / "report.html").read_text().split("Evaluated afterwards")[1]
    assert text.count("adapter against base") == 1  # the greedy one has no partner


def test_reflect_on_line_draws_its_failures(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    path = recipe(
        tmp_path / "r.yaml",
        tiny,
        [REFLECT | {"attempts": 3, "train_all": True}],
        save={"episodes": 12},
    )
    assert cli("run", path, "--out", tmp_path / "run").code == 0
    for row in rows(tmp_path / "run", "metrics"):
        assert 3 <= row["tried"] <= 9
        failures = round((1 - row["first"]) * row["tried"])
        assert row["groups"] == min(3, failures)
        assert row["sampled"] > 0
    episodes = [row for row in rows(tmp_path / "run", "episodes") if row["label"] == "train"]
    assert all(
        [t["trained"] for t in e["turns"]] == [False, False, False, True, False, True]
        for e in episodes
    )
    first = {}
    for e in episodes:
        first.setdefault((e["step"], e["problem"]["id"]), []).append(e["turns"][1]["tokens"])
    assert all(
        tokens == attempts[0] for attempts in first.values() for tokens in attempts
    )  # a group shares one failed attempt


def test_reflect_on_line_where_nothing_fails(start: Start, tiny: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path / "r.yaml", tiny, [REFLECT | {"attempts": 2, "steps": 2}])
    outcome = start(run_with_verdict, True, "run", str(path), "--out", str(tmp_path / "run")).wait()
    assert outcome.code == 0, outcome.err
    for row in rows(tmp_path / "run", "metrics"):
        assert (row["first"], row["tried"], row["grad_norm"], row["trained_tokens"]) == (
            1.0,
            6.0,
            0.0,
            0.0,
        )
        assert "reward" not in row


def run_with_verdict(passed: bool, *argv: str) -> None:
    """The command line, with a verifier that passes all or nothing."""
    from minirl.episode import Verdict
    from minirl.verify import countdown

    countdown.verify = lambda *_, **__: Verdict(
        float(passed), passed, {"error_kind": None if passed else "missed_target"}
    )
    minirl(*argv)


@pytest.mark.parametrize(
    ("keep", "said"), [("failed", "kept nothing"), ("all", "needs failed attempts")]
)
def test_collecting_the_wrong_thing_is_one_line(
    start: Start, tiny: Path, tmp_path: Path, keep: str, said: str
) -> None:
    path = recipe(
        tmp_path / "r.yaml", tiny, [{"kind": "collect", "problems": 3, "keep": keep}, REFLECT]
    )
    outcome = start(run_with_verdict, True, "run", str(path), "--out", str(tmp_path / "run")).wait()
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("minirl: stages[1]: ")
    assert said in outcome.err


def test_self_training(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """Offline: what was kept is trained id by id, beside the demonstrations. Online: right
    attempts, and as many demonstrations."""
    sft = {
        "kind": "train",
        "method": "demonstrate",
        "group": 1,
        "batch": 8,
        "learner": {"loss": "nll", "lr": 1e-3},
    }
    stages = [
        sft | {"steps": 0},
        {
            "kind": "collect",
            "problems": 10,
            "samples": 20,
            "batch": 5,
            "keep": "passed",
            "keep_each": 2,
        },
        sft | {"steps": 4, "examples": "both"},
        sft
        | {
            "method": "self_train",
            "steps": 2,
            "group": 12,
            "batch": 10,
            "learner": {"loss": "nll", "sampled_share": 0.5, "lr": 1e-3},
        },
    ]
    path = recipe(tmp_path / "r.yaml", tiny, stages, save={"episodes": 130})
    outcome = cli("run", path, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert [row["stage"] for row in rows(tmp_path / "run", "metrics")] == [
        1,
        1,
        2,
        2,
        2,
        2,
        3,
        3,
    ], "a stage without steps is left out"
    kept = [
        tuple(tuple(turn["tokens"]) for turn in row["turns"])
        for row in rows(tmp_path / "run", "kept/1")
    ]
    assert len(kept) >= 3
    assert all(row["parts"]["first"] for row in rows(tmp_path / "run", "kept/1"))
    episodes = [row for row in rows(tmp_path / "run", "episodes") if row["label"] == "train"]
    offline = [row for row in episodes if row["stage"] == 2]
    replayed = [
        tuple(tuple(turn["tokens"]) for turn in row["turns"])
        for row in offline
        if row["problem"]["context"]
    ]
    assert set(replayed) <= set(kept)
    assert 0 < len(replayed) < len(offline) == 32
    assert len({row["problem"]["id"] for row in offline if not row["problem"]["context"]}) > 3, (
        "and demonstrations of all problems"
    )
    assert all([turn["trained"] for turn in row["turns"]] == [False, True] for row in offline)
    online = [row for row in episodes if (row["stage"], row["step"]) == (3, 0)]
    attempts, shown = online[:120], online[120:]
    assert [row["parts"]["first"] for row in attempts] == [
        row["turns"][1]["trained"] for row in attempts
    ]
    assert any(row["turns"][1]["trained"] for row in attempts)
    assert [row["problem"]["id"] for row in shown] == [
        row["problem"]["id"] for row in attempts[::12]
    ]
    assert all(row["turns"][1]["trained"] and row["turns"][1]["logprobs"] is None for row in shown)
    metrics = rows(tmp_path / "run", "metrics")[6]
    assert metrics["first"] == sum(row["parts"]["first"] for row in attempts) / 120
    assert metrics["overlong"] == sum(row["finish"] == "length" for row in attempts) / 120, (
        "of what was sampled alone"
    )
    assert metrics["trained_tokens"] == sum(
        len(turn["tokens"]) for row in online for turn in row["turns"] if turn["trained"]
    )


def test_what_was_cut_is_not_kept_as_right() -> None:
    """Catches: self-training on right programs that the token limit cut while the model wrote on:
    they have no end to learn."""
    problem = Problem("p", "?", None)

    def played(token: int, passed: bool, finish: str) -> Episode:
        turns = (Turn("prompt", (1,)), Turn("attempt", (token,), (-1.0,), trained=True))
        return Episode(problem, turns, float(passed), {"first": passed}, finish)

    episodes = [
        played(2, True, "length"),
        played(3, True, "stop"),
        played(3, True, "stop"),
        played(4, False, "length"),
        played(5, True, "stop"),
    ]

    def kept(which: Any, each: int = 9) -> list[int]:
        stage = Collect(kind="collect", keep=which, keep_each=each)
        return [e.tokens[1] for e in choose_kept(episodes, stage)]

    assert kept("passed") == [3, 5]
    assert kept("passed", 1) == [3]
    assert kept("failed") == [4]
    assert kept("all") == [2, 3, 4, 5]


@pytest.mark.slow
def test_a_run_is_not_taken_up_with_other_weights(
    start: Start, cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    """The same name, and another copy of the model under it: the hub answers again, or a folder was
    written over."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    path = recipe(tmp_path / "r.yaml", model, [SINGLE | {"steps": 400}], save={"every": 1})
    job = start(minirl, "run", str(path), "--out", str(tmp_path / "run"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(job, lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    job.process.kill()
    job.process.join()
    weights = load_file(model / "model.safetensors")
    name = next(iter(weights))
    save_file(
        weights | {name: weights[name] + 0.01},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    before = metrics.read_text()
    outcome = cli("run", path, "--out", tmp_path / "run")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert before.startswith(metrics.read_text())
    assert metrics.read_text().count("\n") >= 1, "what was saved is kept"
    assert f"{tmp_path / 'run'}: {model} has other weights here (got " in outcome.err


def test_a_run_is_not_taken_up_in_another_dtype(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """What `auto` finds differs from GPU to GPU. Catches: weights that differ by rounding alone
    told as other weights."""
    path, folder = recipe(tmp_path / "r.yaml", tiny, [SINGLE | {"steps": 1}]), tmp_path / "run"
    assert cli("run", path, "--out", folder).code == 0
    known = json.loads((folder / "model.json").read_text())
    run = Run.open(folder, recipes.load(path))
    with run:
        run.check_model(known["weights"], known["dtype"])
        with pytest.raises(
            UserError,
            match=rf"computes in other, expected {known['dtype']}, in which the run began",
        ):
            run.check_model("digest of the same weights, rounded otherwise", "other")
        with pytest.raises(UserError, match="has other weights here"):
            run.check_model("digest of others", known["dtype"])
    assert json.loads((folder / "model.json").read_text()) == known


@pytest.mark.slow
def test_a_run_is_not_taken_up_with_other_problems(
    start: Start, cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    """A data file that was edited while the run lay still. Catches: a run whose steps are of two
    data sets."""
    asked, held = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    rows = [
        {"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"}
        for n in range(9)
    ]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    held.write_text("".join(json.dumps(row) + "\n" for row in rows[6:]))
    path, folder = (
        recipe(tmp_path / "r.yaml", tiny, [SINGLE | {"steps": 400}], save={"every": 1}),
        tmp_path / "run",
    )
    task = {"name": "gsm8k", "source": str(asked), "test_source": str(held), "held_out": 3}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"task": task}))
    job = start(minirl, "run", str(path), "--out", str(folder))
    until(
        job,
        lambda: (
            (folder / "metrics.jsonl").exists()
            and (folder / "metrics.jsonl").read_text().count("\n") >= 3
        ),
    )
    job.process.kill()
    job.process.join()
    noted, before = (
        json.loads((folder / "task.json").read_text()),
        (folder / "metrics.jsonl").read_text(),
    )
    assert (noted["train"], noted["held_out"]) == (6, 3)
    asked.write_text(asked.read_text().replace("#### 4", "#### 5"))
    outcome = cli("run", path, "--out", folder)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert (
        f"{folder}: the task gsm8k has other problems here (got 6 and 3 held out, digest "
        in outcome.err
    )
    assert before.startswith((folder / "metrics.jsonl").read_text()), "what was saved is kept"
    assert json.loads((folder / "task.json").read_text()) == noted


@pytest.mark.parametrize("held", ["", "[]", '{"problems": 3}', "[" * 100_000])
def test_a_damaged_note_of_the_problems_is_named(
    held: str, tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    """What a run is checked against is data too. Catches: a traceback in place of a line."""
    path, folder = recipe(tmp_path / "r.yaml", tiny, [SINGLE | {"steps": 1}]), tmp_path / "run"
    assert cli("run", path, "--out", folder).code == 0
    (folder / "task.json").write_text(held)
    with (
        Run.open(folder, recipes.load(path)) as run,
        pytest.raises(UserError, match=r"task\.json: .*delete it to resume unchecked"),
    ):
        run.check_task("digest", 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["policy.safetensors", "learner.safetensors", "learner.json"])
@pytest.mark.parametrize("held", [None, b"", b"{"])
def test_a_torn_checkpoint_is_named(
    name: str, held: bytes | None, cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    """A file that a copy left out or cut. Catches: a traceback on resume."""
    path, folder = (
        recipe(
            tmp_path / "r.yaml", tiny, [SINGLE | {"steps": 2}], save={"every": 1, "keep_last": 9}
        ),
        tmp_path / "run",
    )
    assert cli("run", path, "--out", folder).code == 0
    state = json.loads((folder / "state.json").read_text())
    state |= {"finished": False, "position": {"stage": 0, "step": 1}, "weights": "00-000001"}
    (folder / "state.json").write_text(json.dumps(state))
    torn = folder / "checkpoints" / "00-000001" / name
    torn.unlink() if held is None else torn.write_bytes(held)
    outcome = cli("run", path, "--out", folder)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert f"{torn}: cannot be read (" in outcome.err
    assert "start again with another --out" in outcome.err


@pytest.mark.slow
def test_every_loss_trains(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """One run of plain single-attempt stages, one for each preset of the loss."""
    losses = ["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce"]
    stages = [
        SINGLE | {"learner": {"loss": loss, "lr": 5e-3, "schedule": "constant", "warmup": 0.0}}
        for loss in losses
    ]
    path = recipe(tmp_path / "r.yaml", tiny, stages, save={"episodes": 0})
    outcome = cli("run", path, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    metrics = rows(tmp_path / "run", "metrics")
    assert [row["stage"] for row in metrics] == [n for n in range(6) for _ in range(2)]
    assert all(row["grad_norm"] > 0 for row in metrics if row["dead"] < 3)
    assert all(row["lr"] == 5e-3 for row in metrics)
    anchored = {n for n in range(6) if losses[n] not in ("dapo", "reinforce")}
    assert {row["stage"] for row in metrics if "kl" in row} == anchored
    assert all(row["kl"] == 0.0 for row in metrics if row["step"] == 0 and "kl" in row)
    assert rows(tmp_path / "run", "episodes") == []


def until(job: Job, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    ends = time.monotonic() + timeout_s
    while not condition():
        assert job.process.is_alive(), job.wait()
        assert time.monotonic() < ends, job.out
        time.sleep(0.002)


@pytest.fixture(scope="module")
def unstopped(cli: Cli, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe whose regular saves are far apart, and its folder after a run from start to end."""
    folder = tmp_path_factory.mktemp("unstopped")
    stages = [STAGES[0], STAGES[1] | {"problems": 30}, REFLECT | {"steps": 8}]
    path = recipe(folder / "recipe.yaml", tiny, stages, eval={"start": True}, save={"every": 100})
    assert cli("run", path, "--out", folder / "run").code == 0
    return path, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "done"), [(1, 2), (2, 1)])
def test_ctrl_c_saves_and_resuming_gives_the_same(
    start: Start, cli: Cli, unstopped: tuple[Path, Path], tmp_path: Path, stage: int, done: int
) -> None:
    """Stopped in a collect or a train stage."""
    path, whole = unstopped
    folder = tmp_path / "run"
    job = start(minirl, "run", str(path), "--out", str(folder))
    metrics = folder / "metrics.jsonl"
    until(job, lambda: metrics.exists() and metrics.read_text().count(f'"stage":{stage},') >= done)
    job.signal(signal.SIGINT)
    outcome = job.wait()
    assert outcome.code == 130
    assert outcome.err == f"stopped; the same command takes {folder} up again\n"
    assert "stopping after this step" in outcome.out
    position = json.loads((folder / "state.json").read_text())["position"]
    assert position["stage"] == stage
    assert position["step"] >= done
    assert len(rows(folder, "metrics")) == {1: 3, 2: 13}[stage] + position["step"]
    resumed = cli("run", path, "--out", folder)
    assert resumed.code == 0
    assert f"resuming at stage {stage}, step {position['step']}\n" in resumed.out
    for name in (
        "metrics.jsonl",
        "evals.jsonl",
        "episodes.jsonl",
        "kept/1.jsonl",
        "adapter/adapter_model.safetensors",
    ):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_second_ctrl_c_stops_at_once(start: Start, tiny: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path / "r.yaml", tiny, [SINGLE | {"steps": 1000, "group": 64, "batch": 32}])
    job = start(minirl, "run", str(path), "--out", str(tmp_path / "run"))
    until(job, lambda: "single (grpo): 1000 steps" in job.out)
    job.signal(signal.SIGINT)
    until(job, lambda: "stopping after this step" in job.out)
    job.signal(signal.SIGINT)
    outcome = job.wait()
    assert outcome.code == 130
    assert outcome.err == "minirl: stopped at once; the same command goes on from the last save\n"


def test_missing_tracker_is_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    missing = next(
        (name for name in ("wandb", "trackio") if importlib.util.find_spec(name) is None), None
    )
    if missing is None:
        pytest.skip("wandb and trackio are both installed, so no tracker is missing")
    path = recipe(tmp_path / "r.yaml", tiny, [SINGLE], track=[missing])
    outcome = cli("run", path, "--out", tmp_path / "run")
    assert outcome.code == 2
    assert (
        outcome.err
        == f"minirl: track: got '{missing}', which is not installed; `pip install {missing}` or"
        " take it out of the list\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_tensorboard_gets_the_metrics(start: Start, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed; it comes with the extra tensorboard")
    path = recipe(
        tmp_path / "r.yaml",
        tiny,
        [SINGLE, SINGLE | {"learner": {"loss": "rloo"}}],
        track=["tensorboard"],
    )
    outcome = cli("run", path, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    read = start(read_events, tmp_path / "run").wait()
    assert read.code == 0, read.err
    logged = yaml.safe_load(read.out)
    rewards = [row["reward"] for row in rows(tmp_path / "run", "metrics")]
    assert logged["0/reward"] == [[0, pytest.approx(rewards[0])], [1, pytest.approx(rewards[1])]]
    assert logged["1/reward"] == [
        [2, pytest.approx(rewards[2])],
        [3, pytest.approx(rewards[3])],
    ]  # steps are counted on over stages
    assert [step for step, _ in logged["1/sample_s"]] == [2, 3]
    first = [summarise(row)["first"].value for row in rows(tmp_path / "run", "evals")]
    assert logged["eval/first"] == [[2, first[0]], [4, first[1]]]


def read_events(folder: Path) -> None:
    """Print {tag: [[step, value], ...]} of all TensorBoard events below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend(
                (event.step, event.value) for event in events.Scalars(tag)
            )
    print(json.dumps(found))
