"""`settings.json`, in a comparison's folder: what is compared, how, with what versions and on which machine."""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import ray

from tune_hypergrad.comparison.running.growth import EXTENSIONS, Growth
from tune_hypergrad.comparison.running.plan import Plan
from tune_hypergrad.comparison.telling.records import SETTINGS_FILE

_PACKAGES = ("tune_hypergrad", "torch", "ray", "hpbandster", "ConfigSpace", "numpy")


def write_settings(folder: Path, plan: Plan, key: str, storage: str | None, growth: Growth) -> None:
    """Write `settings.json`: what is compared, how, with what versions and on which machine. Where it was written
    before, only versions and machine are written anew, what the comparison has grown by, and what was left out beside
    what has been."""
    file = folder / SETTINGS_FILE
    resources = ray.cluster_resources()
    machine = {
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "CPU": resources.get("CPU", 0),
        "GPU": resources.get("GPU", 0),
        "processor": _processor(),
    }
    versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    begun = datetime.now(timezone.utc).isoformat(timespec="seconds")
    settings = {
        **plan.settings(),
        "storage": storage,
        "key": key,
        "folder": str(folder),
        "started": begun,
        "versions": versions,
    }
    if file.exists():
        saved = json.loads(file.read_text())
        grown = {**plan.settings(), EXTENSIONS: [*saved.get(EXTENSIONS, ()), growth.said()]} if growth else {}
        settings = {**saved, **grown, "left_out": {**saved.get("left_out", {}), **plan.left_out}}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({**settings, "machine": machine}, indent=1))
    temporary.replace(file)


def _processor() -> str:
    """The processor of this node, by its name where the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
