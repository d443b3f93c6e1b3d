"""How much memory a run may take."""

from __future__ import annotations

from pathlib import Path

import torch

_CONTROL_GROUP = Path("/sys/fs/cgroup")
_SHARE = 0.25  # several trials may run beside each other


def free_memory(device: torch.device) -> int:
    """Bytes on `device` that one run may take: a quarter of what is free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available()
    return int(free * _SHARE)


def mebibytes(size: float) -> str:
    """A number of bytes for a message."""
    return f"{size / 2**20:.0f} MiB"


def _available() -> int:
    """What Linux says can be had without swapping, and the container has left; 4 GiB where nobody says."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = 1 << 32
    return int(max(0, min(free, _left_in_container())))


def _left_in_container() -> float:
    """Bytes below the limit of the control group, infinite where it has none."""
    try:
        limit, used = ((_CONTROL_GROUP / f"memory.{what}").read_text().strip() for what in ("max", "current"))
        return float("inf") if limit == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return float("inf")
