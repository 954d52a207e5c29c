"""transformers' `generate` as a sampler: called directly and well, as what the live sampler is
measured against.

Invariant: it does nothing that it need not: left-padded lock-step batches, exact sampling at
temperature 1, no log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from minirl.chat import Chat
from minirl.engine import lean
from minirl.engine.model.policy import Policy
from minirl.engine.sample.plain import generate
from minirl.episode import Ask, Completion


class Generate:
    """Decodes all waiting asks together, up to `rows`, and gives them back when the longest has
    ended. Lengths alone end a completion.

    model: a transformers model, LoRA layers inside or not.
    """

    def __init__(self, model: Any, chat: Chat, device: torch.device, *, rows: int) -> None:
        self.model = model
        self.chat = chat
        self.device = device
        self.rows = rows
        self._queue: list[tuple[int, Ask]] = []

    def add(self, key: int, ask: Ask) -> None:
        """Queue an ask; its seed and temperature are not used."""
        self._queue.append((key, ask))

    def poll(self) -> list[tuple[int, Completion]]:
        """The completions of the next asks, those of like length together."""
        waiting = sorted(self._queue, key=lambda item: -len(item[1].tokens))
        chosen, self._queue = waiting[: self.rows], waiting[self.rows :]
        replies = self._generate([ask for _, ask in chosen])
        return [(key, reply) for (key, _), reply in zip(chosen, replies, strict=True)]

    def _generate(self, asks: Sequence[Ask]) -> list[Completion]:
        longest = max(len(ask.tokens) for ask in asks)
        limits = torch.tensor([ask.max_tokens for ask in asks], device=self.device)
        settings = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=int(limits.max()),
            pad_token_id=self.chat.tokenizer.pad_token_id,
            disable_compile=True,
        )
        out = generate(
            self.model,
            [ask.tokens for ask in asks],
            self.device,
            settings,
            stopping_criteria=StoppingCriteriaList([Limits(limits + longest)]),
        )
        replies = zip(out.tolist(), asks, strict=True)
        sampled = [reply[: ask.max_tokens] for reply, ask in replies]
        return [
            Completion(tuple(ids), (0.0,) * len(ids), self.chat.text(ids), "length")
            for ids in sampled
        ]


class Limits(StoppingCriteria):  # type: ignore[misc]
    """Tells `generate` which rows have as many tokens as they were to have."""

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return self.lengths <= input_ids.shape[1]


@contextmanager
def stock(policy: Policy, attention: str, adapter: torch.dtype = torch.float32) -> Iterator[Any]:
    """The policy's transformers model as transformers and peft ship it: their attention, their
    LoRA, norms and MLPs, nothing of ours.

    attention: the implementation it was loaded with. adapter: what the adapter's weights are held
    in; in the model's own type `generate` need not cast anything.
    """
    base = policy.model.get_base_model()
    ours = base.config._attn_implementation
    masters = {name: p.data for name, p in policy.trainable.items()}
    try:
        base.set_attn_implementation(attention)
        for p in policy.trainable.values():
            p.data = p.data.to(adapter)
        with lean.stock(policy.model):
            yield base
    finally:
        for name, p in policy.trainable.items():
            p.data = masters[name]
        base.set_attn_implementation(ours)
