"""Policy: the model with its adapter, the log-probabilities it gives, and its frozen reference.

Invariant: the reference is a snapshot of the adapter's weights, not "adapter off": after a warm-up
the bare model is the wrong anchor. A value head is no part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minirl.engine.model import attention
from minirl.engine.model.attention import Cached, Layout
from minirl.engine.model.batch import Batch, Row, collate, collate_plain, pack, pack_plain
from minirl.engine.model.device import install
from minirl.engine.model.head import Head
from minirl.engine.model.tensors import read_parameters, write_parameters
from minirl.engine.model.value_head import FILE as VALUE_HEAD
from minirl.engine.model.value_head import ValueHead

WEIGHTS = "policy.safetensors"


class Policy:
    """model: a peft model with one adapter, on `device`, computing in `dtype`; only the adapter's
    parameters require a gradient.

    config: of its text model. trainable: the adapter's weights. value_head: None until PPO adds one
    or a saved one is loaded.
    """

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self._base = base = model.get_base_model()
        self._decoder = base.get_decoder()
        self.config = base.config.get_text_config()
        self.backend = install(model, device)
        self.head = Head(base.get_output_embeddings(), self.config, self.backend)
        self.shares_prefixes = attention.supports(base.config)
        if self.shares_prefixes:
            base.set_attn_implementation(attention.NAME)
        # transformers hands a mask of four dimensions through: the layout alone says who sees whom.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        self.trainable: dict[str, torch.nn.Parameter] = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }
        self.value_head: ValueHead | None = None
        self._reference: dict[str, Tensor] | None = None

    def states(self, batch: Batch) -> Tensor:
        """The trunk's last hidden states where each trained token is predicted, (N, D)."""
        hidden = self.hidden(batch.tokens, batch.positions, batch.layout or batch.present)
        return hidden.flatten(0, 1).index_select(0, batch.before)

    def logprobs(
        self,
        batch: Batch,
        *,
        temperature: float,
        entropy: bool = False,
        entropy_grad: bool = False,
        states: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each trained token under logits / temperature, (N,) float32; and with
        `entropy` the entropy there, (N,), which carries a gradient only with `entropy_grad`.

        states: those of this batch, if they are known already.
        """
        at = self.states(batch) if states is None else states
        return self.head.logprobs(
            at, batch.target, temperature=temperature, entropy=entropy, entropy_grad=entropy_grad
        )

    def values(self, batch: Batch, *, states: Tensor | None = None) -> Tensor:
        """The value head's estimate of the return from each trained token on, (N,) float32, before
        that token is known."""
        if self.value_head is None:
            raise RuntimeError("expected add_value_head() before values()")
        out: Tensor = self.value_head(self.states(batch) if states is None else states)
        return out

    def add_value_head(self) -> ValueHead:
        """The value head; a fresh one if there was none."""
        if self.value_head is None:
            self.value_head = ValueHead(self.config.hidden_size, self.device)
        return self.value_head

    def load_value_head(self, folder: Path) -> None:
        """Load the value head beside an adapter, if there is one. Raises UserError if it is another
        model's."""
        if (folder / VALUE_HEAD).exists():
            self.add_value_head().load(folder)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        sight: Layout | Cached | Tensor | None,
        cache: Any = None,
    ) -> Tensor:
        """Last hidden states (B, T, D) of tokens and positions (B, T). sight: which tokens see
        which, as a layout or a padding mask; None for causal rows without padding."""
        if sight is None or isinstance(sight, Tensor):
            extra: dict[str, Any] = {"attention_mask": sight}
        else:
            extra = {"attention_mask": self._no_mask, "layout": sight, "backend": self.backend}
        out = self._decoder(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        )
        result: Tensor = out.last_hidden_state
        return result

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """Inside, the model computes its attention by the library's own function, without a
        layout."""
        ours = self._base.config._attn_implementation
        self._base.set_attn_implementation(attention.stock_attention(self._base.config))
        try:
            yield
        finally:
            self._base.set_attn_implementation(ours)

    def give_up_sharing(self) -> None:
        """Take plain rows and the library's own attention from now on."""
        self.shares_prefixes = False
        self._base.set_attn_implementation(attention.stock_attention(self._base.config))

    def batches(self, rows: Sequence[Row], budget_tokens: int, *, pad: int) -> Iterator[Batch]:
        """Micro-batches of at most `budget_tokens` computed tokens: packed with shared prefixes if
        the model supports it, else plain rows."""
        if self.shares_prefixes:
            return (collate(bundles, self.device) for bundles in pack(rows, budget_tokens))
        chunks = pack_plain(rows, budget_tokens)
        return (collate_plain(chunk, pad=pad, device=self.device) for chunk in chunks)

    def freeze_reference(self) -> None:
        """Take the adapter's present weights as the reference of KL terms."""
        self._reference = {name: p.detach().clone() for name, p in self.trainable.items()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model computes with the reference's weights and without gradients."""
        if self._reference is None:
            raise RuntimeError("expected freeze_reference() before reference()")
        live = {name: p.data for name, p in self.trainable.items()}
        try:
            for name, p in self.trainable.items():
                p.data = self._reference[name]
            with torch.no_grad():
                yield
        finally:
            for name, p in self.trainable.items():
                p.data = live[name]

    def save(self, folder: Path) -> None:
        """Write the trainable weights, float32, as one safetensors file; the value head's, if there
        is one, as another."""
        write_parameters(folder / WEIGHTS, self.trainable)
        if self.value_head is not None:
            self.value_head.save(folder)

    def load(self, folder: Path) -> None:
        """Load weights that `save` wrote. Raises UserError if they are another adapter's or cannot
        be read."""
        read_parameters(folder / WEIGHTS, self.trainable)
        self.load_value_head(folder)
