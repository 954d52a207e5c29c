"""Whole runs of SWiRL on a tiny model: collect, filter, step-wise training and its baseline; kills;
other models; another task."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from conftest import Cli, Start, minirl, recipe, teach
from servers import Reply, Server, completion
from stepping import SOLUTION
from tiny import save_tiny

from minirl.episode import Episode
from minirl.errors import UserError
from minirl.io.files import read_rows
from minirl.recipe import load, parse

SAMPLING = {
    "temperature": 0.7,
    "attempt_tokens": 24,
    "stepwise": {"expression": "do", "answer": "end", "steps": 2},
}
COLLECT = {
    "kind": "collect",
    "temperature": 0.5,
    "method": "stepwise",
    "problems": 4,
    "samples": 3,
    "keep": "all",
    "keep_each": 3,
    "batch": 2,
}
JUDGE = {
    "kind": "model",
    "model": "UNTAUGHT",
    "verdict": "probability",
    "approve_at": 0.53,
}  # the taught model finds nothing good
FILTER = {"kind": "filter", "keep": "process", "judge": JUDGE, "parts": 3}
STEP = {
    "kind": "train",
    "method": "step",
    "steps": 3,
    "group": 4,
    "batch": 2,
    "judge": JUDGE,
    "learner": {"lr": 5e-3, "beta": 0.01},
}
SHOWN = {
    "kind": "train",
    "method": "demonstrate_stepwise",
    "steps": 2,
    "group": 1,
    "batch": 2,
    "learner": {"loss": "nll", "lr": 1e-4},
}
Write = Callable[..., Path]
ROWS = (
    "metrics.jsonl",
    "evals.jsonl",
    "episodes.jsonl",
    "kept/1.jsonl",
    "kept/2.jsonl",
    "adapter/adapter_model.safetensors",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The task part of a recipe over a file of twelve rows."""
    path = tmp_path_factory.mktemp("gsm8k") / "rows.jsonl"
    rows = [
        {"question": f"Child {n} has 2, 3 and 4 clips. How many?", "answer": SOLUTION}
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "gsm8k", "source": str(path), "chain": "calls", "train": 8, "held_out": 4}


