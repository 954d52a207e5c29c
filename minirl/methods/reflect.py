"""reflect: Reflect, Retry, Reward (R3, arXiv 2505.24726).

After a failed attempt a fixed request asks for a reflection, then for the task again, in the same
conversation. The reward is the retry's verdict, and the reflection alone is trained: prompt, failed
attempt and retry get no gradient. A problem whose context already ends in a failed attempt (a
collect stage's) starts at the reflection; one without starts with an attempt, and ends there if it
is right.
"""

from __future__ import annotations

from minirl.episode import Problem, Turn
from minirl.rollout import Play, Talk
from minirl.tasks import Task

REFLECT = "That is not right. In a few words: what went wrong, and what would you do instead?"
RETRY = "Now solve the task again, with this in mind, and answer in the same form."


def reflect(talk: Talk, task: Task, *, train_all: bool = False) -> Play:
    """[Prompt, attempt,] request, reflection, request, retry, verdict of the retry."""
    sampling, first = talk.sampling, False
    parts: dict[str, str | None] = {}
    if not talk.problem.context:
        text = yield from talk.ask("attempt", max_tokens=sampling.attempt_tokens, stop=task.stop)
        verdict = task.verify(talk.problem, text)
        if verdict.passed:
            # Nothing to reflect on: no reward to learn from either, and "not scored" keeps it out
            # of every group's mean.
            return talk.end(None, first=True, second=True, first_error=None)
        parts["first_error"] = verdict.parts.get("error_kind")  # type: ignore[assignment]
    talk.tell("request", REFLECT)
    yield from talk.ask("reflection", max_tokens=sampling.reflection_tokens, trained=True)
    talk.tell("request", RETRY)
    text = yield from talk.ask(
        "retry", max_tokens=sampling.attempt_tokens, trained=train_all, stop=task.stop
    )
    verdict = task.verify(talk.problem, text)
    return talk.end(
        verdict,
        first=first,
        second=verdict.passed,
        second_error=verdict.parts.get("error_kind"),
        **parts,
    )


def failed(problem: Problem, turns: tuple[Turn, ...]) -> Problem:
    """The problem of reflecting on a failed attempt: its context is everything up to and with the
    attempt, none of it trained."""
    context = tuple(Turn(turn.kind, turn.tokens, turn.logprobs, trained=False) for turn in turns)
    return Problem(
        problem.id,
        problem.prompt,
        problem.answer,
        problem.solution,
        problem.system,
        problem.tools,
        context,
    )
