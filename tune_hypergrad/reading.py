"""Reading a data set's batches in other processes: each a function of its seed and of its examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from tune_hypergrad.batches import Batch
from tune_hypergrad.errors import InputError
from tune_hypergrad.randomness import preserved_generators, seed_everything


@dataclass(frozen=True)
class Loading:
    """How a data set is read, in the words of torch's `DataLoader`."""

    workers: int = 0
    """Processes that read ahead; 0: batches are read where they are used."""
    pin_memory: bool = False
    """Whether batches go to a GPU by way of page-locked memory, while it computes; with workers only."""
    prefetch_factor: int | None = None
    """Batches that each worker reads ahead; None is torch's own number, 2."""
    multiprocessing_context: str | None = None
    """How workers start, such as "spawn"; None is the system's own way."""
    worker_init_fn: Callable[[int], None] | None = None
    """Called in every worker with its number before it reads."""
    timeout: float = 0.0
    """Seconds to wait for a batch before the run fails; 0 is no limit."""

    @classmethod
    def of(cls, loader: DataLoader[Any]) -> Loading:
        """How a `DataLoader` reads its data set."""
        context: Any = loader.multiprocessing_context
        return cls(
            loader.num_workers,
            loader.pin_memory,
            loader.prefetch_factor,
            None if context is None else context.get_start_method(),
            loader.worker_init_fn,
            loader.timeout,
        )


class Task(NamedTuple):
    """A batch that is to be read of a data set."""

    seed: int
    """Seed of torch's, NumPy's and Python's generators for what the data set draws for the batch."""
    positions: Sequence[int]
    """Positions in the data set of the batch's examples."""


class Readable(Protocol):
    """What batches are read of: a split of a data set."""

    loading: Loading | None

    def collated(self, positions: Sequence[int]) -> Batch: ...


def read(source: Readable, tasks: Sequence[Task]) -> list[Batch]:
    """Batches, one of each task, read in this process; global generators are left as they were."""
    with preserved_generators():
        return _read(source, tasks)


def _read(source: Readable, tasks: Sequence[Task]) -> list[Batch]:
    found = []
    for task in tasks:
        seed_everything(task.seed)
        found.append(source.collated(task.positions))
    return found


class Reader:
    """Reads several batches at a time, in worker processes while it is open.

    Args:
        source: the split.
        pin: whether there is a GPU to pin memory for.
    """

    def __init__(self, source: Readable, *, pin: bool) -> None:
        self._source, self._loading = source, source.loading or Loading()
        self._pin = pin and self._loading.pin_memory
        self._order = _Order()
        self._loader: DataLoader[Any] | None = None
        self._stream: Iterator[Any] | None = None
        self._is_open = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """For the body, the reader may have workers, which end with it."""
        if self._is_open:
            yield
            return
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            self._close()

    @property
    def reads_ahead(self) -> bool:
        """Whether the reader has workers now that can read ahead."""
        return self._is_open and self._loading.workers > 0

    def read(self, tasks: Sequence[Task]) -> list[Batch]:
        """Batches, one of each task, read in this process and at once."""
        return read(self._source, tasks)

    def begin(self, requests: Iterator[Sequence[Task]]) -> object:
        """Let the workers read ahead along some requests, in their order; what they did before is given up.

        Returns:
            What says whether these are the requests that `take` answers: `present`.
        """
        self._order.requests = requests
        if self._loader is None:
            self._loader = self._make_loader()
        self._stream = iter(self._loader)
        self.present = object()
        return self.present

    present: object | None = None
    """What the last call of `begin` returned, until the workers end; else None."""

    def take(self) -> list[Batch]:
        """The batches of the next request.

        Raises:
            InputError: of the data set, as it was raised in the worker.
        """
        assert self._stream is not None
        found = next(self._stream)
        if isinstance(found, InputError):
            raise found
        return found  # type: ignore[no-any-return]

    def _make_loader(self) -> DataLoader[Any]:
        loading = self._loading
        return DataLoader(
            _InWorker(self._source),
            batch_size=None,
            sampler=self._order,
            num_workers=loading.workers,
            collate_fn=_as_it_is,
            pin_memory=self._pin,
            prefetch_factor=loading.prefetch_factor,
            multiprocessing_context=loading.multiprocessing_context,
            worker_init_fn=loading.worker_init_fn,
            timeout=loading.timeout,
            persistent_workers=True,  # for other orders, until they are closed
            generator=torch.Generator(),  # from which it draws its own seed, and not from the global one
        )

    def _close(self) -> None:
        stream: Any = self._stream
        self._stream = self._loader = self.present = None
        if stream is not None:
            stream._shutdown_workers()  # now, whoever else still refers to it


class _Order:
    """A sampler that gives the requests to the loader's workers: others for every pass."""

    requests: Iterator[Sequence[Task]] = iter(())

    def __iter__(self) -> Iterator[Sequence[Task]]:
        return self.requests


class _InWorker(Dataset[Any]):
    """A data set whose items are the batches of a request."""

    def __init__(self, source: Readable) -> None:
        self._source = source

    def __getitem__(self, tasks: Sequence[Task]) -> Any:
        try:
            return _read(self._source, tasks)
        except InputError as error:
            return error  # a loader would make several lines of it


def _as_it_is(batches: Any) -> Any:
    return batches
