"""The reward model: it learns what tells right from wrong, says it of each sample alone, and its
folder is plain peft."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from conftest import Cli, Start, minirl, recipe
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_train import rows, until
from transformers import AutoModelForSequenceClassification

from minirl import recipe as recipes
from minirl.engine.learn.reward_model import CONFIG, WEIGHTS, RewardModel, Sample
from minirl.engine.model import load as models
from minirl.engine.model.adapter import adapter_state
from minirl.errors import UserError
from minirl.loop.train import train

CPU = torch.device("cpu")
NODE = recipes.RewardModel(kind="reward_model", lr=1e-2, batch=16)
RULE, OTHER = 50, 60


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> recipes.Model:
    folder = tiny.save_tiny(tmp_path_factory.mktemp("tiny") / "model")
    return recipes.Model(name=str(folder), dtype="fp32", lora=recipes.Lora(rank=4, alpha=8))


@pytest.fixture(scope="module")
def adapter(node: recipes.Model) -> dict[str, torch.Tensor]:
    """That of a policy that has learned something."""
    state = adapter_state(models.load_model(node).model)
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.1 for name, tensor in state.items()
    }


def samples(count: int, seed: int, share: float = 0.3) -> list[Sample]:
    """Random ids; a right sample has RULE as its last but one, a wrong one OTHER."""
    rng = Random(seed)
    made = []
    for _ in range(count):
        right = rng.random() < share
        text = [rng.randrange(97, 100) for _ in range(rng.randrange(2, 20))]
        made.append(Sample((*text, RULE if right else OTHER, tiny.IM_END), right))
    return made


def fitted(
    node: recipes.Model, adapter: dict[str, torch.Tensor], **numbers: Any
) -> tuple[RewardModel, list[dict[str, float]]]:
    model, logged = RewardModel.fresh(node, adapter, 0, CPU), []
    facts = model.fit(
        samples(160, 1),
        samples(60, 2),
        NODE.model_copy(update=numbers),
        0,
        logged.append,
        lambda: False,
    )
    assert facts is not None
    assert logged[-1] == {"step": len(logged) - 1, **facts}
    return model, logged


@pytest.fixture(scope="module")
def trained(
    node: recipes.Model, adapter: dict[str, torch.Tensor]
) -> tuple[RewardModel, list[dict[str, float]]]:
    return fitted(node, adapter)


def test_it_starts_from_the_policy_and_knows_nothing(
    node: recipes.Model, adapter: dict[str, torch.Tensor]
) -> None:
    model = RewardModel.fresh(node, adapter, 0, CPU)
    state = adapter_state(model.loaded.model)
    assert all(torch.equal(state[name], tensor) for name, tensor in adapter.items())
    assert {name: tuple(state[name].shape) for name in state.keys() - adapter.keys()} == {
        "base_model.model.score.weight": (2, 32)
    }
    assert model([s.tokens for s in samples(5, 3)]) == [0.5] * 5
    assert all(p.dtype == torch.float32 for p in model.loaded.model.parameters() if p.requires_grad)


def test_it_learns_what_tells_right_from_wrong(
    trained: tuple[RewardModel, list[dict[str, float]]],
) -> None:
    model, logged = trained
    assert [row["step"] for row in logged] == [0, 1, 2]
    assert logged[-1]["accuracy"] == logged[-1]["auc"] == 1.0
    assert logged[-1]["right"] == sum(s.right for s in samples(60, 2)) / 60
    assert logged[0]["loss"] > logged[-1]["loss"]
    assert logged[0]["loss"] < math.log(2) * 1.2
    chances = model([s.tokens for s in samples(30, 9)])
    assert all(
        (chance > 0.9) if s.right else (chance < 0.1)
        for chance, s in zip(chances, samples(30, 9), strict=True)
    )


@pytest.mark.parametrize(
    ("quantize", "dtype"), [("none", "bf16"), ("none", "fp16"), ("nf4", "bf16"), ("int8", "bf16")]
)
def test_it_learns_from_float32_masters_whatever_it_computes_in(
    node: recipes.Model, adapter: dict[str, torch.Tensor], quantize: str, dtype: str
) -> None:
    model, logged = fitted(node.model_copy(update={"quantize": quantize, "dtype": dtype}), adapter)
    assert logged[-1]["auc"] == 1.0
    assert logged[0]["loss"] < 1.0
    assert {p.dtype for p in model.loaded.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_gradient_that_overflows_is_dropped(
    node: recipes.Model, adapter: dict[str, torch.Tensor]
) -> None:
    """Catches: infinity clipped to NaN, which is in the weights for good after one step."""
    model = RewardModel.fresh(node, adapter, 0, CPU)
    weight, calls = next(p for p in model.loaded.model.parameters() if p.requires_grad), []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient / 0.0 if len(calls) == 3 else gradient

    weight.register_hook(overflow)
    facts = model.fit(samples(160, 1), samples(60, 2), NODE, 0, lambda row: None, lambda: False)
    assert len(calls) > 3
    assert facts is not None
    assert facts["auc"] == 1.0
    assert all(bool(p.isfinite().all()) for p in model.loaded.model.parameters())


def test_it_learns_the_same_with_gradient_checkpointing(
    node: recipes.Model,
    adapter: dict[str, torch.Tensor],
    trained: tuple[RewardModel, list[dict[str, float]]],
) -> None:
    model, logged = fitted(node.model_copy(update={"gradient_checkpointing": True}), adapter)
    assert any(
        getattr(module, "gradient_checkpointing", False) for module in model.loaded.model.modules()
    )
    assert [row["loss"] for row in logged] == pytest.approx(
        [row["loss"] for row in trained[1]], rel=1e-4
    )


def test_equal_runs_are_equal_bit_for_bit(
    node: recipes.Model,
    adapter: dict[str, torch.Tensor],
    trained: tuple[RewardModel, list[dict[str, float]]],
) -> None:
    again, logged = fitted(node, adapter)
    one, two = (adapter_state(model.loaded.model) for model in (trained[0], again))
    assert logged == trained[1]
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_micro_batches_do_not_change_what_is_learned(
    node: recipes.Model,
    adapter: dict[str, torch.Tensor],
    trained: tuple[RewardModel, list[dict[str, float]]],
) -> None:
    _, cut = fitted(node, adapter, micro_batch=2)
    assert cut[0]["loss"] == pytest.approx(trained[1][0]["loss"], rel=1e-3)


def test_a_sample_is_scored_alone_or_among_others(
    trained: tuple[RewardModel, list[dict[str, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = trained[0], [s.tokens for s in samples(40, 4)]
    together = model(asked)
    assert together == pytest.approx([model([row])[0] for row in asked], abs=1e-6)
    monkeypatch.setattr("minirl.engine.learn.reward_model.SCORED_TOKENS", 50)
    assert model(asked) == pytest.approx(together, abs=1e-6)
    assert model([]) == []


def test_balance(node: recipes.Model, adapter: dict[str, torch.Tensor]) -> None:
    """From samples that hold no sign of their label, the balanced one learns one half, the other
    the share of right ones."""
    blind = [Sample((97, 98, tiny.IM_END), number % 10 == 0) for number in range(160)]
    found = []
    for balance in (True, False):
        model = RewardModel.fresh(node, adapter, 0, CPU)
        model.fit(
            blind,
            [],
            NODE.model_copy(update={"balance": balance, "epochs": 6}),
            0,
            lambda row: None,
            lambda: False,
        )
        found += model([blind[0].tokens])
    assert found[0] == pytest.approx(0.5, abs=0.1)
    assert found[1] == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_to_tell_apart(
    node: recipes.Model, adapter: dict[str, torch.Tensor], share: float
) -> None:
    model = RewardModel.fresh(node, adapter, 0, CPU)
    with pytest.raises(
        UserError,
        match=r"right and .* wrong samples to learn from, expected some of each; collect more",
    ):
        model.fit(samples(10, 0, share), [], NODE, 0, lambda row: None, lambda: False)


def test_its_folder_is_plain_peft(
    node: recipes.Model, trained: tuple[RewardModel, list[dict[str, float]]], tmp_path: Path
) -> None:
    model, asked = trained[0], [s.tokens for s in samples(10, 5)]
    model.save(tmp_path, {"auc": 1.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        WEIGHTS,
        CONFIG,
    ]
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "base": node.name,
        "labels": ["wrong", "right"],
        "auc": 1.0,
    }
    assert RewardModel.open(tmp_path, node)(asked) == model(asked)
    plain = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(node.name, num_labels=2), tmp_path
    ).eval()
    with torch.no_grad():
        theirs = [
            plain(input_ids=torch.tensor([row])).logits.softmax(-1)[0, 1].item() for row in asked
        ]
    assert theirs == pytest.approx(model(asked), abs=1e-6)


def test_folders_that_hold_no_reward_model(
    node: recipes.Model, trained: tuple[RewardModel, list[dict[str, float]]], tmp_path: Path
) -> None:
    trained[0].save(tmp_path, {})

    def refused(folder: Path) -> str:
        with pytest.raises(UserError, match=r"no reward model of .* that can be read") as caught:
            RewardModel.open(folder, node)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    refused(tmp_path / "none")
    for name, text in (
        (CONFIG, "{"),
        (CONFIG, "[]"),
        (CONFIG, json.dumps({"base": "other", "labels": ["wrong", "right"]})),
        (WEIGHTS, "x"),
    ):
        folder = tmp_path / "copy"
        shutil.copytree(tmp_path, folder, ignore=shutil.ignore_patterns("copy"))
        (folder / name).write_text(text)
        refused(folder)
        shutil.rmtree(folder)
    shutil.copytree(tmp_path, tmp_path / "less", ignore=shutil.ignore_patterns("less"))
    stored = load_file(tmp_path / WEIGHTS)
    stored.popitem()
    save_file(stored, tmp_path / "less" / WEIGHTS)
    refused(tmp_path / "less")


STAGES: list[dict[str, Any]] = [
    {"kind": "collect", "problems": 10, "samples": 40, "batch": 5, "keep": "all", "keep_each": 40},
    {"kind": "reward_model", "epochs": 2, "batch": 16, "lr": 1e-3, "held_out": 0.5},
]


@pytest.fixture(scope="module")
def whole(cli: Cli, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("reward")
    path = recipe(folder / "r.yaml", tiny, STAGES)
    outcome = cli("run", path, "--out", folder / "run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "{'loss'" not in outcome.out, "the Trainer keeps quiet"
    return path, folder / "run"


def test_a_run_with_a_reward_model(cli: Cli, whole: tuple[Path, Path], tmp_path: Path) -> None:
    metrics = [row for row in rows(whole[1], "metrics") if row["stage"] == 1]
    assert [(row["step"], "loss" in row, 0 <= row["auc"] <= 1) for row in metrics] == [
        (0, True, True),
        (1, True, True),
    ]
    facts = json.loads((whole[1] / "reward_model" / CONFIG).read_text())
    assert facts["accuracy"] == metrics[-1]["accuracy"]
    folder = tmp_path / "run"
    shutil.copytree(whole[1], folder)
    assert cli("report", folder).code == 0
    assert "Reward model, new samples" in (folder / "report.html").read_text()
    outcome = cli("eval", folder, "--samples", 3, "--rerank", folder)
    assert outcome.code == 0, outcome.err
    (row,) = rows(folder, "later_evals")
    assert row["temperature"] == 1.0, "samples at temperature 0 would be equal"
    assert row["changed"] == [f"rerank {folder}"]
    assert all(len(problem["p_right"]) == 3 for problem in row["problems"])
    share = sum(problem["scores"]["reranked"][0] for problem in row["problems"]) / 4
    assert f"reranked@3 {share:.1%} [" in outcome.out
    assert cli("eval", folder, "--samples", 3).code == 0
    assert len(rows(folder, "later_evals")) == 2, "another kind of evaluation, kept beside it"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--rerank", "."],
            (
                "--rerank: got 1 samples of 1 tries, expected at least 2 samples of one try; add"
                " --samples 8"
            ),
        ),
        (["--samples", "2", "--rerank", "."], "no recipe.yaml there; expected a run folder"),
        (
            ["--samples", "2", "--vote"],
            "eval.vote: got true for task 'countdown', expected gsm8k, svamp or mathqa",
        ),
        (["--samples", "0"], "eval.samples: Input should be greater than 0"),
        (["--vote", "--table"], "--table: got it with --samples, --vote, --rerank, --base or"),
        (["--base", "--table"], "--method, expected none of these: it compares single tries"),
        (["--table", "--method", "naive_rag"], "--table: got it with --samples, --vote"),
    ],
)
def test_options_that_cannot_be(
    cli: Cli, whole: tuple[Path, Path], options: list[str], said: str
) -> None:
    outcome = cli("eval", whole[1], *options)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert said in outcome.err


def test_several_processes_are_refused_before_anything_is_done(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a refusal after the hours of the warm-up."""
    monkeypatch.setattr(
        "minirl.loop.train.Accelerator",
        lambda **_: SimpleNamespace(num_processes=2, is_main_process=True),
    )
    node = recipes.load(recipe(tmp_path / "r.yaml", tiny, STAGES))
    with pytest.raises(
        UserError,
        match=(
            r"stages\[1\]: a reward model is trained by one process; run the recipe without"
            r" `accelerate launch`"
        ),
    ):
        train(node, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_killed_reward_model_is_begun_again(
    start: Start, cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    """Killed and interrupted in the middle of the stage, the run ends in the same bytes."""
    path = recipe(tmp_path / "r.yaml", tiny, [STAGES[0], STAGES[1] | {"epochs": 12}])
    assert cli("run", path, "--out", tmp_path / "whole").code == 0
    folder = tmp_path / "run"
    for stop in ("kill", "interrupt"):
        job = start(minirl, "run", str(path), "--out", str(folder))
        until(job, lambda job=job: "1 reward model 3/12" in job.out)  # type: ignore[misc]
        if stop == "kill":
            job.process.kill()
            job.process.join()
        else:
            job.signal(2)
            assert job.wait().code == 130
        assert not (folder / "reward_model").exists()
        assert json.loads((folder / "state.json").read_text())["position"] == {
            "stage": 1,
            "step": 0,
        }
    assert cli("run", path, "--out", folder).code == 0
    for name in (
        "metrics.jsonl",
        f"reward_model/{WEIGHTS}",
        f"reward_model/{CONFIG}",
        "kept/0.jsonl",
    ):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
