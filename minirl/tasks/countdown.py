"""The Countdown task: generated problems that can be solved, or the hub's set, or a local file of
the same columns.

Invariant: a problem's key is its multiset of numbers with its target; no key is in both splits, and
every generated one has a solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random

from minirl import recipe
from minirl.episode import Problem, Verdict
from minirl.errors import UserError
from minirl.io.rows import read_dataset
from minirl.tasks.countdown_demonstrations import demonstrate
from minirl.tasks.countdown_expressions import draw_expression
from minirl.tasks.task import Task
from minirl.verify import countdown as verifier

Key = tuple[tuple[int, ...], int]  # numbers, target

OPERATORS = "+-*/"
# Draws without a new problem, and draws a wanted problem, before a recipe is called too narrow: 0.1
# s, and seconds at the default size.
MAX_MISSES, MAX_TRIES = 20_000, 500


def open_task(task: recipe.Countdown, seed: int) -> Task:
    """The task; its problems are a function of `task` alone, so that runs with different seeds
    share their held-out set.

    Raises UserError if the recipe allows too few different problems or the data is malformed.
    """
    if not task.operators or set(task.operators) - set(OPERATORS):
        raise UserError(f"task.operators: got {task.operators!r}, expected some of + - * /")
    if not task.numbers or min(task.numbers) < 2 or max(task.numbers) > 6:
        raise UserError(f"task.numbers: got {list(task.numbers)}, expected counts between 2 and 6")
    wanted = task.train + task.held_out
    keys = _generate_keys(task, wanted) if task.source == "generate" else _read_keys(task, wanted)
    problems = [_problem(numbers, target, task.operators) for numbers, target in keys]
    return Task(
        name="countdown",
        train=tuple(problems[task.held_out :]),
        held_out=tuple(problems[: task.held_out]),
        verify=partial(_verify, task),
        stop=(verifier.CLOSE,),
        demonstrate=partial(demonstrate, operators=task.operators),
    )


def _verify(task: recipe.Countdown, problem: Problem, text: str) -> Verdict:
    return verifier.verify(
        problem.answer["numbers"], problem.answer["target"], text, task.credit, task.operators
    )


def _problem(numbers: Sequence[int], target: int, operators: str) -> Problem:
    listed = ", ".join(map(str, numbers))
    prompt = (
        f"Make {target} from the numbers {listed}. Use each number exactly once, with"
        f" {' '.join(operators)} and brackets. End with the expression inside {verifier.OPEN}"
        f" {verifier.CLOSE} tags."
    )
    identity = "countdown/" + "-".join(map(str, sorted(numbers))) + f"={target}"
    return Problem(identity, prompt, {"numbers": list(numbers), "target": target})


def _generate_keys(task: recipe.Countdown, wanted: int) -> list[Key]:
    """`wanted` different keys, each of an expression that was drawn."""
    rng = Random(f"countdown/{task.numbers}/{task.high}/{task.target_high}/{task.operators}")
    keys: dict[Key, Key] = {}  # by the sorted numbers
    misses = 0
    for _ in range(wanted * MAX_TRIES):
        numbers = tuple(rng.randint(1, task.high) for _ in range(rng.choice(task.numbers)))
        _, target = draw_expression(numbers, task.operators, rng)
        before = len(keys)
        if target is not None and 1 <= target <= task.target_high:
            keys.setdefault((tuple(sorted(numbers)), target), (numbers, target))
        if len(keys) == wanted:
            return list(keys.values())
        misses = misses + 1 if len(keys) == before else 0
        if misses == MAX_MISSES:
            break
    raise UserError(
        f"task: numbers up to {task.high} and targets up to {task.target_high} gave {len(keys)}"
        f" different problems, expected {wanted} (train + held_out); raise task.high or"
        " task.target_high, or lower task.train"
    )


def _read_keys(task: recipe.Countdown, wanted: int) -> list[Key]:
    """The first `wanted` different keys of a data set, fewer if it has no more."""
    keys: dict[Key, Key] = {}
    for where, row in read_dataset(task.source, ("nums", "target")):
        numbers, target = row["nums"], row["target"]
        well_formed = (
            isinstance(numbers, list)
            and 2 <= len(numbers) <= 6
            and all(type(n) is int and n >= 0 for n in numbers)
        )
        if not well_formed or type(target) is not int:
            got = f"nums={str(numbers)[:60]}, target={str(target)[:20]}"
            raise UserError(
                f"{where}: got {got}, expected 2 to 6 whole numbers of 0 or more and a whole"
                " number; mend or delete the row"
            )
        keys.setdefault((tuple(sorted(numbers)), target), (tuple(numbers), target))
        if len(keys) == wanted:
            break
    if len(keys) <= task.held_out:
        raise UserError(
            f"{task.source}: got {len(keys)} different problems, expected more than task.held_out"
            f" = {task.held_out}"
        )
    return list(keys.values())
