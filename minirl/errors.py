"""The one exception a user is meant to see.

Invariant: its text is one line that says what was got, what was expected, where, and what to do
next; the command line prints it without a traceback and exits with code 2.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend: a bad key, a missing file, a model that cannot be had."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
