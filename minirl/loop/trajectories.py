"""Trajectories of SWiRL (arXiv 2504.04736): with their provenance, and split into states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

from minirl import recipe
from minirl.engine.model import load as models
from minirl.episode import Episode, Group, Problem
from minirl.errors import UserError
from minirl.loop.session import Session
from minirl.methods.swirl.states import imitations, some, states

SHOWN = ("steps", "calls", "errors", "malformed")


def with_provenance(
    s: Session,
    seed: str,
    groups: Sequence[Group],
    drawn: Sequence[tuple[int, Problem]],
) -> list[Group]:
    """Each episode with who wrote it (`by`: the model and a digest of the adapter) and the seed
    that it was drawn with (`seed`)."""
    by = writer(s)
    return [
        Group(
            g.problem,
            tuple(
                _noted(e, by=by, seed=f"{s.recipe.seed}/{seed}/{n}/{p.id}/{k}")
                for k, e in enumerate(g.episodes)
            ),
        )
        for g, (n, p) in zip(groups, drawn, strict=True)
    ]


def _noted(episode: Episode, **more: str) -> Episode:
    return replace(episode, parts={**episode.parts, **more})


def writer(s: Session) -> str:
    """The policy's name: its model, a digest of the base weights, and one of the adapter's."""
    digest = blake2b(digest_size=8)
    for name, p in sorted(s.policy.trainable.items()):
        digest.update(name.encode() + p.detach().cpu().numpy().tobytes())
    return (
        f"policy {s.recipe.model.name} {models.fingerprint(s.policy.model)[:8]}"
        f" {digest.hexdigest()}"
    )


def described(kept: Sequence[Episode]) -> str:
    """A collect stage's trajectories in a line: how many, means of their numbers, shares that
    answered and were right."""
    count = max(len(kept), 1)
    means = [
        f"{name} {sum(float(e.parts.get(name) or 0) for e in kept) / count:.2f}" for name in SHOWN
    ]
    shares = [
        f"{label} {sum(bool(e.parts.get(name)) for e in kept) / count:.1%}"
        for name, label in (("answered", "answered"), ("first", "right"))
    ]
    return (
        f"{len(kept)} trajectories of {len({e.problem.id for e in kept})} questions:"
        f" {', '.join([*means, *shares])}"
    )


def states_of(
    s: Session, index: int, stage: recipe.Train, kept: Sequence[Episode]
) -> list[Problem]:
    """The states that a stage trains on, with their actions where it imitates them. Raises
    UserError where it asks for more."""
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
