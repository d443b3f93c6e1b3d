"""What a program's objects hold besides tensors, as it was before something was run once more."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
_MOST_HELD = 10_000
"""Entries of containers that are put back; larger ones are data."""


def attributes_of(objects: Iterable[Any]) -> Callable[[], None]:
    """What puts back, as often as it is called, what objects hold now: their attributes, and what lists, dicts, sets
    and generators among these have in them. Objects may count, log, cache, and draw from generators of their own."""
    held = [(vars(each), dict(vars(each))) for each in objects]
    undo = [_undoing(value) for _, before in held for name, value in before.items() if name not in OF_EVERY_MODULE]

    def put_back() -> None:
        for now, before in held:
            for name in now.keys() - before.keys():
                del now[name]
            now.update((name, value) for name, value in before.items() if name not in OF_EVERY_MODULE)
        for each in undo:
            if each is not None:
                each()

    return put_back


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
    if isinstance(value, list | deque | set | dict) and len(value) <= _MOST_HELD:
        return _undoing_container(value, copy.copy(value))
    return None


def _undoing_container(value: Any, before: Any) -> Callable[[], object]:
    def put_back() -> None:
        value.clear()
        (value.extend if isinstance(value, list | deque) else value.update)(before)

    return put_back
