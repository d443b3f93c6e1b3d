"""Keep freed memory at hand while training, instead of giving it back to the system at every tensor's end.

glibc maps large blocks afresh and unmaps them when freed, so the batched activations of forward mode would be paged
in and zeroed again for every operation, at up to half of the time of a step.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 1 << 26, _MMAP_THRESHOLD: 1 << 30}
# what glibc's own adjustment of its thresholds ends at
_GIVE_BACK = {_TRIM_THRESHOLD: 1 << 26, _TOP_PAD: 1 << 17, _MMAP_THRESHOLD: 1 << 25}


class _Kept:
    depth = 0
    """How many bodies of `kept_heap` run within each other: the outermost gives memory back."""


@contextmanager
def kept_heap() -> Iterator[None]:
    """Run the body with a heap that does not shrink, then give its free part back.

    Does nothing without glibc, or where the environment sets malloc's thresholds.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    set_by_user = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if set_by_user or not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    assert libc is not None
    _Kept.depth += 1
    try:
        for parameter, value in _KEEP.items():
            libc.mallopt(parameter, value)
        yield
    finally:
        _Kept.depth -= 1
        if not _Kept.depth:
            for parameter, value in _GIVE_BACK.items():
                libc.mallopt(parameter, value)
            libc.malloc_trim(0)
