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
from minirl.tasks.task import Demonstration, Task, fingerprint

__all__ = ["Demonstration", "Task", "draw", "fingerprint", "open_task"]


def open_task(node: recipe.Task, seed: int, made: Task | None = None) -> Task:
    """The task a recipe names; `made` in Python where that is `own`. Raises UserError for data that
    cannot be had or read."""
    if isinstance(node, recipe.Own):
        from minirl.tasks import own

        if made is None:
            raise UserError(
                "task.name: got 'own', which is made in Python; expected it as task=Task(...) of"
                " minirl.train or minirl.evaluate_run"
            )
        return own.sound(made)
    if made is not None:
        raise UserError(
            f"task: got a Task beside task.name {node.name!r}, expected the recipe to say task:"
            " {name: own}"
        )
    if isinstance(node, recipe.Countdown):
        from minirl.tasks import countdown

        return countdown.open_task(node, seed)
    if isinstance(node, recipe.QA):
        from minirl.tasks import qa

        return qa.open_task(node, seed)
    if isinstance(node, recipe.Maths):
        from minirl.tasks import maths

        return maths.open_task(node, seed)
    from minirl.tasks import function_calling

    return function_calling.open_task(node, seed)


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
