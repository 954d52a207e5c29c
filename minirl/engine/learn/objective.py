"""Objective: the loss of one micro-batch, and the sums that a step logs of it.

Invariant: both are sums over trained tokens, with weights that are fixed over the whole optimizer
step, so the micro-batches of a step add up to the same gradient and the same means however they are
cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minirl.engine.learn import losses
from minirl.engine.learn.ppo import Experience
from minirl.engine.model.batch import Batch
from minirl.engine.model.policy import Policy
from minirl.recipe import Learner

Sums = dict[str, Tensor | float]
"""Sums over the trained tokens of a batch or a step, by name; float64. `tokens` counts them."""
SUMS = (
    "tokens",
    "loss",
    "kl",
    "entropy",
    "clipped",
    "mismatch",
    "compared",  # the tokens that `mismatch` is summed over
    "moved",  # PPO: k3 of KL(policy that sampled || policy now)
    "value_loss",
    "value_clipped",
)


def add(sums: Sums, more: Mapping[str, Tensor | float]) -> None:
    """Add another batch's sums to `sums`."""
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


def objective(
    policy: Policy,
    learner: Learner,
    batch: Batch,
    *,
    temperature: float,
    experience: Experience | None,
    measure_mismatch: bool,
) -> tuple[Tensor, Sums]:
    """The loss of a micro-batch, (), and its sums. experience: PPO's, None for other losses."""
    reference = None
    if learner.penalises_loss:
        # Before the policy's own forward: the swap must not touch weights that a backward pass
        # still needs.
        with policy.reference():
            reference, _ = policy.logprobs(batch, temperature=temperature)
    with torch.set_grad_enabled(experience is None or not experience.value_only):
        states = policy.states(batch)
        wanted = {"entropy": learner.loss != "nll", "entropy_grad": learner.entropy != 0}
        logprobs, entropy = policy.logprobs(batch, temperature=temperature, states=states, **wanted)
    sums: Sums = {"tokens": float(batch.old.numel())}
    if learner.loss == "nll":
        loss = losses.nll(logprobs, batch.weights)
    else:
        loss, sums["clipped"] = _policy_term(learner, batch, logprobs, experience)
        if measure_mismatch:
            sums["mismatch"] = _sum(losses.kl_k3(batch.old, logprobs.detach()))
            sums["compared"] = sums["tokens"]
    if reference is not None:
        kl = losses.kl_k3(logprobs, reference)
        loss = loss + learner.beta * (batch.weights * kl).sum()
        sums["kl"] = _sum(kl)
    if entropy is not None:
        sums["entropy"] = _sum(entropy)
        if learner.entropy:
            loss = loss - learner.entropy * (batch.weights * entropy).sum()
    if experience is not None:
        term, more = _value_term(policy, learner, batch, states, experience)
        loss = loss + term
        sums |= {"moved": _sum(losses.kl_k3(batch.old, logprobs.detach())), **more}
    return loss, sums | {"loss": _sum(loss)}


def _policy_term(
    learner: Learner, batch: Batch, logprobs: Tensor, experience: Experience | None
) -> tuple[Tensor, Tensor]:
    advantages = batch.advantages
    if experience is not None:
        advantages = experience.advantages[experience.index.of(batch)]
    episode = batch.episode if learner.ratio == "sequence" else None
    clips = {"clip_low": learner.clip_low, "clip_high": learner.clip_high}
    loss, clipped = losses.policy_loss(
        logprobs, batch.old, advantages, batch.weights, episode=episode, **clips
    )
    return loss, _sum(clipped)


def _value_term(
    policy: Policy, learner: Learner, batch: Batch, states: Tensor, experience: Experience
) -> tuple[Tensor, Sums]:
    where = experience.index.of(batch)
    values = policy.values(batch, states=states.detach() if learner.value_detach else states)
    old, returns = experience.values[where], experience.returns[where]
    loss, clipped = losses.value_loss(values, old, returns, batch.weights, clip=learner.value_clip)
    return learner.value_coef * loss, {"value_loss": _sum(loss), "value_clipped": _sum(clipped)}


def _sum(values: Tensor) -> Tensor:
    return values.detach().double().sum()
