"""ModelRunner: tokens in, logits out, by way of the cache; a decode step runs eagerly or is
replayed from CUDA graphs that were captured for a few sizes.

Invariant: both forms give the same logits. A captured step is padded in rows and in keys; padded
rows write to the last place of their slots, which no conversation ever uses (the last token of an
answer is never fed).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minirl.engine.model.attention import Cached
from minirl.engine.model.chunks import chunks
from minirl.engine.model.policy import Policy
from minirl.engine.sample.kv_cache import KVCache

# Passes read multiples of this many keys, into which capacities divide: a CPU's library builds
# kernels for every new number.
KEYS = 16
# Captured steps read multiples of this many keys: every size is a graph that takes about a second.
WIDTH = 256
WARM_UPS = 2  # eager steps before a capture, in which libraries allocate what they need

Prompt = tuple[int, ...]
Step = Callable[[], Tensor]


class ModelRunner:
    """Runs the policy's model; row i computes in slot i. prefilled: prompt tokens computed since
    the start."""

    def __init__(self, policy: Policy, cache: KVCache) -> None:
        self.policy = policy
        self.cache = cache
        self.prefilled = 0

    def prefill(self, prompts: Mapping[Prompt, Sequence[int]]) -> Tensor:
        """Compute what the first row of each prompt lacks of it and fork its other rows; the logits
        after the prompts, (rows, V) float32, in the order of the rows."""
        leaders = [(tokens, rows[0]) for tokens, rows in prompts.items()]
        missing = [len(tokens) - self.cache.length(row) for tokens, row in leaders]
        logits: dict[int, Tensor] = {}
        order = sorted(range(len(leaders)), key=lambda i: missing[i])
        budget = self.policy.backend.prefill_tokens
        for chunk in chunks(order, lambda c: missing[c[-1]] * len(c), budget):
            last = self._prefill([leaders[i] for i in chunk])
            logits |= {leaders[i][1]: of for i, of in zip(chunk, last, strict=True)}
        for tokens, rows in prompts.items():
            for row in rows:
                self.cache.fork(rows[0], row, len(tokens))
                logits[row] = logits[rows[0]]
        return torch.stack([logits[row] for row in sorted(logits)])

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Feed each row its newest token; the logits of the next ones, (rows, V) float32."""
        logits = self._decode(tokens, [self.cache.length(row) for row in range(len(tokens))])
        for row, token in enumerate(tokens):
            self.cache.extend(row, [token])
        return logits

    def forward(
        self, tokens: Tensor, positions: Tensor, rows: slice | Tensor, width: int
    ) -> Tensor:
        """Hidden states (B, T, D) of tokens (B, T) at `positions` of `rows`, reading the first
        `width` keys."""
        view = self.cache.view(rows, positions, width)
        return self.policy.hidden(tokens, positions, Cached(positions, width), cache=view)

    def _prefill(self, leaders: Sequence[tuple[Prompt, int]]) -> Tensor:
        """One pass over what the rows lack of their prompts; the logits after these, (B, V)."""
        device, rows = self.policy.device, [row for _, row in leaders]
        held = [self.cache.length(row) for row in rows]
        lacking = [tokens[h:] for (tokens, _), h in zip(leaders, held, strict=True)]
        width = max(map(len, lacking))
        tokens = torch.tensor(
            [[*some, *[0] * (width - len(some))] for some in lacking], device=device
        )
        positions = torch.tensor(held, device=device)[:, None] + torch.arange(width, device=device)
        # Padded tokens are written too, all behind what the slots hold and will hold: at most one
        # place behind the longest.
        longest = max(len(prompt) for prompt, _ in leaders)
        positions.clamp_(max=longest)
        reach = _round_up(min(longest, max(held) + width - 1) + 1, KEYS)
        # Slots side by side are read in place.
        span = slice(rows[0], rows[0] + len(rows))
        are_neighbours = rows == [*range(span.start, span.stop)]
        where = span if are_neighbours else torch.tensor(rows, device=device)
        hidden = self.forward(tokens, positions, where, reach)
        last = torch.tensor([len(some) - 1 for some in lacking])
        for row, some in zip(rows, lacking, strict=True):
            self.cache.extend(row, some)
            self.prefilled += len(some)
        return self.policy.head.logits(hidden[torch.arange(len(rows)), last])

    def _decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        device = self.policy.device
        fed, at = (torch.tensor(values, device=device)[:, None] for values in (tokens, positions))
        return self._step(fed, at, _round_up(max(positions) + 1, KEYS))

    def _step(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """Logits (B, V) after tokens (B, 1) of the first B rows."""
        hidden = self.forward(tokens, positions, slice(0, len(tokens)), width)
        return self.policy.head.logits(hidden[:, 0])


class GraphRunner(ModelRunner):
    """Decodes by captured graphs, one for each power of two of rows and multiple of WIDTH keys;
    eagerly for good once a capture fails.

    The cache's memory must stay in its place between rollouts; if it moves, the graphs are captured
    anew.
    """

    def __init__(self, policy: Policy, cache: KVCache) -> None:
        super().__init__(policy, cache)
        self.graphs: dict[tuple[int, int], tuple[Tensor, Tensor, Step]] = {}
        self.works = True
        self._memory: tuple[int, ...] = ()
        self._pool: Any = None

    def _decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        if not self.works:
            return super()._decode(tokens, positions)
        if self._memory != self.cache.memory:
            self.graphs.clear()
            self._memory = self.cache.memory
        try:
            return self._replay(tokens, positions)
        except (RuntimeError, torch.AcceleratorError) as error:
            self.works = False
            self.graphs.clear()
            logging.getLogger("minirl").warning(
                "CUDA graphs do not work here (%s); decoding goes on without them",
                str(error).split("\n")[0],
            )
            return super()._decode(tokens, positions)

    def _replay(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        count, unused = len(tokens), self.cache.capacity - 1
        rows = min(1 << (count - 1).bit_length(), self.cache.count)
        width = min(_round_up(max(positions) + 1, WIDTH), self.cache.capacity)
        values = torch.tensor(
            [[*tokens, *[0] * (rows - count)], [*positions, *[unused] * (rows - count)]],
            device=self.policy.device,
        )
        if (rows, width) not in self.graphs:
            fed, at = values[0, :, None].clone(), values[1, :, None].clone()
            self.graphs[rows, width] = fed, at, self.capture(lambda: self._step(fed, at, width))
        fed, at, replay = self.graphs[rows, width]
        fed.copy_(values[0, :, None])
        at.copy_(values[1, :, None])
        return replay()[:count].clone()  # the graph's own output is written over by the next step

    def capture(self, step: Step) -> Step:
        """A callable that runs the kernels of `step` again, on the present values of its tensors.

        All graphs share one pool of memory: one runs at a time, and its output is copied before the
        next.
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


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
