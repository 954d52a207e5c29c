"""What a stage plays: its problems, those of a step, and a group of episodes for each.

Invariant: all of it is a function of the recipe, the weights and the step's number.
"""

from __future__ import annotations

from collections.abc import Sequence

from minirl import recipe
from minirl.episode import Group, Problem, regroup
from minirl.errors import UserError
from minirl.loop.session import Session
from minirl.loop.trajectories import states_of
from minirl.methods import Method
from minirl.methods.demonstrate import as_sampled
from minirl.methods.reflect import failed
from minirl.methods.single import single
from minirl.tasks import draw


def problems_of(s: Session, index: int, stage: recipe.Collect | recipe.Train) -> Sequence[Problem]:
    """What the stage plays: the task's problems, or what the collect or filter stage before it
    kept."""
    before = s.recipe.stages[index - 1] if index else None
    if isinstance(stage, recipe.Train) and isinstance(before, recipe.Collect | recipe.Filter):
        return _kept_problems(s, index, stage)
    if not s.task.train:
        raise UserError(
            f"stages[{index}]: task {s.task.name!r} has no training problems; set task.train above"
            " 0, or only evaluate"
        )
    return s.task.train


def _kept_problems(s: Session, index: int, stage: recipe.Train) -> Sequence[Problem]:
    episodes = s.run.kept(index - 1)
    if not episodes:
        raise UserError(
            f"stages[{index}]: the collect stage before it kept nothing; collect more problems or"
            " samples, or change `keep`"
        )
    if stage.facts.starts_from == "states":
        return states_of(s, index, stage, episodes)
    if stage.facts.starts_from == "failures":
        if any(e.parts["first"] for e in episodes):
            raise UserError(
                f"stages[{index}]: method reflect needs failed attempts; set keep: failed in"
                f" stages[{index - 1}]"
            )
        return [failed(e.problem, e.turns) for e in episodes]
    if stage.examples != "demonstrations":
        return [*(s.task.train if stage.examples == "both" else ()), *map(as_sampled, episodes)]
    return [e.problem for e in episodes]


def drawn(
    s: Session, index: int, step: int, stage: recipe.Train, problems: Sequence[Problem]
) -> tuple[list[tuple[int, Problem]], dict[str, float]]:
    """This process's problems of a step, numbered, and what is logged of finding them."""
    if stage.facts.starts_from == "failures" and not problems[0].context:
        return _failures(s, index, step, stage, problems)
    return (
        list(
            s.mine(list(enumerate(draw(problems, stage.batch, step * stage.batch, s.recipe.seed))))
        ),
        {},
    )


def _failures(
    s: Session, index: int, step: int, stage: recipe.Train, problems: Sequence[Problem]
) -> tuple[list[tuple[int, Problem]], dict[str, float]]:
    """On-line R3: failed attempts of the policy as it is now, made round by round until there are
    enough, or `attempts` rounds are over."""
    window = stage.batch * stage.attempts
    tries = list(enumerate(draw(problems, window, step * window, s.recipe.seed)))
    share, found, tried = len(s.mine(range(stage.batch))), [], 0
    for start in range(0, window, stage.batch):
        mine = s.mine(tries[start : start + stage.batch])[:share]
        episodes = s.play(
            [single(s.talk(p, f"{index}/{step}/attempt/{n}/{p.id}"), s.task) for n, p in mine]
        )
        found += [failed(e.problem, e.turns) for e in episodes if not e.parts["first"]]
        tried += len(episodes)
        if len(found) >= share:
            break
    counts = s.gather([(len(found), tried)])
    failures, total = sum(f for f, _ in counts), sum(t for _, t in counts)
    return list(enumerate(found[:share])), {"first": 1.0 - failures / total, "tried": float(total)}


def played(
    s: Session,
    seed: str,
    method: Method,
    drawn: Sequence[tuple[int, Problem]],
    size: int,
    *,
    check: bool,
    temperature: float,
) -> list[Group]:
    """A group of `size` episodes for each drawn problem; with `check`, once again where their
    sampler turns out to be wrong."""

    def once() -> list[Group]:
        talks = [
            s.talk(p, f"{seed}/{n}/{p.id}/{k}", temperature=temperature)
            for n, p in drawn
            for k in range(size)
        ]
        return regroup(s.play([method(talk, s.task) for talk in talks]), size)

    groups = once()
    return once() if check and s.check(groups, temperature=temperature) else groups
