"""SWiRL's recipes: each runs through all its stages, in its form for a CPU, with a tiny model and
few steps; the runs that compare filters are overrides of them (docs/methods.md)."""

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
IMITATE = "{kind: train, method: imitate, group: 1, batch: 64, steps: 30, states: 150"
IMITATE += ", learner: {loss: nll, lr: 1.0e-4, schedule: constant}}"


def collected(first: int) -> list[str]:
    """Overrides of a run that collects and judges, without RL; `first`: the collect stage."""
    return [f"stages.{first + 1}.keep=none", f"stages.{first + 2}=null"]


def compared(variant: str, first: int, source: Path, states: int) -> list[str]:
    """Overrides of a run that takes its trajectories from another one."""
    keep = "process" if variant == "sft" else variant
    judged, trained = f"stages.{first + 1}", f"stages.{first + 2}"
    return [
        *(f"stages.{number}=null" for number in range(first + 1)),
        f"{judged}.source={source}",
        f"{judged}.keep={keep}",
        *([] if keep in ("process", "both") else [f"{judged}.judge=null"]),
        f"{trained}={IMITATE}" if variant == "sft" else f"{trained}.states={states}",
        f"model.adapter={source / 'adapter'}",
        "eval.start=true",
    ]


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


def smaller(task: str, model: Path, path: Path, overrides: list[str]) -> list[str]:
    """Overrides that leave every stage in, with little to do."""
    train, test = SOURCES[task]
    sets: dict[str, object] = {
        "model.name": model,
        "model.dtype": "fp32",
        "task.source": DATA / train,
        "task.test_source": DATA / test,
        "task.train": 20,
        "task.held_out": 2,
        "eval.problems": 2,
        "sampling.attempt_tokens": 20,
        "sampling.result_tokens": 40,
        "sampling.stepwise.answer": "end",
        "sampling.stepwise.query" if task == "hotpotqa" else "sampling.stepwise.expression": "do",
    }
    left_out = sum(text in ("stages.0=null", "stages.1=null") for text in overrides)
    for number, stage in enumerate(recipes.load(path, overrides).stages, start=left_out):
        if isinstance(stage, recipes.Collect):
            sets |= {f"stages.{number}.problems": 6, f"stages.{number}.batch": 3}
        elif isinstance(stage, recipes.Filter):
            sets |= {f"stages.{number}.parts": 2}
        elif isinstance(stage, recipes.Train):
            few = {"steps": 1, "batch": 2, "group": min(stage.group, 3)}
            few |= {"states": 3} if stage.states is not None else {}
            sets |= {f"stages.{number}.{name}": value for name, value in few.items()}
    changed = [*overrides, *(f"{name}={value}" for name, value in sets.items())]
    return [word for text in changed for word in ("--set", text)]


@pytest.fixture(scope="module")
def tiny(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    outcome = start(teach, folder, 60, ("<do>{a} {sign} {b}</do>", "<end>{b}</end>")).wait()
    assert outcome.code == 0, outcome.err
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
@pytest.mark.parametrize("task", SOURCES)
def test_every_recipe_runs(task: str, start: Start, tiny: Path, tmp_path: Path) -> None:
    def ran(name: str, overrides: list[str]) -> Path:
        path, folder = ROOT / "recipes" / "cpu" / f"swirl_{task}.yaml", tmp_path / name
        options = smaller(task, tiny, path, overrides)
        outcome = start(run_with_luck, "run", str(path), *options, "--out", str(folder)).wait()
        assert outcome.code == 0, outcome.err
        node, metrics = recipes.load(folder / "recipe.yaml"), read_rows(folder / "metrics.jsonl")
        assert {row["stage"] for row in metrics} == set(range(len(node.stages))), name
        assert (folder / "adapter" / "adapter_model.safetensors").exists()
        return folder

    ran("whole", [])
    source = ran("collect", collected(1))
    for variant in VARIANTS:
        ran(variant, compared(variant, 1, source, 150))


@pytest.mark.parametrize("first", [0, 1], ids=["gpu", "cpu"])
@pytest.mark.parametrize("task", SOURCES)
def test_the_ablation_differs_in_its_filter_alone(task: str, first: int) -> None:
    """One set of trajectories, equal numbers of states; a judge only where the filter needs one."""
    path = ROOT / "recipes" / ("cpu" if first else "") / f"swirl_{task}.yaml"
    whole, collect = recipes.load(path), recipes.load(path, collected(first))
    assert [stage.kind for stage in collect.stages] == ["train"] * first + ["collect", "filter"]
    assert collect.stages[first] == whole.stages[first]
    for variant in VARIANTS[:-1]:
        node = recipes.load(path, compared(variant, first, Path("runs/c"), 9))
        filtered, trained = node.stages
        assert isinstance(filtered, recipes.Filter)
        assert (filtered.keep, filtered.source) == (variant, "runs/c")
        last = collect.stages[-1]
        assert isinstance(last, recipes.Filter)
        judge = None if variant in ("none", "outcome") else last.judge
        assert filtered.judge == judge, "verdicts are found again"
        assert trained == whole.stages[-1].model_copy(update={"states": 9})
        assert (node.task, node.sampling) == (whole.task, whole.sampling)
