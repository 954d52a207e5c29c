"""Learner: groups in, one step of the adapter out.

credit -> batch -> objective -> optimizer. Invariant: every denominator is taken over the whole
optimizer step on all processes, so the gradient is the same for any micro-batch size and any number
of processes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from minirl.engine.learn import optim, ppo
from minirl.engine.learn.credit import Credit, advantages, is_dead
from minirl.engine.learn.objective import Sums, objective
from minirl.engine.learn.ppo import Experience
from minirl.engine.model.batch import Row, row
from minirl.engine.model.policy import Policy
from minirl.episode import Episode, Group
from minirl.recipe import Learner as LearnerNode

MIN_MICRO_TOKENS = 256
NO_WORKSPACE = "CUBLAS_STATUS_ALLOC_FAILED"  # how cuBLAS says that the GPU's memory is full
VALUE = "value."  # before the names of the value optimizer's tensors
T = TypeVar("T")


class Credited(NamedTuple):
    """A group of a step with its advantages; `first` is the number of its first episode among all
    of this process's."""

    first: int
    group: Group
    credit: Sequence[Credit | None]


class Learner:
    """One stage's optimizer over a policy.

    steps: of the whole stage, for the schedule. pad: the id that fills plain rows. limit_tokens:
    most trained tokens of an episode, the constant denominator of Dr. GRPO. temperature: that of
    sampling, under which tokens are scored too. Under loss `ppo` the policy gets a value head,
    which has an optimizer and a gradient norm of its own.
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
        updates_a_step = node.passes * node.minibatches
        self.updates_frozen = (
            min(steps, node.value_warmup) * updates_a_step
        )  # in which the adapter waits for the value head
        self.updates_planned = steps * updates_a_step - self.updates_frozen
        self.updates = 0
        self.skipped = 0
        self.micro_tokens = node.micro_tokens
        self.parameters = list(policy.trainable.values())
        self.optimizer = optim.build(node, self.parameters, policy.device)
        self.value_parameters = (
            list(policy.add_value_head().parameters()) if node.loss == "ppo" else []
        )
        self.value_optimizer = (
            optim.build_value(node, self.value_parameters) if self.value_parameters else None
        )
        self.scaler = torch.amp.GradScaler(
            policy.device.type, enabled=policy.dtype == torch.float16
        )
        # The scaler begins to exist with its first loss, and a process whose groups are all dead
        # has none.
        self.scaler.scale(torch.zeros((), device=policy.device))

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Train on this process's share of a step's groups; the step's means over all processes.

        kl, entropy, clip and mismatch_kl are means over trained tokens; mismatch_kl is the k3
        estimate of KL(sampler || learner) before the first update, which is what a wrong mask,
        position or weight shows up in. PPO's kl, value, return and explained_variance are those of
        before the first update, its approx_kl the mean k3 estimate of KL(sampler || learner) over
        all of them.
        """
        firsts = accumulate((len(group.episodes) for group in groups), initial=0)
        items = [
            Credited(first, group, advantages(group, self.node))
            for first, group in zip(firsts, groups, strict=False)
        ]
        sums = Sums.zero(self.policy.device)
        norms: list[float] = []
        # every dropout is zero; this is what gradient checkpointing goes by
        self.policy.model.train()
        experience = self._experience(items) if self.node.loss == "ppo" else None
        for number in range(self.node.passes):
            for chunk in _split(items, self.node.minibatches):
                first = (
                    number == 0 and self.updates % (self.node.passes * self.node.minibatches) == 0
                )
                norms.append(
                    self._one_update(self._rows(chunk), sums, experience, measure_mismatch=first)
                )
                self.updates += 1
        self.policy.model.eval()
        return self._means(items, sums, norms, experience)

    def _means(
        self, items: list[Credited], sums: Sums, norms: list[float], experience: Experience | None
    ) -> dict[str, float]:
        """What is logged of a step."""
        totals = self.accelerator.reduce(sums.vector(), "sum").tolist()
        total = dict(zip(Sums.__slots__, totals, strict=True))
        made, per_token = len(norms), max(total["tokens"], 1.0)
        stats = {
            "loss": total["loss"] / made,
            "grad_norm": sum(norms) / made,
            "lr": self.learning_rate(self.updates - 1),
        }
        if self.node.loss != "nll":
            stats["groups"], stats["dead"] = self._total(
                [float(len(items)), float(sum(is_dead(item.credit) for item in items))]
            )
            stats |= {"entropy": total["entropy"] / per_token, "clip": total["clipped"] / per_token}
            stats["mismatch_kl"] = total["mismatch"] / max(total["compared"], 1.0)
        if self.node.penalises_loss:
            stats["kl"] = total["kl"] / per_token
        if experience is not None:
            stats |= experience.stats | {"approx_kl": total["moved"] / per_token}
            stats |= {
                "value_loss": total["value_loss"] / made,
                "value_clip": total["value_clipped"] / per_token,
            }
        return stats | {
            "trained_tokens": total["tokens"] / self.node.passes,
            "skipped": float(self.skipped),
        }

    def learning_rate(self, update: int) -> float:
        """The adapter's at an update, counted from 0: a pure function, so that resuming needs no
        scheduler state."""
        return optim.learning_rate(self.node, update - self.updates_frozen, self.updates_planned)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values that a resumed run needs."""
        tensors, plain = optim.flatten(self.optimizer)
        if self.value_optimizer is not None:  # torch's AdamW: its state is tensors alone
            tensors |= {
                VALUE + name: tensor
                for name, tensor in optim.flatten(self.value_optimizer)[0].items()
            }
        counts = {
            "updates": self.updates,
            "skipped": self.skipped,
            "micro_tokens": self.micro_tokens,
        }
        return tensors, {"optimizer": plain, "scaler": self.scaler.state_dict(), **counts}

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """What `state` gave."""
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(VALUE)}
        optim.unflatten(self.optimizer, own, plain["optimizer"])
        if self.value_optimizer is not None:
            theirs = {
                name.removeprefix(VALUE): tensor
                for name, tensor in tensors.items()
                if name.startswith(VALUE)
            }
            optim.unflatten(self.value_optimizer, theirs, {})
        self.scaler.load_state_dict(plain["scaler"])
        self.updates, self.skipped, self.micro_tokens = (
            plain["updates"],
            plain["skipped"],
            plain["micro_tokens"],
        )

    def _experience(self, items: list[Credited]) -> Experience:
        """What PPO trains a step towards; the two forward passes of it may run out of memory like
        any other."""
        rows = self._rows(items)

        def look() -> ppo.Seen:
            batches = self.policy.batches(rows, self.micro_tokens, pad=self.pad)
            return ppo.look(
                self.policy,
                rows,
                batches,
                temperature=self.temperature,
                reference=self.node.beta > 0,
            )

        scores = {
            item.first + i: e.reward
            for item in items
            for i, e in enumerate(item.group.episodes)
            if e.reward is not None
        }
        value_only = self.updates < self.updates_frozen
        return ppo.experience(
            self._within_memory(look), scores, self.node, self._total, value_only=value_only
        )

    def _rows(self, chunk: Sequence[Credited]) -> list[Row]:
        """The live episodes of a minibatch, each with its token weight; dead groups count in the
        denominators and cost nothing else."""
        counted = [
            (item.first + i, e, a, None if is_dead(item.credit) else number)
            for number, item in enumerate(chunk)
            for i, (e, a) in enumerate(zip(item.group.episodes, item.credit, strict=True))
            if a is not None
        ]
        share = self.node.sampled_share
        # Of sampled episodes and of shown ones: their part of the loss, and over how many episodes
        # and tokens it is spread.
        spread: dict[bool, tuple[float, float, float]] = {}
        for is_sampled in (True, False):
            lengths = [
                e.trained_tokens
                for _, e, _, _ in counted
                if share is None or _is_sampled(e) == is_sampled
            ]
            part = 1.0 if share is None else share if is_sampled else 1.0 - share
            episodes, tokens = self._total([float(len(lengths)), float(sum(lengths))])
            spread[is_sampled] = (part, episodes, tokens)

        def weight(e: Episode) -> float:
            part, episodes, tokens = spread[_is_sampled(e)]
            if self.node.aggregate == "token":
                return part / tokens
            return part / (
                episodes
                * (e.trained_tokens if self.node.aggregate == "sequence" else self.limit_tokens)
            )

        return [
            row(e, advantage=a, weight=weight(e), number=number, group=group)
            for number, e, a, group in counted
            if group is not None
        ]

    def _one_update(
        self, rows: list[Row], sums: Sums, experience: Experience | None, *, measure_mismatch: bool
    ) -> float:
        """Accumulate the gradient of all rows and apply it; its norm before clipping (0.0 when
        there was nothing to learn)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.updates)

        def accumulated() -> Sums:
            self._zero_gradients()
            found = Sums.zero(self.policy.device)
            for batch in self.policy.batches(rows, self.micro_tokens, pad=self.pad):
                loss = objective(
                    self.policy,
                    self.node,
                    batch,
                    found,
                    temperature=self.temperature,
                    experience=experience,
                    measure_mismatch=measure_mismatch,
                )
                self.scaler.scale(loss).backward()
            return found

        sums.add(self._within_memory(accumulated))
        return self._apply(bool(rows), value_only=experience is not None and experience.value_only)

    def _within_memory(self, attempt: Callable[[], T]) -> T:
        """The attempt, begun again with micro-batches half as large as often as it runs out of
        memory."""
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                is_memory = isinstance(error, torch.OutOfMemoryError) or NO_WORKSPACE in str(error)
                if not is_memory or self.micro_tokens <= MIN_MICRO_TOKENS:
                    raise
                self.micro_tokens //= 2
                logging.getLogger("minirl").warning(
                    "out of GPU memory: micro-batches of at most %d tokens from here on"
                    " (learner.micro_tokens was %d)",
                    self.micro_tokens,
                    self.node.micro_tokens,
                )
            # here, where the failed forward's tensors are no longer held by the traceback
            torch.cuda.empty_cache()

    def _apply(self, live: bool, *, value_only: bool = False) -> float:
        """Sum the gradient over processes, clip it, step; a gradient that is not finite skips the
        step and is counted.

        The adapter's and the value head's are clipped apart, so that a bad value does not shrink
        the policy's step; neither steps where one of the two is not finite. With value_only the
        adapter stays as it is, moments and weight decay included.
        """
        if not self._total([float(live)])[0]:
            return 0.0
        self._reduce_gradients()
        for optimizer in self._optimizers():
            self.scaler.unscale_(optimizer)
        parts = (
            [self.parameters, self.value_parameters] if self.value_parameters else [self.parameters]
        )
        norms = [torch.nn.utils.clip_grad_norm_(part, self.node.grad_clip).item() for part in parts]
        if all(map(math.isfinite, norms)):
            for optimizer in self._optimizers()[value_only:]:
                self.scaler.step(optimizer)
        else:
            self.skipped += 1
            self._zero_gradients()
        self.scaler.update()
        return norms[0] if all(map(math.isfinite, norms)) else 0.0

    def _reduce_gradients(self) -> None:
        parameters = [*self.parameters, *self.value_parameters]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.accelerator.num_processes == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        flat = self.accelerator.reduce(flat, "sum")
        for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = piece.view_as(p).clone()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """The adapter's, and the value head's where there is one."""
        return (
            [self.optimizer]
            if self.value_optimizer is None
            else [self.optimizer, self.value_optimizer]
        )

    def _zero_gradients(self) -> None:
        for optimizer in self._optimizers():
            optimizer.zero_grad(set_to_none=False)

    def _total(self, numbers: list[float]) -> list[float]:
        """Each number added up over all processes."""
        local = torch.tensor(numbers, dtype=torch.float64, device=self.policy.device)
        total: list[float] = self.accelerator.reduce(local, "sum").tolist()
        return total


def _is_sampled(episode: Episode) -> bool:
    """Whether what is trained of an episode was sampled, and not shown."""
    return all(turn.sampled for turn in episode.turns if turn.trained)


def _split(items: list[T], count: int) -> Iterator[list[T]]:
    """`count` consecutive pieces of nearly equal size."""
    for i in range(count):
        yield items[len(items) * i // count : len(items) * (i + 1) // count]
