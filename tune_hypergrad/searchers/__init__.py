"""Ray searchers; HpBandSter is imported only when one of its own is first used.

HpBandSter's H2BO is not among them: its density estimator calls `numpy.float`, which NumPy removed in version 1.24.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_hypergrad.searchers.hpbandster import BOHBSearch, BOSearch, HyperBandSearch, RandomSearch
    from tune_hypergrad.searchers.hypergradient_search import HypergradientSearch
    from tune_hypergrad.searchers.results import hpbandster_result
    from tune_hypergrad.searchers.starting import starting_points

_MODULES = {
    "BOHBSearch": "hpbandster",
    "BOSearch": "hpbandster",
    "HyperBandSearch": "hpbandster",
    "HypergradientSearch": "hypergradient_search",
    "RandomSearch": "hpbandster",
    "hpbandster_result": "results",
    "starting_points": "starting",
}

__all__ = [
    "BOHBSearch",
    "BOSearch",
    "HyperBandSearch",
    "HypergradientSearch",
    "RandomSearch",
    "hpbandster_result",
    "starting_points",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"tune_hypergrad.searchers.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'tune_hypergrad.searchers' has no attribute {name!r}")
