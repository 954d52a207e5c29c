"""Relay: a conversation that another model speaks, written down in the policy's own tokens.

Invariant: the speaker is asked in its own template and tokens, and the episode holds the policy's:
what the speaker said stands there as text that nobody sampled (as in a demonstration), so that its
states are problems for the policy and no log-probability of another model is ever trained on.
"""

from __future__ import annotations

from collections.abc import Generator

from minirl.chat import Chat
from minirl.episode import Ask, Completion, Problem, Turn
from minirl.recipe import Sampling
from minirl.rollout import Talk


class Relay(Talk):
    """A Talk whose replies come from a speaker with a chat of its own; a method cannot tell the
    difference."""

    def __init__(
        self,
        problem: Problem,
        chat: Chat,
        sampling: Sampling,
        *,
        temperature: float,
        seed: str,
        speaker: Chat,
    ) -> None:
        super().__init__(problem, chat, sampling, temperature=temperature, seed=seed)
        self._other = Talk(problem, speaker, sampling, temperature=temperature, seed=seed)

    def begin(self, user: str, *, system: str | None = None) -> None:
        """As in Talk, on both sides."""
        super().begin(user, system=system)
        self._other.begin(user, system=system)

    def tell(self, kind: str, text: str) -> None:
        """As in Talk, on both sides."""
        super().tell(kind, text)
        self._other.tell(kind, text)

    def ask(
        self, kind: str, *, max_tokens: int, trained: bool = False, stop: tuple[str, ...] = ()
    ) -> Generator[Ask, Completion, str]:
        """Let the speaker speak: its text, with the stop string that a server leaves out put back.

        A reply that the speaker's limit has cut ends where it was cut, and is no action.
        """
        text = yield from self._other.ask(kind, max_tokens=max_tokens, stop=stop)
        self._finish = self._other._finish
        if not self._other.turns[-1].tokens:  # a server's: text alone
            if self._finish != "length":
                text += next(
                    (end for end in stop if text.count("<" + end[2:]) > text.count(end)), ""
                )
            self._other.turns[-1] = Turn(kind, self._other.chat.reply(text))
        self.turns.append(Turn(kind, self.chat.reply(text), None, trained))
        return text
