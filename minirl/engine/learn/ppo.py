"""PPO's part before the first update of a step: values, rewards and advantages of every trained
token.

Invariant: what a step is trained towards is fixed before its first update and is the same in all
its passes and minibatches; one entry stands for one trained token, and prompts, tool results and
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


class Places:
    """Where the trained tokens of each episode stand in flat tensors of M entries, one for each
    trained token of a step."""

    def __init__(self, rows: Iterable[Row]) -> None:
        counts = [(r.episode, sum(r.mask)) for r in rows]
        ends = [0, *accumulate(count for _, count in counts)]
        self.total = ends[-1]
        self._spans = {number: range(ends[i], ends[i + 1]) for i, (number, _) in enumerate(counts)}

    def of(self, batch: Batch) -> Tensor:
        """The place of each of the batch's trained tokens, (N,) int64; a batch holds its episodes
        whole."""
        numbers = torch.unique_consecutive(batch.episode).tolist()
        return torch.tensor(
            [place for number in numbers for place in self._spans[number]],
            device=batch.episode.device,
        )

    def parts(self, flat: Sequence[float]) -> dict[int, list[float]]:
        """The entries of each episode, by its number."""
        return {number: list(flat[span.start : span.stop]) for number, span in self._spans.items()}


@dataclass(frozen=True, slots=True)
class Seen:
    """What the forward passes before a step find at its M trained tokens."""

    places: Places
    values: Tensor  # (M,) float32
    old: Tensor  # (M,) float32, the sampler's log-probabilities
    reference: Tensor  # (M,) float32, the reference's; equal to `old` where none is needed


@dataclass(frozen=True, slots=True)
class Experience:
    """What a step is trained towards, and what is logged of it. value_only: in this step the
    adapter stays as it is."""

    places: Places
    values: Tensor  # (M,) float32, of before the step
    returns: Tensor  # (M,) float32
    advantages: Tensor  # (M,) float32, white over the whole step
    value_only: bool
    stats: dict[str, float]

    def where(self, batch: Batch) -> Tensor:
        """Where the batch's trained tokens stand in these tensors, (N,) int64."""
        return self.places.of(batch)


@torch.no_grad()
def look(
    policy: Policy,
    rows: Sequence[Row],
    batches: Iterable[Batch],
    *,
    temperature: float,
    reference: bool,
) -> Seen:
    """Values and (with `reference`) the reference's log-probabilities of the rows' trained tokens;
    `batches` are these rows in any cut."""
    places = Places(rows)
    values, old, anchor = (torch.zeros(places.total, device=policy.device) for _ in range(3))
    for batch in batches:
        where = places.of(batch)
        values[where], old[where], anchor[where] = policy.values(batch), batch.old, batch.old
        if reference:
            with policy.reference():
                anchor[where], _ = policy.logprobs(batch, temperature=temperature)
    return Seen(places, values, old, anchor)


def experience(
    seen: Seen, scores: Mapping[int, float], node: Learner, total: Total, *, value_only: bool
) -> Experience:
    """Token rewards, GAE and whitening (ReFT, arXiv 2401.08967, section 3.2) over the episodes of
    all processes.

    Advantages are taken with `gae_lambda`, the returns that the value head learns with
    `value_lambda` (decoupled GAE: VC-PPO, arXiv 2503.01491). With one lambda of 0.95 for both, the
    target k tokens before the end of a chain that pays R is 0.95^k R while the head is still zero:
    it would learn how near the end is, and not how likely the chain is right.

    scores: the verifier's, by the episode's number. An episode that its token limit cut is over
    like any other: nothing is added for what might have come, because the limit is part of the task
    and the verifier has judged the text as it stands.
    """
    values, old, anchor = (
        seen.places.parts(flat.tolist()) for flat in (seen.values, seen.old, seen.reference)
    )
    advantages: list[float] = []
    returns: list[float] = []
    for number in values:
        rewards = token_rewards(scores[number], old[number], anchor[number], node.beta)
        advantages += gae(rewards, values[number], node.gamma, node.gae_lambda)[0]
        returns += gae(rewards, values[number], node.gamma, node.value_lambda)[1]
    flat = seen.values.tolist()
    stats = {
        "value": moments(flat, total)[0],
        "return": moments(returns, total)[0],
        "explained_variance": explained_variance(flat, returns, total),
    }
    if node.beta > 0:
        stats["kl"] = moments(losses.kl_k3(seen.old, seen.reference).tolist(), total)[0]
        stats["kl_penalty"] = node.beta * moments((seen.old - seen.reference).tolist(), total)[0]
    device = seen.values.device
    white = torch.tensor(whiten(advantages, total), device=device)
    return Experience(
        seen.places, seen.values, torch.tensor(returns, device=device), white, value_only, stats
    )
