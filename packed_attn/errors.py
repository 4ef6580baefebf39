"""What an exception says, in the one line that a refusal or a table has room for."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type's name where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
