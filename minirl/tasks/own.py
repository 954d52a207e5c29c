"""Own tasks: problems and a verifier that somebody made in Python, checked before a run is made of
them and at every verdict.

Invariant: what comes out can be written to a run folder and read again, and a verifier that fails
is named with its problem.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import signature
from math import isfinite

from minirl import recipe
from minirl.episode import Problem, Verdict
from minirl.errors import UserError, first_line
from minirl.recipe.own import OWN, label_of, load_function
from minirl.record.measures import SCORES
from minirl.tasks.task import Task

TAKEN = frozenset({"verdict", "first", "second", "first_error", "second_error"})
"""Names of parts that the loop itself gives."""


def open_task(config: recipe.Own, seed: int, given: Task | None) -> Task:
    """The task that a file's function makes, or the one given in Python, checked."""
    if config.name != OWN:
        if given is not None:
            raise UserError(
                f"task: got a Task beside task.name {config.name!r}, expected one of the two"
            )
        return sound(_call(config, seed))
    if given is None:
        raise UserError(
            "task.name: got 'own', which is made in Python; expected it as task=Task(...) of"
            " minirl.train or minirl.evaluate_run"
        )
    return sound(given)


def _call(config: recipe.Own, seed: int) -> Task:
    """What the function returns for its options."""
    function = load_function(config.name, "task.name")
    options, parameters = dict(config.options), signature(function).parameters
    if "seed" in parameters:
        options.setdefault("seed", seed)
    try:
        signature(function).bind(**options)
    except TypeError as error:
        raise UserError(
            f"task.options: got {', '.join(config.options) or 'none'}, expected the arguments of"
            f" {label_of(config.name)}{signature(function)} ({error})"
        ) from error
    try:
        task = function(**options)
    except UserError:
        raise
    except Exception as error:  # somebody else's code; its traceback stands behind the message
        text = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"task.name: {config.name} failed with {text}") from error
    if not isinstance(task, Task):
        raise UserError(
            f"task.name: {config.name} returned {type(task).__name__}, expected a minirl.Task"
        )
    return task


def sound(made: Task) -> Task:
    """The task with a verifier whose verdicts are checked. Raises UserError for one that no run can
    be made of."""
    where = f"task {made.name!r}"
    if not made.train or not made.held_out:
        found = f"{len(made.train)} training and {len(made.held_out)} held-out problems"
        raise UserError(f"{where}: got {found}, expected at least one of each")
    ids = Counter(problem.id for problem in (*made.train, *made.held_out))
    if twice := [name for name, count in ids.items() if count > 1]:
        raise UserError(
            f"{where}: got the id {twice[0]!r} twice, expected an id of its own for each problem,"
            " held-out ones too"
        )
    trained = {_asked(problem) for problem in made.train}
    if leaked := [problem.id for problem in made.held_out if _asked(problem) in trained]:
        raise UserError(
            f"{where}: held-out problem {leaked[0]!r} asks what a training problem asks, expected"
            " another question"
        )
    for problem in (*made.train, *made.held_out):
        if not _survives(problem.answer):
            raise UserError(
                f"{where}: problem {problem.id!r} has the answer {str(problem.answer)[:80]!r},"
                " expected plain JSON (text, numbers, lists, dicts with text as keys): run folders"
                " keep it"
            )
    answers = None if made.verify_answer is None else partial(_verdict, where, made.verify_answer)
    checked = replace(made, verify=partial(_verdict, where, made.verify), verify_answer=answers)
    checked.verify(made.train[0], "")
    return checked


def _asked(problem: Problem) -> tuple[str, str | None, str]:
    return problem.prompt, problem.system, json.dumps(problem.tools, sort_keys=True, default=str)


def _survives(answer: object) -> bool:
    try:
        return bool(json.loads(json.dumps(answer, allow_nan=False)) == answer) and not isinstance(
            answer, tuple
        )
    except (TypeError, ValueError, RecursionError):
        return False


def _verdict(
    where: str, verify: Callable[[Problem, str], Verdict], problem: Problem, text: str
) -> Verdict:
    where = f"{where}: verify on problem {problem.id!r}"
    try:
        found: object = verify(problem, text)
    # somebody else's code; what it says stands in the message, and its traceback behind it
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"{where} of the text {text[:80]!r} failed with {type(error).__name__}: {said}"
        ) from error
    if not isinstance(found, Verdict):
        raise UserError(
            f"{where} gave {type(found).__name__}, expected a Verdict(score, passed) for any text"
        )
    try:
        score, passed = float(found.score), bool(found.passed)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} gave the score {found.score!r}, expected a number") from error
    if not isfinite(score):
        raise UserError(f"{where} gave the score {score}, expected a finite number")
    if wrong := [
        name for name, value in found.parts.items() if name in TAKEN or not is_part(name, value)
    ]:
        raise UserError(
            f"{where} gave the part {wrong[0]!r}: {found.parts[wrong[0]]!r}, expected text, a"
            f" finite number, a bool or None under a name other than {', '.join(sorted(TAKEN))};"
            f" {', '.join(SCORES)} are shares from 0 to 1, or counts"
        )
    return Verdict(score, passed, found.parts)


def is_part(name: str, value: object) -> bool:
    """Whether a run folder can keep it, and a report count it."""
    if name in SCORES:
        return isinstance(value, bool | int | float) and SCORES[name].accepts(value)
    return isfinite(value) if isinstance(value, float) else isinstance(value, str | int | None)
