"""What a call of a torch function writes to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]
_IN_PLACE = (Tensor.__setitem__, SET_DATA)
_KEEPING_VALUES = ("requires_grad_", "detach_", "rename_", "share_memory_")
"""Names of functions that change a tensor, and none of its elements."""
_AUGMENTED = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__")


class Call(NamedTuple):
    """The arguments of a call, with what it writes to apart."""

    written: tuple[Any, ...]
    """A tensor or a list of tensors, which is the first argument; empty where nothing is written to."""
    args: tuple[Any, ...]
    """All other positional arguments."""
    kwargs: dict[str, Any]

    @property
    def targets(self) -> list[Tensor]:
        """The tensors that are written to."""
        if not self.written:
            return []
        (target,) = self.written
        return [each for each in (target if isinstance(target, list | tuple) else [target]) if isinstance(each, Tensor)]


def may_write(function: Callable[..., Any]) -> bool:
    """Whether a torch function writes to its first argument, or may be asked to."""
    return _place_of_request(function) is not None


def call_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call of a torch function, be it in place by its name (`mul_`) or by an argument (`inplace=True`)."""
    place = _place_of_request(function)
    if place is None or (place >= 0 and not kwargs.get("inplace", args[place] if place < len(args) else False)):
        return Call((), args, kwargs)
    if not args and "input" in kwargs:
        kwargs = dict(kwargs)
        args = (kwargs.pop("input"),)
    return Call(args[:1], args[1:], kwargs)


@cache
def _place_of_request(function: Callable[..., Any]) -> int | None:
    """Which argument asks a function to write to its first one, counted from 0; -1 of one that always does, None of one
    that never does."""
    name = getattr(function, "__name__", "")
    by_name = name.endswith("_") and not name.endswith("__") and name not in _KEEPING_VALUES
    if function in _IN_PLACE or name in _AUGMENTED or by_name:
        return -1
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of torch's backend, where a name says it
        return None
    return parameters.index("inplace") if "inplace" in parameters else None
