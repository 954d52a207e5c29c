"""The plain sampler: transformers' `generate`, for any architecture; the live one is checked
against it.

Invariant: `generate` only computes logits here. Which token is drawn from them, and its
log-probability, is decided as in every sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from minirl.chat import Chat
from minirl.engine.model.batch import pad_rows
from minirl.engine.model.policy import Policy
from minirl.engine.sample.draw import Reply, draw
from minirl.episode import Ask, Completion


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    device: torch.device,
    settings: GenerationConfig,
    **extra: Any,
) -> Tensor:
    """transformers' `generate` on left-padded prompts, with these settings alone; the new tokens,
    (B, T). extra: further arguments of `generate`."""
    longest = max(map(len, prompts))
    tokens, present = pad_rows(prompts, settings.pad_token_id, side="left")
    # The model's own generation config may hold an end token or a repetition penalty, which are
    # taken wherever ours is silent and would bias every ratio.
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        out: Tensor = model.generate(
            input_ids=tokens.to(device),
            attention_mask=present.to(device),
            generation_config=settings,
            **extra,
        )
    finally:
        model.generation_config = kept
    return out[:, longest:]


class PlainSampler:
    """Decodes up to `rows` asks together, left-padded, and gives them all back when the last has
    ended. tokens: sampled since the start, for tokens/s."""

    def __init__(self, policy: Policy, chat: Chat, *, rows: int) -> None:
        self.policy = policy
        self.chat = chat
        self.rows = rows
        self.tokens = 0
        self._waiting: list[tuple[int, Ask]] = []

    def add(self, key: int, ask: Ask) -> None:
        """Queue an ask."""
        self._waiting.append((key, ask))

    def reset(self) -> None:
        """Nothing outlives a poll."""

    def poll(self) -> list[tuple[int, Completion]]:
        """The completions of the next asks, those of like length together."""
        # Longest first: an out-of-memory error, if there is to be one, comes at once and not at the
        # end.
        waiting = sorted(self._waiting, key=lambda item: (-len(item[1].tokens), item[0]))
        chosen, self._waiting = waiting[: self.rows], waiting[self.rows :]
        replies = [Reply(key, ask) for key, ask in chosen]
        generate(
            self.policy.model.get_base_model(),
            [reply.ask.tokens for reply in replies],
            self.policy.device,
            GenerationConfig(
                do_sample=False,
                use_cache=True,
                pad_token_id=self.chat.tokenizer.pad_token_id,
                max_new_tokens=max(reply.ask.max_tokens for reply in replies),
            ),
            logits_processor=LogitsProcessorList([Picker(replies, self.chat, self.policy.device)]),
            stopping_criteria=StoppingCriteriaList([Ended(replies)]),
        )
        self.tokens += sum(len(reply.tokens) for reply in replies)
        return [reply.completion(self.chat) for reply in replies]


class Picker(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's next token from its own stream of uniforms, and appends it to its reply.

    `generate` is told to be greedy and is handed logits in which the drawn token alone is finite.
    """

    def __init__(self, replies: Sequence[Reply], chat: Chat, device: torch.device) -> None:
        self._replies = replies
        self._chat = chat
        longest = max(len(reply.uniforms) for reply in replies)
        streams = [[*r.uniforms, *[0.0] * (longest - len(r.uniforms))] for r in replies]
        self._uniforms = torch.tensor(streams, device=device)  # (B, most tokens)
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V) -> (B, V)
        chosen = draw(self._replies, scores.float(), self._uniforms[:, self._step], self._chat)
        self._step += 1
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)


@dataclass
class Ended(StoppingCriteria):  # type: ignore[misc]
    """Tells `generate` which rows have ended."""

    replies: Sequence[Reply]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        ended = [reply.finish is not None for reply in self.replies]
        return torch.tensor(ended, device=input_ids.device)
