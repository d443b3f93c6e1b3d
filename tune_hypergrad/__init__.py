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
    "DeltaSTN": "trainables",
    "FDS": "trainables",
    "HD": "trainables",
    "FixedSchedule": "trainables",
    "HyperBandSearch": "searchers",
    "HypergradientSearch": "searchers",
    "InnerRun": "trainables",
    "RandomSearch": "searchers",
    "STN": "trainables",
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
    "Cost",
    "DeltaSTN",
    "FixedSchedule",
    "HyperBandSearch",
    "HypergradientResult",
    "HypergradientSearch",
    "InnerRun",
    "InputError",
    "Problem",
    "RandomSearch",
    "Schedule",
    "check_problem",
    "continuing",
    "hpbandster_result",
    "hypergradient",
    "schedule",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_RAY:
        return getattr(import_module(f"tune_hypergrad.{_NEEDS_RAY[name]}"), name)
    raise AttributeError(f"module 'tune_hypergrad' has no attribute {name!r}")
