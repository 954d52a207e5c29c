"""Expressions over all the numbers of a Countdown problem: one at random, or all that reach a
target.

Invariant: every intermediate value is whole, and no negative one is made unless asked for: few
people would go by such a number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from random import Random

Way = tuple[str, ...]  # steps ("3 * 4 = 12", ...) and at last the expression that they work out


def draw_expression(
    numbers: Sequence[int], operators: str, rng: Random, *, signed: bool = False
) -> tuple[Way, int | None]:
    """A random expression over all `numbers` in random order, and its value.

    The value is None if an intermediate is not whole, or negative unless `signed`.
    """
    pool = [(str(n), n) for n in numbers]
    rng.shuffle(pool)
    steps: list[str] = []
    while len(pool) > 1:
        (a, x), (b, y) = pool.pop(), pool.pop()
        op = rng.choice(operators)
        value = _apply(x, op, y, signed=signed)
        if value is None:
            return (), None
        steps.append(f"{x} {op} {y} = {value}")
        pool.insert(rng.randrange(len(pool) + 1), (f"({a} {op} {b})", value))
    return (*steps, pool[0][0]), pool[0][1]


def find_solutions(numbers: Sequence[int], target: int, operators: str) -> Iterator[Way]:
    """Every way to reach the target; brute force, quick to the last for 4 numbers or so."""

    def search(pool: tuple[tuple[str, int], ...], steps: Way) -> Iterator[Way]:
        if len(pool) == 1:
            if pool[0][1] == target:
                yield (*steps, pool[0][0])
            return
        for i, j in itertools.permutations(range(len(pool)), 2):
            (a, x), (b, y) = pool[i], pool[j]
            rest = tuple(item for k, item in enumerate(pool) if k not in (i, j))
            for op in operators:
                value = None if op in "+*" and i > j else _apply(x, op, y)
                if value is not None:
                    yield from search(
                        (*rest, (f"({a} {op} {b})", value)), (*steps, f"{x} {op} {y} = {value}")
                    )

    yield from search(tuple((str(n), n) for n in numbers), ())


def _apply(x: int, op: str, y: int, *, signed: bool = False) -> int | None:
    if op == "+":
        return x + y
    if op == "*":
        return x * y
    if op == "-":
        return x - y if signed or x >= y else None
    return x // y if y and x % y == 0 else None
