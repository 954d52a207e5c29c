"""Methods: what an episode of each kind looks like, as a generator written for one episode (floor 4, no torch)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from minirl import recipe
from minirl.methods.demonstrate import demonstrate
from minirl.methods.reflect import reflect
from minirl.methods.single import single
from minirl.rollout import Play, Talk
from minirl.tasks import Task

Method = Callable[[Talk, Task], Play]


def method_of(stage: recipe.Stage) -> Method:
    """The method a stage names, with the stage's own options bound."""
    if stage.method == "single":
        return single
    if stage.method == "reflect":
        return partial(reflect, train_all=stage.train_all)
    return partial(demonstrate, share=stage.reflections)
