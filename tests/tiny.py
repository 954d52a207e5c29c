"""Offline stand-ins for a real model: a byte-level tokenizer and two-layer seeded models of each
supported architecture.

Invariant: no file, no network, no global state. The same call gives the same ids and the same
weights, and leaves torch's random generator where it was. Token ids 0 to 255 are the bytes
themselves; 256 is <|im_start|>, 257 <|im_end|>, 258 <pad>.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from minirl.engine.model.source import EMBEDDED, resolve
from minirl.errors import UserError

IM_START, IM_END, PAD = 256, 257, 258
VOCAB_SIZE = 259
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """One token a byte, three special tokens, ChatML template; encodes and decodes any text without
    loss, adds nothing to it.

    merges: pairs of ASCII tokens that are one, in the order in which they are put together; they
    take the ids from 256 on.
    """
    alphabet = [*_byte_alphabet(), *(left + right for left, right in merges)]
    backend = Tokenizer(
        tokenizer_models.BPE(
            vocab={char: number for number, char in enumerate(alphabet)}, merges=list(merges)
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    # Listed in the order of their ids: they are appended to the 256 bytes one after the other.
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(arch: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A two-layer model of 32 hidden units in float32 and eval mode; `overrides` are keys of its
    transformers config.

    Weights are ten times larger than usual so that next-token distributions are far from uniform;
    biases are random, not zero.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"got {arch!r}, expected one of {ARCHITECTURES}")
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
        "pad_token_id": PAD,
        "dtype": torch.float32,
    }
    if arch == "phi3":
        settings["original_max_position_embeddings"] = 4096
    if arch.startswith("gemma"):
        # One layer with a window and one without, so that both masks are met; the window is short
        # enough to matter.
        settings |= {
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        }
    config = AutoConfig.for_model(arch, **(settings | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # A logit soft-cap (Gemma 2) exists in eager attention only; sdpa refuses it.
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_tiny(folder: str | Path, arch: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Save `tiny_model` and `byte_tokenizer` as a local model folder that works as `model.name`;
    returns the folder."""
    tiny_model(arch, seed, **overrides).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return Path(folder)


def real_model() -> str:
    """The folder or hub id of the embedded model, fetched and built if need be; skips the test,
    saying why, if it cannot be had."""
    try:
        return resolve(EMBEDDED)
    except UserError as error:
        pytest.skip(str(error))


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte: visible Latin-1 as itself,
    the others from U+0100 on."""
    visible = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]
