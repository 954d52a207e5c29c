"""self_train: one attempt, trained if it is right (ReFT's online self-training, arXiv 2401.08967,
section 4.2); goes with loss nll.

The stage puts each problem's gold solution beside its attempts; `sampled_share` of the learner
weighs the two.
"""

from __future__ import annotations

from dataclasses import replace

from minirl.methods.single import single
from minirl.rollout import Play, Talk
from minirl.tasks import Task


def self_train(talk: Talk, task: Task) -> Play:
    """Prompt, attempt, verdict; the mask of a wrong attempt is empty, so that no loss touches it,
    and so is that of one which the token limit cut: it would teach never to end."""
    episode = yield from single(talk, task)
    if episode.parts["first"] and episode.finish != "length":
        return episode
    return replace(episode, turns=tuple(replace(turn, trained=False) for turn in episode.turns))
