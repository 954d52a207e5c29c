"""A model of a published shape with random weights: speed and memory without the weights.

Invariant: it is written as a plain model folder and then loaded like any other, so that quantising
it, its adapter and its dtype are the real thing. What it says is noise.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from minirl.engine.model.adapter import LOAD_ERRORS
from minirl.engine.model.device import prepare
from minirl.errors import UserError, first_line
from minirl.io.hub import hub_answers

PART_BYTES = 2 * 10**9  # of weights in one file, and so in the CPU's memory at once
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content']"
    " }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_random_model(source: str, folder: Path, dtype: torch.dtype, device: torch.device) -> Path:
    """Write a model of `source`'s shape with random weights of `dtype` into `folder`, with a
    tokenizer; returns the folder.

    source: a hub id, a config.json, or a folder with one. Its own tokenizer is taken where there is
    one with a chat template, else one token a byte. Raises UserError where there is no
    configuration of a causal language model.
    """
    prepare()
    path = Path(source).expanduser()
    where = f"--random-weights: {source}"
    if not path.exists() and not hub_answers():
        raise UserError(
            f"{where}: no such file or folder, and the hub does not answer; give a local"
            " config.json"
        )
    try:
        name = str(path) if path.exists() else source
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise UserError(
            f"{where}: not the configuration of a causal language model ({first_line(error)})"
        ) from error
    _write_weights(model, folder, device)
    _tokenizer(str(path.parent) if path.is_file() else name).save_pretrained(folder)
    return folder


def _write_weights(model: PreTrainedModel, folder: Path, device: torch.device) -> None:
    """Draw a model without memory layer by layer, and write it in parts: as a whole it may be
    larger than the GPU, or what the CPU has.

    Drawn on `device`: billions of normal numbers take minutes on a CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    part: dict[str, Tensor] = {}
    tied: list[Tensor] = []  # what has been written: held, so that no other tensor is taken for it

    def close() -> None:
        file = f"model-{len(set(places.values())):05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, file))
        part.clear()

    for prefix, module in model.named_modules():
        parameters = module.named_parameters(recurse=False)
        own = {name: p for name, p in parameters if not any(p is other for other in tied)}
        if own:
            tied += own.values()
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
            for name in own:
                part[f"{prefix}.{name}".lstrip(".")] = getattr(module, name).detach().cpu()
            module.to_empty(device="meta", recurse=False)
        if sum(tensor.nbytes for tensor in part.values()) > PART_BYTES:
            close()
    if part:
        close()
    total = sum((folder / file).stat().st_size for file in set(places.values()))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except LOAD_ERRORS:  # a bare config.json has none beside it, and any will do: the text is noise
        return byte_tokenizer()
    return tokenizer if tokenizer.chat_template else byte_tokenizer()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ids 0 to 255, and three special tokens; the ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    backend = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
