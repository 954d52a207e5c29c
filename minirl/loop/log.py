"""What a run writes and shows: steps, evaluations, episodes.

Invariant: only the main process writes; every number goes to the run folder, and from there to the
display and the trackers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from minirl.chat import Chat
from minirl.episode import Episode
from minirl.loop.session import Session
from minirl.recipe import Collect, Filter, RewardModel, Stage
from minirl.record.evals import summarise
from minirl.record.measures import OUTCOMES


def log_step(
    s: Session, row: dict[str, Any], times: dict[str, float], episodes: Sequence[Episode] = ()
) -> None:
    """Log a step's numbers and times, and the text of some of its episodes."""
    stage, step = row["stage"], row["step"]
    s.run.log(row)
    s.run.log_time({"stage": stage, "step": step} | times)
    _log_episodes(s, episodes, stage=stage, step=step, label="train")
    s.progress.step(row, times)
    _track(s, {f"{stage}/{name}": value for name, value in (row | times).items()}, stage, step)


def evaluate_policy(s: Session, label: str, *, stage: int, step: int) -> float:
    """Evaluate on the held-out problems and log it; the score that picks the best checkpoint."""
    began, evaluation = time.monotonic(), s.recipe.eval
    problems = s.task.held_out[: evaluation.problems]
    s.progress.say(
        f"evaluating ({label}): {len(problems)} held-out problems x {evaluation.samples},"
        f" {evaluation.tries} tries"
    )
    s.player.sampler.reset()
    rows, episodes = s.evaluator.evaluate(s.share(problems), s.player.sampler)
    s.player.sampler.reset()
    where = {"stage": stage, "step": step}
    row = {"label": label} | where | s.evaluator.settings | {"problems": s.gather(rows)}
    s.run.log_eval(row)
    summary = summarise(row)
    s.run.log_time(where | {"label": label, "eval_s": time.monotonic() - began})
    _log_episodes(s, episodes[: s.recipe.save.episodes], **where, label=label)
    s.progress.evaluation(label, summary)
    shares = {m.key: summary[m.key] for m in OUTCOMES if summary[m.key]}
    values = {f"eval/{name}": share.value for name, share in (shares | summary["scores"]).items()}
    _track(s, values, stage, step)
    return float(summary["second" if evaluation.tries == 2 else "first"].value)


def texts(chat: Chat, episode: Episode) -> list[str]:
    """The text of each turn, special tokens included."""
    return [chat.text(turn.tokens, special=True) for turn in episode.turns]


def count_steps(stage: Stage) -> int:
    """The steps of a stage: chunks of a collect stage, parts of a filter, epochs of a reward
    model."""
    if isinstance(stage, RewardModel):
        return stage.epochs
    if isinstance(stage, Filter):
        return stage.parts
    return -(-stage.problems // stage.batch) if isinstance(stage, Collect) else stage.steps


def _log_episodes(s: Session, episodes: Sequence[Episode], **labels: Any) -> None:
    s.run.log_episodes(episodes, [texts(s.chat, e) for e in episodes], **labels)


def _track(s: Session, values: dict[str, float], stage: int, step: int) -> None:
    """Send numbers to the trackers, at the step counted over all stages: some trackers refuse a
    step that goes back."""
    if s.recipe.track:
        before = sum(count_steps(earlier) for earlier in s.recipe.stages[:stage])
        s.accelerator.log(values, step=step + before)
