"""What a program's objects hold besides tensors, as it was before something was run once more."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
_LIBRARIES = frozenset({"builtins", "collections", "functools", "logging", "numpy", "ray", "threading", "torch"})
_MOST_HELD = 10_000
"""Entries of containers that are put back; larger ones are data."""


def attributes_of(objects: Iterable[Any]) -> Callable[[], None]:
    """What puts back, as often as it is called, what objects hold now: their attributes, what lists, dicts, sets,
    arrays and generators among these have in them, and the same of other objects among them, but not of those in turn.
    Objects may count, log, cache, and draw from generators of their own."""
    roots = {id(each): each for each in map(_holder, objects) if _is_plain(each) or isinstance(each, nn.Module)}
    inner = {id(value): value for each in roots.values() for value in _attributes(each).values() if _is_plain(value)}
    undo: list[Callable[[], object]] = []
    for each in {**inner, **roots}.values():
        before = _attributes(each)
        undo.append(partial(_put_attributes_back, each, before))
        undo += filter(None, map(_undoing, before.values()))

    def put_back() -> None:
        for each in undo:
            each()

    return put_back


def _attributes(held_by: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(held_by).items() if name not in OF_EVERY_MODULE}


def _put_attributes_back(held_by: Any, before: dict[str, Any]) -> None:
    now = vars(held_by)
    for name in _attributes(held_by).keys() - before.keys():
        del now[name]
    now.update(before)


def _holder(function: Any) -> Any:
    """The object that a function of the program belongs to; itself where it is none."""
    while isinstance(function, partial):
        function = function.func
    return function.__self__ if isinstance(function, MethodType) else function


def _is_plain(value: Any) -> bool:
    """Whether a value is an object of a person's kind, which may hold something in attributes."""
    kind = type(value)
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, type | nn.Module | Tensor | FunctionType | MethodType | ModuleType)
        and kind.__module__.partition(".")[0] not in _LIBRARIES
    )


@contextmanager
def attributes_kept(objects: Iterable[Any]) -> Iterator[None]:
    """For the body, objects may do what they will: afterwards they hold what they held before."""
    put_back = attributes_of(objects)
    try:
        yield
    finally:
        put_back()


def _undoing(value: Any) -> Callable[[], object] | None:
    """What puts an object's contents back; None where it has none that are looked at."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        drawn = value.getstate()
        return lambda: value.setstate(drawn)
    if isinstance(value, np.random.Generator | np.random.RandomState):
        bits = value.bit_generator if isinstance(value, np.random.Generator) else value._bit_generator
        inner = copy.deepcopy(bits.state)
        return lambda: setattr(bits, "state", inner)
    if isinstance(value, np.ndarray) and value.size <= _MOST_HELD and value.flags.writeable:
        return partial(np.copyto, value, value.copy())
    base: Any = next((kind for kind in (OrderedDict, dict, list, deque, set) if isinstance(value, kind)), None)
    if base is None or len(value) > _MOST_HELD:
        return None
    held = list(base.items(value) if issubclass(base, dict) else base.__iter__(value))
    return partial(_refill, value, base, held)


def _refill(value: Any, base: Any, held: list[Any]) -> None:
    """Give a container what it had, where it has something else; by its base's methods, since kinds of a person's own
    may refuse."""
    if issubclass(base, dict):
        now = list(base.items(value))
        if len(now) != len(held) or any(a is not b or x is not y for (a, x), (b, y) in zip(now, held, strict=True)):
            base.clear(value)
            for key, each in held:
                base.__setitem__(value, key, each)
        return
    now = list(base.__iter__(value))
    if len(now) != len(held) or any(a is not b for a, b in zip(now, held, strict=True)):
        base.clear(value)
        (base.update if base is set else base.extend)(value, held)