@pytest.fixture(scope="module")
def tiny(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model whose turns are mostly calls of the calculator, and none of them
    right by intent."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    outcome = start(teach, folder, 150, ("<do>{a}+{b}</do>", "<do>{b}*{a}</do>")).wait()
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="module")
def write(
    tiny: Path, data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """write(stages, part=...) -> a recipe's file."""
    untaught = save_tiny(tmp_path_factory.mktemp("judge"))

    def write(stages: list[dict[str, Any]], **parts: Any) -> Path:
        path = recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", tiny, stages, **parts)
        body = yaml.safe_load(path.read_text()) | {
            "task": data,
            "sampling": SAMPLING | {"rows": 64} | parts.get("sampling", {}),
        }
        path.write_text(yaml.safe_dump(body).replace("UNTAUGHT", str(untaught)))
        return path

    return write


@pytest.fixture(scope="module")
def whole(
    cli: Cli, write: Write, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str]:
    """A recipe with all four stages, the folder of its uninterrupted run, and what it said."""
    path, folder = write([SHOWN, COLLECT, FILTER, STEP]), tmp_path_factory.mktemp("swirl") / "whole"
    outcome = cli("run", path, "--out", folder)
    assert outcome.code == 0, outcome.err
    return path, folder, outcome.out


def episodes(path: Path) -> list[Episode]:
    return [Episode.from_json(row) for row in read_rows(path)]


@pytest.mark.slow
def test_a_run_of_all_stages(whole: tuple[Path, Path, str]) -> None:
    _, folder, out = whole
    collected, kept = episodes(folder / "kept/1.jsonl"), episodes(folder / "kept/2.jsonl")
    assert len({e.tokens for e in collected}) == len(collected) >= 8
    assert {e.parts["by"] for e in collected} == {collected[0].parts["by"]}
    assert len({e.parts["seed"] for e in collected}) == len(collected)
    assert str(collected[0].parts["by"]).startswith("policy ")
    rows = read_rows(folder / "metrics.jsonl")
    parts = [row for row in rows if row["stage"] == 2]
    assert [sum(row[name] for row in parts) for name in ("trajectories", "kept")] == [
        len(collected),
        len(kept),
    ]
    assert sum(row["states"] for row in parts) == sum(
        sum(t.trained for t in e.turns) for e in collected
    )
    assert sum(row[f"pairs_{ab}"] for row in parts for ab in ("11", "10", "01", "00")) == sum(
        row["states"] for row in parts
    )
    assert 0 < len(kept) < len(collected), "the filter bites"
    assert all(set(str(e.parts["verdicts"])) == {"G"} for e in kept)
    assert {e.tokens for e in kept} < {e.tokens for e in collected}
    steps = [row for row in rows if row["stage"] == 3]
    assert all(
        0 < row["reward"] < 1 and row["unscored"] == 0 and row["trained_tokens"] > 0
        for row in steps
    )
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert max(row["mismatch_kl"] for row in steps) < 1e-5
    assert f"collected {len(collected)} trajectories of 4 questions" in out
    assert "filter process: judge against rules, step by step: agree" in out
    trained = [
        Episode.from_json(row)
        for row in read_rows(folder / "episodes.jsonl")
        if row["stage"] == 3 and row["label"] == "train"
    ]
    for e in trained:
        assert [t.trained for t in e.turns] == [False] * (len(e.turns) - 1) + [True]
        assert any(
            k.tokens[: len(e.tokens) - len(e.turns[-1].tokens)]
            == e.tokens[: -len(e.turns[-1].tokens)]
            for k in kept
        )


@pytest.mark.slow
def test_killed_while_collecting_and_judging(
    start: Start, cli: Cli, whole: tuple[Path, Path, str], tmp_path: Path
) -> None:
    """Kills at twelve random moments: nothing is lost, doubled or judged twice, and the run ends in
    the same bytes."""
    path, reference, _ = whole
    rng, struck = Random(0), 0
    watched = ("metrics.jsonl", "kept/1.jsonl", "kept/2.jsonl", "verdicts.jsonl")

    def written(folder: Path) -> int:
        return sum(
            (folder / name).read_bytes().count(b"\n")
            for name in watched
            if (folder / name).exists()
        )

    total = written(reference)
    for folder in (tmp_path / str(n) for n in range(3)):
        for quarter in range(4):
            rows, wait_s = int(total * (quarter + rng.random()) / 4), rng.uniform(0.0, 0.05)
            job = start(minirl, "run", str(path), "--out", str(folder))
            while job.process.is_alive() and written(folder) < rows:
                time.sleep(0.002)
            time.sleep(wait_s)
            job.signal(signal.SIGKILL)
            struck += job.wait().code != 0
        outcome = cli("run", path, "--out", folder)
        assert outcome.code == 0, outcome.err
        for name in ROWS:
            assert (folder / name).read_bytes() == (reference / name).read_bytes(), (
                f"{folder.name}/{name}"
            )
        verdicts = read_rows(folder / "verdicts.jsonl")
        assert len({row["key"] for row in verdicts}) == len(verdicts), "asked twice"
        assert sorted(map(str, verdicts)) == sorted(
            map(str, read_rows(reference / "verdicts.jsonl"))
        )
    assert struck >= 8


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["none", "both"])
def test_another_run_is_the_source_and_states_are_equal(
    keep: str, cli: Cli, write: Write, whole: Any, tmp_path: Path
) -> None:
    _, reference, _ = whole
    filtered = {
        "kind": "filter",
        "keep": keep,
        "source": str(reference),
        "parts": 2,
        "judge": {"kind": "verifier"},
    }
    imitated = {
        "kind": "train",
        "method": "imitate",
        "steps": 2,
        "group": 1,
        "batch": 2,
        "states": 5,
        "learner": {"loss": "nll"},
    }
    parts = {"model": {"adapter": str(reference / "adapter")}}
    outcome = cli("run", write([filtered, imitated], **parts), "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    if keep == "both":  # nothing it says is right
        assert (
            "WARNING: stages[1]: the filter before it kept nothing; nothing is trained"
            in " ".join(outcome.out.split())
        )
        assert {row["stage"] for row in read_rows(tmp_path / "run/metrics.jsonl")} == {0}
        assert (tmp_path / "run/adapter/adapter_model.safetensors").exists(), (
            "the run went on to its end"
        )
        return
    assert len(episodes(tmp_path / "run/kept/0.jsonl")) == len(episodes(reference / "kept/1.jsonl"))
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    states = sum(row["states"] for row in rows if row["stage"] == 0)
    assert f"stage 1: 5 of {states} states" in outcome.out
    for row in (
        r
        for r in read_rows(tmp_path / "run/episodes.jsonl")
        if r["stage"] == 1 and r["label"] == "train"
    ):
        shown = Episode.from_json(row)
        assert [t.trained for t in shown.turns] == [False] * (len(shown.turns) - 1) + [True]
        assert shown.turns[-1].logprobs is None
    found = sum(
        row["states"] for row in read_rows(tmp_path / "run/metrics.jsonl") if row["stage"] == 0
    )
    outcome = cli(
        "run", write([filtered, imitated | {"states": 1000}], **parts), "--out", tmp_path / "more"
    )
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"stages[1].states: got 1000, but there are {found} states" in outcome.err
    assert f"--set stages.1.states={found} and another --out" in outcome.err
    judged = FILTER | {"source": str(reference), "keep": "both"}
    outcome = cli("run", write([judged, imitated], **parts), "--out", tmp_path / "judged")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "judged/verdicts.jsonl").read_bytes(), (
        "the source's judge has said it all"
    )


