"""Losses over the trained tokens of a batch, all tensors flat: (N,) for N trained tokens.

Invariant: every loss is sum(weight * term), with weights fixed over the whole optimizer step
beforehand, so that neither the micro-batch size nor the number of processes changes a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float | None,
    clip_high: float | None,
    episode: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped policy gradient (PPO, arXiv 1707.06347, eq. 7), summed with `weights`; and which
    tokens were clipped, (N,) bool.

    logprobs carries the gradient; old is that of the policy that sampled. With `episode` (N,), the
    number of each token's episode, the ratio is the geometric mean over the episode's tokens (GSPO,
    arXiv 2507.18071, eq. 7): all of an episode must then be in this batch.
    """
    log_ratio = logprobs - old
    if episode is not None:
        log_ratio = _episode_mean(log_ratio, episode)
    ratio = log_ratio.exp()
    low = 0.0 if clip_low is None else 1.0 - clip_low
    high = float("inf") if clip_high is None else 1.0 + clip_high
    clipped = ratio.clamp(low, high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    return -(weights * gain).sum(), (clipped * advantages < ratio * advantages).detach()


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) at each token, (N,): exp(d) - d - 1 with d
    = reference - policy; never negative."""
    difference = reference - logprobs
    # exp(d) - d - 1 would round to +-1e-7 in float32, and that is more than the KL of two nearly
    # equal policies.
    return torch.expm1(difference) - difference


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, weights: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the values, summed with `weights`; and which tokens were clipped,
    (N,) bool.

    values carries the gradient; old are those of before the step. The larger error of the value and
    of the value held within `clip` of the old one counts (ReFT, arXiv 2401.08967, section 3.2): a
    value that has gone further than that towards its return gets no gradient.
    """
    error = (values - returns).square()
    if clip is None:
        return 0.5 * (weights * error).sum(), torch.zeros_like(error, dtype=torch.bool)
    held = (old + (values - old).clamp(-clip, clip) - returns).square()
    return 0.5 * (weights * torch.maximum(error, held)).sum(), (held > error).detach()


def nll(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Weighted negative log-likelihood."""
    return -(weights * logprobs).sum()


def _episode_mean(values: Tensor, episode: Tensor) -> Tensor:
    """Each token's value replaced by its episode's mean, (N,); gradients flow to all of them."""
    _, where = torch.unique(episode, return_inverse=True)
    total = values.new_zeros(int(where.max()) + 1).index_add(0, where, values)
    return (total / torch.bincount(where))[where]
