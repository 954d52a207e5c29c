"""The Countdown task: generated problems that can be solved, or the hub's set, or a local file of
the same columns.

Invariant: a problem's key is its multiset of numbers with its target; no key is in both splits, and
every generated one has a solution.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from random import Random

from minirl import recipe
from minirl.episode import Problem, Verdict
from minirl.errors import UserError
from minirl.io.rows import read_dataset
from minirl.tasks.task import Demonstration, Task
from minirl.verify import countdown as verifier

Key = tuple[tuple[int, ...], int]
Way = tuple[str, ...]  # steps ("3 * 4 = 12", ...) and at last the expression that they work out

OPERATORS = "+-*/"
# Draws without a new problem, and draws a wanted problem, before a recipe is called too narrow: 0.1
# s, and seconds at the default size.
MAX_MISSES, MAX_TRIES = 20_000, 500
MAX_TRIALS = 3  # most other wrong tries of a demonstrated reflection
GIVE_UP = 0.25  # chance that it stops after a wrong try
# Half of the demonstrated reflections are what models say by themselves: true, and of no use to a
# retry.
VAGUE_SHARE = 0.5
VAGUE = (
    "That does not come to {target}. I should be more careful with the arithmetic.",
    "The value is wrong. I would look at the operators again.",
    "I missed {target}. Another combination of the numbers is needed.",
    "I did not check the result. Next time I would check it against {target}.",
)
# solutions that a demonstration is chosen from: every one of 3 numbers, and a bounded search for 6
MAX_WAYS = 100
# draws of a wrong attempt before all are taken to reach the target (as with 2 + 2 and 2 * 2)
WRONG_TRIES = 200


def open_task(node: recipe.Countdown, seed: int) -> Task:
    """The task; its problems are a function of `node` alone, so that runs with different seeds
    share their held-out set.

    Raises UserError where the recipe allows too few different problems or the data is malformed.
    """
    _check_operators(node)
    wanted = node.train + node.held_out
    keys = _generated(node, wanted) if node.source == "generate" else _read(node, wanted)
    problems = [_problem(numbers, target, node.operators) for numbers, target in keys]
    return Task(
        name="countdown",
        train=tuple(problems[node.held_out :]),
        held_out=tuple(problems[: node.held_out]),
        verify=partial(_verify, node),
        stop=(verifier.CLOSE,),
        demonstrate=partial(demonstrate, operators=node.operators),
    )


def _verify(node: recipe.Countdown, problem: Problem, text: str) -> Verdict:
    return verifier.verify(
        problem.answer["numbers"], problem.answer["target"], text, node.credit, node.operators
    )


def _check_operators(node: recipe.Countdown) -> None:
    if not node.operators or set(node.operators) - set(OPERATORS):
        raise UserError(f"task.operators: got {node.operators!r}, expected some of + - * /")
    if not node.numbers or min(node.numbers) < 2 or max(node.numbers) > 6:
        raise UserError(f"task.numbers: got {list(node.numbers)}, expected counts between 2 and 6")


def _problem(numbers: Sequence[int], target: int, operators: str) -> Problem:
    listed = ", ".join(map(str, numbers))
    prompt = (
        f"Make {target} from the numbers {listed}. Use each number exactly once, with"
        f" {' '.join(operators)} and brackets. End with the expression inside {verifier.OPEN}"
        f" {verifier.CLOSE} tags."
    )
    identity = "countdown/" + "-".join(map(str, sorted(numbers))) + f"={target}"
    return Problem(identity, prompt, {"numbers": list(numbers), "target": target})


def _generated(node: recipe.Countdown, wanted: int) -> list[Key]:
    rng = Random(f"countdown/{node.numbers}/{node.high}/{node.target_high}/{node.operators}")
    found: dict[Key, Key] = {}
    misses = 0
    for _ in range(wanted * MAX_TRIES):
        numbers = tuple(rng.randint(1, node.high) for _ in range(rng.choice(node.numbers)))
        _, target = random_expression(numbers, node.operators, rng)
        before = len(found)
        if target is not None and 1 <= target <= node.target_high:
            found.setdefault((tuple(sorted(numbers)), target), (numbers, target))
        if len(found) == wanted:
            return list(found.values())
        misses = misses + 1 if len(found) == before else 0
        if misses == MAX_MISSES:
            break
    raise UserError(
        f"task: numbers up to {node.high} and targets up to {node.target_high} gave {len(found)}"
        f" different problems, expected {wanted} (train + held_out); raise task.high or"
        " task.target_high, or lower task.train"
    )


def _read(node: recipe.Countdown, wanted: int) -> list[Key]:
    found: dict[Key, Key] = {}
    for where, row in read_dataset(node.source, ("nums", "target")):
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
        found.setdefault((tuple(sorted(numbers)), target), (tuple(numbers), target))
        if len(found) == wanted:
            break
    if len(found) <= node.held_out:
        raise UserError(
            f"{node.source}: got {len(found)} different problems, expected more than task.held_out"
            f" = {node.held_out}"
        )
    return list(found.values())


def random_expression(
    numbers: Sequence[int], operators: str, rng: Random, *, signed: bool = False
) -> tuple[list[str], int | None]:
    """A random expression over all `numbers` in random order, as its steps ("3 * 4 = 12", ...), and
    its value.

    The value is None where an intermediate is not whole, or negative unless `signed`: few people
    would go by such a number.
    """
    pool = [(str(n), n) for n in numbers]
    rng.shuffle(pool)
    steps: list[str] = []
    while len(pool) > 1:
        (a, x), (b, y) = pool.pop(), pool.pop()
        op = rng.choice(operators)
        value = _apply(x, op, y, signed=signed)
        if value is None:
            return [], None
        steps.append(f"{x} {op} {y} = {value}")
        pool.insert(rng.randrange(len(pool) + 1), (f"({a} {op} {b})", value))
    return [*steps, pool[0][0]], pool[0][1]


def _apply(x: int, op: str, y: int, *, signed: bool = False) -> int | None:
    if op == "+":
        return x + y
    if op == "*":
        return x * y
    if op == "-":
        return x - y if signed or x >= y else None
    return x // y if y and x % y == 0 else None


def solutions(numbers: Sequence[int], target: int, operators: str) -> Iterator[Way]:
    """Every way to reach the target, as steps that end with the expression; brute force, quick to
    the last for 4 numbers or so."""

    def search(pool: tuple[tuple[str, int], ...], steps: Way) -> Iterator[Way]:
        if len(pool) == 1:
            if pool[0][1] == target:
                yield (*steps, pool[0][0])
            return
        for i, j in itertools.permutations(range(len(pool)), 2):
            (a, x), (b, y) = pool[i], pool[j]
            rest = tuple(item for k, item in enumerate(pool) if k not in (i, j))
            for op in operators:
                if op in "+*" and i > j:
                    continue
                value = _apply(x, op, y)
                if value is not None:
                    yield from search(
                        (*rest, (f"({a} {op} {b})", value)), (*steps, f"{x} {op} {y} = {value}")
                    )

    yield from search(tuple((str(n), n) for n in numbers), ())


def demonstrate(problem: Problem, rng: Random, *, operators: str) -> Demonstration:
    """A right answer, a wrong attempt, and a reflection: some vague words, or the attempt worked
    out and others tried.

    "8 + (3 - 2): 3 - 2 = 1, 8 + 1 = 9, not 13. (8 + 3) + 2: 8 + 3 = 11, 11 + 2 = 13, yes.": a retry
    can copy what was found. Tries come in random order and are given up at random, so not every
    such reflection finds a solution. Which kind of reflection helps, and how long to go on, is left
    for reinforcement learning to find. The attempt misses the target; only where no expression over
    all the numbers does, it leaves one out.
    """
    numbers, target = problem.answer["numbers"], problem.answer["target"]
    ways = list(itertools.islice(solutions(numbers, target, operators), MAX_WAYS))
    if not ways:
        raise UserError(
            f"{problem.id}: no solution with {operators}; demonstrations need problems that can be"
            " solved"
        )
    solution = rng.choice(ways)
    # A model's own attempts go below zero now and then; what it tries next had better not.
    attempts = _misses(numbers, target, operators, rng, count=1, signed=True)
    if attempts:
        ((value, wrong),) = attempts.items()
        fault = f"{_worked(wrong)}, not {target}."
    else:
        value, wrong = None, (str(numbers[0]),)
        fault = f"{numbers[0]} leaves out {', '.join(map(str, numbers[1:]))}."
    if rng.random() < VAGUE_SHARE:
        vague = rng.choice(VAGUE).format(target=target)
        return Demonstration(_answer(solution[-1]), _answer(wrong[-1]), vague, settled=False)
    others = _misses(numbers, target, operators, rng, count=1 + MAX_TRIALS)
    trials = list(
        _trials(
            [way for other, way in others.items() if other != value][:MAX_TRIALS], solution, rng
        )
    )
    return Demonstration(
        _answer(solution[-1]),
        _answer(wrong[-1]),
        " ".join([fault, *trials]),
        settled=trials[-1].endswith("yes."),
    )


def _trials(misses: Sequence[Way], solution: Way, rng: Random) -> Iterator[str]:
    """The solution among the misses in random order, until it is found or patience ends."""
    tries = [solution, *misses]
    rng.shuffle(tries)
    for tried in tries:
        yield f"{_worked(tried)}, {'yes' if tried == solution else 'no'}."
        if tried == solution or rng.random() < GIVE_UP:
            return


def _worked(way: Way) -> str:
    """An expression with what it comes to, one operation at a time."""
    return f"{_strip(way[-1])}: {', '.join(way[:-1])}"


def _misses(
    numbers: Sequence[int],
    target: int,
    operators: str,
    rng: Random,
    *,
    count: int,
    signed: bool = False,
) -> dict[int, Way]:
    """Up to `count` expressions that miss the target, by their values; fewer where there are
    fewer."""
    found: dict[int, Way] = {}
    for _ in range(WRONG_TRIES):
        steps, value = random_expression(numbers, operators, rng, signed=signed)
        if value is not None and value != target:
            found.setdefault(value, tuple(steps))
        if len(found) == count:
            break
    return found


def _answer(expression: str) -> str:
    return f"{verifier.OPEN}{_strip(expression)}{verifier.CLOSE}"


def _strip(expression: str) -> str:
    """Without the outermost brackets, which every built expression has."""
    return expression[1:-1] if expression.startswith("(") else expression
