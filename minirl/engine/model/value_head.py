"""The value head: one number for each position, from the trunk's last hidden state there.

Invariant: its weights are float32 masters and it computes in float32, whatever the trunk computes
in. It is saved beside the adapter in a file of its own, so that the adapter's folder stays one that
plain peft loads.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minirl.errors import UserError

FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """A linear map from D hidden numbers to one (ReFT, arXiv 2401.08967, section 3.2): mean(weight
    * state / rms(state)) + bias.

    Hidden states differ in size from model to model by far more than rewards do; over their own
    size, and with the mean in place of a sum, a step of AdamW moves a value by about twice its
    learning rate at most (once for the weights, once for the bias) whatever the model. The head
    starts at zero: the first advantages are those of the bare returns, and no gradient reaches the
    trunk from random values.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        # Not nn.Linear: drawing weights that are then thrown away would move torch's random
        # generator.
        self.weight = nn.Parameter(torch.zeros(1, size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def forward(self, states: Tensor) -> Tensor:
        """Values (N,) float32 of hidden states (N, D)."""
        size = states.shape[-1]
        even = nn.functional.rms_norm(states.float(), (size,), eps=1e-6)
        return nn.functional.linear(even, self.weight / size, self.bias).squeeze(-1)

    def save(self, folder: Path) -> None:
        """Write the weights to a file of their own in `folder`."""
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in self.named_parameters()},
            folder / FILE,
        )

    def load(self, folder: Path) -> None:
        """Weights that `save` wrote, copied in place: an optimizer may hold these parameters.
        UserError where they are of another size."""
        path = folder / FILE
        try:
            stored = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); restore it, or delete it to begin with a fresh"
                " value head"
            ) from error
        got = {name: tuple(t.shape) for name, t in stored.items()}
        expected = {name: tuple(p.shape) for name, p in self.named_parameters()}
        if got != expected:
            raise UserError(
                f"{path}: got a value head of {got}, expected {expected}; it is another model's,"
                " delete it to begin afresh"
            )
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(stored[name])
