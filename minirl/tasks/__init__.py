"""Tasks: problems, the prompt they are put as, and the verifier that scores an answer.

Invariant: a task is a pure function of its recipe and the seed, and no held-out problem is ever
among the training ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from minirl import recipe
from minirl.episode import Problem
from minirl.errors import UserError
from minirl.tasks import countdown, function_calling, maths, own, qa
from minirl.tasks.task import Demonstration, Task, fingerprint

__all__ = ["Demonstration", "Task", "draw", "fingerprint", "open_task"]


def open_task(config: recipe.Task, seed: int, given: Task | None = None) -> Task:
    """The task that a recipe names; `given` in Python if that is `own`. Raises UserError for data
    or code that cannot be had or read."""
    if isinstance(config, recipe.Own):
        return own.open_task(config, seed, given)
    if given is not None:
        raise UserError(
            f"task: got a Task beside task.name {config.name!r}, expected the recipe to say task:"
            " {name: own}"
        )
    match config:
        case recipe.Countdown():
            return countdown.open_task(config, seed)
        case recipe.QA():
            return qa.open_task(config, seed)
        case recipe.Maths():
            return maths.open_task(config, seed)
        case _:
            return function_calling.open_task(config, seed)


def draw(problems: Sequence[Problem], count: int, position: int, seed: int) -> list[Problem]:
    """`count` problems from `position` on in an endless sequence of epochs, each its own seeded
    shuffle.

    A pure function of its arguments: a resumed run needs no cursor but the step it is at.
    """
    drawn: list[Problem] = []
    while len(drawn) < count:
        epoch, offset = divmod(position + len(drawn), len(problems))
        order = list(range(len(problems)))
        Random(f"epoch/{seed}/{epoch}").shuffle(order)
        drawn += [problems[i] for i in order[offset : offset + count - len(drawn)]]
    return drawn
