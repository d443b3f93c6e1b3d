"""How much memory a run may take."""

from __future__ import annotations

from pathlib import Path

import torch

_SHARE = 0.25  # several trials may run beside each other


def free_memory(device: torch.device) -> int:
    """Bytes on `device` that one run may take: a quarter of what is free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available()
    return int(free * _SHARE)


def mebibytes(size: float) -> str:
    """A number of bytes for a message."""
    return f"{size / 2**20:.0f} MiB"


def _available() -> int:
    """What Linux says can be had without swapping; 4 GiB where nobody says."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 1 << 32
