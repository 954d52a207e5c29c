"""The collect stage: problems played chunk by chunk, and what the stage wants of their episodes
kept on disk."""

from __future__ import annotations

import time
from collections.abc import Sequence

from minirl import recipe
from minirl.episode import Episode
from minirl.loop.problems import played, problems_of
from minirl.loop.session import Interrupted, Session, length
from minirl.loop.trajectories import described, with_provenance
from minirl.methods import method_of
from minirl.record.metrics import EpisodeStats, average
from minirl.record.state import Position
from minirl.tasks import draw


def collect_stage(s: Session, index: int, stage: recipe.Collect) -> None:
    """Play problems chunk by chunk and keep what the stage wants; every chunk is saved."""
    chunks = length(stage)
    s.progress.stage(f"{index} collect {stage.keep}", chunks, s.run.position.step)
    problems = draw(problems_of(s, index, stage), stage.problems, 0, s.recipe.seed)
    began_at = s.run.position.step
    for chunk in range(began_at, chunks):
        began, before = time.monotonic(), s.sampler.tokens
        mine = s.mine(list(enumerate(problems[chunk * stage.batch : (chunk + 1) * stage.batch])))
        own = played(
            s,
            f"{index}/{chunk}",
            method_of(stage),
            mine,
            stage.samples,
            check=chunk == began_at,
            temperature=stage.temperature,
        )
        if stage.facts.makes_states:
            own = with_provenance(s, f"{index}/{chunk}", own, mine)
        groups = s.gather([group.episodes for group in own])
        kept = [episode for group in groups for episode in keep(group, stage)]
        s.run.keep(index, kept)
        row = {"stage": index, "step": chunk, "kept": len(kept)} | average(
            [EpisodeStats.of(e) for group in groups for e in group]
        )
        s.log(
            row,
            {
                "sample_s": time.monotonic() - began,
                "sample_tps": (s.sampler.tokens - before) / (time.monotonic() - began),
            },
        )
        done = chunk + 1 == chunks
        s.run.advance(Position(index + 1, 0) if done else Position(index, chunk + 1))
        if s.asked_to_stop():
            raise Interrupted
    s.accelerator.wait_for_everyone()  # the next stage reads what the main process has just written
    if stage.facts.makes_states:
        s.progress.say(f"collected {described(s.run.kept(index))}")


def keep(episodes: Sequence[Episode], stage: recipe.Collect) -> list[Episode]:
    """The stage's choice among one problem's episodes, no two with the same tokens; with `passed`
    none that its token limit cut."""
    wanted = {"failed": (False,), "passed": (True,), "all": (False, True)}[stage.keep]
    whole = [e for e in episodes if stage.keep != "passed" or e.finish != "length"]
    distinct = {e.tokens: e for e in whole if e.parts["first"] in wanted}
    return list(distinct.values())[: stage.keep_each]
