"""Many methods side by side: one cluster, one budget, one report.

`running` makes and runs the trials, `telling` says what came of them; both stand on the ledger, and what tells needs
no Ray. What is here is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_hypergrad.comparison.running.compare import Interrupted, compare
    from tune_hypergrad.comparison.running.retraining import Retraining
    from tune_hypergrad.comparison.telling.records import Comparison

_MODULES = {
    "Comparison": "telling.records",
    "Interrupted": "running.compare",
    "Retraining": "running.retraining",
    "compare": "running.compare",
}

__all__ = ["Comparison", "Interrupted", "Retraining", "compare"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"tune_hypergrad.comparison.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'tune_hypergrad.comparison' has no attribute {name!r}")
