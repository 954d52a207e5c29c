"""Tasks: problems, the prompt they are put as, and the verifier that scores an answer.

Invariant: a task is a pure function of its recipe and the seed, and no held-out problem is ever among the training ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from minirl import recipe
from minirl.episode import Problem, Verdict
from minirl.errors import UserError


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What SFT imitates on one problem: a right answer, and where the task has them a failed attempt with a reflection on it.

    settled: the reflection arrives at the answer; else it gives up, and no retry is shown after it.
    """

    answer: str
    attempt: str = ""
    reflection: str = ""
    settled: bool = True


@dataclass(frozen=True, slots=True)
class Task:
    """verify: (problem, text of an attempt) -> Verdict, pure. stop: strings that end an attempt (they stay in it).

    verify_answer: (problem, the answer alone, no words around it) -> Verdict: for method stepwise; None where it cannot play the task.
    demonstrate: (problem, rng) -> Demonstration; None where the task has no gold solutions to show.
    notes: what the user should know once, e.g. how many rows were left out.
    """

    name: str
    train: Sequence[Problem]
    held_out: Sequence[Problem]
    verify: Callable[[Problem, str], Verdict]
    stop: tuple[str, ...] = ()
    demonstrate: Callable[[Problem, Random], Demonstration] | None = None
    notes: tuple[str, ...] = ()
    verify_answer: Callable[[Problem, str], Verdict] | None = None


def open_task(node: recipe.Task, seed: int, made: Task | None = None) -> Task:
    """The task a recipe names; `made` in Python where that is `own`. Raises UserError for data that cannot be had or read."""
    if isinstance(node, recipe.Own):
        return _checked(made)
    if made is not None:
        raise UserError(f"task: got a Task beside task.name {node.name!r}, expected the recipe to say task: {{name: own}}")
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


def _checked(made: Task | None) -> Task:
    """A task that a user made, if a run can be made of it."""
    if made is None:
        raise UserError("task.name: got 'own', which is made in Python; expected train(recipe, folder, task=Task(...))")
    ids = Counter(problem.id for problem in (*made.train, *made.held_out))
    twice = next((name for name, count in ids.items() if count > 1), None)
    if not made.train or not made.held_out or twice is not None:
        again = "" if twice is None else f", two of them {twice!r}"
        found = f"{len(made.train)} training and {len(made.held_out)} held-out problems{again}"
        raise UserError(f"task {made.name!r}: got {found}, expected at least one of each, with ids of their own")
    trained = {problem.prompt for problem in made.train}
    if leaked := next((problem.id for problem in made.held_out if problem.prompt in trained), None):
        raise UserError(f"task {made.name!r}: held-out problem {leaked!r} asks what a training problem asks, expected another question")
    verdict: object = made.verify(made.train[0], "")
    if not isinstance(verdict, Verdict):
        raise UserError(f"task {made.name!r}: verify gave {type(verdict).__name__}, expected a Verdict(score, passed) for any text")
    return made


def draw(problems: Sequence[Problem], count: int, position: int, seed: int) -> list[Problem]:
    """`count` problems from `position` on in an endless sequence of epochs, each its own seeded shuffle.

    A pure function of its arguments: a resumed run needs no cursor but the step it is at.
    """
    drawn: list[Problem] = []
    while len(drawn) < count:
        epoch, offset = divmod(position + len(drawn), len(problems))
        order = list(range(len(problems)))
        Random(f"epoch/{seed}/{epoch}").shuffle(order)
        drawn += [problems[i] for i in order[offset : offset + count - len(drawn)]]
    return drawn
