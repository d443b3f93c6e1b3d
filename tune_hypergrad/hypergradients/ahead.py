"""The batches of a run by their number: read ahead along the order in which they are used, and read once."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tune_hypergrad.batches import Batch
from tune_hypergrad.hypergradients.memory import free_memory
from tune_hypergrad.reading import Reader, Task

_MOST = 2 << 30
"""Bytes of batches that a run keeps at the most: other trials may begin beside it."""


class BatchesAhead:
    """Batches by their number, whatever the order in which they are asked for.

    Where numbers follow each other, up or down, workers read ahead from the second on; from the first, where the order
    was announced. All other batches are read when they are asked for. Those that are asked for again are kept in the
    main memory, up to a quarter of what is free, and 2 GiB.

    Args:
        reader: of the split.
        tasks: what to read for a number.
        end: the number after the last one; None: there is no last.
    """

    def __init__(self, reader: Reader, tasks: Callable[[int], Sequence[Task]], end: int | None = None) -> None:
        self._reader, self._tasks, self._end = reader, tasks, end
        self._announced: Sequence[int] = ()
        self._requested: deque[int] = deque()  # numbers that workers read
        self._stream: object | None = None
        self._last: int | None = None
        self._kept: dict[int, list[Batch]] = {}
        self._sizes: dict[int, int] = {}
        self._room = 0

    def expect(self, numbers: Sequence[int]) -> None:
        """Announce numbers in the order in which their batches are going to be asked for."""
        self._announced = numbers

    def get(self, number: int, *, again: bool = False) -> list[Batch]:
        """The batches of a number.

        Args:
            number: from 0.
            again: whether it will be asked for again.
        """
        found = self._kept.get(number)
        if found is None:
            found = self._read(number)
            if again:
                self._keep(number, found)
        elif again:
            found = copy.deepcopy(found)  # a model may overwrite its input
        if not again:
            self._forget(number)
        self._last = number
        return found

    def forget(self) -> None:
        """Let go of all batches that are kept."""
        self._kept, self._sizes = {}, {}

    def _read(self, number: int) -> list[Batch]:
        reader = self._reader
        if reader.reads_ahead and not self._is_next(number):
            order = self._order_from(number)
            if order is not None:
                self._stream = reader.begin(self._requests(order))
        if not self._is_next(number):
            return reader.read(self._tasks(number))
        found = reader.take()
        self._requested.popleft()
        return found

    def _is_next(self, number: int) -> bool:
        """Whether the workers give the batches of this number next."""
        is_present = self._stream is not None and self._stream is self._reader.present
        return is_present and bool(self._requested) and self._requested[0] == number

    def _order_from(self, number: int) -> Iterator[int] | None:
        """The numbers from this one on in the order in which they are likely to be asked for; None where that cannot be
        told."""
        if len(self._announced) > 1 and self._announced[0] == number:
            return iter(self._announced)
        if self._last is None or abs(number - self._last) != 1:
            return None
        if number < self._last:
            return iter(range(number, -1, -1))
        return count(number) if self._end is None else iter(range(number, self._end))

    def _requests(self, order: Iterator[int]) -> Iterator[Sequence[Task]]:
        requested: deque[int] = deque()
        self._requested = requested
        for number in order:
            if number not in self._kept:
                requested.append(number)
                yield self._tasks(number)

    def _keep(self, number: int, batches: list[Batch]) -> None:
        """Keep copies of a number's batches, which are in no memory that is shared with workers, nor pinned."""
        if not self._kept:
            self._room = min(free_memory(torch.device("cpu")), _MOST)
        copies: dict[int, Any] = {}
        try:
            kept = copy.deepcopy(batches, copies)
        except (TypeError, RuntimeError):  # something that cannot be copied is read again
            return
        size = sum(each.nbytes for each in copies.values() if isinstance(each, Tensor | np.ndarray))
        if size <= self._room:
            self._kept[number], self._sizes[number] = kept, size
            self._room -= size

    def _forget(self, number: int) -> None:
        if self._kept.pop(number, None) is not None:
            self._room += self._sizes.pop(number)
