"""Methods: each is a generator that plays one episode.

Invariant: FUNCTIONS has the names of `minirl.recipe.METHODS`, no more and no fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from minirl import recipe
from minirl.errors import UserError
from minirl.methods.demonstrate import demonstrate
from minirl.methods.own import Method, own_method
from minirl.methods.reflect import reflect
from minirl.methods.search.baselines import ircot, iter_retgen, naive_rag, no_rag
from minirl.methods.search.search import search
from minirl.methods.self_train import self_train
from minirl.methods.single import single
from minirl.methods.swirl.demonstrate import demonstrate_stepwise
from minirl.methods.swirl.stepwise import imitate, step, stepwise
from minirl.recipe import METHODS, Train
from minirl.recipe.methods import EVALUATED_BY, facts_of
from minirl.recipe.own import OWN, give, is_own
from minirl.rollout import Play
from minirl.tasks import Task

__all__ = ["FUNCTIONS", "Method", "evaluated_by", "method_of", "use_own"]
FUNCTIONS: dict[str, Callable[..., Play]] = {
    function.__name__: function
    for function in (
        single,
        reflect,
        self_train,
        demonstrate,
        no_rag,
        naive_rag,
        iter_retgen,
        ircot,
        search,
        stepwise,
        step,
        demonstrate_stepwise,
        imitate,
    )
}


def function_of(name: str, *, scored: bool) -> Callable[..., Play]:
    """The function of a method, one's own too; see `own_method`."""
    return FUNCTIONS[name] if name in FUNCTIONS else own_method(name, scored=scored)


def method_of(stage: recipe.Collect | recipe.Train) -> Method:
    """The method that a stage names, with the stage's own options bound."""
    function = function_of(stage.method, scored=isinstance(stage, recipe.Collect))
    options = stage.facts.options if isinstance(stage, Train) else ()
    bound = {name: getattr(stage, name) for name in options}
    return partial(function, **bound) if bound else function


def evaluated_by(evaluation: recipe.Eval, task: Task) -> Method:
    """The method that an evaluation names; see `recipe.Eval.method` if it names none. With 2 tries,
    reflect."""
    if evaluation.tries == 2:
        return reflect
    return function_of(evaluation.method or EVALUATED_BY[task.kind], scored=True)


def use_own(
    used: recipe.Recipe,
    method: Callable[..., Any] | None = None,
    uses: Sequence[str] = ("collect", "train", "eval"),
) -> None:
    """Load the own methods that a recipe names for these uses, and check that they fit it. method:
    what `own` means. Raises UserError for a file or function that cannot be had or does not fit."""
    give(method)
    named = {name: where for where, use, name in used.named if is_own(name) and use in uses}
    if method is not None and OWN not in named:
        raise UserError(
            "method: got a function, but the recipe names no method `own`; expected `method: own`"
            " in a stage, or in eval"
        )
    for name, where in named.items():
        own_method(name, where)
    try:
        for stage in used.stages:
            if isinstance(stage, Train) and stage.method in named:
                stage.check_method(stage.facts)
        used.check_methods({**METHODS, **{name: facts_of(name) for name in named}})
    except ValueError as error:
        raise UserError(str(error)) from error
