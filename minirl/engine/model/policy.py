"""Policy: the model with its adapter, the log-probabilities it gives, and the frozen reference it
is held to.

Invariant: the reference is a snapshot of the adapter's weights, not "adapter off": after a warm-up
the bare model is the wrong anchor. A value head, where a stage needs one, is no part of the
reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minirl.engine.model import attention
from minirl.engine.model.attention import Cached, Layout
from minirl.engine.model.batch import Batch, Row, collate, collate_plain, pack, pack_plain
from minirl.engine.model.device import install
from minirl.engine.model.head import Head
from minirl.engine.model.value_head import FILE as VALUE_HEAD
from minirl.engine.model.value_head import ValueHead
from minirl.errors import UserError

WEIGHTS = "policy.safetensors"


class Policy:
    """model: a peft model with one adapter, on `device`, computing in `dtype`; only the adapter's
    parameters require a gradient.

    trainable: the adapter's weights. value_head: None until PPO needs it (`add_value_head`) or a
    saved one is loaded; it then stays.
    """

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        base = model.get_base_model()
        self._decoder = base.get_decoder()
        self.backend = install(model, device)
        self.head = Head(base.get_output_embeddings(), base.config.get_text_config(), self.backend)
        self.shares_prefixes = attention.supports(base.config)
        if self.shares_prefixes:
            base.set_attn_implementation(attention.NAME)
        # A mask of four dimensions is handed through as it is: the layout alone says who sees whom.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        self.trainable: dict[str, torch.nn.Parameter] = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }
        self.value_head: ValueHead | None = None
        self._reference: dict[str, Tensor] | None = None

    def states(self, batch: Batch) -> Tensor:
        """The trunk's last hidden states where each trained token is predicted, (N, D)."""
        hidden = self.hidden(batch.tokens, batch.positions, batch.layout or batch.present)
        return hidden.flatten(0, 1).index_select(0, batch.seen)

    def logprobs(
        self,
        batch: Batch,
        *,
        temperature: float,
        entropy: bool = False,
        entropy_grad: bool = False,
        states: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each trained token under logits / temperature, (N,) float32; and the
        entropy there, (N,), where asked.

        The vocabulary projection runs on trained positions alone. The entropy carries a gradient
        only with `entropy_grad`.
        states: those of this batch, where they are at hand already.
        """
        seen = self.states(batch) if states is None else states
        return self.head.logprobs(
            seen, batch.target, temperature=temperature, entropy=entropy, entropy_grad=entropy_grad
        )

    def values(self, batch: Batch, *, states: Tensor | None = None) -> Tensor:
        """The value head's estimate of the return from each trained token on, (N,) float32, made
        before that token is seen."""
        if self.value_head is None:
            raise RuntimeError("expected add_value_head() before values()")
        out: Tensor = self.value_head(self.states(batch) if states is None else states)
        return out

    def add_value_head(self) -> ValueHead:
        """The value head; a fresh one where there was none."""
        if self.value_head is None:
            self.value_head = ValueHead(
                self.model.get_base_model().config.get_text_config().hidden_size, self.device
            )
        return self.value_head

    def load_value_head(self, folder: Path) -> None:
        """The value head that stands beside an adapter; nothing happens where none does. Raises
        UserError for another model's."""
        if (folder / VALUE_HEAD).exists():
            self.add_value_head().load(folder)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        sight: Layout | Cached | Tensor | None,
        cache: Any = None,
    ) -> Tensor:
        """Last hidden states (B, T, D) of tokens and positions (B, T); `sight` says who sees whom,
        as a layout or a padding mask."""
        mask, extra = (
            (sight, {})
            if sight is None or isinstance(sight, Tensor)
            else (self._no_mask, {"layout": sight, "backend": self.backend})
        )
        out = self._decoder(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        )
        result: Tensor = out.last_hidden_state
        return result

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """Inside, the model computes its attention by the library's own function, with no
        layout."""
        base = self.model.get_base_model()
        ours = base.config._attn_implementation
        base.set_attn_implementation(attention.stock_attention(base.config))
        try:
            yield
        finally:
            base.set_attn_implementation(ours)

    def give_up_sharing(self) -> None:
        """From now on plain rows and the library's own attention."""
        self.shares_prefixes = False
        base = self.model.get_base_model()
        base.set_attn_implementation(attention.stock_attention(base.config))

    def batches(self, rows: Sequence[Row], budget_tokens: int, *, pad: int) -> Iterator[Batch]:
        """Micro-batches of at most `budget_tokens` computed tokens: packed with shared prefixes
        where the model can, else plain rows."""
        if self.shares_prefixes:
            return (collate(bundles, self.device) for bundles in pack(rows, budget_tokens))
        return (
            collate_plain(chunk, pad=pad, device=self.device)
            for chunk in pack_plain(rows, budget_tokens)
        )

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
        """The trainable weights, float32, as one safetensors file; the value head's, where there is
        one, as another."""
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in self.trainable.items()},
            folder / WEIGHTS,
        )
        if self.value_head is not None:
            self.value_head.save(folder)

    def load(self, folder: Path) -> None:
        """Weights that `save` wrote. Raises UserError where they are another adapter's, or not to
        be had."""
        stored = read_tensors(folder / WEIGHTS)
        wrong = [
            n for n, p in self.trainable.items() if n not in stored or stored[n].shape != p.shape
        ]
        if wrong or len(stored) != len(self.trainable):
            raise UserError(
                f"{folder / WEIGHTS}: not the weights of this adapter (first difference:"
                f" {(wrong or sorted(stored))[0]})"
            )
        with torch.no_grad():
            for name, p in self.trainable.items():
                p.copy_(stored[name])
        self.load_value_head(folder)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A checkpoint's safetensors file. Raises UserError where it is not there or torn."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); bring it back, or start again with another --out"
        ) from error
