"""Loading: dtypes, frozen base and float32 adapter, quantisation on a CPU, the lean LoRA forward,
saving for plain peft."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from minirl import recipe
from minirl.engine import lean
from minirl.engine.model import load as models
from minirl.engine.model import lora
from minirl.engine.model.adapter import adapter_state, load_adapter_state, save_adapter
from minirl.engine.model.device import pick_dtype
from minirl.errors import UserError

CPU = torch.device("cpu")
HAS_AVX512_BF16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from an architecture to a saved tiny model of it (wide enough for blocks of 64 to
    be quantised)."""
    root = tmp_path_factory.mktemp("models")

    def folder(arch: str) -> str:
        path: Path = root / arch
        if not path.is_dir():
            tiny.save_tiny(path, arch, hidden_size=64, intermediate_size=128)
        return str(path)

    return folder


def node(name: str, **settings: Any) -> recipe.Model:
    return recipe.Model(
        name=name, **{"dtype": "fp32", "lora": recipe.Lora(rank=4, alpha=8), **settings}
    )


def stir(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every trainable weight a random value, so that B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def ids(seed: int = 0, rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def lora_gradients(model: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(input_ids=x).logits.float()
    logits.log_softmax(-1)[:, :-1].gather(-1, x[:, 1:, None]).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    assert got
    flat = [
        torch.cat([grads[name].flatten().float() for name in sorted(expected)])
        for grads in (got, expected)
    ]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_every_architecture_loads_frozen_with_a_float32_adapter(folders: Any, arch: str) -> None:
    loaded = models.load_model(node(folders(arch), dtype="bf16"), device=CPU)
    trained = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(
        p.dtype == torch.bfloat16
        for name, p in loaded.model.named_parameters()
        if name not in trained
    )
    assert not any("lm_head" in name for name in trained)
    stir(loaded.model)
    grads = lora_gradients(loaded.model, ids())
    assert grads.keys() == trained.keys()
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in grads.values())
    assert "\n" not in models.describe(loaded)


def test_dropout_is_zero_so_train_mode_computes_what_eval_mode_does(tmp_path: Path) -> None:
    folder = str(tiny.save_tiny(tmp_path / "model", "llama", attention_dropout=0.5))
    model = models.load_model(node(folder), device=CPU).model
    assert not model.training
    stir(model)
    quiet = model(input_ids=ids()).logits
    assert torch.equal(model.train()(input_ids=ids()).logits, quiet)


def test_the_seed_alone_draws_the_adapter(folders: Any) -> None:
    before = torch.get_rng_state()
    one, same, other = (
        adapter_state(models.load_model(node(folders("llama")), seed=s, device=CPU).model)
        for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities: dict[str, bool] = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert pick_dtype("auto", CPU) == torch.float32
    capabilities["avx512_bf16"] = True
    assert pick_dtype("auto", CPU) == torch.bfloat16
    assert pick_dtype("fp32", CPU) == torch.float32
    for capability, dtype in (
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert pick_dtype("auto", torch.device("cuda:0")) == dtype


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_lean_forward_is_peft_s_own_in_float32(folders: Any, quantize: str) -> None:
    model = models.load_model(node(folders("qwen2"), quantize=quantize), device=CPU).model
    stir(model)
    ours, our_grads = model(input_ids=ids()).logits, lora_gradients(model, ids())
    with model.disable_adapter():
        off = model(input_ids=ids()).logits
    assert lean.is_lean(next(m for m in model.modules() if isinstance(m, LoraLayer)))
    with lean.stock(model):
        own, own_grads = model(input_ids=ids()).logits, lora_gradients(model, ids())
    # INT8 layers round their input to 8 bits as well, so the last bit of a float32 can flip a step
    # of 1/127.
    bound = 1e-2 if quantize == "int8" else 1e-6
    assert float((ours - own).detach().norm() / own.detach().norm()) < bound
    assert relative_error(our_grads, own_grads) < bound
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids()).logits, off)
    assert (ours - off).abs().max() > 0.1


def test_lean_forward_follows_switched_and_merged_adapters(folders: Any) -> None:
    model = models.load_model(node(folders("llama")), device=CPU).model
    stir(model)
    first = model(input_ids=ids()).logits
    model.add_adapter("reference", copy.copy(model.peft_config["default"]))
    model.set_adapter("reference")
    with model.disable_adapter():
        off = model(input_ids=ids()).logits
    assert torch.equal(model(input_ids=ids()).logits, off)  # a fresh adapter has B = 0
    model.set_adapter("default")
    assert torch.equal(model(input_ids=ids()).logits, first)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids()).logits, first, atol=1e-4, rtol=1e-4)


def test_lean_forward_leaves_dora_and_dropout_to_peft() -> None:
    for settings, changed in (
        ({}, 14),
        ({"use_dora": True}, 0),
        ({"lora_dropout": 0.1}, 0),
        ({"lora_bias": True}, 0),
    ):
        model = get_peft_model(
            tiny.tiny_model(), LoraConfig(r=2, target_modules="all-linear", **settings)
        )
        assert lora.lean_lora(model) == changed


