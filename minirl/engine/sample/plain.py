"""The plain sampler: transformers' `generate`, for any architecture, and what the live one is
checked against.

Invariant: `generate` only computes logits here. What is drawn from them, and its log-probability,
is decided as in every sampler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
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
from minirl.engine.model.policy import Policy
from minirl.engine.sample.draw import check_finite, pick, stops, uniforms
from minirl.episode import Ask, Completion


class PlainSampler:
    """Decodes up to `rows` asks together, left-padded, and gives them all back when the last has
    ended."""

    def __init__(self, policy: Policy, chat: Chat, *, rows: int) -> None:
        self.policy = policy
        self.chat = chat
        self.rows = rows
        self.tokens = 0  # sampled since the start, for tokens/s
        self._queue: deque[tuple[int, Ask]] = deque()

    def add(self, key: int, ask: Ask) -> None:
        """Queue an ask."""
        self._queue.append((key, ask))

    def reset(self) -> None:
        """Nothing outlives a poll."""

    def poll(self) -> list[tuple[int, Completion]]:
        """The completions of the next asks, those of like length together."""
        # Longest first: an out-of-memory error, if there is to be one, comes at once and not at the
        # end.
        waiting = sorted(self._queue, key=lambda item: (-len(item[1].tokens), item[0]))
        chosen, self._queue = waiting[: self.rows], deque(waiting[self.rows :])
        completions = self._generate([ask for _, ask in chosen])
        self.tokens += sum(len(c.tokens) for c in completions)
        return [(key, completion) for (key, _), completion in zip(chosen, completions, strict=True)]

    def _generate(self, asks: Sequence[Ask]) -> list[Completion]:
        longest = max(len(ask.tokens) for ask in asks)
        pad = self.chat.tokenizer.pad_token_id
        tokens = torch.full((len(asks), longest), pad)
        present = torch.zeros_like(tokens)
        for i, ask in enumerate(asks):
            tokens[i, longest - len(ask.tokens) :] = torch.tensor(ask.tokens)
            present[i, longest - len(ask.tokens) :] = 1
        picker = Picker(asks, self.chat, self.policy.device)
        base = self.policy.model.get_base_model()
        # The model's own generation config may hold a repetition penalty or other warpers: they
        # would bias every ratio.
        kept, base.generation_config = base.generation_config, GenerationConfig()
        try:
            with torch.no_grad():
                base.generate(
                    input_ids=tokens.to(self.policy.device),
                    attention_mask=present.to(self.policy.device),
                    generation_config=GenerationConfig(
                        do_sample=False,
                        use_cache=True,
                        pad_token_id=pad,
                        max_new_tokens=max(ask.max_tokens for ask in asks),
                    ),
                    logits_processor=LogitsProcessorList([picker]),
                    stopping_criteria=StoppingCriteriaList([Ended(picker)]),
                )
        finally:
            base.generation_config = kept
        return picker.completions()


class Picker(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's next token from its own stream of uniforms, and writes down its
    log-probability.

    `generate` is told to be greedy and is handed logits in which the drawn token alone is finite.
    """

    def __init__(self, asks: Sequence[Ask], chat: Chat, device: torch.device) -> None:
        self.asks = asks
        self.chat = chat
        self.running = [True] * len(asks)
        self._picked: list[list[int]] = [[] for _ in asks]
        self._logprobs: list[list[float]] = [[] for _ in asks]
        self._finish: list[Any] = ["length"] * len(asks)
        longest = max(ask.max_tokens for ask in asks)
        streams = [[*uniforms(ask), *[0.0] * (longest - ask.max_tokens)] for ask in asks]
        self._uniforms = torch.tensor(streams, device=device)  # (B, most tokens)
        self._temperature = [ask.temperature for ask in asks]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V) -> (B, V)
        step = max(len(picked) for picked in self._picked)
        chosen, logprobs = pick(scores.float(), self._temperature, self._uniforms[:, step])
        check_finite(found := logprobs.tolist())
        for i, (token, logprob) in enumerate(zip(chosen.tolist(), found, strict=True)):
            if self.running[i]:
                self._append(i, token, logprob)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)

    def _append(self, i: int, token: int, logprob: float) -> None:
        ask, picked = self.asks[i], self._picked[i]
        picked.append(token)
        self._logprobs[i].append(logprob)
        if token in self.chat.eos or (ask.stop and stops(self.chat, picked, ask.stop)):
            self._finish[i] = "stop"
            self.running[i] = False
        elif len(picked) >= ask.max_tokens:
            self.running[i] = False

    def completions(self) -> list[Completion]:
        """One for each ask, in order."""
        return [
            Completion(tuple(tokens), tuple(logprobs), self.chat.text(tokens), finish)
            for tokens, logprobs, finish in zip(
                self._picked, self._logprobs, self._finish, strict=True
            )
        ]


class Ended(StoppingCriteria):  # type: ignore[misc]
    """Tells `generate` which rows have ended."""

    def __init__(self, picker: Picker) -> None:
        self.picker = picker

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.tensor(
            [not running for running in self.picker.running], device=input_ids.device
        )
