"""Keep freed memory at hand while training, instead of giving it back to the system at every tensor's end.

glibc maps large blocks afresh and unmaps them when freed, so the batched activations of forward mode would be paged
in and zeroed again for every operation, at up to half of the time of a step; and the graphs that reverse mode keeps,
for every run of a search, at up to half of the time of its training. So memory is given back when nothing has trained
for a while.
"""

from __future__ import annotations

import ctypes
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 1 << 26, _MMAP_THRESHOLD: 1 << 30}
# what glibc's own adjustment of its thresholds ends at
_GIVE_BACK = {_TRIM_THRESHOLD: 1 << 26, _TOP_PAD: 1 << 17, _MMAP_THRESHOLD: 1 << 25}
IDLE_S = 2.0
"""Seconds after the last training at which the free part of the heap is given back."""


class _Allocated(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "blocks", "small", "mapped_blocks", "mapped", "_", "fast", "used", "free", "top")
    ]


class _Heap:
    """This process's: without a lock, which a fork might copy while it is held."""

    depth = 0
    """How many bodies of `kept_heap` run."""
    giving_back: threading.Timer | None = None
    """What is going to give the free part back, while none runs."""
    resident_before = 0
    """Bytes of the process in memory, before the first body after the last return."""


def _forget_parent() -> None:
    """In a forked process no body runs, and nothing is going to be given back: its parent's threads are not there."""
    _Heap.depth, _Heap.giving_back = 0, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)


@contextmanager
def kept_heap() -> Iterator[None]:
    """Run the body with a heap that does not shrink; its free part is given back where none follows within `IDLE_S`.

    Does nothing without glibc, or where the environment sets malloc's thresholds.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    giving_back = _Heap.giving_back
    if giving_back is not None:
        giving_back.cancel()  # its thread may be at work, and forget it, at any moment
        _Heap.giving_back = None
    elif not _Heap.depth:
        _Heap.resident_before = _resident()
    _Heap.depth += 1
    try:
        _set(libc, _KEEP)
        yield
    finally:
        _Heap.depth -= 1
        if not _Heap.depth:
            giving_back = _Heap.giving_back = threading.Timer(IDLE_S, _give_back, (libc,))
            giving_back.daemon = True
            giving_back.start()


def free_in_heap() -> int:
    """Bytes that the heap holds free between two trainings, and that are taken from the rest of the machine."""
    mallinfo = _mallinfo()
    if mallinfo is None or _Heap.giving_back is None:
        return 0
    return max(0, min(int(mallinfo().free), _resident() - _Heap.resident_before))


def in_use() -> int | None:
    """Bytes in use in the heaps and in mapped blocks; None without glibc."""
    mallinfo = _mallinfo()
    if mallinfo is None:
        return None
    found = mallinfo()
    return int(found.used + found.mapped)


def _give_back(libc: ctypes.CDLL) -> None:
    _Heap.giving_back = None
    _set(libc, _GIVE_BACK)
    libc.malloc_trim(0)
    if _Heap.depth:  # a body has begun meanwhile
        _set(libc, _KEEP)


def _set(libc: ctypes.CDLL, parameters: dict[int, int]) -> None:
    for parameter, value in parameters.items():
        libc.mallopt(parameter, value)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and may be told what to keep."""
    set_by_user = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    return None if set_by_user or _mallinfo() is None else ctypes.CDLL(None)


@cache
def _mallinfo() -> Callable[[], Any] | None:
    """glibc's own account of what it has given; None without glibc of 2020 or later."""
    found: Any = getattr(ctypes.CDLL(None), "mallinfo2", None) if os.name == "posix" else None
    if found is not None:
        found.restype = _Allocated
    return found  # type: ignore[no-any-return]


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
