"""Learner: groups in, one step of the adapter out.

credit -> weights -> batch -> objective -> optimizer. Invariant: every denominator is taken over the
whole optimizer step on all processes, so the gradient is the same for any micro-batch size and any
number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from minirl import recipe
from minirl.engine.learn import optim, ppo
from minirl.engine.learn.credit import Credit, advantages, is_dead
from minirl.engine.learn.objective import SUMS, Sums, add, objective
from minirl.engine.learn.ppo import Experience
from minirl.engine.learn.weights import token_weights
from minirl.engine.model.batch import Row, row
from minirl.engine.model.policy import Policy
from minirl.episode import Episode, Group

MIN_MICRO_TOKENS = 256
NO_WORKSPACE = "CUBLAS_STATUS_ALLOC_FAILED"  # how cuBLAS says that the GPU's memory is full
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CreditedGroup:
    """A group of a step with its advantages. number: of the group; first: that of its first
    episode; both count all groups of this process's step."""

    number: int
    first: int
    group: Group
    credit: Sequence[Credit | None]

    @property
    def is_dead(self) -> bool:
        """Whether it teaches nothing; then it costs no forward pass."""
        return is_dead(self.credit)

    def counted(self) -> Iterator[tuple[int, Episode, Credit]]:
        """The episodes that take part in the loss, each with its number and advantage."""
        pairs = zip(self.group.episodes, self.credit, strict=True)
        for number, (episode, advantage) in enumerate(pairs, self.first):
            if advantage is not None:
                yield number, episode, advantage


