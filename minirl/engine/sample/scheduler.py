"""Scheduler: which asks run, and in which row.

Invariant: row i decodes in slot i of the cache; the slots behind the rows hold conversations that
may go on. An ask is admitted only if its whole answer fits beside those that run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

from minirl.engine.sample.draw import Reply
from minirl.engine.sample.kv_cache import KVCache
from minirl.episode import Ask

# Asks wait for this many others (for as many as decode, if these are fewer): a prefill reads all
# weights, like a decode step.
ADMIT_TOGETHER = 16


class Scheduler:
    """At most `rows` asks run at once. running: the replies by row."""

    def __init__(self, cache: KVCache, rows: int) -> None:
        self.cache = cache
        self.rows = rows
        self.waiting: deque[tuple[int, Ask]] = deque()
        self.running: list[Reply] = []

    def add(self, key: int, ask: Ask) -> None:
        """Queue an ask; one that goes on with a cached conversation goes first, before that slot is
        given away."""
        slot, length = self.cache.find_prefix(ask.tokens)
        if length and length == self.cache.length(slot):
            self.waiting.appendleft((key, ask))
        else:
            self.waiting.append((key, ask))

    def admit(self) -> list[Reply]:
        """Give waiting asks the next rows; their replies, none while it is better to decode on.

        Of asks with equal tokens the first gets the longest cached prefix, the others empty slots.
        """
        count, start = self._fitting(), len(self.running)
        if not count or count < min(ADMIT_TOGETHER, start):
            return []
        asks = [self.waiting.popleft() for _ in range(count)]
        self.cache.reserve(self._capacity([ask for _, ask in asks]), live=start)
        prompts: set[tuple[int, ...]] = set()
        # Conversations that go on come first: they sit in slots which the others might be given.
        for key, ask in sorted(asks, key=lambda item: -self.cache.find_prefix(item[1].tokens)[1]):
            row = len(self.running)
            if ask.tokens in prompts:
                self.cache.evict(row)
            else:
                self.cache.allocate(row, ask.tokens)
            prompts.add(ask.tokens)
            self.running.append(Reply(key, ask))
        return self.running[start:]

    def release(self) -> list[Reply]:
        """Take the replies that have ended out of their rows, the last row first; the last row
        moves into each gap."""
        ended = []
        for row in reversed(range(len(self.running))):
            if self.running[row].finish is not None:
                ended.append(self.running[row])
                self.running[row] = self.running[-1]
                self.cache.swap(row, len(self.running) - 1)
                self.running.pop()
        return ended

    def _fitting(self) -> int:
        """How many of the asks that have waited longest can be given a row now."""
        longest, live = 0, len(self.running)
        for fit, (_, ask) in enumerate(islice(self.waiting, self.rows - live)):
            longest = max(longest, len(ask.tokens) + ask.max_tokens)
            if live + fit >= self.cache.room(longest):
                return fit
        return min(len(self.waiting), self.rows - live)

    def _capacity(self, asks: Sequence[Ask]) -> int:
        """Places that each slot needs for `asks`; for all that wait if the budget has them: every
        growth copies the cache."""
        needed, later = (
            max((len(ask.tokens) + ask.max_tokens for ask in some), default=0)
            for some in (asks, [ask for _, ask in self.waiting])
        )
        most = max(needed, later)
        return most if self.cache.room(most) >= len(self.running) + len(asks) else needed
