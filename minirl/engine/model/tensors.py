"""Trained parameters in safetensors files: written as they are, read back in place.

Invariant: nothing is read into a parameter unless all names and shapes are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minirl.errors import UserError


def write_parameters(path: Path, parameters: Mapping[str, Tensor]) -> None:
    """Write parameters to a file, under their names."""
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, path)


def read_parameters(path: Path, parameters: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors into parameters, in place: an optimizer may hold them. Raises UserError
    if the file cannot be read or has other names or shapes."""
    stored = read_tensors(path)
    got = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    expected = {name: tuple(p.shape) for name, p in parameters.items()}
    if got != expected:
        name = min(got.items() ^ expected.items())[0]
        raise UserError(
            f"{path}: got shape {got.get(name)} for {name}, expected {expected.get(name)}; the"
            " weights are another model's: restore the file, or start again with another --out"
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(stored[name])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError if it is missing or torn."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); restore it, or start again with another --out"
        ) from error