@pytest.mark.slow
def test_credit_by_step_on_line(cli: Cli, write: Write, tmp_path: Path) -> None:
    online = {
        "kind": "train",
        "method": "stepwise",
        "credit": "step",
        "steps": 2,
        "group": 3,
        "batch": 2,
        "judge": JUDGE,
    }
    outcome = cli("run", write([online | {"learner": {"lr": 5e-3}}]), "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    for row in rows:  # a group whose episodes all read the same is dead, by chance
        assert row["dead"] < row["groups"]
        assert row["trained_tokens"] > 0
        assert 0 <= row["approved"] <= 1
    shown = [
        Episode.from_json(row)
        for row in read_rows(tmp_path / "run/episodes.jsonl")
        if row["label"] == "train"
    ]
    assert all(
        e.step_rewards is not None and len(e.step_rewards) == e.parts["steps"] for e in shown
    )


@pytest.mark.slow
def test_the_base_judge_is_the_model_without_its_adapter(
    cli: Cli, write: Write, whole: Any, tmp_path: Path
) -> None:
    """Under a trained adapter it says of every step what it says under a fresh one, which changes
    nothing."""
    _, reference, _ = whole
    judge = {"kind": "base", "verdict": "probability", "approve_at": 0.0}
    stages = [{"kind": "filter", "keep": "none", "source": str(reference), "judge": judge}]
    said: list[dict[str, float]] = []
    for name, model in (("trained", {"adapter": str(reference / "adapter")}), ("fresh", {})):
        outcome = cli("run", write(stages, model=model), "--out", tmp_path / name)
        assert outcome.code == 0, outcome.err
        said.append(
            {row["key"]: row["verdict"] for row in read_rows(tmp_path / name / "verdicts.jsonl")}
        )
    assert len(said[0]) > 10
    assert max(said[0].values()) > 0
    assert said[0] == pytest.approx(said[1], rel=1e-5)


@pytest.mark.slow
def test_a_judge_that_never_answers_stops_nothing(cli: Cli, write: Write, tmp_path: Path) -> None:
    """Every step is left without a score: nothing is trained, the run goes on to its end and says
    how many."""
    dead = {
        "kind": "endpoint",
        "url": "http://127.0.0.1:9/v1",
        "model": "m",
        "retries": 0,
        "timeout_s": 1,
    }
    stages = [
        COLLECT | {"problems": 2},
        {"kind": "filter", "keep": "none", "judge": dead, "parts": 1},
        STEP | {"judge": dead, "steps": 2},
    ]
    outcome = cli("run", write(stages), "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [
        (r["unanswered"] > 0, r["kept"] - r["trajectories"]) for r in rows if r["stage"] == 1
    ] == [(True, 0)]
    assert [
        (r["unscored"] > 0, r["dead"], r["trained_tokens"]) for r in rows if r["stage"] == 2
    ] == [(True, 2.0, 0.0)] * 2
    assert outcome.out.count("WARNING: the judge gave no answer to") == 2, "once a stage"
    assert (
        " ".join(outcome.out.split()).count(
            "nor trained (http://127.0.0.1:9/v1: no answer in 1 tries"
        )
        == 2
    ), "and why"


DEAD = {
    "kind": "endpoint",
    "url": "http://127.0.0.1:9/v1",
    "model": "m",
    "retries": 0,
    "timeout_s": 1,
}


@pytest.mark.slow
def test_a_dead_judge_of_a_filter_ends_in_a_warning(cli: Cli, write: Write, tmp_path: Path) -> None:
    """Catches: a run that stops for good, blaming another stage, because its filter could keep
    nothing."""
    stages = [
        COLLECT | {"problems": 2},
        FILTER | {"judge": DEAD, "parts": 2},
        STEP | {"judge": DEAD, "states": 2},
        SHOWN,
    ]
    outcome = cli("run", write(stages), "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.out.split())
    assert "WARNING: stages[2]: the filter before it kept nothing; nothing is trained" in said
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [(r["unanswered"] > 0, r["kept"]) for r in rows if r["stage"] == 1] == [(True, 0)] * 2
    assert [r["stage"] for r in rows] == [0, 1, 1, 3, 3], "the next stage is trained"


@pytest.mark.slow
def test_steps_that_were_not_answered_are_asked_for_once_more(
    cli: Cli, write: Write, serve: Callable[[Reply], Server], tmp_path: Path
) -> None:
    """Catches: trajectories dropped for good because a server stumbled once."""
    seen: set[str] = set()

    def stumble(body: dict[str, Any]) -> tuple[int, bytes]:
        text = body["messages"][1]["content"]
        known = text in seen
        seen.add(text)
        return completion("GOOD") if known else (503, b"")

    judge = DEAD | {"url": serve(stumble).url}
    stages = [
        COLLECT | {"problems": 3, "samples": 1},
        FILTER | {"judge": judge, "parts": 3},
        STEP | {"steps": 1},
    ]
    outcome = cli("run", write(stages), "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    rows = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if row["stage"] == 1]
    in_form = [e.parts["malformed"] == 0 for e in episodes(tmp_path / "run/kept/0.jsonl")]
    assert any(in_form)
    assert [(r["unanswered"], r["kept"]) for r in rows] == [(0, int(good)) for good in in_form]
    assert "WARNING: the judge gave no answer" not in outcome.out


def test_credit_by_step_goes_on_without_its_judge(cli: Cli, write: Write, tmp_path: Path) -> None:
    online = {
        "kind": "train",
        "method": "stepwise",
        "credit": "step",
        "steps": 2,
        "group": 3,
        "batch": 2,
        "judge": DEAD,
    }
    outcome = cli("run", write([online]), "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [
        (row["unscored"] > 0, row["dead"], row["trained_tokens"], row["grad_norm"]) for row in rows
    ] == [(True, 2.0, 0.0, 0.0)] * 2


def test_another_task_is_tried(cli: Cli, write: Write, whole: Any, data: dict[str, Any]) -> None:
    _, folder, _ = whole
    other = write([SHOWN], eval={"problems": 3, "start": False})
    outcome = cli("eval", folder, "--task", other, "--set", "eval.problems=2")
    assert outcome.code == 0, outcome.err
    assert "on 2 problems" in outcome.out
    (row,) = read_rows(folder / "later_evals.jsonl")
    assert row["changed"] == ["recipe=recipe"]
    assert len(row["problems"]) == 2


def test_wrong_recipes_are_told_in_one_line(write: Write, tiny: Path, data: dict[str, Any]) -> None:
    whole: dict[str, Any] = {
        "model": {"name": str(tiny)},
        "task": data,
        "stages": [COLLECT, FILTER, STEP],
    }
    parse(whole, "r")
    train = {"kind": "train", "steps": 1}
    searched = {"name": "hotpotqa", "source": "x.json"}
    for change, said in [
        ({"stages": [FILTER]}, r"stages\[0\]: got a filter without trajectories"),
        (
            {"stages": [STEP]},
            r"stages\[0\]\.method: got 'step', expected step or imitate after a filter",
        ),
        (
            {"stages": [COLLECT, train | {"method": "stepwise"}]},
            r"stages\[1\]\.method: got 'stepwise'",
        ),
        (
            {"stages": [COLLECT, {k: v for k, v in FILTER.items() if k != "judge"}]},
            "judge: got none with keep 'process'",
        ),
        (
            {"stages": [COLLECT, FILTER | {"judge": {"kind": "verifier", "gold": True}}]},
            "never sees the gold answer",
        ),
        (
            {"stages": [COLLECT, FILTER | {"outcome": "judge"}]},
            r"stages\[1\]\.outcome: got 'judge' for task 'gsm8k'",
        ),
        (
            {"stages": [COLLECT, FILTER, {k: v for k, v in STEP.items() if k != "judge"}]},
            "judge: got none with method 'step'",
        ),
        ({"stages": [COLLECT, STEP | {"method": "imitate"}]}, "imitate"),
        (
            {"stages": [train | {"method": "stepwise", "judge": JUDGE}]},
            "judge: got one with method 'stepwise'",
        ),
        (
            {
                "stages": [
                    train
                    | {
                        "method": "stepwise",
                        "credit": "step",
                        "judge": JUDGE,
                        "learner": {"loss": "ppo"},
                    }
                ]
            },
            "credit: got 'step'",
        ),
        ({"stages": [train | {"method": "stepwise", "states": 3}]}, "states: got 3"),
        (
            {"stages": [train | {"method": "single"}]},
            r"stages\[0\]\.method: got 'single' for task 'gsm8k' with chain 'calls'",
        ),
        (
            {"task": data | {"chain": "prose"}},
            r"stages\[0\]\.method: got 'stepwise' for task 'gsm8k' with chain 'prose'",
        ),
        (
            {"task": data | {"chain": "prose", "most_calls": 2}},
            "most_calls: got 2 with chain 'prose'",
        ),
        ({"sampling": {"stepwise": {"answer": "<a>"}}}, "answer: got '<a>', expected a tag's name"),
        ({"sampling": {"stepwise": {"answer": "math_exp"}}}, "expected three that differ"),
        (
            {"task": searched, "eval": {"judge": {"kind": "verifier"}}},
            r"eval\.judge\.kind: got 'verifier'",
        ),
    ]:
        with pytest.raises(UserError, match=said) as error:
            parse(whole | change, "r")
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_wrong_sources_are_told_in_one_line(
    cli: Cli, write: Write, whole: Any, tmp_path: Path
) -> None:
    filtered = {"kind": "filter", "keep": "none", "source": str(tmp_path / "none")}
    outcome = cli("run", write([filtered, STEP]), "--out", tmp_path / "run")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "is no run folder" in outcome.err
    before_any_model = write(
        [filtered, STEP], model={"name": "no/such/model", "adapter": str(tmp_path / "none")}
    )
    for said in (
        "model.adapter: ",
        (
            "has no adapter_config.json, expected a folder that peft saved; check the path, or run"
            " the recipe"
        ),
    ):
        assert said in cli("run", before_any_model, "--out", tmp_path / "run2").err
    source = {"kind": "filter", "keep": "none", "source": str(whole[1])}
    more = {"stepwise": {"expression": "do", "answer": "end", "steps": 4}}
    for path, said in [
        (
            write([source, STEP], sampling=more),
            (
                "sampling.stepwise.steps 2, expected 4; take another run, or set"
                " sampling.stepwise.steps"
            ),
        ),
        (
            write([source, STEP], model={"template": "plain"}),
            "model.template 'chat', expected 'plain'",
        ),
        (write([source, STEP], model={"dtype": "bf16"}), "has trajectories of other base weights"),
    ]:
        outcome = cli("run", path, "--out", tmp_path / said[:20])
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert said in outcome.err
    leaking = write([source, STEP])
    leaking.write_text(
        leaking.read_text().replace("held_out: 4", "held_out: 11").replace("train: 8", "train: 1")
    )
    outcome = cli("run", leaking, "--out", tmp_path / "leaking")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "has a trajectory about problem 'gsm8k/" in outcome.err
    assert ", which this run holds out, expected training problems of its own" in outcome.err
    assert load(write([filtered, STEP])).stages[0].kind == "filter"
