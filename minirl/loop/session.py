"""A session: what every stage of a run shares.

Invariant: nothing in it is replaced during a run except the sampler inside `player`; what several
processes did is put together in the order in which `share` dealt it out.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from minirl.chat import Chat
from minirl.engine.model import load as models
from minirl.engine.model.device import dtype_name
from minirl.engine.model.policy import Policy
from minirl.episode import Problem
from minirl.loop.evaluate import Evaluator
from minirl.loop.judges import JudgeModels
from minirl.loop.open_model import open_model
from minirl.loop.player import Player
from minirl.recipe import Recipe
from minirl.record.progress import Progress
from minirl.record.run import Run
from minirl.rollout import Talk
from minirl.tasks import Task, fingerprint, open_task

_NOTHING = object()  # fills a share that is shorter than the others


class Interrupted(Exception):  # noqa: N818 - not an error
    """The user pressed Ctrl-C: everything up to the last finished step is saved."""


@dataclass(slots=True)
class StopRequest:
    """Whether this process was asked to stop."""

    asked: bool = False


@dataclass(frozen=True, slots=True)
class Session:
    """The recipe, run folder, model, task and helpers of one run."""

    recipe: Recipe
    run: Run
    accelerator: Accelerator
    policy: Policy
    chat: Chat
    task: Task
    progress: Progress
    player: Player
    evaluator: Evaluator
    judges: JudgeModels
    stop: StopRequest = field(default_factory=StopRequest)

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's share of items that all processes have."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """All processes' items, in the order in which `share` dealt them out."""
        if self.accelerator.num_processes == 1:
            return list(items)
        rounds = zip_longest(*gather_object([list(items)]), fillvalue=_NOTHING)
        return [item for dealt in rounds for item in dealt if item is not _NOTHING]

    def asked_to_stop(self) -> bool:
        """Whether any process was asked to stop. All of them must call this at the same step, and
        all get the same answer."""
        asked = torch.tensor(float(self.stop.asked), device=self.accelerator.device)
        # Not written back to `stop`: a signal that comes while this waits for the others would be
        # lost.
        return bool(self.accelerator.reduce(asked, "sum").item())

    def stop_if_asked(self) -> None:
        """Raise Interrupted if any process was asked to stop."""
        if self.asked_to_stop():
            raise Interrupted

    def talk(self, problem: Problem, seed: str, *, temperature: float) -> Talk:
        """A new conversation about a problem. What is sampled in it depends on the run's seed and
        on `seed`, its name within the run."""
        return Talk(
            problem,
            self.chat,
            self.recipe.sampling,
            temperature=temperature,
            seed=f"{self.recipe.seed}/{seed}",
        )


def open_session(
    recipe: Recipe,
    run: Run,
    accelerator: Accelerator,
    progress: Progress,
    own_task: Task | None = None,
) -> Session:
    """Open the task, model and sampler of a recipe, with the weights that the run saved last.

    own_task: the task if the recipe says `task: {name: own}`.
    Raises UserError if something is missing or differs from what the run began with.
    """
    task = open_task(recipe.task, recipe.seed, own_task)
    run.check_task(fingerprint(task), len(task.train), len(task.held_out))
    with accelerator.main_process_first():  # the others find the model in the cache
        policy, chat, sampler, description = open_model(
            recipe.model, recipe.sampling, recipe.seed, accelerator.device
        )
    run.check_model(models.fingerprint(policy.model), dtype_name(policy.dtype))
    if recipe.model.adapter is not None:  # a value head from an earlier run's last ppo stage
        policy.load_value_head(Path(recipe.model.adapter).expanduser())
    for line in (description, *task.notes):
        progress.say(line)
    if (weights := run.weights()) is not None:
        policy.load(weights)
        progress.say(f"resuming at stage {run.position.stage}, step {run.position.step}")
    if recipe.track:
        accelerator.init_trackers("minirl", config={"recipe": recipe.dump()})
    return Session(
        recipe,
        run,
        accelerator,
        policy,
        chat,
        task,
        progress,
        Player(sampler, progress),
        Evaluator(task, chat, recipe.sampling, recipe.eval, recipe.seed),
        JudgeModels(policy, chat, recipe.sampling),
    )


@contextmanager
def interruptible(s: Session) -> Iterator[None]:
    """Inside, the first Ctrl-C lets the current step finish and be saved; the second stops at
    once."""

    def ask(signum: int, frame: object) -> None:
        if s.stop.asked:
            raise KeyboardInterrupt
        s.stop.asked = True
        text = (
            "stopping after this step, which will be saved; Ctrl-C again to stop at once (loses the"
            " steps since the last save)"
        )
        # A handler must not wait for the display, which the interrupted code may hold; a thread
        # may.
        threading.Thread(target=s.progress.say, args=(text,)).start()

    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return
    old = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
