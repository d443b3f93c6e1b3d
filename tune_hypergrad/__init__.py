"""Gradient-based hyperparameter optimisation inside Ray Tune.

What needs Ray is imported when it is first used, so that the engine (`tune_hypergrad.hypergradients`) works without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tune_hypergrad.budget import Budget, Cost
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import HypergradientResult, check_problem, hypergradient
from tune_hypergrad.problem import Problem
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.space import schedule

if TYPE_CHECKING:
    from tune_hypergrad.comparison import Comparison, Retraining, compare
    from tune_hypergrad.methods import Method
    from tune_hypergrad.searchers import (
        BOHBSearch,
        BOSearch,
        HyperBandSearch,
        HypergradientSearch,
        RandomSearch,
        hpbandster_result,
    )
    from tune_hypergrad.trainables import FDS, HD, STN, CenteredSTN, DeltaSTN, FixedSchedule, InnerRun, continuing

_NEEDS_RAY = {
    "BOHBSearch": "searchers",
    "BOSearch": "searchers",
    "CenteredSTN": "trainables",
    "Comparison": "comparison",
    "DeltaSTN": "trainables",
    "FDS": "trainables",
    "HD": "trainables",
    "FixedSchedule": "trainables",
    "HyperBandSearch": "searchers",
    "HypergradientSearch": "searchers",
    "InnerRun": "trainables",
    "Method": "methods",
    "RandomSearch": "searchers",
    "Retraining": "comparison",
    "STN": "trainables",
    "compare": "comparison",
    "continuing": "trainables",
    "hpbandster_result": "searchers",
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
    "continuing",
    "hpbandster_result",
    "hypergradient",
    "schedule",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_RAY:
        return getattr(import_module(f"tune_hypergrad.{_NEEDS_RAY[name]}"), name)
    raise AttributeError(f"module 'tune_hypergrad' has no attribute {name!r}")
