"""What is in force for the thread that trains, and in backward passes, of which GPUs' parts have threads of their own.

Autograd hands modes on to these threads, but no context variables.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
_NOTHING = object()


class InForce(Generic[T]):
    """A value that is in force for a body, in the thread that runs it and in the threads of its backward passes.

    Args:
        name: what it is called.
        otherwise: what is in force where no thread runs a body.
    """

    def __init__(self, name: str, otherwise: T) -> None:
        self._own: ContextVar[Any] = ContextVar(name, default=_NOTHING)
        self._otherwise = otherwise
        self._of_all: list[T] = []  # of the bodies that threads run now, in the order in which they have begun

    @property
    def value(self) -> T:
        """That of the innermost body that this thread runs; in a thread of autograd's, of the body begun last in any
        thread."""
        own: T = self._own.get()
        if own is not _NOTHING:
            return own
        return (self._otherwise, *self._of_all)[-1] if _may_be_autograds_thread() else self._otherwise

    @contextmanager
    def set_to(self, value: T) -> Iterator[None]:
        """For the body, have another value in force."""
        before = self._own.get()
        self._own.set(value)
        self._of_all.append(value)
        try:
            yield
        finally:
            self._of_all.remove(value)
            self._own.set(before)  # not by its token, which another context would refuse


def _may_be_autograds_thread() -> bool:
    """Whether a backward pass runs in this thread, which Python has not started: one of autograd's, or of a program
    that has threads of its own."""
    return torch._C._current_graph_task_id() >= 0 and isinstance(threading.current_thread(), threading._DummyThread)
