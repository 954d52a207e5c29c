"""One decode step for all rows: eager, or replayed from CUDA graphs that were captured for a few
sizes.

Invariant: both give the same logits. A captured step is padded in rows and in keys; what a padded
row writes stands in the last place of its slot, which no conversation ever uses (the last token of
an answer is never fed).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minirl.engine.model.attention import Cached
from minirl.engine.model.policy import Policy
from minirl.engine.sample.slots import Slots

# passes read multiples of this many keys, into which capacities divide: a CPU's library builds
# kernels for every new number
KEYS = 16
# captured steps read multiples of this many keys: every size is a graph, and a graph costs about a
# second
WIDTH = 256
WARM_UPS = 2  # eager steps before a capture, in which libraries allocate what they need

Step = Callable[[], Tensor]


class Decoder:
    """Row i feeds its newest token into slot i."""

    def __init__(self, policy: Policy, slots: Slots) -> None:
        self.policy = policy
        self.slots = slots

    def __call__(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits of the next token, (B, V) float32, after `tokens` (B) at `positions` (B)."""
        device = self.policy.device
        fed, at = (torch.tensor(values, device=device)[:, None] for values in (tokens, positions))
        return self.step(fed, at, -(-(max(positions) + 1) // KEYS) * KEYS)

    def step(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """The same from (B, 1) tensors, reading the first `width` keys."""
        self.slots.aim(slice(0, len(tokens)), positions, width)
        hidden = self.policy.hidden(tokens, positions, Cached(positions, width), cache=self.slots)
        return self.policy.head.logits(hidden[:, 0])


class GraphDecoder(Decoder):
    """The same from captured graphs, one for each power of two of rows and multiple of WIDTH keys;
    eager for good once a capture fails.

    The slots' memory must stay where it is between rollouts; where it moves, the graphs are
    captured anew.
    """

    def __init__(self, policy: Policy, slots: Slots) -> None:
        super().__init__(policy, slots)
        self.graphs: dict[tuple[int, int], tuple[Tensor, Tensor, Step]] = {}
        self.works = True
        self._memory: tuple[int, ...] = ()
        self._pool: Any = None

    def __call__(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        if (
            not self.works or not self.slots.memory
        ):  # the first step of all gives the slots their memory
            return super().__call__(tokens, positions)
        if self._memory != self.slots.memory:
            self.graphs.clear()
            self._memory = self.slots.memory
        try:
            return self._replay(tokens, positions)
        except (RuntimeError, torch.AcceleratorError) as error:
            self.works = False
            self.graphs.clear()
            logging.getLogger("minirl").warning(
                "CUDA graphs do not work here (%s); decoding goes on without them",
                str(error).split("\n")[0],
            )
            return super().__call__(tokens, positions)

    def _replay(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        count, unused = len(tokens), self.slots.capacity - 1
        rows = min(1 << (count - 1).bit_length(), self.slots.count)
        width = min(-(-(max(positions) + 1) // WIDTH) * WIDTH, self.slots.capacity)
        values = torch.tensor(
            [[*tokens, *[0] * (rows - count)], [*positions, *[unused] * (rows - count)]],
            device=self.policy.device,
        )
        if (rows, width) not in self.graphs:
            fed, at = values[0, :, None].clone(), values[1, :, None].clone()
            self.graphs[rows, width] = fed, at, self.capture(lambda: self.step(fed, at, width))
        fed, at, replay = self.graphs[rows, width]
        fed.copy_(values[0, :, None])
        at.copy_(values[1, :, None])
        return replay()[:count].clone()  # the graph's own output is written over by the next step

    def capture(self, step: Step) -> Step:
        """A callable that runs the kernels of `step` again, on whatever its tensors then hold.

        All graphs share one pool of memory: one runs at a time, and what it gives is copied before
        the next.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
