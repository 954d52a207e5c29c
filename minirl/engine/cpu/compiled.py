"""The door to kernels.py: the compiled kernels if numba is installed (`pip install
'minirl[cpu]'`), and tensors in the form that numba takes.

Invariant: whether the kernels are used depends on the machine and the installed packages alone,
never on timing, so that a resumed run computes as before.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirl.errors import first_line

DTYPES = (torch.bfloat16, torch.float32)
# numba's other pools of threads would fight with torch's for the cores; this one is torch's own
OPENMP = "omp"


def kernels(x: Tensor) -> Any:
    """The module of kernels if it computes on tensors like x, without a gradient; else None."""
    return _kernels() if x.device.type == "cpu" and x.dtype in DTYPES else None


def share_threads() -> None:
    """Let numba, where it is installed, take its threads from torch's own pool."""
    if importlib.util.find_spec("numba") is not None:
        import numba

        numba.config.THREADING_LAYER = OPENMP


@cache
def _kernels() -> Any:
    """kernels.py, after a trial of it; None unless it is right and its threads are torch's."""
    if importlib.util.find_spec("numba") is None:
        return None
    import numba

    said = logging.getLogger("minirl")
    try:
        from minirl.engine.cpu import kernels as found

        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        with torch.no_grad():
            works = _works(found)
        if not works or numba.config.DISABLE_JIT or numba.threading_layer() != OPENMP:
            reason = "they run on other threads than torch, or not as they should"
            said.info("numba's kernels are left out: %s", reason)
            return None
    except (numba.errors.NumbaError, ImportError, OSError, RuntimeError, ValueError) as error:
        said.info("numba's kernels are left out (%s)", first_line(error))
        return None
    return found


def _works(found: Any) -> bool:
    """Whether RMSNorm of one row comes out right; it compiles nothing else."""
    x, out = torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.zeros(1, 4)
    weight, normed, scale = torch.full((4,), 2.0), torch.empty(1, 4), torch.empty(1)
    found.rms_norm(*map(array, (x, normed, out, weight)), np.float32(0.0), array(scale))
    return torch.allclose(out, torch.tensor([[2.4, 3.2, 0.0, 0.0]]))


def array(x: Tensor) -> Any:
    """A contiguous tensor's memory as a numpy array; bf16 by its bits."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
