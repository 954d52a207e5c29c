"""The reward-model stage (ReFT): a classifier of right and wrong answers.

Invariant: the stage is done as a whole or not at all; no problem is on both sides of its split.
"""

from __future__ import annotations

import time

from minirl.engine.learn.reward_model import RewardModel, Sample
from minirl.engine.model.adapter import adapter_state
from minirl.io.files import write_folder
from minirl.loop.log import log_step
from minirl.loop.session import Session
from minirl.recipe import RewardModel as RewardStage
from minirl.record.state import Position
from minirl.rollout import seed_of


def reward_stage(s: Session, index: int, stage: RewardStage) -> None:
    """Train a reward model on what the collect stage before kept; it is saved in the run folder's
    `reward_model`."""
    s.progress.stage(f"{index} reward model", stage.epochs)
    train, held_out = _split(s, index, stage)
    model = RewardModel.fresh(
        s.recipe.model, adapter_state(s.policy.model), s.recipe.seed, s.policy.device
    )
    began = time.monotonic()

    def log(row: dict[str, float]) -> None:
        log_step(s, {"stage": index, **row}, {"learn_s": time.monotonic() - began})

    facts = model.fit(train, held_out, stage, s.recipe.seed, log, s.asked_to_stop)
    if facts is not None:
        write_folder(s.run.folder / "reward_model", lambda folder: model.save(folder, facts))
        s.run.advance(Position(index + 1, 0))
    s.stop_if_asked()


def _split(s: Session, index: int, stage: RewardStage) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on and samples held out, divided by problem."""
    kept = s.run.kept(index - 1)
    ids = sorted({e.problem.id for e in kept}, key=lambda name: seed_of(s.recipe.seed, index, name))
    held_out = set(ids[: round(stage.held_out * len(ids))])
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for e in kept:
        parts[e.problem.id in held_out].append(Sample(e.tokens, bool(e.parts["first"])))
    return parts
