"""A session: the two wings opened side by side, and what every stage of a run shares.

Invariant: whatever is written or shown of a run goes through here, and only the main process
writes; the shares of several processes are put together in the order in which they were dealt out.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from minirl import recipe
from minirl.chat import Chat
from minirl.engine.model import load as models
from minirl.engine.model.device import dtype_name
from minirl.engine.model.policy import Policy
from minirl.engine.sample.agreement import measure_agreement
from minirl.engine.sample.live import LiveSampler, open_sampler
from minirl.engine.sample.plain import PlainSampler
from minirl.episode import Episode, Group, Problem
from minirl.loop.evaluate import evaluate as evaluate_problems
from minirl.loop.judges import Voices
from minirl.record.evals import summarise
from minirl.record.progress import Progress
from minirl.record.run import Run
from minirl.rollout import Play, Talk, play
from minirl.tasks import Task, fingerprint, open_task

_NOTHING = object()  # fills a share that is shorter than the others


class Interrupted(Exception):  # noqa: N818 - not an error
    """The user pressed Ctrl-C: everything up to the last finished step is saved."""


@dataclass(slots=True)
class Session:
    """What every stage of a run shares."""

    recipe: recipe.Recipe
    run: Run
    accelerator: Accelerator
    policy: Policy
    chat: Chat
    task: Task
    sampler: LiveSampler | PlainSampler
    progress: Progress
    voices: Voices
    stop: bool = field(default=False)

    def mine(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's share."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """Everybody's items, in the order in which `mine` dealt them out."""
        if self.accelerator.num_processes == 1:
            return list(items)
        rounds = zip_longest(*gather_object([list(items)]), fillvalue=_NOTHING)
        return [item for dealt in rounds for item in dealt if item is not _NOTHING]

    def asked_to_stop(self) -> bool:
        """Whether anybody was asked to; all processes of a run learn it at the same step, or the
        others would wait for ever."""
        asked = torch.tensor(float(self.stop), device=self.accelerator.device)
        # Not written back to `stop`: a signal that comes while this waits for the others would be
        # lost.
        return bool(self.accelerator.reduce(asked, "sum").item())

    def talk(self, problem: Problem, seed: str, *, temperature: float | None = None) -> Talk:
        """A conversation about a problem; `seed` names it within the run, and with the run's own
        seed decides what is sampled."""
        sampling = self.recipe.sampling
        temperature = sampling.temperature if temperature is None else temperature
        return Talk(
            problem, self.chat, sampling, temperature=temperature, seed=f"{self.recipe.seed}/{seed}"
        )

    def play(self, plays: Sequence[Play]) -> list[Episode]:
        """Episodes in the order of `plays`, shown as they finish."""
        done = 0
        self.sampler.reset()  # so that a step does not depend on what was sampled before it

        def count(_: Episode) -> None:
            nonlocal done
            done += 1
            self.progress.sampling(done, len(plays))

        episodes = play(plays, self.sampler, on_done=count)
        self.sampler.reset()  # on a GPU the cache's memory is the learner's now
        return episodes

    def check(self, groups: Sequence[Group], *, temperature: float) -> bool:
        """Compare sampler and layout with plain rows, and take the plain path where they differ by
        more than rounding.

        True where the sampler had to be given up: what it sampled must be sampled again.
        """
        found = measure_agreement(
            self.policy, groups, temperature=temperature, pad=self.chat.tokenizer.pad_token_id
        )
        # All processes of a run go the same way, or their updates would differ.
        wrong = [
            any(self.gather([not found.holds(value)])) for value in (found.sampler, found.layout)
        ]
        distances = {"sampler": found.sampler, "shared prefixes": found.layout}
        shown = ", ".join(
            f"{name} {value:.2g}" for name, value in distances.items() if value is not None
        )
        self.progress.say(
            f"mean distance from plain rows, nats a token: {shown or 'nothing to compare'} (limit"
            f" {found.limit:g})"
        )
        if wrong[1]:
            self.progress.say(
                "WARNING: shared prefixes do not agree with plain rows on this model; learning goes"
                " on with plain rows"
            )
        if wrong[0] and isinstance(self.sampler, PlainSampler):
            self.progress.say(
                "WARNING: `generate` and the learner disagree on this model, beyond rounding;"
                " expect a high mismatch_kl"
            )
        if any(wrong) and isinstance(self.sampler, LiveSampler):
            self.progress.say(
                "WARNING: the live sampler does not agree with plain rows on this model; sampling"
                " goes on with `generate`"
            )
            self.policy.give_up_sharing()
            tokens = self.sampler.tokens
            self.sampler = PlainSampler(self.policy, self.chat, rows=self.recipe.sampling.rows)
            self.sampler.tokens = tokens  # the count goes on
            return True
        return False

    def evaluate(self, label: str, *, stage: int, step: int) -> float:
        """Evaluate on the held-out problems and log it; the score that picks the best
        checkpoint."""
        node, began = self.recipe.eval, time.monotonic()
        problems = self.task.held_out[: node.problems]
        self.progress.say(
            f"evaluating ({label}): {len(problems)} held-out problems x {node.samples},"
            f" {node.tries} tries"
        )
        self.sampler.reset()
        rows, episodes = evaluate_problems(
            self.mine(problems),
            self.task,
            self.chat,
            self.sampler,
            self.recipe.sampling,
            node,
            self.recipe.seed,
        )
        self.sampler.reset()
        rows = self.gather(rows)
        row = (
            {"label": label, "stage": stage, "step": step}
            | eval_settings(node)
            | {"problems": rows}
        )
        self.run.log_eval(row)
        summary = summarise(row)
        self.run.log_time(
            {"stage": stage, "step": step, "label": label, "eval_s": time.monotonic() - began}
        )
        self.log_episodes(
            episodes[: self.recipe.save.episodes], stage=stage, step=step, label=label
        )
        self.progress.evaluation(label, summary)
        self._track(
            {
                f"eval/{key}": summary[key].value
                for key in ("first", "second", "fixed")
                if summary[key] is not None
            },
            stage,
            step,
        )
        self._track(
            {f"eval/{name}": found.value for name, found in summary["scores"].items()}, stage, step
        )
        return float(summary["second" if node.tries == 2 else "first"].value)

    def log(
        self, row: dict[str, Any], times: dict[str, float], episodes: Sequence[Episode] = ()
    ) -> None:
        """Write a step's numbers, times and some episodes to the run folder, the display and the
        trackers."""
        self.run.log(row)
        self.run.log_time({"stage": row["stage"], "step": row["step"]} | times)
        self.log_episodes(episodes, stage=row["stage"], step=row["step"], label="train")
        self.progress.step(row, times)
        self._track(
            {f"{row['stage']}/{name}": value for name, value in (row | times).items()},
            row["stage"],
            row["step"],
        )

    def _track(self, values: dict[str, float], stage: int, step: int) -> None:
        """Send numbers to the trackers, at the step counted over all stages: some of them refuse
        one that goes back."""
        if self.recipe.track:
            self.accelerator.log(
                values, step=step + sum(length(earlier) for earlier in self.recipe.stages[:stage])
            )

    def log_episodes(self, episodes: Sequence[Episode], **labels: Any) -> None:
        """Write episodes with the text of their turns."""
        self.run.log_episodes(episodes, [texts(self.chat, e) for e in episodes], **labels)


