"""SWiRL's recipes: each runs through all its stages, CPU part and data as they are, with a tiny
model and few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Start, minirl, teach

from minirl import recipe as recipes
from minirl.io.files import read_rows

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
SOURCES = {
    "gsm8k": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
    "hotpotqa": ("hotpotqa/train_100.json", "hotpotqa/dev_distractor_100.jsonl"),
}
VARIANTS = ("none", "process", "outcome", "both", "sft")


def run_with_luck(*argv: str) -> None:
    """The command line, with rules that approve most of what is said and answers that are all
    right: a tiny model solves nothing."""
    from hashlib import blake2b

    from minirl.loop import filter_stage as filtering
    from minirl.methods.swirl import filters
    from minirl.methods.swirl.rules import Rules

    passes = filters.passes
    Rules._approves = lambda self, case, problem: blake2b(case.message.encode()).digest()[0] % 8 > 0  # type: ignore[method-assign]
    filtering.passes = lambda judged, keep, at: passes(judged._replace(right=True), keep, at)  # type: ignore[attr-defined]
    minirl(*argv)


def smaller(path: Path, task: str, model: Path) -> list[str]:
    """Overrides that leave every stage in, with little to do."""
    node = recipes.load(path, on_cpu=True)
    train, test = SOURCES[task]
    sets = {
        "model.name": model,
        "model.dtype": "fp32",
        "task.source": DATA / train,
        "task.test_source": DATA / test,
    }
    sets |= {
        "task.train": 20,
        "task.held_out": 2,
        "eval.problems": 2,
        "sampling.attempt_tokens": 20,
        "sampling.result_tokens": 40,
    }
    sets |= {
        "sampling.stepwise.answer": "end",
        "sampling.stepwise.query" if task == "hotpotqa" else "sampling.stepwise.expression": "do",
    }
    for number, stage in enumerate(node.stages):
        if isinstance(stage, recipes.Collect):
            sets |= {f"stages.{number}.problems": 6, f"stages.{number}.batch": 3}
        elif isinstance(stage, recipes.Filter):
            sets |= {f"stages.{number}.parts": 2}
        elif isinstance(stage, recipes.Train):
            sets |= {
                f"stages.{number}.steps": 1,
                f"stages.{number}.batch": 2,
                f"stages.{number}.group": min(stage.group, 3),
            }
            sets |= {f"stages.{number}.states": 3} if stage.states is not None else {}
    return [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def tiny(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    outcome = start(teach, folder, 60, ("<do>{a} {sign} {b}</do>", "<end>{b}</end>")).wait()
    assert outcome.code == 0, outcome.err
    return folder


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
@pytest.mark.parametrize("task", SOURCES)
def test_every_recipe_runs(task: str, start: Start, tiny: Path, tmp_path: Path) -> None:
    def ran(variant: str, *more: str) -> Path:
        path, folder = ROOT / "recipes" / f"swirl_{task}{variant}.yaml", tmp_path / f"run{variant}"
        outcome = start(
            run_with_luck, "run", str(path), *smaller(path, task, tiny), *more, "--out", str(folder)
        ).wait()
        assert outcome.code == 0, outcome.err
        node, metrics = recipes.load(folder / "recipe.yaml"), read_rows(folder / "metrics.jsonl")
        assert {row["stage"] for row in metrics} == set(range(len(node.stages))), variant
        assert (folder / "adapter" / "adapter_model.safetensors").exists()
        return folder

    ran("")
    collected = ran("_collect")
    for variant in VARIANTS:
        ran(
            f"_{variant}",
            "--set",
            f"stages.0.source={collected}",
            "--set",
            f"model.adapter={collected / 'adapter'}",
        )


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("task", SOURCES)
def test_the_ablation_differs_in_its_filter_alone(task: str, on_cpu: bool) -> None:
    """Equal states, equal numbers of trained actions, one set of trajectories; a judge only where
    the filter needs one."""
    found = {
        v: recipes.load(ROOT / "recipes" / f"swirl_{task}_{v}.yaml", on_cpu=on_cpu)
        for v in VARIANTS
    }
    whole = recipes.load(ROOT / "recipes" / f"swirl_{task}.yaml", on_cpu=on_cpu)
    collect = recipes.load(ROOT / "recipes" / f"swirl_{task}_collect.yaml", on_cpu=on_cpu)
    counts = set()
    for variant, node in found.items():
        filtered, trained = node.stages
        assert isinstance(filtered, recipes.Filter)
        assert isinstance(trained, recipes.Train)
        assert filtered.keep == ("process" if variant == "sft" else variant)
        assert (filtered.judge is None) == (variant in ("none", "outcome"))
        counts.add((trained.states, trained.group * trained.batch * trained.steps))
        assert (
            (node.task, node.sampling)
            == (whole.task, whole.sampling)
            == (collect.task, collect.sampling)
        )
    assert len(counts) == 1
    judged = {
        node.stages[0].judge
        for node in (found["process"], found["both"], found["sft"])
        if isinstance(node.stages[0], recipes.Filter)
    }
    assert judged == {s.judge for s in collect.stages if isinstance(s, recipes.Filter)}, (
        "verdicts are found again"
    )
