"""The collect stage: play problems chunk by chunk with frozen weights, and keep some episodes.

Invariant: every chunk is saved before the next begins.
"""

from __future__ import annotations

from collections.abc import Sequence

from minirl.episode import Episode
from minirl.loop.log import count_steps, log_step
from minirl.loop.problems import find_problems, roll_out
from minirl.loop.session import Session
from minirl.loop.trajectories import describe_trajectories, note_provenance
from minirl.methods import method_of
from minirl.recipe import Collect
from minirl.record.metrics import EpisodeStats, average
from minirl.record.state import Position
from minirl.tasks import draw


def collect_stage(s: Session, index: int, stage: Collect) -> None:
    """Play the chunks that are still to do."""
    chunks, first = count_steps(stage), s.run.position.step
    s.progress.stage(f"{index} collect {stage.keep}", chunks, first)
    problems = draw(find_problems(s, index, stage), stage.problems, 0, s.recipe.seed)
    makes_states = stage.facts.makes_states
    for chunk in range(first, chunks):
        seed, batch = f"{index}/{chunk}", problems[chunk * stage.batch : (chunk + 1) * stage.batch]
        share = s.share(list(enumerate(batch)))
        own = roll_out(
            s,
            seed,
            method_of(stage),
            share,
            stage.samples,
            check=chunk == first,
            temperature=stage.temperature,
        )
        if makes_states:
            own = note_provenance(s, seed, own, share)
        groups = s.gather([group.episodes for group in own])
        kept = [episode for group in groups for episode in choose_kept(group, stage)]
        s.run.keep(index, kept)
        means = average([EpisodeStats.of(e) for group in groups for e in group])
        row = {"stage": index, "step": chunk, "kept": len(kept)} | means
        log_step(s, row, s.player.take_times())
        is_last = chunk + 1 == chunks
        s.run.advance(Position(index + 1, 0) if is_last else Position(index, chunk + 1))
        s.stop_if_asked()
    s.accelerator.wait_for_everyone()  # the next stage reads what the main process has just written
    if makes_states:
        s.progress.say(f"collected {describe_trajectories(s.run.kept(index))}")


def choose_kept(episodes: Sequence[Episode], stage: Collect) -> list[Episode]:
    """The episodes of one problem that the stage keeps, no two with the same tokens.

    `passed` keeps none that the token limit cut.
    """
    wanted = {"failed": (False,), "passed": (True,), "all": (False, True)}[stage.keep]
    whole = [e for e in episodes if stage.keep != "passed" or e.finish != "length"]
    distinct = {e.tokens: e for e in whole if e.parts["first"] in wanted}
    return list(distinct.values())[: stage.keep_each]
