"""The live sampler: asks in, completions out, with the log-probability of every token under the
weights that will be trained.

It keeps the keys and values of live conversations in slots, so that every token is computed once.
Invariant: a completion is a function of the weights, the ask's tokens and its seed alone (given the
same logits), whatever it was batched with.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from minirl.chat import Chat
from minirl.engine.model.attention import Cached
from minirl.engine.model.chunks import chunks
from minirl.engine.model.lora import FixedLora
from minirl.engine.model.policy import Policy
from minirl.engine.sample.decode import KEYS, Decoder, GraphDecoder
from minirl.engine.sample.draw import check_finite, pick, stops, uniforms
from minirl.engine.sample.plain import PlainSampler
from minirl.engine.sample.slots import Slots
from minirl.episode import Ask, Completion, Finish

# Asks that wait for each other while others decode (as many as decode, when few do): a prefill
# reads all weights, like a decode step.
ADMIT_TOGETHER = 16


def open_sampler(
    policy: Policy,
    chat: Chat,
    *,
    rows: int,
    cache_tokens: int | None = None,
    cuda_graphs: bool = False,
) -> LiveSampler | PlainSampler:
    """The live sampler where the model's attention allows it, else the plain one. The numbers are
    those of recipe.Sampling."""
    if policy.shares_prefixes:
        return LiveSampler(
            policy, chat, rows=rows, cache_tokens=cache_tokens, cuda_graphs=cuda_graphs
        )
    kind = policy.model.get_base_model().config.get_text_config().model_type
    logging.getLogger("minirl").info(
        "%s models cannot share prefixes here: sampling by `generate`, learning on plain rows", kind
    )
    return PlainSampler(policy, chat, rows=rows)


@dataclass(slots=True)
class Live:
    """An ask that is being answered; picked and logprobs grow together."""

    key: int
    ask: Ask
    uniforms: list[float]
    picked: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None

    def append(self, token: int, logprob: float, chat: Chat) -> None:
        """Take a drawn token, and see whether it ends the answer."""
        self.picked.append(token)
        self.logprobs.append(logprob)
        if token in chat.eos or (self.ask.stop and stops(chat, self.picked, self.ask.stop)):
            self.finish = "stop"
        elif len(self.picked) >= self.ask.max_tokens:
            self.finish = "length"


class LiveSampler:
    """Continuous decoding: rows that end leave at once, and waiting asks take their places.

    Asks with equal tokens are prefilled once and forked; an ask that extends a conversation still
    in a slot prefills its new tokens only. Row i decodes in slot i, so the rows' keys are read in
    place; the slots behind them hold conversations that may go on.
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
        self.rows = rows
        self.tokens = 0  # sampled since the start, for tokens/s
        self.prefilled = 0  # prompt tokens computed since the start
        self._queue: deque[tuple[int, Ask]] = deque()
        self._live: list[Live] = []
        self._ended: list[tuple[int, Completion]] = []
        config = policy.model.get_base_model().config.get_text_config()
        self._lora = FixedLora(policy.model, rows, policy.backend)
        policy.head.pack(rows)
        captures = cuda_graphs and policy.device.type == "cuda"
        self._slots = Slots(
            config.num_hidden_layers,
            rows,
            policy.device,
            policy.backend,
            cache_tokens,
            keeps_memory=captures,
        )
        self._decode = (GraphDecoder if captures else Decoder)(policy, self._slots)

    def add(self, key: int, ask: Ask) -> None:
        """Queue an ask; one that goes on with a conversation still in a slot goes first, before
        that slot is given away."""
        slot, length = self._slots.longest_prefix(ask.tokens)
        if length and length == len(self._slots.tokens[slot]):
            self._queue.appendleft((key, ask))
        else:
            self._queue.append((key, ask))

    def reset(self) -> None:
        """Forget every conversation: the weights have changed, or a run must not depend on what
        came before."""
        if self._queue or self._live:
            raise RuntimeError(
                f"expected an idle sampler, got {len(self._queue)} waiting and {len(self._live)}"
                " running asks"
            )
        self._slots.clear()
        self._lora.clear()

    @torch.no_grad()
    def poll(self) -> list[tuple[int, Completion]]:
        """Decode until at least one ask is answered; the answers since the last call."""
        with self._lora:
            while not self._ended:
                fit = self._fitting()
                if fit and fit >= min(ADMIT_TOGETHER, len(self._live)):
                    self._admit([self._queue.popleft() for _ in range(fit)])
                elif self._live:
                    self._step()
                else:
                    raise RuntimeError("poll: expected at least one ask")
        ended, self._ended = self._ended, []
        return ended

    def _fitting(self) -> int:
        """How many of the asks that have waited longest can be given a row now."""
        longest, live = 0, len(self._live)
        for fit, (_, ask) in enumerate(islice(self._queue, self.rows - live)):
            longest = max(longest, len(ask.tokens) + ask.max_tokens)
            if live + fit >= self._slots.room(longest):
                return fit
        return min(len(self._queue), self.rows - live)

    def _admit(self, asks: Sequence[tuple[int, Ask]]) -> None:
        """Give each ask a row, compute what no slot holds of it, and draw its first token."""
        start = len(self._live)
        self._slots.reserve(self._capacity(asks), live=start)
        leaders: dict[tuple[int, ...], int] = {}
        # Conversations that go on come first: they sit in slots which the others might be given.
        for key, ask in sorted(
            asks, key=lambda item: -self._slots.longest_prefix(item[1].tokens)[1]
        ):
            row = len(self._live)
            if ask.tokens in leaders:
                self._slots.vacate(row)
            else:
                leaders[ask.tokens] = row
                self._slots.bring(ask.tokens, row)
            self._live.append(Live(key, ask, uniforms(ask)))
        first = self._prefill(list(leaders.items()))
        place = {tokens: i for i, tokens in enumerate(leaders)}
        for row in range(start, len(self._live)):
            tokens = self._live[row].ask.tokens
            self._slots.copy(leaders[tokens], row, len(tokens))
        fresh = self._live[start:]
        self._draw(start, first[[place[live.ask.tokens] for live in fresh]], self._uniform(fresh))

    def _capacity(self, asks: Sequence[tuple[int, Ask]]) -> int:
        """Places that each slot needs for `asks`; for all that wait where the budget has them:
        every growth copies the cache."""
        needed, later = (
            max((len(ask.tokens) + ask.max_tokens for _, ask in some), default=0)
            for some in (asks, self._queue)
        )
        return (
            max(needed, later)
            if self._slots.room(max(needed, later)) >= len(self._live) + len(asks)
            else needed
        )

    def _prefill(self, leaders: Sequence[tuple[tuple[int, ...], int]]) -> Tensor:
        """Compute the tokens that the leaders' slots lack; the logits after each leader's last
        token, (leaders, V)."""
        missing = [len(tokens) - len(self._slots.tokens[row]) for tokens, row in leaders]
        out: dict[int, Tensor] = {}
        order = sorted(range(len(leaders)), key=lambda i: missing[i])
        budget = self.policy.backend.prefill_tokens
        for chunk in chunks(order, lambda c: missing[c[-1]] * len(c), budget):
            out |= self._prefill_chunk(leaders, chunk, missing)
        return torch.stack([out[i] for i in range(len(leaders))])

    def _prefill_chunk(
        self, leaders: Sequence[tuple[tuple[int, ...], int]], chunk: list[int], missing: list[int]
    ) -> dict[int, Tensor]:
        device, width = self.policy.device, max(missing[i] for i in chunk)
        rows = [leaders[i][1] for i in chunk]
        span = slice(rows[0], rows[0] + len(rows))
        held = [len(self._slots.tokens[row]) for row in rows]
        tokens = torch.tensor(
            [
                [*leaders[i][0][h:], *[0] * (width - missing[i])]
                for i, h in zip(chunk, held, strict=True)
            ],
            device=device,
        )
        positions = torch.tensor(held, device=device)[:, None] + torch.arange(width, device=device)
        # Padded tokens are written too, all behind what the slots hold and will hold: at most one
        # place behind the longest.
        longest = max(len(leaders[i][0]) for i in chunk)
        positions.clamp_(max=longest)
        reach = -(-(min(longest, max(held) + width - 1) + 1) // KEYS) * KEYS
        # Slots side by side are read where they stand.
        self._slots.aim(
            span if rows == [*range(span.start, span.stop)] else torch.tensor(rows, device=device),
            positions,
            reach,
        )
        hidden = self.policy.hidden(tokens, positions, Cached(positions, reach), cache=self._slots)
        last = hidden[torch.arange(len(chunk)), torch.tensor([missing[i] - 1 for i in chunk])]
        for i, row in zip(chunk, rows, strict=True):
            self._slots.tokens[row] = list(leaders[i][0])
            self.prefilled += missing[i]
        return dict(zip(chunk, self.policy.head.logits(last), strict=True))

    def _step(self) -> None:
        """One token for every row."""
        lengths = [len(self._slots.tokens[row]) for row in range(len(self._live))]
        uniform = self._uniform(
            self._live
        )  # before the pass: a copy to a GPU waits for all that was asked of it
        logits = self._decode([live.picked[-1] for live in self._live], lengths)
        for row, live in enumerate(self._live):
            self._slots.tokens[row].append(live.picked[-1])
        self._draw(0, logits, uniform)

    def _uniform(self, rows: Sequence[Live]) -> Tensor:
        """The numbers that decide the rows' next tokens, (B,)."""
        return torch.tensor(
            [live.uniforms[len(live.picked)] for live in rows], device=self.policy.device
        )

    def _draw(self, start: int, logits: Tensor, uniform: Tensor) -> None:
        """Draw the next token of the rows from `start` on, and let those that have ended go."""
        rows = self._live[start:]
        chosen, logprobs = pick(logits, [live.ask.temperature for live in rows], uniform)
        check_finite(found := logprobs.tolist())
        for live, token, logprob in zip(rows, chosen.tolist(), found, strict=True):
            live.append(token, logprob, self.chat)
        self.tokens += len(rows)
        for row in reversed(range(start, len(self._live))):
            live = self._live[row]
            if live.finish is not None:
                completion = Completion(
                    tuple(live.picked),
                    tuple(live.logprobs),
                    self.chat.text(live.picked),
                    live.finish,
                )
                self._ended.append((live.key, completion))
                self._live[row] = self._live[-1]
                self._slots.swap(row, len(self._live) - 1)
                self._live.pop()
