"""Methods: each is a generator that plays one episode.

Invariant: FUNCTIONS has the names of `minirl.recipe.METHODS`, no more and no fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from minirl import recipe
from minirl.methods.demonstrate import demonstrate
from minirl.methods.reflect import reflect
from minirl.methods.search.ircot import ircot
from minirl.methods.search.iter_retgen import iter_retgen
from minirl.methods.search.naive_rag import naive_rag
from minirl.methods.search.no_rag import no_rag
from minirl.methods.search.search import search
from minirl.methods.self_train import self_train
from minirl.methods.single import single
from minirl.methods.swirl.demonstrate import demonstrate_stepwise
from minirl.methods.swirl.stepwise import imitate, step, stepwise
from minirl.recipe.methods import EVALUATED_BY
from minirl.rollout import Play, Talk
from minirl.tasks import Task
from minirl.tasks.qa import SearchTask

Method = Callable[[Talk, Task], Play]
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


def method_of(stage: recipe.Collect | recipe.Train) -> Method:
    """The method a stage names, with the stage's own options bound."""
    function = FUNCTIONS[stage.method]
    options = stage.facts.options if isinstance(stage, recipe.Train) else ()
    bound = {name: getattr(stage, name) for name in options}
    return partial(function, **bound) if bound else function


def evaluated_by(node: recipe.Eval, task: Task) -> Method:
    """The method that an evaluation names; see `recipe.Eval.method` where it names none. With 2
    tries, reflect."""
    if node.tries == 2:
        return reflect
    kind = "search" if isinstance(task, SearchTask) else "calls" if task.verify_answer else "text"
    return FUNCTIONS[node.method or EVALUATED_BY[kind]]
