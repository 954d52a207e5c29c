"""minirl: reinforcement learning of quantised LoRA adapters on one GPU.

The names of `__all__` are its public face. Each is imported when it is first asked for, so that
`import minirl` stays cheap and without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minirl.episode import Problem, Verdict
    from minirl.loop.train import train
    from minirl.loop.trial import evaluate_run
    from minirl.recipe import load as load_recipe
    from minirl.recipe.methods import method
    from minirl.rollout import Talk
    from minirl.tasks import Task

__all__ = ["Problem", "Talk", "Task", "Verdict", "evaluate_run", "load_recipe", "method", "train"]
__version__ = "0.1.0"

_HOME = {
    "Problem": "episode.Problem",
    "Talk": "rollout.Talk",
    "Task": "tasks.Task",
    "Verdict": "episode.Verdict",
    "evaluate_run": "loop.trial.evaluate_run",
    "load_recipe": "recipe.load",
    "method": "recipe.methods.method",
    "train": "loop.train.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minirl' has no attribute {name!r}")
    module, _, attribute = _HOME[name].rpartition(".")
    return getattr(import_module(f"minirl.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
