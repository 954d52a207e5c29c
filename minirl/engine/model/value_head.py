"""The value head: one number for each position, from the trunk's last hidden state there.

Invariant: its weights are float32 and it computes in float32, whatever the trunk computes in. It is
saved in a file of its own beside the adapter, whose folder plain peft can still load.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from minirl.engine.model.tensors import read_parameters, write_parameters

FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """A linear map from D hidden numbers to one (ReFT, arXiv 2401.08967, section 3.2): mean(weight
    * state / rms(state)) + bias.

    Hidden states differ in size from model to model by far more than rewards do. Divided by their
    own size, and with the mean in place of a sum, a step of AdamW moves a value by at most twice
    its learning rate (once for the weights, once for the bias), whatever the model. The head starts
    at zero: the first advantages are the bare returns, and the trunk gets no gradient from random
    values.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        # Not nn.Linear: drawing weights, only to drop them, would move torch's random generator.
        self.weight = nn.Parameter(torch.zeros(1, size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def forward(self, states: Tensor) -> Tensor:
        """Values (N,) float32 of hidden states (N, D)."""
        size = states.shape[-1]
        even = nn.functional.rms_norm(states.float(), (size,), eps=1e-6)
        return nn.functional.linear(even, self.weight / size, self.bias).squeeze(-1)

    def save(self, folder: Path) -> None:
        """Write the weights to a file of their own in `folder`."""
        write_parameters(folder / FILE, dict(self.named_parameters()))

    def load(self, folder: Path) -> None:
        """Load weights that `save` wrote. Raises UserError if they are of another size."""
        read_parameters(folder / FILE, dict(self.named_parameters()))
