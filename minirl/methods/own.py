"""One's own method: a generator function `(talk, task) -> Episode` of a file, or given in Python.

Invariant: what it does wrong is told in one line with its name and the problem, before any loss
sees the episode.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import isgeneratorfunction

from minirl.episode import Episode
from minirl.errors import UserError, first_line
from minirl.recipe.methods import MethodFacts, facts_of
from minirl.recipe.own import label_of, load_function
from minirl.rollout import Play, Talk
from minirl.tasks import Task
from minirl.tasks.own import is_part

Method = Callable[[Talk, Task], Play]
TRIES = ("first", "second")


def own_method(name: str, where: str = "method", *, scored: bool = False) -> Method:
    """The method of an own name, with every episode checked. scored: each has to have a verdict.

    Raises UserError for a function that
    is none, and where there is no function."""
    function, facts = load_function(name, where), facts_of(name)
    if not isgeneratorfunction(function):
        raise UserError(
            f"{where}: {name} is not a method; expected a generator function (talk, task) that says"
            " `text = yield from talk.ask(...)` and `return talk.end(verdict)`"
        )
    label = label_of(name)

    def play(talk: Talk, task: Task) -> Play:
        said = f"method {label} on problem {talk.problem.id!r}"
        try:
            episode: Episode = yield from function(talk, task)
        except UserError:
            raise
        except Exception as error:  # somebody else's code; its traceback stands behind the message
            text = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{said} failed with {text}") from error
        if wrong := _fault(episode, facts, scored=scored):
            raise UserError(f"{said} {wrong}")
        return episode

    return play


def _fault(episode: object, facts: MethodFacts, *, scored: bool) -> str | None:
    if not isinstance(episode, Episode):
        return f"returned {type(episode).__name__}, expected `return talk.end(verdict)`"
    if scored and "first" not in episode.parts:
        return "ended without a verdict, expected one where it is evaluated or collected"
    if not facts.takes_nll and any(turn.trained and not turn.sampled for turn in episode.turns):
        return "trains a turn that nobody sampled, expected it of a method with takes_nll alone"
    for name, value in episode.parts.items():
        if isinstance(value, bool) if name in TRIES else is_part(name, value):
            continue
        return f"gave the part {name!r}: {value!r}, expected text, a finite number, a bool or None"
    return None
