"""The one exception a user is meant to see, and how to quote other exceptions in it.

Invariant: a UserError is one line that says what was got, what was expected, where, and what to do
next; the command line prints it without a traceback and exits with code 2.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can correct: a wrong key, a missing file, an absent model."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; its type's name if it has no
    message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
