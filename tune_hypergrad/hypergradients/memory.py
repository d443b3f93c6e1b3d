"""How much memory a run may take."""

from __future__ import annotations

import weakref
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.heap import free_in_heap, in_use

_CONTROL_GROUP = Path("/sys/fs/cgroup")
_SHARE, _SHARE_OF_ALL = 0.25, 0.75
"""Parts of what is free that one run may take, and all that may run beside each other."""
_TRIED = 1 << 22
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for base, suffix in ((10**3, "b"), (2**10, "ib"))
}
"""Bytes by unit, in small letters."""


_PROCESSES: dict[str, int] = {}
"""How many processes like this one there may be at once, by type of device: a property of the process, as torch's
number of threads is."""


def set_processes(device_type: str, count: int) -> None:
    """Say how many processes like this one may share the memory of a device; without, few do."""
    _PROCESSES[device_type] = count


def free_memory(device: torch.device) -> int:
    """Bytes on `device` that one run may take: a quarter of what is free, and less where so many processes share it
    that they would take more than three quarters (see `set_processes`)."""
    free = _free_on_gpu(device) if device.type == "cuda" else _available()
    return int(free * min(_SHARE, _SHARE_OF_ALL / _PROCESSES.get(device.type, 1)))


def _free_on_gpu(device: torch.device) -> int:
    """What nobody has, and what this process keeps without having use for it. What it keeps for recordings counts as
    free, though it has use for it."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def allocated(device: torch.device) -> int | None:
    """Bytes that tensors on `device` and the rest of the program have been given; None where nobody says: on a CPU,
    with other allocators than glibc's."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return in_use() if _is_counted() else None


class PeakOfTensors(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is entered, and the most that there were at once.

    What operations need within themselves is not in it, nor is what was there before; it is the same on every machine.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        """The most bytes at once so far."""
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in before:
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:
            self._known.add(address)
            self._now += size
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


@cache
def _is_counted() -> bool:
    """Whether glibc's figures have the memory of tensors in them."""
    before = in_use()
    if before is None:
        return False
    tried = torch.empty(_TRIED, dtype=torch.uint8)
    return (in_use() or 0) - before > tried.nbytes / 2  # other threads may free something meanwhile


def as_bytes(size: float | str, name: str = "max_memory") -> int:
    """An amount of memory as a person gives it: a number of bytes, or "500MB", "2GiB" and the like; `name` is what it
    is given as.

    Raises:
        InputError: it is none.
    """
    text = size if isinstance(size, str) else ""
    unit = text.strip().lstrip("0123456789. ")
    try:
        number = float(text.strip().removesuffix(unit)) if text else float(size)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(size, bool) or unit.lower() not in _UNITS or not isfinite(number) or number < 0:
        raise InputError(f"{name} is {size!r}: give a number of bytes, or such as '500MB' or '2GiB'")
    return int(number * _UNITS[unit.lower()])


def mebibytes(size: float) -> str:
    """A number of bytes for a message."""
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.3g} KiB"


def _available() -> int:
    """What Linux says can be had without swapping, and the container has left, and what the last run has left in the
    heap; 4 GiB where nobody says."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = 1 << 32
    return int(max(0, min(free, _left_in_container()))) + free_in_heap()


def _left_in_container() -> float:
    """Bytes below the limit of the control group, infinite where it has none."""
    try:
        limit, used = ((_CONTROL_GROUP / f"memory.{what}").read_text().strip() for what in ("max", "current"))
        return float("inf") if limit == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return float("inf")
