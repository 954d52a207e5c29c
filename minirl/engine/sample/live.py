"""The live sampler: asks in, completions out, with the log-probability of every token under the
weights that will be trained.

It keeps the keys and values of live conversations, so that every token is computed once. Invariant:
a completion is a function of the weights, the ask's tokens and its seed alone (given the same
logits), whatever it was batched with.
"""

from __future__ import annotations

import logging

import torch

from minirl.chat import Chat
from minirl.engine.model.lora import FixedLora
from minirl.engine.model.policy import Policy
from minirl.engine.sample.draw import Reply, draw
from minirl.engine.sample.kv_cache import KVCache
from minirl.engine.sample.plain import PlainSampler
from minirl.engine.sample.runner import GraphRunner, ModelRunner
from minirl.engine.sample.scheduler import Scheduler
from minirl.episode import Ask, Completion


def open_sampler(
    policy: Policy,
    chat: Chat,
    *,
    rows: int,
    cache_tokens: int | None = None,
    cuda_graphs: bool = False,
) -> LiveSampler | PlainSampler:
    """The live sampler if the model's attention allows it, else the plain one. The numbers are
    those of recipe.Sampling."""
    if policy.shares_prefixes:
        return LiveSampler(
            policy, chat, rows=rows, cache_tokens=cache_tokens, cuda_graphs=cuda_graphs
        )
    logging.getLogger("minirl").info(
        "%s models cannot share prefixes here: sampling by `generate`, learning on plain rows",
        policy.config.model_type,
    )
    return PlainSampler(policy, chat, rows=rows)


class LiveSampler:
    """Continuous decoding: rows that end leave at once, and waiting asks take their places.

    Asks with equal tokens are prefilled once and forked; an ask that extends a conversation still
    in the cache prefills its new tokens only. tokens: sampled since the start, for tokens/s.
    """

    def __init__(
        self,
        policy: Policy,
        chat: Chat,
        *,
        rows: int,
        cache_tokens: int | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        self.policy = policy
        self.chat = chat
        self.tokens = 0
        self._lora = FixedLora(policy.model, rows, policy.backend)
        policy.head.pack(rows)
        captures = cuda_graphs and policy.device.type == "cuda"
        layers = policy.config.num_hidden_layers
        self.cache = KVCache(
            layers, rows, policy.device, policy.backend, cache_tokens, keeps_memory=captures
        )
        self.runner = (GraphRunner if captures else ModelRunner)(policy, self.cache)
        self.scheduler = Scheduler(self.cache, rows)

    def add(self, key: int, ask: Ask) -> None:
        """Queue an ask."""
        self.scheduler.add(key, ask)

    def reset(self) -> None:
        """Forget every conversation: the weights have changed, or a run must not depend on what
        came before."""
        waiting, running = len(self.scheduler.waiting), len(self.scheduler.running)
        if waiting or running:
            raise RuntimeError(
                f"expected an idle sampler, got {waiting} waiting and {running} running asks"
            )
        self.cache.clear()
        self._lora.clear()

    @torch.no_grad()
    def poll(self) -> list[tuple[int, Completion]]:
        """Decode until at least one ask is answered; the answers since the last call."""
        with self._lora:
            while True:
                admitted = self.scheduler.admit()
                if not admitted and not self.scheduler.running:
                    raise RuntimeError("poll: expected at least one ask")
                self._draw(admitted or self.scheduler.running, is_new=bool(admitted))
                if ended := self.scheduler.release():
                    return [reply.completion(self.chat) for reply in ended]

    def _draw(self, replies: list[Reply], *, is_new: bool) -> None:
        """Draw the next token of these replies: the newest ones, of which nothing is computed yet,
        or all that run."""
        # Before the pass: a copy to a GPU waits for all that was asked of it.
        uniform = torch.tensor(
            [reply.uniforms[len(reply.tokens)] for reply in replies], device=self.policy.device
        )
        if is_new:
            prompts: dict[tuple[int, ...], list[int]] = {}
            for row, reply in enumerate(replies, len(self.scheduler.running) - len(replies)):
                prompts.setdefault(reply.ask.tokens, []).append(row)
            logits = self.runner.prefill(prompts)
        else:
            logits = self.runner.decode([reply.tokens[-1] for reply in replies])
        draw(replies, logits, uniform, self.chat)
        self.tokens += len(replies)
