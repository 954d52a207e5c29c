"""The bench: both sides do the same work, and what is said of it adds up. No figure here says how
fast anything is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import byte_tokenizer, save_tiny, tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from minirl.bench import Options, against_trl, bench, random_weights, render
from minirl.bench.ceilings import kv_bytes, matrices_of, products, weight_bytes
from minirl.bench.generate import Generate, stock
from minirl.bench.measure import Measurement, Report, Spread, by_turns, rates
from minirl.bench.random_weights import write_random_model
from minirl.bench.rollouts import (
    measure_rollouts,
    planned,
    r3_from_scratch,
    r3_step,
    search_plans,
    uneven_plans,
)
from minirl.bench.setup import Bench, open_bench, prompt_of
from minirl.bench.steps import measure_steps, our_step
from minirl.bench.updates import measure_updates, resting_mb, variants
from minirl.chat import Chat
from minirl.cli import app
from minirl.engine.lean import is_lean
from minirl.engine.learn.learner import Learner
from minirl.engine.model import attention
from minirl.episode import Ask
from minirl.errors import UserError

CPU = torch.device("cpu")
QUICK = Options(dtype="fp32", repeats=1, quick=True)
HAS_TRL = pytest.mark.skipif(bool(against_trl.missing()), reason=f"TRL {against_trl.missing()}")


@pytest.fixture(autouse=True)
def on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cuda" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def opened(folder: Path, tmp_path: Path) -> Bench:
    """A quick bench on a tiny model whose adapter does something."""
    return open_(folder, tmp_path)


def open_(folder: Path, tmp_path: Path, **settings: Any) -> Bench:
    made = open_bench(replace(QUICK, model=str(folder), **settings), tmp_path)
    with torch.no_grad():
        for i, p in enumerate(made.policy.trainable.values()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return made


def test_a_ratio_is_ours_over_theirs() -> None:
    line = Measurement(
        "rollout", "x", "tokens/s", Spread((30.0, 10.0, 20.0)), Spread((4.0, 5.0, 8.0)), "generate"
    )
    assert line.ratio == 20.0 / 5.0
    assert line.ratios == Spread((7.5, 2.0, 2.5))
    assert line.to_json()["ours"] == {
        "median": 20.0,
        "min": 10.0,
        "max": 30.0,
        "values": [30.0, 10.0, 20.0],
    }
    alone = replace(line, theirs=None, against="not installed")
    assert (alone.ratio, alone.ratios, alone.to_json()["theirs"]) == (None, None, None)
    report = Report({"processor": "p"}, "m", {"repeats": 3}, [line, alone])
    assert [row["ratio"] for row in json.loads(json.dumps(report.to_json()))["measurements"]] == [
        4.0,
        None,
    ]
    assert render(report).row_count == 2


def test_sides_run_by_turns_after_a_round_that_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: all of one side first, a warm-up that counts, seconds of the wrong side."""
    clock = [0.0]
    monkeypatch.setattr("minirl.bench.measure.time.perf_counter", lambda: clock[0])
    order = ""

    def work(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            nonlocal order
            order += name
            clock[0] += seconds * (100 if len(order) <= 2 else 1)
            return 6.0

        return run

    runs = by_turns({"ours": work("a", 2.0), "theirs": work("b", 3.0)}, 3, CPU)
    assert order == "abababab"
    assert runs == {"ours": [(2.0, 6.0)] * 3, "theirs": [(3.0, 6.0)] * 3}
    assert rates(runs["theirs"]) == Spread((2.0, 2.0, 2.0))


@pytest.mark.parametrize("tokens", [60, 85, 200])
def test_prompts_have_the_length_asked_for(tokens: int) -> None:
    chat = Chat(byte_tokenizer())
    lengths = [len(chat.prompt(prompt_of(chat, seed, tokens))) for seed in range(4)]
    assert all(tokens <= n <= tokens + 8 for n in lengths)
    assert len({prompt_of(chat, seed, tokens).prompt for seed in range(4)}) == 4


def test_both_sides_sample_the_same_lengths(opened: Bench) -> None:
    """Turn by turn. Catches: an end token that ends a forced completion, a limit that one side
    ignores, results told to one side alone."""
    generate = Generate(
        opened.policy.model.get_base_model(), opened.chat, CPU, rows=opened.sizes.rows
    )
    for plans in (uneven_plans(opened), search_plans(opened)):
        live = planned(opened, opened.sampler(), plans)
        assert [[len(t.tokens) for t in e.turns if t.sampled] for e in live] == [
            [n for n, _ in plan] for plan in plans
        ]
        with stock(opened.policy, opened.stock_attention):
            other = planned(opened, generate, plans)
        kinds = [
            [(t.kind, len(t.tokens)) for t in e.turns if t.sampled or t.kind == "prompt"]
            for e in other
        ]
        assert kinds == [
            [(t.kind, len(t.tokens)) for t in e.turns if t.sampled or t.kind == "prompt"]
            for e in live
        ]
    assert {e.turns[-1].kind for e in live} == {"attempt"}
    assert not opened.chat.eos  # else a forced length would be a matter of luck
    assert {len(plan) for plan in search_plans(opened)} <= {1, 2, 3, 4}
    assert max(n for ((n, _),) in uneven_plans(opened)) == opened.sizes.new_tokens
    episodes = r3_from_scratch(opened, generate)
    assert [t.kind for t in episodes[0].turns] == [
        "prompt",
        "attempt",
        "request",
        "reflection",
        "request",
        "retry",
    ]
    assert {e.sampled_tokens for e in episodes} == {3 * opened.sizes.new_tokens}


def test_generate_draws_from_the_models_own_distribution(
    opened: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its draw made greedy it says what the live sampler says greedily. Catches: padding that
    is seen, rows in another order, a limit that is another row's, the model's own penalties."""
    monkeypatch.setattr(
        torch, "multinomial", lambda probs, num_samples: probs.argmax(-1, keepdim=True)
    )
    base = opened.policy.model.get_base_model()
    base.generation_config.repetition_penalty = 5.0
    asks = [Ask(tuple(range(40, 40 + n)), 3 + n % 5, 0.0) for n in (30, 7, 19, 24, 11)]
    said = []
    for sampler in (Generate(base, opened.chat, CPU, rows=3), opened.sampler()):
        for key, ask in enumerate(asks):
            sampler.add(key, ask)
        done: dict[int, tuple[int, ...]] = {}
        while len(done) < len(asks):
            done |= {key: completion.tokens for key, completion in sampler.poll()}
        said.append(done)
    assert said[0] == said[1]
    assert base.generation_config.repetition_penalty == 5.0


def test_stock_is_the_same_model_and_leaves_no_trace(opened: Bench) -> None:
    policy, ids = opened.policy, torch.arange(40, 70)[None]
    base = policy.model.get_base_model()
    forwards = [m for m in policy.model.modules() if is_lean(m)]
    before, masters = (
        policy.model(input_ids=ids).logits,
        {n: p.data for n, p in policy.trainable.items()},
    )
    with stock(policy, opened.stock_attention, adapter=torch.bfloat16):
        assert base.config._attn_implementation == "sdpa"
        assert {p.dtype for p in policy.trainable.values()} == {torch.bfloat16}
        assert not [m for m in policy.model.modules() if is_lean(m)]
    with stock(policy, opened.stock_attention):
        assert torch.allclose(policy.model(input_ids=ids).logits, before, atol=1e-4)
    assert base.config._attn_implementation == attention.NAME
    assert all(
        p.data is masters[n] or p.data.data_ptr() == masters[n].data_ptr()
        for n, p in policy.trainable.items()
    )
    assert [m for m in policy.model.modules() if is_lean(m)] == forwards
    assert torch.equal(policy.model(input_ids=ids).logits, before)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3_text"])
def test_gradients_of_all_sides_agree(arch: str, tmp_path: Path) -> None:
    """The same loss on the same tokens: 1e-5 of the largest entry in float32. Catches: a shifted
    target, another weight, another mask."""
    opened = open_(save_tiny(tmp_path / "m", arch), tmp_path)
    found: dict[str, tuple[float, torch.Tensor]] = {}
    for name, side in variants(opened, 37, 11).items():
        trained = side()
        grads = [
            p.grad.flatten().clone() for p in opened.policy.trainable.values() if p.grad is not None
        ]
        found[name] = trained, torch.cat(grads)
    assert {trained for trained, _ in found.values()} == {11.0 * opened.sizes.group}
    ours = found["ours"][1]
    assert ours.abs().max() > 1e-3
    for name, (_, theirs) in found.items():
        assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max() + 1e-7, name


def test_the_plain_side_takes_plain_rows(opened: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: comparing the shared layout with itself, or a policy left without it."""
    widths: list[tuple[int, ...]] = []
    hidden = opened.policy.hidden
    monkeypatch.setattr(
        opened.policy,
        "hidden",
        lambda tokens, *args, **kw: (
            widths.append(tuple(tokens.shape)) or hidden(tokens, *args, **kw)
        ),
    )
    sides = variants(opened, 100, 20)
    widths.clear()
    sides["ours"]()
    sides["padded rows"]()
    assert widths == [
        (1, 192),
        (4, 120),
    ]  # 100 + 4 * 20 filled up to a multiple of 64; 4 rows of 100 + 20
    assert opened.policy.shares_prefixes


def test_updates_are_measured_on_every_shape(opened: Bench) -> None:
    opened = replace(opened, sizes=replace(opened.sizes, grid=((200, 8), (8, 24))))
    lines = measure_updates(opened)
    assert [line.what for line in lines] == ["update 200/8"] * 2 + ["update 8/24"] * 2
    assert [line.against for line in lines] == ["padded rows", "transformers rows"] * 2
    assert all(
        line.ratio is not None and line.ratio == line.ours.median / line.theirs.median
        for line in lines
        if line.theirs
    )


@pytest.mark.cuda
def test_an_update_with_a_shared_prefix_takes_less_memory(opened: Bench) -> None:
    opened = replace(opened, sizes=replace(opened.sizes, grid=((200, 8),)))
    memory = measure_updates(opened)[2]
    assert (memory.unit, memory.what) == ("MB", "update 200/8, peak memory")
    resting = resting_mb(opened)
    assert memory.theirs is not None
    # 232 tokens against 832: what is held above the model is under half.
    assert (memory.ours.median - resting) < 0.5 * (memory.theirs.median - resting)


def test_rests(opened: Bench) -> None:
    """Weights once (tied embeddings are one tensor), gradients and two moments of the adapter."""
    base = sum(p.numel() for n, p in opened.policy.model.named_parameters() if "lora" not in n)
    adapter = sum(p.numel() for p in opened.policy.trainable.values())
    extra = resting_mb(opened) * 1e6 - 4 * (base + 4 * adapter)
    assert 0 <= extra < 1000  # rotary tables


def test_rollouts_are_measured(opened: Bench) -> None:
    rows, new = opened.sizes.rows, opened.sizes.new_tokens
    lines = measure_rollouts(opened)
    assert [line.what for line in lines] == [
        f"single turn, {new} new",
        f"single turn, 1-{new} new",
        f"R3, 3 turns of {new}",
        "search-like, 1-4 uneven turns",
    ]
    assert f"{rows * new} tokens" in lines[0].note
    assert f"{3 * rows * new} tokens" in lines[2].note
    assert all(
        line.unit == "tokens/s" and line.theirs is not None and line.ours.median > 0
        for line in lines
    )
    opened.sampler().reset()


def test_generate_has_two_adapters_in_half_precision(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_(folder, tmp_path, dtype="bf16", repeats=1)
    held: list[tuple[torch.dtype, bool]] = []
    generate = Generate._generate

    def seen(self: Generate, asks: Any) -> Any:
        layer = next(m for m in bench.policy.model.modules() if hasattr(m, "lora_A"))
        held.append((layer.lora_A["default"].weight.dtype, is_lean(layer)))
        return generate(self, asks)

    monkeypatch.setattr(Generate, "_generate", seen)
    lines = measure_rollouts(bench)
    assert [line.against for line in lines] == [
        "generate",
        "generate, float32 adapter as in training",
    ] * 4
    assert lines[0].ours == lines[1].ours
    assert (
        held[:4] == [(torch.bfloat16, False), (torch.float32, False)] * 2
    )  # a round to warm up and one that counts, peft's own forward
    assert all(p.dtype == torch.float32 for p in bench.policy.trainable.values())


def test_ceilings_count_what_there_is(opened: Bench) -> None:
    """Hand-counted: a layer of 32 units, 4 heads of 8, 2 key heads, 64 inner; two layers, and a
    head of 259."""
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3
    matrices = matrices_of(opened)
    assert sum(m.weight.numel() for m in matrices) == 2 * layer + 259 * 32
    assert matrices[-1] is opened.policy.model.get_base_model().get_output_embeddings()
    assert products(opened, 10)() * 1e12 == pytest.approx(2 * 10 * (2 * layer + 259 * 32))
    adapter = sum(p.numel() for p in opened.policy.trainable.values())
    assert weight_bytes(opened) == 4 * (2 * layer + 259 * 32 + adapter)
    assert kv_bytes(opened, 8, 100) == 2 * 8 * 100 * 2 * 2 * 8 * 4


def test_a_step_trains_on_every_completion(opened: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: the reflection alone is trained, and the reference step trains as many tokens as ours.
    Catches dead groups."""
    episodes = r3_step(opened, opened.sampler())
    assert [e.reward for e in episodes] == [0.0, 1.0] * (opened.sizes.rows // 2)
    assert {e.trained_tokens for e in episodes} == {opened.sizes.new_tokens}
    assert [t.kind for t in episodes[0].problem.context] == ["prompt", "attempt"]
    seen: list[int] = []
    update = Learner.update
    monkeypatch.setattr(
        Learner, "update", lambda self, groups: seen.append(len(groups)) or update(self, groups)
    )
    assert our_step(opened, r3_step)() == opened.sizes.rows
    assert seen == [opened.sizes.prompts]


def test_without_trl_ours_is_measured_alone(opened: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against_trl, "version", lambda: None)
    lines = measure_steps(opened)
    assert [line.what for line in lines] == ["GRPO step", "R3 step"]
    assert {line.against for line in lines} == {"not installed: pip install 'trl>=1.16,<1.17'"}
    assert all(
        line.theirs is None and line.ratio is None and len(line.ours.values) == 1 for line in lines
    )
    monkeypatch.setattr(against_trl, "version", lambda: "0.9.1")
    assert (
        against_trl.missing()
        == "TRL 0.9.1 installed, expected 1.16.*: pip install 'trl>=1.16,<1.17'"
    )


@HAS_TRL
def test_whole_steps_beside_trl(folder: Path, tmp_path: Path) -> None:
    opened = open_(folder, tmp_path, repeats=1, step_tokens=(75, 10))
    before = {n: p.detach().clone() for n, p in opened.policy.trainable.items()}
    lines = measure_steps(opened)
    assert [line.against for line in lines] == [f"TRL {against_trl.version()}"] * 2
    for line in lines:
        assert line.theirs is not None
        assert len(line.ours.values) == len(line.theirs.values) == 1
        assert line.ratio == line.ours.median / line.theirs.median
    assert all(torch.allclose(before[n], p, atol=1e-6) for n, p in opened.policy.trainable.items())


@HAS_TRL
def test_trl_trains_the_tokens_that_we_train(
    opened: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R3 through rollout_func: the reflection after prompt, attempt and request. Catches: the retry
    trained, the context lost."""
    from trl import GRPOTrainer

    seen: list[dict[str, Any]] = []
    loss = GRPOTrainer._compute_loss
    monkeypatch.setattr(
        GRPOTrainer,
        "_compute_loss",
        lambda self, model, inputs: seen.append(inputs) or loss(self, model, inputs),
    )
    ours, theirs, peak = against_trl.by_turns_with_trl(opened, lambda: 1.0, r3_step)
    assert (len(ours), len(theirs), peak) == (1, 1, None)
    assert theirs[0][0] > 0
    sizes = opened.sizes
    assert len(seen) == 2 * sizes.prompts
    assert {tuple(batch["completion_ids"].shape) for batch in seen} == {
        (sizes.group, sizes.new_tokens)
    }
    assert all(batch["advantages"].abs().min() > 0 for batch in seen)
    episodes = r3_step(opened, opened.sampler())
    lengths = {sum(len(t.tokens) for t in e.turns[:3]) for e in episodes}
    assert {int(n) for batch in seen for n in batch["prompt_mask"].sum(1)} <= {
        n + d for n in lengths for d in (-1, 0, 1)
    }


def test_random_weights_have_the_shape_asked_for(tmp_path: Path) -> None:
    """From a config.json alone: a byte tokenizer. In NF4, through the real loading path."""
    config = tmp_path / "shape.json"
    tiny_model(
        "qwen2", hidden_size=64, intermediate_size=128, num_hidden_layers=3, vocab_size=400
    ).config.to_json_file(config)
    opened = open_bench(
        replace(QUICK, random_weights=str(config), quantize="nf4", dtype="bf16"), tmp_path
    )
    base = opened.policy.model.get_base_model()
    assert (base.config.model_type, base.config.num_hidden_layers, base.config.vocab_size) == (
        "qwen2",
        3,
        400,
    )
    assert opened.chat.text(opened.chat.prompt(opened.problems[0])).endswith(
        f"{opened.problems[0].prompt}\nassistant\n"
    )
    *body, head = matrices_of(opened)
    assert (
        sum(m.weight.numel() * m.weight.element_size() for m in body)
        == sum(m.in_features * m.out_features for m in body) / 2
    )
    assert head.weight.dtype == torch.bfloat16
    assert variants(opened, 24, 8)["ours"]() == 8 * opened.sizes.group


def test_a_tokenizer_beside_the_configuration_is_taken(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    made = write_random_model(str(source), tmp_path / "made", torch.float32, CPU)
    assert (
        json.loads((made / "tokenizer.json").read_text())["model"]["vocab"]
        == json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    )
    with (
        safe_open(made / "model-00000.safetensors", "pt") as drawn,
        safe_open(source / "model.safetensors", "pt") as given,
    ):
        name = "model.layers.0.mlp.up_proj.weight"
        assert drawn.get_tensor(name).shape == given.get_tensor(name).shape
        assert not torch.equal(drawn.get_tensor(name), given.get_tensor(name))


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_are_drawn_in_parts(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: weights left out of the index, norms that are drawn, biases that are not zero, an
    output head drawn beside the embedding that it is tied to, all of the model in memory at once.
    """
    monkeypatch.setattr(random_weights, "PART_BYTES", 40_000)
    config = tmp_path / "shape.json"
    tiny_model(
        "qwen2", hidden_size=64, intermediate_size=128, vocab_size=400, tie_word_embeddings=tied
    ).config.to_json_file(config)
    made = write_random_model(str(config), tmp_path / "made", torch.float32, CPU)
    index = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    parts = sorted(made.glob("*.safetensors"))
    assert len(parts) > 3
    assert {path.name for path in parts} == set(index.values())
    assert all(path.stat().st_size < 200_000 for path in parts)
    assert ("lm_head.weight" in index) is not tied
    model, report = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    layer, embedding = model.model.layers[0], model.model.embed_tokens.weight
    assert (model.lm_head.weight is embedding) is tied
    for weight in (embedding, layer.mlp.up_proj.weight, model.lm_head.weight):
        assert float(weight.detach().std()) == pytest.approx(
            model.config.initializer_range, rel=0.05
        )
    assert set(layer.input_layernorm.weight.tolist()) == {1.0}
    assert set(layer.self_attn.q_proj.bias.tolist()) == {0.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ["--sections", "rollout,steps"],
            "--sections: got 'steps', expected one of rollout, update, step, ceilings",
        ),
        (["--sections", ""], "--sections: got ''"),
        (["--quantize", "int4"], "--quantize: got 'int4', expected one of none, nf4, int8"),
        (["--dtype", "half"], "--dtype: got 'half'"),
        (["--repeats", "0"], "--repeats: got 0, expected 1 or more"),
        (
            ["--step-tokens", "512x12"],
            "--step-tokens: got '512x12', expected prompt and new tokens, e.g. 512/128",
        ),
        (["--step-tokens", "0/4"], "--step-tokens: got '0/4'"),
        (["--json", "nowhere/at/all.json"], "--json: nowhere/at is not a folder"),
    ],
)
def test_options_that_cannot_be_run(change: list[str], said: str, folder: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "--model", str(folder), *change])
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_configuration_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    for source, said in (
        ("a/b", "the hub does not answer"),
        (str(tmp_path / "config.json"), "not the configuration of a causal"),
    ):
        with pytest.raises(UserError, match=said):
            open_bench(replace(QUICK, random_weights=source), tmp_path / "out")


def test_the_command_writes_every_number(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end, TRL missing. Catches: a section left out, JSON that is not the table's numbers, a
    machine that is not named."""
    monkeypatch.setattr(against_trl, "version", lambda: None)
    path = tmp_path / "bench.json"
    arguments = [
        "bench",
        "--model",
        str(folder),
        "--dtype",
        "fp32",
        "--quick",
        "--repeats",
        "2",
        "--json",
        str(path),
    ]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(path.read_text())
    lines = found["measurements"]
    assert [
        s
        for i, s in enumerate(row["section"] for row in lines)
        if i == 0 or s != lines[i - 1]["section"]
    ] == [
        "rollout",
        "update",
        "step",
        "ceilings",
    ]
    assert {"processor", "threads", "versions", "dtype"} <= set(found["machine"])
    assert found["machine"]["dtype"] == "float32"
    assert found["settings"]["repeats"] == 2
    for row in lines:
        values = row["ours"]["values"]
        assert row["ours"]["min"] <= row["ours"]["median"] <= row["ours"]["max"]
        # A difference of two short times may come out anywhere.
        assert min(values) > 0 or row["what"].startswith("decode")
        assert (row["ratio"] is None) == (row["theirs"] is None)
        if row["theirs"]:
            assert row["ratio"] == pytest.approx(row["ours"]["median"] / row["theirs"]["median"])
    assert "not installed: pip install 'trl>=1.16,<1.17'" in {row["against"] for row in lines}
    assert "single turn, 8 new" in result.stdout


def test_the_report_is_kept_after_each_section(folder: Path) -> None:
    kept: list[int] = []
    said: list[str] = []
    options = replace(QUICK, model=str(folder), sections=("ceilings", "update"))
    report = bench(options, said.append, lambda found: kept.append(len(found.measurements)))
    assert kept == [4, len(report.measurements)]
    assert said[1:] == ["measuring: update", "measuring: ceilings"]
