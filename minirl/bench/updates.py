"""Updates: the shared-prefix learner beside padded rows, over a grid of prompt and completion
lengths.

Two references, one group in one micro-batch on every side. "padded rows": our own learner, head and
adapters over plain rows; what is left is the layout. "transformers rows": transformers' and peft's
own forward over padded rows, logits of completion positions alone, as a trainer without a fused
head computes them. Invariant: all sides compute the same loss; their gradients agree to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from random import Random

import torch
from torch import Tensor

from minirl.bench.generate import stock
from minirl.bench.measure import Measurement, Spread, by_turns, peak_bytes, rates
from minirl.bench.setup import Bench
from minirl.engine.learn import losses
from minirl.engine.learn.credit import Credit, advantages
from minirl.engine.model.batch import Row, row
from minirl.episode import Episode, Group, Problem, Turn

SIDES = {
    "padded rows": "same learner, plain rows",
    "transformers rows": "stock forward, completion logits in full",
}
MEGA = 1e6


def measure_updates(bench: Bench) -> list[Measurement]:
    """Trained tokens a second and peak memory (weights, adapter and optimizer included), each shape
    against both references."""
    found = []
    for prompt, completion in bench.sizes.grid:
        sides = variants(bench, prompt, completion)
        runs = by_turns(sides, bench.options.repeats, bench.device)
        peaks = {name: Spread((peak_mb(bench, work),)) for name, work in sides.items()}
        for against, note in SIDES.items():
            what = f"update {prompt}/{completion}"
            found.append(
                Measurement(
                    "update",
                    what,
                    "tokens/s",
                    rates(runs["ours"]),
                    rates(runs[against]),
                    against,
                    note,
                )
            )
            resting = f"{resting_mb(bench):,.0f} MB of it at rest"
            found.append(
                Measurement(
                    "update",
                    f"{what}, peak memory",
                    "MB",
                    peaks["ours"],
                    peaks[against],
                    against,
                    resting,
                )
            )
    return found


def variants(bench: Bench, prompt: int, completion: int) -> dict[str, Callable[[], float]]:
    """The sides by name: each trains on one group, leaves its gradient in the parameters, and
    returns the trained tokens."""
    group = group_of(bench, prompt, completion)
    learner = bench.learner(micro_tokens=bench.sizes.group * (prompt + completion) + 64)

    def update(shared: bool) -> float:
        policy, can = bench.policy, bench.policy.shares_prefixes
        policy.shares_prefixes = can and shared
        try:
            return learner.update([group])["trained_tokens"]
        finally:
            policy.shares_prefixes = can

    return {
        "ours": lambda: update(True),
        "padded rows": lambda: update(False),
        "transformers rows": StockRows(bench, group),
    }


def group_of(bench: Bench, prompt: int, completion: int) -> Group:
    """One group of random tokens, scored by the policy as a sampler would have, so that every ratio
    is 1."""
    rng, vocabulary = (
        Random(f"{prompt}/{completion}"),
        bench.policy.model.get_base_model().config.get_text_config().vocab_size,
    )
    shared = tuple(rng.randrange(vocabulary) for _ in range(prompt))
    problem = Problem(f"bench/{prompt}/{completion}", "", None)

    def episode(number: int, logprobs: tuple[float, ...], tokens: tuple[int, ...]) -> Episode:
        return Episode(
            problem,
            (Turn("prompt", shared), Turn("attempt", tokens, logprobs, trained=True)),
            float(number % 2),
        )

    replies = [
        tuple(rng.randrange(vocabulary) for _ in range(completion))
        for _ in range(bench.sizes.group)
    ]
    rows = rows_of(
        Group(
            problem,
            tuple(episode(i, (0.0,) * completion, tokens) for i, tokens in enumerate(replies)),
        ),
        [0.0] * len(replies),
    )
    scores: dict[int, list[float]] = defaultdict(list)
    with torch.no_grad():
        for batch in bench.policy.batches(
            rows, len(replies) * (prompt + completion), pad=bench.chat.tokenizer.pad_token_id
        ):
            logprobs, _ = bench.policy.logprobs(batch, temperature=1.0)
            for number, value in zip(batch.episode.tolist(), logprobs.tolist(), strict=True):
                scores[number].append(value)
    return Group(
        problem, tuple(episode(i, tuple(scores[i]), tokens) for i, tokens in enumerate(replies))
    )


def rows_of(group: Group, credit: Sequence[Credit | None]) -> list[Row]:
    """The group's rows under GRPO's weights: a mean over each episode's tokens, then over
    episodes."""
    episodes = group.episodes
    return [
        row(
            episode,
            advantage=a or 0.0,
            weight=1.0 / (len(episodes) * episode.trained_tokens),
            number=i,
        )
        for i, (episode, a) in enumerate(zip(episodes, credit, strict=True))
    ]


class StockRows:
    """One GRPO update of a group as a plain trainer writes it, with transformers' forward and
    peft's LoRA.

    float32 adapters under autocast where the model computes in half precision. Halves its
    micro-batch when a GPU runs out of memory.
    """

    def __init__(self, bench: Bench, group: Group) -> None:
        self.bench = bench
        learner = bench.learner()
        self.optimizer, self.scaler = learner.optimizer, learner.scaler
        self.rows = rows_of(group, advantages(group, learner.node))
        self.at_once = len(self.rows)

    def __call__(self) -> float:
        policy = self.bench.policy
        half = policy.dtype != torch.float32
        with stock(policy, self.bench.stock_attention):
            policy.model.train()
            while True:
                self.optimizer.zero_grad(set_to_none=False)
                try:
                    for start in range(0, len(self.rows), self.at_once):
                        with (
                            torch.autocast(policy.device.type, dtype=policy.dtype)
                            if half
                            else nullcontext()
                        ):
                            loss = self._loss(self.rows[start : start + self.at_once])
                        self.scaler.scale(loss).backward()
                    break
                except torch.OutOfMemoryError:
                    if self.at_once == 1:
                        raise
                    self.at_once //= 2
                torch.cuda.empty_cache()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            policy.model.eval()
        return float(sum(sum(r.mask) for r in self.rows))

    def _loss(self, rows: list[Row]) -> Tensor:
        device, trained = (
            self.bench.device,
            sum(rows[0].mask),
        )  # all rows of a group are of one shape here
        tokens = torch.tensor([r.tokens for r in rows], device=device)
        out = self.bench.policy.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            logits_to_keep=trained + 1,
            use_cache=False,
        )
        logits = out.logits[:, :-1].float()  # (B, R, V)
        logprobs = (
            torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, -trained:, None]).squeeze(-1)
        )
        old = torch.tensor([r.old[-trained:] for r in rows], device=device)
        advantage = torch.tensor([r.advantage for r in rows], device=device)[:, None].expand_as(old)
        weight = torch.tensor([r.weight for r in rows], device=device)[:, None].expand_as(old)
        loss, _ = losses.policy_loss(
            logprobs.flatten(),
            old.flatten(),
            advantage.flatten(),
            weight.flatten(),
            clip_low=0.2,
            clip_high=0.2,
        )
        return loss


def peak_mb(bench: Bench, work: Callable[[], object]) -> float:
    """Most megabytes held during `work`, with what rests."""
    return resting_mb(bench) + peak_bytes(work, bench.device) / MEGA


def resting_mb(bench: Bench) -> float:
    """Megabytes of the model, its adapter, the adapter's gradient and AdamW's two moments."""
    tensors = [*bench.policy.model.parameters(), *bench.policy.model.buffers()]
    held = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    trained = sum(p.numel() * p.element_size() for p in bench.policy.trainable.values())
    return float((sum(held.values()) + 3 * trained) / MEGA)