def test_lean_forward_computes_in_the_input_s_dtype(folders: Any) -> None:
    model = models.load_model(node(folders("llama"), dtype="bf16"), device=CPU).model
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        linear = torch.nn.functional.linear
        patch.setattr(
            torch.nn.functional,
            "linear",
            lambda x, w, *b: calls.append((x.dtype, w.dtype)) or linear(x, w, *b),
        )
        layer(torch.randn(1, layer.in_features, dtype=torch.bfloat16))
    assert len(calls) == 2  # the third product is addmm_, which refuses mixed types
    assert set(calls) == {(torch.bfloat16, torch.bfloat16)}


def dequantised(model: PeftModel) -> PeftModel:
    """The same model with its NF4 layers written out as plain linear ones: what the gradients of
    the NF4 model should be."""
    import bitsandbytes.functional as bnb

    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, LoraLayer):
            base = module.base_layer
            weight = bnb.dequantize_4bit(base.weight.data, base.weight.quant_state)
            linear = torch.nn.Linear(
                base.in_features, base.out_features, bias=base.bias is not None, dtype=weight.dtype
            )
            linear.weight.data.copy_(weight)
            if base.bias is not None:
                linear.bias.data.copy_(base.bias.data)
            module.base_layer = linear.requires_grad_(False)
    return plain


@pytest.mark.parametrize("arch", ["llama", "qwen2"])  # qwen2: biased layers
def test_nf4_gradients_survive_an_eval_forward(folders: Any, arch: str) -> None:
    model = models.load_model(node(folders(arch), quantize="nf4"), device=CPU).model
    stir(model)
    plain = dequantised(model)
    with torch.no_grad():
        error = (model.eval()(input_ids=ids()).logits - plain(input_ids=ids()).logits).abs().max()
    assert error < 1e-4
    assert relative_error(lora_gradients(model.train(), ids()), lora_gradients(plain, ids())) < 1e-5


