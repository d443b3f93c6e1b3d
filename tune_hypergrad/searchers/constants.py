"""What is fixed in a search space: whether a point agrees with it, and how it is shown where Ray hides it.

Ray puts placeholders for the objects and functions of a `param_space` before a searcher sees it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray.tune.impl.placeholder import _FunctionResolver, _RefResolver

from tune_hypergrad.errors import InputError

_logger = logging.getLogger(__name__)


def is_same(a: Any, b: Any) -> bool:
    """Whether two constants of a space are the same: identical, or equal of a kind that can tell."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(is_same(value, b[name]) for name, value in a.items())
    try:
        return a is b or (bool(a == b) and isinstance(plain(a), bool) == isinstance(plain(b), bool))
    except (TypeError, ValueError, RuntimeError):  # arrays and tensors, say
        return False


def check_constant(constant: Any, value: Any, what: str) -> None:
    """Raise `InputError` where a point has another value for one of the space's constants."""
    if not (is_same(constant, value) or may_be(constant, value)):
        remedy = "remove it, or give it that value" if shown(constant) is constant else "remove it"
        raise InputError(
            f"{what} = {without_breaks(repr(value))}, which the space fixes to {shown(constant)!r}: {remedy}"
        )
    warn_of_an_object(constant, value, what)


def warn_of_an_object(known: Any, value: Any, what: str) -> None:
    """Warn where an object in a point may not be the one that the space has."""
    if shown(known) is not known and may_be(known, value) and not is_same(known, value):
        text = without_breaks(repr(value))
        _logger.warning("%s = %s: trials get the object in the search space, which may be another one", what, text)


class _Unseen:
    """What is shown for a placeholder, by which Ray hides what is not plain from searchers."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


_UNSEEN = {_RefResolver.TOKEN: _Unseen("<object>"), _FunctionResolver.TOKEN: _Unseen("<sample_from>")}


def _placeholder(value: Any) -> str | None:
    """The kind of placeholder that a value is; None where it is none."""
    is_one = type(value) is tuple and len(value) == 2 and isinstance(value[0], str) and value[0] in _UNSEEN
    return str(value[0]) if is_one else None


def shown(value: Any) -> Any:
    """A value of the space as people are shown it; itself where nothing in it is hidden."""
    kind = _placeholder(value)
    if kind is not None:
        return _UNSEEN[kind]
    if type(value) is dict:
        entries = {name: shown(item) for name, item in value.items()}
        return value if all(entries[name] is item for name, item in value.items()) else entries
    if type(value) in (list, tuple):
        items = type(value)(map(shown, value))
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return value


def may_be(known: Any, value: Any) -> bool:
    """Whether a value can be the space's: what an object's placeholder stands for may be any object."""
    if _placeholder(known) is not None:
        hidden = not isinstance(plain(value), str | int | float | dict | list | tuple | None)
        return _placeholder(known) == _RefResolver.TOKEN and hidden
    if type(known) is dict and isinstance(value, Mapping):
        return known.keys() == value.keys() and all(may_be(item, value[name]) for name, item in known.items())
    if type(known) in (list, tuple) and isinstance(value, type(known)):
        return len(known) == len(value) and all(map(may_be, known, value))
    return is_same(known, value)


def without_breaks(text: str) -> str:
    """A text without its line breaks."""
    return " ".join(text.split())


def plain(value: Any) -> Any:
    """Python's number for one of NumPy's; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value
