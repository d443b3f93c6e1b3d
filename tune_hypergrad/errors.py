"""The one exception for what a person can get wrong, and what its messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user passed cannot work; the message is one line with culprit and remedy."""


class UnsuitedError(InputError):
    """A method cannot work on a problem, or on a search space, that others may be able to work on; the message is one
    line with the reason."""


def in_one_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n", 1)[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'digits'?"`, or nothing where no known name is close."""
    close = difflib.get_close_matches(name.lower().replace("-", "_"), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
