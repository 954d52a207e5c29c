"""Objective: the loss of one micro-batch, and what is logged of it.

Invariant: everything is a sum over trained tokens with weights that are fixed over the whole
optimizer step, so the micro-batches of a step add up to the same gradient and the same means
however they are cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minirl.engine.learn import losses
from minirl.engine.learn.ppo import Experience
from minirl.engine.model.batch import Batch
from minirl.engine.model.policy import Policy
from minirl.recipe import Learner


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
    moved: Tensor  # PPO: k3 of KL(policy that sampled || policy now)
    value_loss: Tensor
    value_clipped: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> Sums:
        """Nothing summed yet."""
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in cls.__slots__))

    def vector(self) -> Tensor:
        """The sums as one tensor, to be added over processes."""
        return torch.stack([getattr(self, name) for name in self.__slots__])

    def add(self, other: Sums) -> None:
        """Add another micro-batch's."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def objective(
    policy: Policy,
    node: Learner,
    batch: Batch,
    sums: Sums,
    *,
    temperature: float,
    experience: Experience | None,
    measure_mismatch: bool,
) -> Tensor:
    """The loss of a micro-batch, (); what is logged of it is added to `sums`. experience: PPO's,
    None for every other loss."""
    reference = None
    if node.penalises_loss:
        # Before the policy's own forward: the swap must not touch weights that a backward pass
        # still needs.
        with policy.reference():
            reference, _ = policy.logprobs(batch, temperature=temperature)
    with torch.set_grad_enabled(experience is None or not experience.value_only):
        states = policy.states(batch)
        logprobs, entropy = policy.logprobs(
            batch,
            temperature=temperature,
            entropy=node.loss != "nll",
            entropy_grad=node.entropy != 0,
            states=states,
        )
    if node.loss == "nll":
        loss = losses.nll(logprobs, batch.weights)
    else:
        loss, clipped = losses.policy_loss(
            logprobs,
            batch.old,
            (
                batch.advantages
                if experience is None
                else experience.advantages[experience.where(batch)]
            ),
            batch.weights,
            clip_low=node.clip_low,
            clip_high=node.clip_high,
            episode=batch.episode if node.ratio == "sequence" else None,
        )
        sums.clipped += clipped.double().sum()
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
    if experience is not None:
        loss = loss + _value_term(policy, node, batch, sums, states, experience)
        sums.moved += losses.kl_k3(batch.old, logprobs.detach()).double().sum()
    sums.loss += loss.detach().double()
    sums.tokens += batch.old.numel()
    return loss


def _value_term(
    policy: Policy, node: Learner, batch: Batch, sums: Sums, states: Tensor, experience: Experience
) -> Tensor:
    where = experience.where(batch)
    values = policy.values(batch, states=states.detach() if node.value_detach else states)
    value_loss, clipped = losses.value_loss(
        values,
        experience.values[where],
        experience.returns[where],
        batch.weights,
        clip=node.value_clip,
    )
    sums.value_loss += value_loss.detach().double()
    sums.value_clipped += clipped.double().sum()
    return node.value_coef * value_loss
