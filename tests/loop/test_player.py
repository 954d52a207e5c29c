"""The player: what it plays, and the speed that it reports."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import Scripted, talk_of
from tiny import byte_tokenizer

from minirl.chat import Chat
from minirl.episode import Ask, Completion, Problem, Verdict
from minirl.loop.player import Player
from minirl.rollout import Play, Talk

CHAT = Chat(byte_tokenizer())


class Counting(Scripted):
    """Counts its tokens, and takes ten seconds for each poll."""

    def __init__(self, clock: SimpleNamespace) -> None:
        super().__init__(CHAT, lambda text, ask: "yes")
        self.tokens = 0
        self._clock = clock

    def reset(self) -> None:
        pass

    def complete(self, ask: Ask) -> Completion:
        self._clock.now += 10.0
        completion = super().complete(ask)
        self.tokens += len(completion.tokens)
        return completion


def answer(talk: Talk) -> Play:
    yield from talk.ask("attempt", max_tokens=8, trained=True)
    return talk.end(Verdict(1.0, True))


def test_the_speed_is_that_of_playing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: the time of a judge, and the tokens that it writes with the policy's own sampler,
    counted as sampling."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    sampler: Any = Counting(clock)
    shown: list[tuple[int, int]] = []
    progress: Any = SimpleNamespace(sampling=lambda done, of: shown.append((done, of)))
    player = Player(sampler, progress)
    talks = [talk_of(Problem(f"p{n}", "Why?", None), CHAT) for n in range(2)]
    episodes = player.play([answer(talk) for talk in talks])
    assert [e.problem.id for e in episodes] == ["p0", "p1"]
    sampler.add(0, Ask(CHAT.prompt(Problem("judge", "Is it good?", None)), 8, 0.0))
    sampler.poll()
    assert clock.now == 30.0
    # Two answers of three letters and an end marker, ten seconds each.
    assert player.take_times() == {"sample_s": 20.0, "sample_tps": 0.4}
    player.play([answer(talk_of(Problem("p2", "Why?", None), CHAT))])
    assert player.take_times() == {"sample_s": 10.0, "sample_tps": 0.4}
    assert shown == [(1, 2), (2, 2), (1, 1)]
