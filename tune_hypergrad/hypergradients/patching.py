"""Attributes of torch's classes and modules that are others while anybody needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any


class Patch:
    """An attribute of a class or module, another one while this is entered, by whichever threads in whatever order.

    Args:
        owner: the class or the module.
        name: of the attribute.
        replacement: makes, of the attribute as it was, what takes its place. That is there for all threads: it has to
            find out whether the one that calls it has entered.
    """

    def __init__(self, owner: Any, name: str, replacement: Callable[[Any], Any]) -> None:
        self._owner, self._name, self._replacement = owner, name, replacement
        self._lock, self._entered = Lock(), 0
        self._own: dict[str, Any] = {}

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have the other attribute for the body."""
        with self._lock:
            self._entered += 1
            if self._entered == 1:
                self._own = {self._name: vars(self._owner)[self._name]} if self._name in vars(self._owner) else {}
                setattr(self._owner, self._name, self._replacement(getattr(self._owner, self._name)))
        try:
            yield
        finally:
            with self._lock:
                self._entered -= 1
                if not self._entered:
                    if self._name in self._own:
                        setattr(self._owner, self._name, self._own[self._name])
                    else:
                        delattr(self._owner, self._name)
