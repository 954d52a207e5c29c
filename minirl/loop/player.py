"""The player: plays episodes with the policy's sampler, and measures the speed of sampling.

Invariant: what it plays does not depend on what it played before, and its time and tokens are those
of playing alone: no judge, no check and no evaluation is counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from minirl.engine.sample.live import LiveSampler
from minirl.engine.sample.plain import PlainSampler
from minirl.episode import Episode
from minirl.record.progress import Progress
from minirl.rollout import Play, play


@dataclass(slots=True)
class Player:
    """The sampler of the run's policy; `loop/agreement.py` replaces it if it is wrong."""

    sampler: LiveSampler | PlainSampler
    progress: Progress
    seconds: float = 0.0
    tokens: int = 0

    def play(self, plays: Sequence[Play]) -> list[Episode]:
        """The episodes in the order of `plays`, shown as they finish."""
        began, before, finished = time.monotonic(), self.sampler.tokens, 0
        self.sampler.reset()  # so that a step does not depend on what was sampled before it

        def show(_: Episode) -> None:
            nonlocal finished
            finished += 1
            self.progress.sampling(finished, len(plays))

        episodes = play(plays, self.sampler, on_done=show)
        self.sampler.reset()  # on a GPU the cache's memory is the learner's now
        self.seconds += time.monotonic() - began
        self.tokens += self.sampler.tokens - before
        return episodes

    def take_times(self) -> dict[str, float]:
        """Seconds of sampling and tokens a second since the last call."""
        times = {"sample_s": self.seconds, "sample_tps": self.tokens / self.seconds}
        self.seconds, self.tokens = 0.0, 0
        return times
