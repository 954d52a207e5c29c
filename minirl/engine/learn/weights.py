"""Token weights: how much each trained token of a minibatch counts in its loss.

Invariant: the denominators are sums over the minibatch of all processes, so the weights are the
same however the minibatch is dealt out or cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from minirl.engine.learn.credit import Total
from minirl.episode import Episode
from minirl.recipe import Learner


def token_weights(
    episodes: Sequence[Episode], learner: Learner, *, limit_tokens: int, total: Total = list
) -> list[float]:
    """The weight of each trained token of each episode; the weights of all tokens add up to 1,
    under `constant` to 1 if every episode were `limit_tokens` long.

    By `aggregate`: `sequence` is a mean over each episode's tokens and then over episodes (GRPO),
    `token` a mean over all tokens (DAPO, arXiv 2503.14476, eq. 8), `constant` divides by episodes x
    limit_tokens (Dr. GRPO, arXiv 2503.20783, section 3.2).

    With `sampled_share` that share is spread over the sampled episodes and the rest over the shown
    ones (ReFT's online self-training, arXiv 2401.08967).
    """
    share = learner.sampled_share
    shown = [share is not None and not _is_sampled(episode) for episode in episodes]
    counts: list[float] = []
    for kind in (False, True):
        lengths = [e.trained_tokens for e, s in zip(episodes, shown, strict=True) if s is kind]
        counts += [float(len(lengths)), float(sum(lengths))]
    of_sampled, of_shown = 1.0 if share is None else share, 0.0 if share is None else 1.0 - share
    sampled_episodes, sampled_tokens, shown_episodes, shown_tokens = total(counts)

    def weight(episode: Episode, is_shown: bool) -> float:
        part = of_shown if is_shown else of_sampled
        if learner.aggregate == "token":
            return part / (shown_tokens if is_shown else sampled_tokens)
        length = episode.trained_tokens if learner.aggregate == "sequence" else limit_tokens
        return part / ((shown_episodes if is_shown else sampled_episodes) * length)

    return [weight(episode, kind) for episode, kind in zip(episodes, shown, strict=True)]


def _is_sampled(episode: Episode) -> bool:
    """Whether the trained turns of an episode were sampled, and not shown."""
    return all(turn.sampled for turn in episode.turns if turn.trained)