@pytest.mark.skipif(
    not HAS_AVX512_BF16, reason="bitsandbytes repacks 4-bit weights only on a CPU with AVX512-BF16"
)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_the_guard_is_needed(folders: Any, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the guard the test above must fail; when bitsandbytes mends its layout, this one says
    that the guard can go."""
    monkeypatch.setattr(models, "_keep_4bit_layout", lambda model: None)
    with pytest.raises((AssertionError, RuntimeError)):
        test_nf4_gradients_survive_an_eval_forward(folders, arch)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("quantize", "low", "high"), [("nf4", 0.05, 0.12), ("int8", 0.002, 0.02)])
def test_quantised_layers_work_on_a_cpu_in_every_dtype(
    folders: Any, quantize: str, low: float, high: float, dtype: str
) -> None:
    plain = models.load_model(node(folders("qwen2")), device=CPU).model
    small = models.load_model(node(folders("qwen2"), quantize=quantize, dtype=dtype), device=CPU)
    layers = [
        next(m for m in model.modules() if isinstance(m, LoraLayer)).base_layer
        for model in (plain, small.model)
    ]
    with torch.no_grad():
        expected, got = (
            layer(torch.eye(64, dtype=d)).float()
            for layer, d in zip(layers, (torch.float32, small.dtype), strict=True)
        )
    assert low < float((got - expected).norm() / expected.norm()) < high
    assert f"base in {quantize}" in models.describe(small)
    assert f"computes in {dtype} on cpu" in models.describe(small)
    stir(small.model)
    grads = lora_gradients(small.model, ids())
    assert all(
        g.dtype == torch.float32 and torch.isfinite(g).all() and g.abs().max() > 0
        for g in grads.values()
    )


def test_quantising_elsewhere_is_refused(folders: Any) -> None:
    with pytest.raises(UserError, match=r"got nf4 on mps.*model.quantize=none"):
        models.load_model(node(folders("llama"), quantize="nf4"), device=torch.device("mps"))


def saved_numbers(model: torch.nn.Module) -> int:
    """How many numbers a forward pass keeps for the backward pass."""
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids())
    return sum(saved)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_gradient_checkpointing_changes_memory_only(folders: Any, quantize: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = models.load_model(
            node(folders("qwen2"), quantize=quantize, gradient_checkpointing=checkpointing),
            device=CPU,
        ).model.train()
        stir(model)
        gradients.append((saved_numbers(model), lora_gradients(model, ids())))
    assert gradients[1][0] < 0.5 * gradients[0][0]
    assert relative_error(gradients[1][1], gradients[0][1]) < 1e-6


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_a_saved_adapter_loads_in_plain_peft(folders: Any, arch: str, tmp_path: Path) -> None:
    loaded = models.load_model(node(folders(arch)), device=CPU)
    stir(loaded.model)
    save_adapter(loaded.model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path(folders(arch)).resolve())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["inference_mode"] is True
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"]),
        str(tmp_path / "adapter"),
    )
    torch.testing.assert_close(
        plain(input_ids=ids()).logits, loaded.model(input_ids=ids()).logits, atol=1e-5, rtol=1e-5
    )
    loaded.model.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders(arch)), str(tmp_path / "peft")
    )
    assert torch.equal(again(input_ids=ids()).logits, plain(input_ids=ids()).logits)


def test_adapter_state_is_a_snapshot_that_can_be_put_back(folders: Any) -> None:
    model = models.load_model(node(folders("llama"), dtype="bf16"), device=CPU).model
    stir(model, seed=1)
    state = adapter_state(model)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    before = model(input_ids=ids()).logits
    stir(model, seed=2)
    assert not torch.equal(model(input_ids=ids()).logits, before)
    load_adapter_state(model, state)
    assert torch.equal(model(input_ids=ids()).logits, before)
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="expected 28 adapter weights, got 27"):
        load_adapter_state(model, state)


def test_training_starts_from_a_given_adapter(folders: Any, tmp_path: Path) -> None:
    first = models.load_model(node(folders("llama")), device=CPU)
    stir(first.model)
    adapter = str(tmp_path / "adapter")
    save_adapter(first.model, adapter)
    second = models.load_model(node(folders("llama"), adapter=adapter), device=CPU)
    assert torch.equal(second.model(input_ids=ids()).logits, first.model(input_ids=ids()).logits)
    assert lora_gradients(second.model, ids()).keys() == lora_gradients(first.model, ids()).keys()
    with pytest.raises(
        UserError,
        match=(
            r"rank 4, alpha 8, the recipe 16, 32; add --set model.lora.rank=4 --set"
            r" model.lora.alpha=8"
        ),
    ):
        models.load_model(node(folders("llama"), adapter=adapter, lora=recipe.Lora()), device=CPU)
    fewer = recipe.Lora(rank=4, alpha=8, targets=("q_proj", "v_proj"))
    with pytest.raises(UserError, match=r"does not fit .*expected 8 adapter weights, got 28"):
        models.load_model(node(folders("llama"), adapter=adapter, lora=fewer), device=CPU)
    wider = str(tiny.save_tiny(tmp_path / "wider", "llama", hidden_size=96))
    for other in (wider, folders("phi3")):
        with pytest.raises(UserError, match="does not fit"):
            models.load_model(node(other, adapter=adapter), device=CPU)
    with pytest.raises(UserError, match=r"no adapter_config.json"):
        models.load_model(node(folders("llama"), adapter=str(tmp_path)), device=CPU)


def test_named_targets_and_unknown_ones(folders: Any) -> None:
    lora = recipe.Lora(rank=4, alpha=8, targets=("q_proj", "v_proj"))
    loaded = models.load_model(node(folders("llama"), lora=lora), device=CPU)
    assert sum(isinstance(module, LoraLayer) for module in loaded.model.modules()) == 4
    with pytest.raises(
        UserError, match=r"got \('nothing',\), expected all-linear or some of .*q_proj"
    ):
        models.load_model(
            node(folders("llama"), lora=recipe.Lora(targets=("nothing",))), device=CPU
        )


def test_a_tokenizer_needs_a_chat_template_and_gets_a_pad_token(tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = tiny.byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "no_pad")
    assert models.load_tokenizer(str(tmp_path / "no_pad")).pad_token_id == tiny.IM_END
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(
        UserError, match=r"model my/model: its tokenizer has no chat template.*-Instruct"
    ):
        models.load_tokenizer(str(tmp_path / "bare"), "my/model")


def test_folders_that_cannot_be_loaded_say_so_in_one_line(folders: Any, tmp_path: Path) -> None:
    folder = tiny.save_tiny(tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (None, b"torn", whole[: len(whole) // 2]):
        weights.unlink()
        if content is not None:
            weights.write_bytes(content)
        with pytest.raises(UserError, match="cannot be loaded"):
            models.load_model(node(str(folder)), device=CPU)
        weights.write_bytes(b"")
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"files lack weights.*layers.2"):
        models.load_model(node(str(folder)), device=CPU)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load_model(node(str(folder)), device=CPU)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_embedded_model_knows_english(quantize: str) -> None:
    tiny.real_model()
    loaded = models.load_model(
        recipe.Model(name="smollm2-135m", quantize=quantize, dtype="fp32"), device=CPU
    )
    x = torch.tensor(
        [loaded.tokenizer.encode("The capital of France is Paris. The capital of Italy is")]
    )
    with torch.no_grad():
        logits = loaded.model(input_ids=x).logits
    assert loaded.tokenizer.decode(logits[0, -1].argmax()) == " Rome"
    assert (
        loaded.model.peft_config["default"].base_model_name_or_path
        == "HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    assert models.describe(loaded).startswith(
        "HuggingFaceTB/SmolLM2-135M-Instruct · 134.5 M parameters, base "
    )