def open_session(
    node: recipe.Recipe,
    run: Run,
    accelerator: Accelerator,
    progress: Progress,
    made: Task | None = None,
) -> Session:
    """Task, model and sampler of a recipe, with the weights that the run was saved with. Raises
    UserError for what cannot be had.

    made: the task where the recipe says `own`.
    """
    task = open_task(node.task, node.seed, made)
    run.check_task(fingerprint(task), len(task.train), len(task.held_out))
    with accelerator.main_process_first():  # the others find the model in the cache
        loaded = models.load_model(node.model, node.seed, accelerator.device)
    run.check_model(models.fingerprint(loaded.model), dtype_name(loaded.dtype))
    chat = Chat(
        loaded.tokenizer, eos=models.eos(loaded.model), plain=node.model.template == "plain"
    )
    policy = Policy(loaded.model, loaded.device, loaded.dtype)
    if node.model.adapter is not None:
        policy.load_value_head(
            Path(node.model.adapter).expanduser()
        )  # that of an earlier run's last ppo stage
    for line in (models.describe(loaded), *task.notes):
        progress.say(line)
    if (weights := run.weights()) is not None:
        policy.load(weights)
        progress.say(f"resuming at stage {run.position.stage}, step {run.position.step}")
    if node.track:
        accelerator.init_trackers("minirl", config={"recipe": node.dump()})
    sampler = open_sampler(
        policy,
        chat,
        rows=node.sampling.rows,
        cache_tokens=node.sampling.cache_tokens,
        cuda_graphs=node.sampling.cuda_graphs,
    )
    voices = Voices(policy, chat, rows=node.sampling.rows, cache_tokens=node.sampling.cache_tokens)
    return Session(node, run, accelerator, policy, chat, task, sampler, progress, voices)


def length(stage: recipe.Stage) -> int:
    """How many steps (collect chunks, parts of a filter, a reward model's epochs) a stage has."""
    if isinstance(stage, recipe.RewardModel):
        return stage.epochs
    if isinstance(stage, recipe.Filter):
        return stage.parts
    return -(-stage.problems // stage.batch) if isinstance(stage, recipe.Collect) else stage.steps


def eval_settings(node: recipe.Eval) -> dict[str, Any]:
    """What two evaluations must share to be compared."""
    return {"tries": node.tries, "samples": node.samples, "temperature": node.temperature}


def texts(chat: Chat, episode: Episode) -> list[str]:
    """The text of each turn, special tokens included."""
    return [chat.text(turn.tokens, special=True) for turn in episode.turns]


@contextmanager
def interruptible(s: Session) -> Iterator[None]:
    """Inside, the first Ctrl-C lets the step in hand finish and be saved; the second stops at
    once."""

    def ask(signum: int, frame: object) -> None:
        if s.stop:
            raise KeyboardInterrupt
        s.stop = True
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
