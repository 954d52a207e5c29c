"""Loading: a chat model (plain, NF4 or INT8), its tokenizer, and one LoRA adapter to train.

Invariant: the base weights are frozen, and the adapter's are float32 masters whatever dtype the
model computes in. No code from a model folder is ever run, and no pickle is read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from minirl import recipe
from minirl.engine.model.adapter import ADAPTER, LOAD_ERRORS, fresh_adapter, start_from
from minirl.engine.model.attention import stock_attention
from minirl.engine.model.device import dtype_name, pick_device, pick_dtype, prepare
from minirl.engine.model.gated import lean_gates
from minirl.engine.model.lora import lean_lora
from minirl.engine.model.source import public_name, resolve
from minirl.errors import UserError, first_line

HEAD = "score"  # what transformers calls the output layer of a sequence classifier


@dataclass(frozen=True)
class LoadedModel:
    """model: base with one trainable adapter named "default", in eval mode. Train mode computes the
    same, as every dropout is zero; it has gradient checkpointing where eval mode has caches."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    settings: recipe.Model


def load_tokenizer(path: str, name: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with a pad token. name: the user's word for the model.
    Raises UserError if it cannot be loaded or has no chat template."""
    prepare()
    name = name or path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise UserError(
            f"model {name}: its tokenizer cannot be loaded ({first_line(error)}); check model.name"
        ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"model {name}: its tokenizer has no chat template, expected a chat model; take its"
            " -Instruct or -chat variant"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    settings: recipe.Model, seed: int = 0, device: torch.device | None = None
) -> LoadedModel:
    """The recipe's model with its adapter, on `device` (default: `pick_device()`). `seed` draws a
    fresh adapter's A; B starts at zero.

    Raises UserError if the model cannot be had, has no chat template or cannot be quantised here,
    or if the adapter does not fit.
    """
    loaded = _load(settings, seed, device)
    if settings.adapter is not None:
        start_from(loaded.model, settings)
    lean_gates(loaded.model)
    return loaded


def load_classifier(
    settings: recipe.Model, labels: int, seed: int = 0, device: torch.device | None = None
) -> LoadedModel:
    """The recipe's model as a sequence classifier with a fresh adapter. Its head is part of the
    adapter, in float32, starts at zero, and reads the last token that is no padding.

    Raises UserError as `load_model` does. `settings.adapter` is left to the caller.
    """
    return _load(settings, seed, device, labels)


def fingerprint(model: nn.Module) -> str:
    """A digest of some thousand values of each frozen weight: it differs for another model, and for
    the same one rounded otherwise."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            flat = p.detach().flatten()
            some = flat[:: max(1, flat.numel() // 1024)].contiguous().view(torch.uint8)
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            digest.update(some.cpu().numpy().tobytes())
    return digest.hexdigest()


def eos(model: Any) -> list[int]:
    """The ids that end a completion, by the model's own generation config; none if it has none."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def describe(loaded: LoadedModel) -> str:
    """One line: model, parameters, trained parameters, quantisation, compute dtype, device."""
    trained, total = loaded.model.get_nb_trainable_parameters()
    lora, settings = loaded.model.peft_config[ADAPTER], loaded.settings
    dtype = dtype_name(loaded.dtype)
    base = "base not quantised" if settings.quantize == "none" else f"base in {settings.quantize}"
    is_gpu = loaded.device.type == "cuda"
    device = torch.cuda.get_device_name(loaded.device) if is_gpu else loaded.device.type
    return (
        f"{public_name(settings.name)} · {(total - trained) / 1e6:,.1f} M parameters, {base} · LoRA"
        f" rank {lora.r}, alpha {lora.lora_alpha:g}, {trained / 1e6:,.2f} M trained in fp32 ·"
        f" computes in {dtype} on {device}"
    )


def _load(
    settings: recipe.Model, seed: int, device: torch.device | None, labels: int = 0
) -> LoadedModel:
    """The model with a fresh adapter. labels: of a sequence classifier; 0 for a language model."""
    device = device or pick_device()
    dtype = pick_dtype(settings.dtype, device)
    base, tokenizer = _load_base(settings, device, dtype, labels)
    more: dict[str, Any] = {}
    if labels:
        for config in (base.config, base.config.get_text_config()):
            config.pad_token_id = tokenizer.pad_token_id
        head = getattr(base, HEAD).float()
        torch.nn.init.zeros_(head.weight)
        head.register_forward_pre_hook(_in_float32)
        more = {"task_type": "SEQ_CLS", "modules_to_save": [HEAD]}
    model = fresh_adapter(base, settings, seed, **more)
    model.peft_config[ADAPTER].base_model_name_or_path = public_name(settings.name)
    lean_lora(model)
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    return LoadedModel(model.eval(), tokenizer, device, dtype, settings)


def _in_float32(module: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(state.float() for state in states)


def _load_base(
    settings: recipe.Model, device: torch.device, dtype: torch.dtype, labels: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen base model and its tokenizer."""
    prepare()
    path = resolve(settings.name)
    tokenizer = load_tokenizer(path, settings.name)
    if settings.quantize != "none" and device.type not in ("cuda", "cpu"):
        raise UserError(
            f"model.quantize: got {settings.quantize} on {device.type}, which bitsandbytes is"
            " untested on; set model.quantize=none"
        )
    try:
        config = _read_config(path, labels)
        kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
        model, report = kind.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            device_map={"": device},
            quantization_config=_quantization(settings.quantize, dtype, [HEAD] if labels else None),
            attn_implementation=stock_attention(config),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise UserError(
            f"model {settings.name}: cannot be loaded ({first_line(error)}); expected a causal"
            " language model with safetensors weights that transformers knows without code of its"
            " own; check model.name"
        ) from error
    if missing := sorted(set(report["missing_keys"]) - {f"{HEAD}.weight"}):
        raise UserError(
            f"model {settings.name}: its files lack weights ({', '.join(missing[:3])}, ...); fetch"
            " it again"
        )
    _keep_4bit_layout(model)
    return model.requires_grad_(False), tokenizer


def _read_config(path: str, labels: int) -> Any:
    """A model's config, with every dropout at zero."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    text = config.get_text_config()
    for key, value in text.to_dict().items():
        if key.endswith(("dropout", "pdrop")) and value:
            setattr(text, key, 0.0)
    if labels:
        config.num_labels = labels
    return config


def _quantization(
    quantize: str, dtype: torch.dtype, skip: list[str] | None
) -> BitsAndBytesConfig | None:
    """skip: modules that stay as they are; None for the library's own choice, the output head."""
    if quantize == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        )
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return None


def _keep_4bit_layout(model: nn.Module) -> None:
    """Keep bitsandbytes 0.50 from repacking 4-bit weights at the first eval-mode forward on a CPU
    with AVX512-BF16.

    The packed layout has no backward: afterwards no gradient flows through a layer, silently, and a
    biased layer crashes.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
