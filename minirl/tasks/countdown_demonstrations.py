"""Demonstrations of Countdown: a right answer, a wrong attempt, and a reflection on it.

Invariant: pure; every sum that is shown is right, and the attempt is wrong. The attempt misses the
target; only if every expression over all the numbers reaches it, the attempt leaves one out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from random import Random

from minirl.episode import Problem
from minirl.errors import UserError
from minirl.tasks.countdown_expressions import Way, draw_expression, find_solutions
from minirl.tasks.task import Demonstration
from minirl.verify.countdown import CLOSE, OPEN

MAX_TRIALS = 3  # most other wrong tries of a reflection
GIVE_UP = 0.25  # chance that it stops after a wrong try
# Half of the reflections are what models say by themselves: true, and of no use to a retry.
VAGUE_SHARE = 0.5
VAGUE = (
    "That does not come to {target}. I should be more careful with the arithmetic.",
    "The value is wrong. I would look at the operators again.",
    "I missed {target}. Another combination of the numbers is needed.",
    "I did not check the result. Next time I would check it against {target}.",
)
# Solutions that a demonstration is chosen from: every one of 3 numbers, a bounded search for 6.
MAX_WAYS = 100
# Draws of a wrong attempt before all are taken to reach the target (as with 2 + 2 and 2 * 2).
WRONG_TRIES = 200


def demonstrate(problem: Problem, rng: Random, *, operators: str) -> Demonstration:
    """A demonstration drawn by `rng`. Its reflection is some vague words, or works the attempt out
    and tries other expressions.

    "8 + (3 - 2): 3 - 2 = 1, 8 + 1 = 9, not 13. (8 + 3) + 2: 8 + 3 = 11, 11 + 2 = 13, yes.": a retry
    can copy that solution. Tries come in random order and are given up at random: which kind of
    reflection helps is for reinforcement learning to find. Raises UserError for a problem without a
    solution.
    """
    numbers, target = problem.answer["numbers"], problem.answer["target"]
    ways = list(itertools.islice(find_solutions(numbers, target, operators), MAX_WAYS))
    if not ways:
        raise UserError(
            f"{problem.id}: no solution with {operators}; demonstrations need problems that can be"
            " solved"
        )
    solution = rng.choice(ways)
    # A model's own attempts go below zero now and then; what it tries next had better not.
    attempts = _draw_misses(numbers, target, operators, rng, count=1, signed=True)
    if attempts:
        ((value, wrong),) = attempts.items()
        fault = f"{_show_steps(wrong)}, not {target}."
    else:
        value, wrong = None, (str(numbers[0]),)
        fault = f"{numbers[0]} leaves out {', '.join(map(str, numbers[1:]))}."
    answer, attempt = _write_answer(solution), _write_answer(wrong)
    if rng.random() < VAGUE_SHARE:
        return Demonstration(answer, attempt, rng.choice(VAGUE).format(target=target), False)
    others = _draw_misses(numbers, target, operators, rng, count=1 + MAX_TRIALS)
    misses = [way for other, way in others.items() if other != value][:MAX_TRIALS]
    trials = list(_try_in_turn(misses, solution, rng))
    return Demonstration(answer, attempt, " ".join([fault, *trials]), trials[-1].endswith("yes."))


def _try_in_turn(misses: Sequence[Way], solution: Way, rng: Random) -> Iterator[str]:
    """The solution among the misses in random order, until it is found or patience ends."""
    ways = [solution, *misses]
    rng.shuffle(ways)
    for way in ways:
        yield f"{_show_steps(way)}, {'yes' if way == solution else 'no'}."
        if way == solution or rng.random() < GIVE_UP:
            return


def _draw_misses(
    numbers: Sequence[int],
    target: int,
    operators: str,
    rng: Random,
    *,
    count: int,
    signed: bool = False,
) -> dict[int, Way]:
    """Up to `count` expressions that miss the target, by their values; fewer if no more are
    found."""
    misses: dict[int, Way] = {}
    for _ in range(WRONG_TRIES):
        way, value = draw_expression(numbers, operators, rng, signed=signed)
        if value is not None and value != target:
            misses.setdefault(value, way)
        if len(misses) == count:
            break
    return misses


def _show_steps(way: Way) -> str:
    """An expression and its value, one operation at a time."""
    return f"{_strip_brackets(way[-1])}: {', '.join(way[:-1])}"


def _write_answer(way: Way) -> str:
    return f"{OPEN}{_strip_brackets(way[-1])}{CLOSE}"


def _strip_brackets(expression: str) -> str:
    """Without the outermost brackets, which every built expression has."""
    return expression[1:-1] if expression.startswith("(") else expression
