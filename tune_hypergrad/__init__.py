"""Gradient-based hyperparameter optimisation inside Ray Tune.

What is here is imported when it is first used: the engine (`tune_hypergrad.hypergradients`) works without Ray, and
processes that do not need torch start without it.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_hypergrad.budget import Budget, Cost
    from tune_hypergrad.comparison import Comparison, Retraining, compare
    from tune_hypergrad.comparison.methods import Method
    from tune_hypergrad.errors import InputError
    from tune_hypergrad.hypergradients import HypergradientResult, check_problem, hypergradient
    from tune_hypergrad.problem import Problem
    from tune_hypergrad.schedules import Schedule
    from tune_hypergrad.searchers import (
        BOHBSearch,
        BOSearch,
        HyperBandSearch,
        HypergradientSearch,
        RandomSearch,
        hpbandster_result,
        starting_points,
    )
    from tune_hypergrad.space import complement, schedule
    from tune_hypergrad.trainables import FDS, HD, STN, CenteredSTN, DeltaSTN, FixedSchedule, InnerRun, continuing

    __version__: str

_MODULES = {
    "BOHBSearch": "searchers",
    "BOSearch": "searchers",
    "Budget": "budget",
    "CenteredSTN": "trainables",
    "Comparison": "comparison",
    "Cost": "budget",
    "DeltaSTN": "trainables",
    "FDS": "trainables",
    "FixedSchedule": "trainables",
    "HD": "trainables",
    "HyperBandSearch": "searchers",
    "HypergradientResult": "hypergradients",
    "HypergradientSearch": "searchers",
    "InnerRun": "trainables",
    "InputError": "errors",
    "Method": "comparison.methods",
    "Problem": "problem",
    "RandomSearch": "searchers",
    "Retraining": "comparison",
    "STN": "trainables",
    "Schedule": "schedules",
    "check_problem": "hypergradients",
    "compare": "comparison",
    "complement": "space",
    "continuing": "trainables",
    "hpbandster_result": "searchers",
    "hypergradient": "hypergradients",
    "schedule": "space",
    "starting_points": "searchers",
}

__all__ = [
    "FDS",
    "HD",
    "STN",
    "BOHBSearch",
    "BOSearch",
    "Budget",
    "CenteredSTN",
    "Comparison",
    "Cost",
    "DeltaSTN",
    "FixedSchedule",
    "HyperBandSearch",
    "HypergradientResult",
    "HypergradientSearch",
    "InnerRun",
    "InputError",
    "Method",
    "Problem",
    "RandomSearch",
    "Retraining",
    "Schedule",
    "check_problem",
    "compare",
    "complement",
    "continuing",
    "hpbandster_result",
    "hypergradient",
    "schedule",
    "starting_points",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"tune_hypergrad.{_MODULES[name]}"), name)
    if name == "__version__":
        return metadata.version("tune_hypergrad")  # setup.cfg's, as it was when the package was installed
    raise AttributeError(f"module 'tune_hypergrad' has no attribute {name!r}")
