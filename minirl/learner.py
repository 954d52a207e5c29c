"""Learner: groups in, one step of the adapter out.

credit -> batch -> loss -> optimizer. Invariant: every denominator is taken over the whole optimizer step on all processes, so the
gradient is the same for any micro-batch size and any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from minirl import losses, optim
from minirl.batch import Batch, Row, row
from minirl.credit import advantages, is_dead
from minirl.episode import Group
from minirl.policy import Policy
from minirl.recipe import Learner as LearnerNode

MIN_MICRO_TOKENS = 256
T = TypeVar("T")


@dataclass(slots=True)
class Sums:
    """Totals over the trained tokens of a step: what the logged means are made of."""

    tokens: Tensor
    loss: Tensor
    kl: Tensor
    entropy: Tensor
    clipped: Tensor
    mismatch: Tensor
    compared: Tensor  # the tokens that `mismatch` is summed over

    @classmethod
    def zero(cls, device: torch.device) -> Sums:
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in cls.__slots__))

    def vector(self) -> Tensor:
        return torch.stack([getattr(self, name) for name in self.__slots__])


class Learner:
    """One stage's optimizer over a policy.

    steps: of the whole stage, for the schedule. pad: the id that fills plain rows. limit_tokens: most trained tokens of an episode, the
    constant denominator of Dr. GRPO. temperature: that of sampling, under which tokens are scored too.
    """

    def __init__(
        self,
        policy: Policy,
        node: LearnerNode,
        accelerator: Accelerator,
        *,
        steps: int,
        limit_tokens: int,
        temperature: float,
        pad: int,
    ) -> None:
        self.policy = policy
        self.node = node
        self.accelerator = accelerator
        self.limit_tokens = limit_tokens
        self.temperature = temperature
        self.pad = pad
        self.updates_planned = steps * node.passes * node.minibatches
        self.updates = 0
        self.skipped = 0
        self.micro_tokens = node.micro_tokens
        self.parameters = list(policy.trainable.values())
        self.optimizer = optim.build(node, self.parameters, policy.device)
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.dtype == torch.float16)
        # The scaler begins to exist with its first loss, and a process whose groups are all dead has none.
        self.scaler.scale(torch.zeros((), device=policy.device))

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Train on this process's share of a step's groups; the step's means over all processes.

        kl, entropy, clip and mismatch_kl are means over trained tokens; mismatch_kl is the k3 estimate of KL(sampler || learner) before
        the first update, which is what a wrong mask, position or weight shows up in.
        """
        credits = [advantages(group, self.node) for group in groups]
        sums = Sums.zero(self.policy.device)
        norms: list[float] = []
        self.policy.model.train()  # every dropout is zero; this is what gradient checkpointing goes by
        for number in range(self.node.passes):
            for chunk in _split(list(zip(groups, credits, strict=True)), self.node.minibatches):
                first = number == 0 and self.updates % (self.node.passes * self.node.minibatches) == 0
                norms.append(self._one_update(self._rows(chunk), sums, measure_mismatch=first))
                self.updates += 1
        self.policy.model.eval()
        tokens, loss, kl, entropy, clipped, mismatch, compared = self.accelerator.reduce(sums.vector(), "sum").tolist()
        made = self.node.passes * self.node.minibatches
        per_token = max(tokens, 1.0)
        stats = {"loss": loss / made, "grad_norm": sum(norms) / made, "lr": self.learning_rate(self.updates - 1)}
        if self.node.loss != "nll":
            counts = torch.tensor([len(groups), sum(map(is_dead, credits))], dtype=torch.float32, device=self.policy.device)
            stats["groups"], stats["dead"] = self.accelerator.reduce(counts, "sum").tolist()
            stats |= {"entropy": entropy / per_token, "clip": clipped / per_token, "mismatch_kl": mismatch / max(compared, 1.0)}
        if self.node.beta > 0:
            stats["kl"] = kl / per_token
        stats |= {"trained_tokens": tokens / self.node.passes, "skipped": float(self.skipped)}
        return stats

    def learning_rate(self, update: int) -> float:
        """That of an update, counted from 0: a pure function, so that resuming needs no scheduler state."""
        rising = math.ceil(round(self.node.warmup * self.updates_planned, 9))  # 0.07 * 100 is a little more than 7
        if update < rising:
            return self.node.lr * (update + 1) / rising
        progress = (update - rising) / max(1, self.updates_planned - rising)
        if self.node.schedule == "constant":
            return self.node.lr
        if self.node.schedule == "linear":
            return self.node.lr * (1.0 - progress)
        return self.node.lr * 0.5 * (1.0 + math.cos(math.pi * progress))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values that a resumed run needs."""
        tensors, plain = optim.flatten(self.optimizer)
        counts = {"updates": self.updates, "skipped": self.skipped, "micro_tokens": self.micro_tokens}
        return tensors, {"optimizer": plain, "scaler": self.scaler.state_dict(), **counts}

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """What `state` gave."""
        optim.unflatten(self.optimizer, tensors, plain["optimizer"])
        self.scaler.load_state_dict(plain["scaler"])
        self.updates, self.skipped, self.micro_tokens = plain["updates"], plain["skipped"], plain["micro_tokens"]

    def _rows(self, chunk: Sequence[tuple[Group, list[float | None]]]) -> list[Row]:
        """The live episodes of a minibatch, each with its token weight; dead groups count in the denominators and cost nothing else."""
        counted = [
            (e, a, None if is_dead(credit) else number)
            for number, (group, credit) in enumerate(chunk)
            for e, a in zip(group.episodes, credit, strict=True)
            if a is not None
        ]
        local = torch.tensor([len(counted), sum(e.trained_tokens for e, _, _ in counted)], dtype=torch.float64)
        episodes, tokens = self.accelerator.reduce(local.to(self.policy.device), "sum").tolist()

        def weight(trained_tokens: int) -> float:
            if self.node.aggregate == "token":
                return float(1.0 / tokens)
            return float(1.0 / (episodes * (trained_tokens if self.node.aggregate == "sequence" else self.limit_tokens)))

        return [
            row(e, advantage=a, weight=weight(e.trained_tokens), number=number, group=group)
            for number, (e, a, group) in enumerate(counted)
            if group is not None
        ]

    def _one_update(self, rows: list[Row], sums: Sums, *, measure_mismatch: bool) -> float:
        """Accumulate the gradient of all rows and apply it; its norm before clipping (0.0 when there was nothing to learn)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.updates)
        while True:
            self.optimizer.zero_grad(set_to_none=False)
            attempt = Sums.zero(self.policy.device)
            try:
                for batch in self.policy.batches(rows, self.micro_tokens, pad=self.pad):
                    self._backward(batch, attempt, measure_mismatch)
                break
            except torch.OutOfMemoryError:
                if self.micro_tokens <= MIN_MICRO_TOKENS:
                    raise
                self.micro_tokens //= 2
            torch.cuda.empty_cache()  # here, where the failed forward's tensors are no longer held by the traceback
        for name in Sums.__slots__:
            setattr(sums, name, getattr(sums, name) + getattr(attempt, name))
        return self._apply(bool(rows))

    def _backward(self, batch: Batch, sums: Sums, measure_mismatch: bool) -> None:
        node, reference = self.node, None
        if node.beta > 0:
            # Before the policy's own forward: the swap must not touch weights that a backward pass still needs.
            with self.policy.reference():
                reference, _ = self.policy.logprobs(batch, temperature=self.temperature)
        logprobs, entropy = self.policy.logprobs(
            batch, temperature=self.temperature, entropy=node.loss != "nll", entropy_grad=node.entropy != 0
        )
        clipped = torch.zeros_like(batch.old, dtype=torch.bool)
        if node.loss == "nll":
            loss = losses.nll(logprobs, batch.weights)
        else:
            loss, clipped = losses.policy_loss(
                logprobs,
                batch.old,
                batch.advantages,
                batch.weights,
                clip_low=node.clip_low,
                clip_high=node.clip_high,
                episode=batch.episode if node.ratio == "sequence" else None,
            )
            if measure_mismatch:
                sums.compared += batch.old.numel()
                sums.mismatch += losses.kl_k3(batch.old, logprobs.detach()).double().sum()
        if reference is not None:
            kl = losses.kl_k3(logprobs, reference)
            loss = loss + node.beta * (batch.weights * kl).sum()
            sums.kl += kl.detach().double().sum()
        if entropy is not None:
            sums.entropy += entropy.detach().double().sum()
            if node.entropy:
                loss = loss - node.entropy * (batch.weights * entropy).sum()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        sums.loss += loss.detach().double()
        sums.clipped += clipped.double().sum()
        sums.tokens += batch.old.numel()

    def _apply(self, live: bool) -> float:
        """Sum the gradient over processes, clip it, step; a gradient that is not finite skips the step and is counted."""
        anything = self.accelerator.reduce(torch.tensor(float(live), device=self.policy.device), "sum").item()
        if not anything:
            return 0.0
        self._reduce_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.node.grad_clip).item()
        if not math.isfinite(norm):
            self.skipped += 1
            self.optimizer.zero_grad(set_to_none=False)
        if math.isfinite(norm) or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # skips by itself where unscale_ found a gradient that is not finite
        self.scaler.update()
        return norm if math.isfinite(norm) else 0.0

    def _reduce_gradients(self) -> None:
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.accelerator.num_processes == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
        flat = self.accelerator.reduce(flat, "sum")
        for p, piece in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = piece.view_as(p).clone()


def _split(items: list[T], count: int) -> Iterator[list[T]]:
    """`count` consecutive pieces of nearly equal size."""
    for i in range(count):
        yield items[len(items) * i // count : len(items) * (i + 1) // count]
