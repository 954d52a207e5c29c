"""Methods: what an episode of each kind looks like, as a generator written for one episode (floor
4, no torch)."""

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
from minirl.rollout import Play, Talk
from minirl.tasks import Task
from minirl.tasks.qa import SearchTask

Method = Callable[[Talk, Task], Play]
EVALUATED: dict[str, Method] = {
    "single": single,
    "no_rag": no_rag,
    "naive_rag": naive_rag,
    "iter_retgen": iter_retgen,
    "ircot": ircot,
    "search": search,
    "stepwise": stepwise,
}
"""What an evaluation with one try can play; the order is that of the table (see
`trial.compare_methods`)."""
BY_NAME = EVALUATED | {
    "self_train": self_train,
    "step": step,
    "imitate": imitate,
    "demonstrate_stepwise": demonstrate_stepwise,
}


def method_of(stage: recipe.Collect | recipe.Train) -> Method:
    """The method a stage names, with the stage's own options bound."""
    if isinstance(stage, recipe.Train) and stage.method == "reflect":
        return partial(reflect, train_all=stage.train_all)
    if isinstance(stage, recipe.Train) and stage.method == "demonstrate":
        return partial(demonstrate, share=stage.reflections)
    return BY_NAME[stage.method]


def evaluated_by(node: recipe.Eval, task: Task) -> Method:
    """The method that an evaluation names; see `recipe.Eval.method` where it names none. With 2
    tries, reflect."""
    if node.tries == 2:
        return reflect
    return EVALUATED[
        node.method
        or (
            "search"
            if isinstance(task, SearchTask)
            else "stepwise"
            if task.verify_answer
            else "single"
        )
    ]
