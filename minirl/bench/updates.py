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
from random import Random

import torch
from torch import Tensor

from minirl.bench.generate import stock
from minirl.bench.measure import MEGA, Measurement, Spread, by_turns, peak_bytes, rates
from minirl.bench.setup import Bench
from minirl.engine.learn import losses
from minirl.engine.learn.credit import Credit, advantages
from minirl.engine.model.batch import Row, row
from minirl.episode import Episode, Group, Problem, Turn

SIDES = {
    "padded rows": "same learner, plain rows",
    "transformers rows": "stock forward, completion logits in full",
}


def measure_updates(bench: Bench) -> list[Measurement]:
    """Trained tokens a second, each shape against both references. On CUDA peak memory too:
    weights, adapter and optimizer included."""
    found = []
    for prompt, completion in bench.sizes.grid:
        sides = variants(bench, prompt, completion)
        runs = by_turns(sides, bench.options.repeats, bench.device)
        what, ours = f"update {prompt}/{completion}", rates(runs["ours"])
        for against, note in SIDES.items():
            theirs = rates(runs[against])
            found.append(Measurement("update", what, "tokens/s", ours, theirs, against, note))
        if bench.device.type == "cuda":
            peaks = {name: Spread((peak_mb(bench, work),)) for name, work in sides.items()}
            what, note = f"{what}, peak memory", f"{resting_mb(bench):,.0f} MB of it at rest"
            for against in SIDES:
                ours, theirs = peaks["ours"], peaks[against]
                found.append(Measurement("update", what, "MB", ours, theirs, against, note))
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
    vocabulary = bench.policy.model.get_base_model().config.get_text_config().vocab_size
    rng = Random(f"{prompt}/{completion}")

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocabulary) for _ in range(count))

    opening = Turn("prompt", tokens(prompt))
    problem = Problem(f"bench/{prompt}/{completion}", "", None)
    replies = [tokens(completion) for _ in range(bench.sizes.group)]

    def group(logprobs: Sequence[Sequence[float]]) -> Group:
        turns = [
            (opening, Turn("attempt", reply, tuple(of_reply), trained=True))
            for reply, of_reply in zip(replies, logprobs, strict=True)
        ]
        rewarded = (Episode(problem, pair, float(i % 2)) for i, pair in enumerate(turns))
        return Group(problem, tuple(rewarded))

    rows = rows_of(group([[0.0] * completion] * len(replies)), [0.0] * len(replies))
    scores: dict[int, list[float]] = defaultdict(list)
    pad, most = bench.chat.tokenizer.pad_token_id, len(replies) * (prompt + completion)
    with torch.no_grad():
        for batch in bench.policy.batches(rows, most, pad=pad):
            logprobs, _ = bench.policy.logprobs(batch, temperature=1.0)
            for number, value in zip(batch.episode.tolist(), logprobs.tolist(), strict=True):
                scores[number].append(value)
    return group([scores[i] for i in range(len(replies))])


def rows_of(group: Group, credit: Sequence[Credit | None]) -> list[Row]:
    """The group's rows under GRPO's weights: a mean over each episode's tokens, then over
    episodes."""
    episodes = group.episodes
    weights = [1.0 / (len(episodes) * episode.trained_tokens) for episode in episodes]
    return [
        row(episode, advantage=advantage or 0.0, weight=weight, number=number)
        for number, (episode, advantage, weight) in enumerate(
            zip(episodes, credit, weights, strict=True)
        )
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
        self.optimizer, self.scaler = learner.optimizer.adapter, learner.optimizer.scaler
        self.rows = rows_of(group, advantages(group, learner.settings))
        self.at_once = len(self.rows)

    def __call__(self) -> float:
        policy = self.bench.policy
        with stock(policy, self.bench.stock_attention):
            policy.model.train()
            while True:
                self.optimizer.zero_grad(set_to_none=False)
                try:
                    self._backward()
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

    def _backward(self) -> None:
        dtype, device = self.bench.policy.dtype, self.bench.device.type
        for start in range(0, len(self.rows), self.at_once):
            with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
                loss = self._loss(self.rows[start : start + self.at_once])
            self.scaler.scale(loss).backward()

    def _loss(self, rows: list[Row]) -> Tensor:
        device = self.bench.device
        trained = sum(rows[0].mask)  # all rows of a group are of one shape here
        tokens = torch.tensor([r.tokens for r in rows], device=device)
        out = self.bench.policy.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            logits_to_keep=trained + 1,
            use_cache=False,
        )
        targets = tokens[:, -trained:]
        logprobs = torch.log_softmax(out.logits[:, :-1].float(), dim=-1)  # (B, R, V)
        logprobs = logprobs.gather(-1, targets[:, :, None]).squeeze(-1)
        old = torch.tensor([r.old[-trained:] for r in rows], device=device)
        advantage, weight = (
            torch.tensor(column, device=device)[:, None].expand_as(old).flatten()
            for column in ([r.advantage for r in rows], [r.weight for r in rows])
        )
        loss, _ = losses.policy_loss(
            logprobs.flatten(), old.flatten(), advantage, weight, clip_low=0.2, clip_high=0.2
        )
        return loss


def peak_mb(bench: Bench, work: Callable[[], object]) -> float:
    """Most megabytes on a GPU during `work`: what rests, and what is held on top of it."""
    before = torch.cuda.memory_allocated(bench.device)
    return resting_mb(bench) + (peak_bytes(work, bench.device) - before) / MEGA


def resting_mb(bench: Bench) -> float:
    """Megabytes of the model, its adapter, the adapter's gradient and AdamW's two moments."""
    tensors = [*bench.policy.model.parameters(), *bench.policy.model.buffers()]
    held = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    trained = sum(p.numel() * p.element_size() for p in bench.policy.trainable.values())
    return float((sum(held.values()) + 3 * trained) / MEGA)
