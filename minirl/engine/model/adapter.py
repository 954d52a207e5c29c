"""The adapter: drawn afresh or started from a folder, copied, saved.

Invariant: plain peft loads what is saved, and the same weights give the same bytes; no pickle is
read.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from minirl import recipe
from minirl.errors import UserError, first_line

ADAPTER = "default"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's own names
# transformers' errors for a folder that it cannot load: files missing or torn, an unknown
# architecture, a package that is not installed.
LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError)


def fresh_adapter(
    base: PreTrainedModel, settings: recipe.Model, seed: int, **more: Any
) -> PeftModel:
    """A LoRA adapter in float32 on every target layer, A drawn from `seed`, B zero. more: further
    arguments of peft's LoraConfig. Raises UserError if no layer is a target."""
    lora = settings.lora
    arguments: dict[str, Any] = {
        "r": lora.rank,
        # Readers of adapter_config.json expect a whole number.
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "target_modules": lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        "task_type": "CAUSAL_LM",
        **more,
    }
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            return get_peft_model(base, LoraConfig(**arguments), adapter_name=ADAPTER)
        except ValueError as error:
            layers = [n for n, module in base.named_modules() if isinstance(module, nn.Linear)]
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise UserError(
                f"model.lora.targets: got {lora.targets!r}, expected all-linear or some of {known}"
            ) from error


def check_adapter(settings: recipe.Model) -> None:
    """Raises UserError if the recipe starts from an adapter that is not there."""
    if settings.adapter is None:
        return
    folder = Path(settings.adapter).expanduser()
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(
                f"model.adapter: {folder} has no {file}, expected a folder that peft saved; check"
                " the path, or run the recipe that makes it"
            )


def start_from(model: PeftModel, settings: recipe.Model) -> None:
    """Load the adapter of a folder into the fresh one. Raises UserError unless its rank, alpha and
    targets are the recipe's, which holds a run's numbers."""
    check_adapter(settings)
    folder, lora = Path(str(settings.adapter)).expanduser(), settings.lora
    try:
        config = json.loads((folder / CONFIG).read_text())
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if (rank, alpha) != (lora.rank, lora.alpha):
            raise UserError(
                f"model.adapter: {folder} has rank {rank}, alpha {alpha}, the recipe {lora.rank},"
                f" {lora.alpha:g}; add --set model.lora.rank={rank} --set model.lora.alpha={alpha}"
            )
        if config.get("use_rslora") or config.get("alpha_pattern"):
            raise ValueError("it scales its layers otherwise than by alpha / rank")
        load_adapter_state(model, load_file(folder / WEIGHTS))
    except LOAD_ERRORS as error:
        raise UserError(
            f"model.adapter: {folder} does not fit {settings.name} with"
            f" model.lora.targets={lora.targets} ({first_line(error)}); use the model and the"
            " targets it was trained with"
        ) from error


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Copies of the adapter's weights, float32 on the CPU, under the names of peft's own file."""
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in _peft_state(model).items()
    }


def load_adapter_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Put the weights of `adapter_state` back. Raises ValueError unless names and shapes are the
    adapter's."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _peft_state(model).items()}
    wrong = shapes.items() ^ {name: tuple(tensor.shape) for name, tensor in state.items()}.items()
    if wrong:
        raise ValueError(
            f"expected {len(shapes)} adapter weights, got {len(state)}; the first that differs is"
            f" {min(wrong)}"
        )
    set_peft_model_state_dict(model, dict(state), adapter_name=ADAPTER)


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the adapter so that plain `peft.PeftModel.from_pretrained(base, folder)` loads it.

    peft's own save_pretrained lists target modules in hash order and may ask the hub about the
    base.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(model), folder / WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(folder)


def _peft_state(model: PeftModel) -> dict[str, Tensor]:
    # save_embedding_layers: left to decide by itself, peft would ask the hub about the base model.
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return dict(sorted(state.items()))
