"""The check of a stage's first step: are sampler and shared prefixes as good as plain rows?

Invariant: all processes of a run take the same path, or their updates would differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from minirl.engine.sample.agreement import measure_agreement
from minirl.engine.sample.live import LiveSampler
from minirl.engine.sample.plain import PlainSampler
from minirl.episode import Group
from minirl.loop.session import Session


def check_paths(s: Session, groups: Sequence[Group], *, temperature: float) -> bool:
    """Measure how far sampler and layout are from plain rows, and fall back to the plain path if
    rounding does not explain it.

    True if the sampler was replaced: what it sampled must be sampled again.
    """
    measured = measure_agreement(
        s.policy, groups, temperature=temperature, pad=s.chat.tokenizer.pad_token_id
    )
    distances = {"sampler": measured.sampler, "shared prefixes": measured.layout}
    text = ", ".join(
        f"{name} {value:.2g}" for name, value in distances.items() if value is not None
    )
    s.progress.say(
        f"mean distance from plain rows, nats a token: {text or 'nothing to compare'} (limit"
        f" {measured.limit:g})"
    )
    sampler_fails, layout_fails = (
        any(s.gather([not measured.holds(value)])) for value in distances.values()
    )
    return _fall_back(s, sampler_fails=sampler_fails, layout_fails=layout_fails)


def _fall_back(s: Session, *, sampler_fails: bool, layout_fails: bool) -> bool:
    """Warn of what fails, and replace it; True if that is the sampler."""
    is_live = isinstance(s.player.sampler, LiveSampler)
    if layout_fails:
        s.progress.say(
            "WARNING: shared prefixes do not agree with plain rows on this model; learning goes"
            " on with plain rows"
        )
    if sampler_fails and not is_live:
        s.progress.say(
            "WARNING: `generate` and the learner disagree on this model, beyond rounding;"
            " expect a high mismatch_kl"
        )
    if not (is_live and (sampler_fails or layout_fails)):
        return False
    s.progress.say(
        "WARNING: the live sampler does not agree with plain rows on this model; sampling"
        " goes on with `generate`"
    )
    s.policy.give_up_sharing()
    s.player.sampler = PlainSampler(s.policy, s.chat, rows=s.recipe.sampling.rows)
    return True
