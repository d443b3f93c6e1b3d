"""The one exception for what a person can get wrong, and what its messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Raised where something that a person passed cannot work: a `ValueError` whose message is one line with the
    culprit and the remedy."""


class UnsuitedError(InputError):
    """Raised where a method cannot work on a problem, or on a search space, that others may be able to work on; the
    message is one line with the reason."""


class NoDerivativeError(RuntimeError):
    """Raised within a model or a loss where it does what no derivative follows; the message says what, and the remedy.

    It is for the engine, which may know another way, or tells a person.
    """


def in_one_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n", 1)[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'digits'?"` where a known name is close to `name`, else an empty text."""
    close = difflib.get_close_matches(name.lower().replace("-", "_"), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
