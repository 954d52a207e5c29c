"""demonstrate: gold solutions, or samples that a collect stage kept, as episodes that nobody
samples now, for SFT (loss nll).

A share of them shows the whole R3 shape: a failed attempt (given), a reflection and, where it
arrives at an answer, a right retry (both trained). A model too small to reflect by itself needs to
have seen it: R3 is known to fail below 1.5B without such a warm-up.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from minirl.episode import Episode, Problem, Turn
from minirl.errors import UserError
from minirl.methods.reflect import REFLECT, RETRY
from minirl.methods.search.demonstrate import demonstrate_search
from minirl.rollout import Play, Talk
from minirl.tasks import Task


def demonstrate(talk: Talk, task: Task, *, reflections: float = 0.0) -> Play:
    """Prompt and a right answer, or searches and an answer; in the share `reflections` of the cases
    prompt, wrong attempt, reflection and right retry.

    A problem from `as_sampled` is shown as it was sampled, id by id.
    """
    if any(turn.trained for turn in talk.problem.context):
        return talk.end(None)
    if task.kind == "search" and not reflections:
        return (yield from demonstrate_search(talk, task))
    if task.demonstrate is None:
        raise UserError(
            f"task {task.name!r} has no demonstrations; expected a task with gold solutions for"
            " method demonstrate"
        )
    rng = Random(talk.seed)
    shown = task.demonstrate(talk.problem, rng)
    if reflections and not shown.reflection:
        raise UserError(
            f"task {task.name!r} has no reflections to show; expected reflections: 0 in the"
            f" demonstrate stage, got {reflections}"
        )
    if rng.random() < reflections:
        talk.reply("attempt", shown.attempt, trained=False)
        talk.tell("request", REFLECT)
        talk.reply("reflection", shown.reflection, trained=True)
        if (
            shown.settled
        ):  # a right retry after a reflection that gave up would teach not to listen to reflections
            talk.tell("request", RETRY)
            talk.reply("retry", shown.answer, trained=True)
    else:
        talk.reply("attempt", shown.answer, trained=True)
    return talk.end(None)


def as_sampled(episode: Episode) -> Problem:
    """The problem whose demonstration is the episode itself: its context is all that was said, with
    the mask it was born with.

    The sampler's log-probabilities stay behind: they are those of other weights than the ones that
    will be trained on it. How the episode ended is not kept either: what a stage keeps with
    `passed` ended by itself.
    """
    turns = tuple(Turn(turn.kind, turn.tokens, None, turn.trained) for turn in episode.turns)
    return replace(episode.problem, context=turns)
