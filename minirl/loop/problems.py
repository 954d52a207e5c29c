"""The problems of a stage and of a step, and a group of episodes for each.

Invariant: all of it is a function of the recipe, the weights and the step's number.
"""

from __future__ import annotations

from collections.abc import Sequence

from minirl.episode import Group, Problem, regroup
from minirl.errors import UserError
from minirl.loop.agreement import check_paths
from minirl.loop.session import Session
from minirl.loop.trajectories import choose_states
from minirl.methods import Method
from minirl.methods.demonstrate import as_sampled
from minirl.methods.reflect import failed
from minirl.methods.single import single
from minirl.recipe import Collect, Filter, Train
from minirl.tasks import draw

Numbered = Sequence[tuple[int, Problem]]
"""Problems with their numbers in the step, which are part of the seeds of their episodes."""


def find_problems(s: Session, index: int, stage: Collect | Train) -> Sequence[Problem]:
    """The stage's problems: the task's, or what the collect or filter stage before it kept."""
    before = s.recipe.stages[index - 1] if index else None
    if isinstance(stage, Train) and isinstance(before, Collect | Filter):
        return _find_kept(s, index, stage)
    if not s.task.train:
        raise UserError(
            f"stages[{index}]: task {s.task.name!r} has no training problems; set task.train above"
            " 0, or only evaluate"
        )
    return s.task.train


def _find_kept(s: Session, index: int, stage: Train) -> Sequence[Problem]:
    episodes = s.run.kept(index - 1)
    if not episodes:
        raise UserError(
            f"stages[{index}]: the collect stage before it kept nothing; collect more problems or"
            " samples, or change `keep`"
        )
    if stage.facts.starts_from == "states":
        return choose_states(s, index, stage, episodes)
    if stage.facts.starts_from == "failures":
        if any(e.parts["first"] for e in episodes):
            raise UserError(
                f"stages[{index}]: method {stage.method} needs failed attempts; set keep: failed in"
                f" stages[{index - 1}]"
            )
        return [failed(e.problem, e.turns) for e in episodes]
    if stage.examples != "demonstrations":
        return [*(s.task.train if stage.examples == "both" else ()), *map(as_sampled, episodes)]
    return [e.problem for e in episodes]


def draw_problems(
    s: Session, index: int, step: int, stage: Train, problems: Sequence[Problem]
) -> tuple[Numbered, dict[str, float]]:
    """This process's problems of a step, and what is logged of finding them."""
    if stage.facts.starts_from == "failures" and not problems[0].context:
        return _draw_failures(s, index, step, stage, problems)
    drawn = draw(problems, stage.batch, step * stage.batch, s.recipe.seed)
    return s.share(list(enumerate(drawn))), {}


def _draw_failures(
    s: Session, index: int, step: int, stage: Train, problems: Sequence[Problem]
) -> tuple[Numbered, dict[str, float]]:
    """On-line R3: failed attempts of the policy as it is now, round by round until there are
    enough of them or `attempts` rounds are over."""
    window, temperature = stage.batch * stage.attempts, s.recipe.sampling.temperature
    drawn = list(enumerate(draw(problems, window, step * window, s.recipe.seed)))
    share, failures, tries = len(s.share(range(stage.batch))), list[Problem](), 0
    for start in range(0, window, stage.batch):
        own = s.share(drawn[start : start + stage.batch])[:share]
        seeds = [f"{index}/{step}/attempt/{n}/{p.id}" for n, p in own]
        episodes = s.player.play(
            [
                single(s.talk(p, seed, temperature=temperature), s.task)
                for (_, p), seed in zip(own, seeds, strict=True)
            ]
        )
        failures += [failed(e.problem, e.turns) for e in episodes if not e.parts["first"]]
        tries += len(episodes)
        if len(failures) >= share:
            break
    counts = s.gather([(len(failures), tries)])
    all_failures, all_tries = (sum(column) for column in zip(*counts, strict=True))
    numbers = {"first": 1.0 - all_failures / all_tries, "tried": float(all_tries)}
    return list(enumerate(failures[:share])), numbers


def roll_out(
    s: Session,
    seed: str,
    method: Method,
    problems: Numbered,
    size: int,
    *,
    check: bool,
    temperature: float,
) -> list[Group]:
    """A group of `size` episodes for each problem; with `check` they are played again if the
    sampler had to be replaced."""

    def once() -> list[Group]:
        talks = [
            s.talk(p, f"{seed}/{n}/{p.id}/{k}", temperature=temperature)
            for n, p in problems
            for k in range(size)
        ]
        return regroup(s.player.play([method(talk, s.task) for talk in talks]), size)

    groups = once()
    return once() if check and check_paths(s, groups, temperature=temperature) else groups