class Learner:
    """One stage's training of a policy.

    steps: of the whole stage, for the schedule. limit_tokens: most trained tokens of an episode,
    the constant denominator of Dr. GRPO. temperature: that of sampling, under which tokens are
    scored too. pad: the id that fills plain rows. Under loss `ppo` the policy gets a value head,
    which has an optimizer and a gradient norm of its own.
    """

    def __init__(
        self,
        policy: Policy,
        settings: recipe.Learner,
        accelerator: Accelerator,
        *,
        steps: int,
        limit_tokens: int,
        temperature: float,
        pad: int,
    ) -> None:
        self.policy = policy
        self.settings = settings
        self.accelerator = accelerator
        self.limit_tokens = limit_tokens
        self.temperature = temperature
        self.pad = pad
        updates_a_step = settings.passes * settings.minibatches
        # The adapter waits for the value head in these.
        self.updates_frozen = min(steps, settings.value_warmup) * updates_a_step
        self.updates_planned = steps * updates_a_step - self.updates_frozen
        self.updates = 0
        self.micro_tokens = settings.micro_tokens
        adapter, is_half = list(policy.trainable.values()), policy.dtype == torch.float16
        head = list(policy.add_value_head().parameters()) if settings.loss == "ppo" else []
        self.optimizer = optim.Optimizer(settings, adapter, head, policy.device, half=is_half)

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Train on this process's share of a step's groups; the step's means over all processes.

        kl, entropy, clip and mismatch_kl are means over trained tokens. mismatch_kl is the k3
        estimate of KL(sampler || learner) before the first update; a wrong mask, position or weight
        shows up in it. PPO's kl, value, return and explained_variance are those of before the first
        update, its approx_kl the mean k3 estimate of KL(sampler || learner) over all updates.
        """
        step = self._credit(groups)
        # Every dropout is zero; gradient checkpointing goes by this mode.
        self.policy.model.train()
        experience = self._experience(step) if self.settings.loss == "ppo" else None
        sums: Sums = {}
        norms: list[float] = []
        for _ in range(self.settings.passes):
            for minibatch in _split(step, self.settings.minibatches):
                rows = self._rows(minibatch)
                self.optimizer.set_rate(self.learning_rate(self.updates))
                add(sums, self._backward(rows, experience, measure_mismatch=not norms))
                norms.append(self._step(rows, experience))
                self.updates += 1
        self.policy.model.eval()
        return self._means(step, sums, norms, experience)

    def learning_rate(self, update: int) -> float:
        """The adapter's at an update, counted from 0: a pure function, so that resuming needs no
        scheduler state."""
        return optim.learning_rate(
            self.settings, update - self.updates_frozen, self.updates_planned
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values that a resumed run needs."""
        tensors, plain = self.optimizer.state()
        return tensors, plain | {"updates": self.updates, "micro_tokens": self.micro_tokens}

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Load tensors and values that `state` gave."""
        self.optimizer.load_state(tensors, plain)
        self.updates, self.micro_tokens = plain["updates"], plain["micro_tokens"]

    def _credit(self, groups: Sequence[Group]) -> list[CreditedGroup]:
        credited, first = [], 0
        for number, group in enumerate(groups):
            credited.append(CreditedGroup(number, first, group, advantages(group, self.settings)))
            first += len(group.episodes)
        return credited

    def _rows(self, minibatch: Sequence[CreditedGroup]) -> list[Row]:
        """The live episodes of a minibatch with their token weights; dead groups only count in the
        denominators."""
        counted = [(g, *item) for g in minibatch for item in g.counted()]
        episodes = [episode for _, _, episode, _ in counted]
        weights = token_weights(
            episodes, self.settings, limit_tokens=self.limit_tokens, total=self._total
        )
        return [
            row(episode, advantage=advantage, weight=weight, number=number, group=g.number)
            for (g, number, episode, advantage), weight in zip(counted, weights, strict=True)
            if not g.is_dead
        ]

    def _experience(self, step: Sequence[CreditedGroup]) -> Experience:
        """PPO's targets of a step; their forward passes may run out of memory like any other."""
        rows = self._rows(step)

        def estimate() -> ppo.Estimates:
            batches = self.policy.batches(rows, self.micro_tokens, pad=self.pad)
            with_reference = self.settings.beta > 0
            return ppo.estimate_tokens(
                self.policy, rows, batches, temperature=self.temperature, reference=with_reference
            )

        counted = [item for g in step for item in g.counted()]
        scores = {number: e.reward for number, e, _ in counted if e.reward is not None}
        estimates = self._within_memory(estimate)
        is_frozen = self.updates < self.updates_frozen
        return ppo.build_experience(
            estimates, scores, self.settings, self._total, value_only=is_frozen
        )

    def _backward(
        self, rows: Sequence[Row], experience: Experience | None, *, measure_mismatch: bool
    ) -> Sums:
        """Accumulate the gradient of all rows; their sums."""

        def accumulate() -> Sums:
            self.optimizer.zero_gradients()
            sums: Sums = {}
            for batch in self.policy.batches(rows, self.micro_tokens, pad=self.pad):
                loss, more = objective(
                    self.policy,
                    self.settings,
                    batch,
                    temperature=self.temperature,
                    experience=experience,
                    measure_mismatch=measure_mismatch,
                )
                self.optimizer.backward(loss)
                add(sums, more)
            return sums

        return self._within_memory(accumulate)

    def _step(self, rows: Sequence[Row], experience: Experience | None) -> float:
        """Apply the gradient; its norm before clipping, 0.0 if no process had anything to learn."""
        if not self._total([float(bool(rows))])[0]:
            return 0.0
        value_only = experience is not None and experience.value_only
        return self.optimizer.step(self.accelerator, value_only=value_only)

    def _within_memory(self, attempt: Callable[[], T]) -> T:
        """Run an attempt, each time that memory runs out again with micro-batches half as large."""
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
                    self.settings.micro_tokens,
                )
            # Here the traceback holds the failed forward's tensors no longer.
            torch.cuda.empty_cache()

    def _means(
        self,
        step: Sequence[CreditedGroup],
        sums: Sums,
        norms: Sequence[float],
        experience: Experience | None,
    ) -> dict[str, float]:
        """The numbers that are logged of a step."""
        totals = self._total([float(sums.get(name, 0.0)) for name in SUMS])
        total = dict(zip(SUMS, totals, strict=True))
        updates, per_token = len(norms), max(total["tokens"], 1.0)
        stats = {
            "loss": total["loss"] / updates,
            "grad_norm": sum(norms) / updates,
            "lr": self.learning_rate(self.updates - 1),
        }
        if self.settings.loss != "nll":
            dead = sum(group.is_dead for group in step)
            stats["groups"], stats["dead"] = self._total([float(len(step)), float(dead)])
            stats |= {"entropy": total["entropy"] / per_token, "clip": total["clipped"] / per_token}
            stats["mismatch_kl"] = total["mismatch"] / max(total["compared"], 1.0)
        if self.settings.penalises_loss:
            stats["kl"] = total["kl"] / per_token
        if experience is not None:
            stats |= experience.stats | {"approx_kl": total["moved"] / per_token}
            stats["value_loss"] = total["value_loss"] / updates
            stats["value_clip"] = total["value_clipped"] / per_token
        stats["trained_tokens"] = total["tokens"] / self.settings.passes
        return stats | {"skipped": float(self.optimizer.skipped)}

    def _total(self, numbers: list[float]) -> list[float]:
        """Each number added up over all processes."""
        local = torch.tensor(numbers, dtype=torch.float64, device=self.policy.device)
        total: list[float] = self.accelerator.reduce(local, "sum").tolist()
        return total


def _split(items: Sequence[T], count: int) -> Iterator[Sequence[T]]:
    """`count` consecutive pieces of nearly equal size."""
    for i in range(count):
        yield items[len(items) * i // count : len(items) * (i + 1) // count]
