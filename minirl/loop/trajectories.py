"""Trajectories of SWiRL (arXiv 2504.04736): their provenance, and the states to train on.

Invariant: a trajectory's provenance says which weights wrote it and with which seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

from minirl.engine.model import load as models
from minirl.episode import Episode, Group, Problem
from minirl.errors import UserError
from minirl.loop.session import Session
from minirl.methods.swirl.states import imitations, some, states
from minirl.recipe import Train

MEANS = ("steps", "calls", "errors", "malformed")
SHARES = {"answered": "answered", "first": "right"}


def note_provenance(
    s: Session, seed: str, groups: Sequence[Group], problems: Sequence[tuple[int, Problem]]
) -> list[Group]:
    """The same groups, each episode with the parts `by`, the policy that wrote it, and `seed`."""
    by = _name_policy(s)

    def note(episode: Episode, number: int, sample: int) -> Episode:
        name = f"{s.recipe.seed}/{seed}/{number}/{episode.problem.id}/{sample}"
        return replace(episode, parts={**episode.parts, "by": by, "seed": name})

    return [
        Group(g.problem, tuple(note(e, n, k) for k, e in enumerate(g.episodes)))
        for g, (n, _) in zip(groups, problems, strict=True)
    ]


def _name_policy(s: Session) -> str:
    """The model's name, a digest of the base weights, and one of the adapter."""
    digest = blake2b(digest_size=8)
    for name, p in sorted(s.policy.trainable.items()):
        digest.update(name.encode() + p.detach().cpu().numpy().tobytes())
    base = models.fingerprint(s.policy.model)[:8]
    return f"policy {s.recipe.model.name} {base} {digest.hexdigest()}"


def describe_trajectories(kept: Sequence[Episode]) -> str:
    """A line about a collect stage's trajectories: how many, and means of their numbers."""
    count = max(len(kept), 1)
    numbers = [
        f"{name} {sum(float(e.parts.get(name) or 0) for e in kept) / count:.2f}" for name in MEANS
    ]
    numbers += [
        f"{label} {sum(bool(e.parts.get(name)) for e in kept) / count:.1%}"
        for name, label in SHARES.items()
    ]
    questions = len({e.problem.id for e in kept})
    return f"{len(kept)} trajectories of {questions} questions: {', '.join(numbers)}"


def choose_states(s: Session, index: int, stage: Train, kept: Sequence[Episode]) -> list[Problem]:
    """The states that a stage trains on, with their actions if it imitates them. Raises UserError
    if it asks for more than there are."""
    split = states(kept) if stage.facts.samples else imitations(kept)
    chosen = some(split, stage.states, s.recipe.seed)
    s.progress.say(
        f"stage {index}: {len(chosen)} of {len(split)} states of {len(kept)} trajectories"
    )
    if stage.states is not None and len(split) < stage.states:
        raise UserError(
            f"stages[{index}].states: got {stage.states}, but there are {len(split)} states;"
            " filters are compared at equal numbers, so run all of them again with --set"
            f" stages.{index}.states={len(split)} and another --out"
        )
    return chosen
