"""single: one attempt at the task, all of it trained. The plain GRPO episode, and the first try
that R3 collects."""

from __future__ import annotations

from minirl.rollout import Play, Talk
from minirl.tasks import Task


def single(talk: Talk, task: Task) -> Play:
    """Prompt, attempt, verdict."""
    text = yield from talk.ask(
        "attempt", max_tokens=talk.sampling.attempt_tokens, trained=True, stop=task.stop
    )
    return talk.end(task.verify(talk.problem, text))
