"""PPO's part before the first update of a step: values, rewards and advantages of every trained
token.

Invariant: what a step is trained towards is fixed before its first update and is the same in all
its passes and minibatches. One entry stands for one trained token; prompts, tool results and
attempts have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from minirl.engine.learn import losses
from minirl.engine.learn.credit import (
    Total,
    explained_variance,
    gae,
    moments,
    token_rewards,
    whiten,
)
from minirl.engine.model.batch import Batch, Row
from minirl.engine.model.policy import Policy
from minirl.recipe import Learner


class TokenIndex:
    """Where the trained tokens of each episode stand in flat tensors of M entries, one for each
    trained token of a step."""

    def __init__(self, rows: Iterable[Row]) -> None:
        counts = {r.episode: sum(r.mask) for r in rows}
        ends = [0, *accumulate(counts.values())]
        self.total = ends[-1]
        self._spans = {
            number: range(start, end)
            for number, start, end in zip(counts, ends[:-1], ends[1:], strict=True)
        }

    def of(self, batch: Batch) -> Tensor:
        """The places of the batch's trained tokens, (N,) int64; a batch holds whole episodes."""
        numbers = torch.unique_consecutive(batch.episode).tolist()
        places = [place for number in numbers for place in self._spans[number]]
        return torch.tensor(places, device=batch.episode.device)

    def by_episode(self, flat: Tensor) -> dict[int, list[float]]:
        """The entries of each episode, by its number."""
        values = flat.tolist()
        return {number: values[span.start : span.stop] for number, span in self._spans.items()}


@dataclass(frozen=True, slots=True)
class Estimates:
    """What policy, value head and reference say of a step's M trained tokens before its first
    update."""

    index: TokenIndex
    values: Tensor  # (M,) float32
    old: Tensor  # (M,) float32, the sampler's log-probabilities
    reference: Tensor  # (M,) float32, the reference's; equal to `old` if it is not needed


@dataclass(frozen=True, slots=True)
class Experience:
    """What a step is trained towards, and what is logged of it. value_only: the adapter stays as
    it is in this step."""

    index: TokenIndex
    values: Tensor  # (M,) float32, of before the step
    returns: Tensor  # (M,) float32
    advantages: Tensor  # (M,) float32, whitened over the whole step
    value_only: bool
    stats: dict[str, float]


@torch.no_grad()
def estimate_tokens(
    policy: Policy,
    rows: Sequence[Row],
    batches: Iterable[Batch],
    *,
    temperature: float,
    reference: bool,
) -> Estimates:
    """Values and (with `reference`) the reference's log-probabilities of the rows' trained tokens;
    `batches` are these rows in any cut."""
    index = TokenIndex(rows)
    values, old, anchor = (torch.zeros(index.total, device=policy.device) for _ in range(3))
    for batch in batches:
        where = index.of(batch)
        values[where], old[where], anchor[where] = policy.values(batch), batch.old, batch.old
        if reference:
            with policy.reference():
                anchor[where], _ = policy.logprobs(batch, temperature=temperature)
    return Estimates(index, values, old, anchor)


def build_experience(
    estimates: Estimates,
    scores: Mapping[int, float],
    learner: Learner,
    total: Total,
    *,
    value_only: bool,
) -> Experience:
    """Token rewards, GAE and whitening (ReFT, arXiv 2401.08967, section 3.2) over the episodes of
    all processes.

    Advantages are taken with `gae_lambda`, the returns that the value head learns with
    `value_lambda` (decoupled GAE: VC-PPO, arXiv 2503.01491). With one lambda of 0.95 for both, the
    target k tokens before the end of a chain that pays R is 0.95^k R while the head is still zero:
    it would learn how near the end is, and not how likely the chain is right.

    scores: the verifier's, by the episode's number. An episode that its token limit cut ends like
    any other: the limit is part of the task, and the verifier has judged the text as it stands.
    """
    index, flat = estimates.index, estimates.values.tolist()
    values, old, anchor = (
        index.by_episode(of) for of in (estimates.values, estimates.old, estimates.reference)
    )
    advantages: list[float] = []
    returns: list[float] = []
    for number in values:
        rewards = token_rewards(scores[number], old[number], anchor[number], learner.beta)
        advantages += gae(rewards, values[number], learner.gamma, learner.gae_lambda)[0]
        returns += gae(rewards, values[number], learner.gamma, learner.value_lambda)[1]
    stats = {
        "value": moments(flat, total)[0],
        "return": moments(returns, total)[0],
        "explained_variance": explained_variance(flat, returns, total),
    }
    if learner.beta > 0:
        kl = losses.kl_k3(estimates.old, estimates.reference).tolist()
        penalty = (estimates.old - estimates.reference).tolist()
        stats["kl"] = moments(kl, total)[0]
        stats["kl_penalty"] = learner.beta * moments(penalty, total)[0]
    targets, whitened = (
        torch.tensor(numbers, device=estimates.values.device)
        for numbers in (returns, whiten(advantages, total))
    )
    return Experience(index, estimates.values, targets, whitened, value_only, stats)
