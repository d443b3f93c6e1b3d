"""The methods by name: which trainable and which searcher each is made of."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import Descent, get_optimizer
from tune_hypergrad.problem import Problem
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.searchers import HypergradientSearch, RandomSearch
from tune_hypergrad.space import gradient_ranges, schedule
from tune_hypergrad.trainables import FDS, HD, FixedSchedule, InnerRun


@dataclass(frozen=True)
class Task:
    """What a method is to work on."""

    problem: Problem
    """What is trained."""
    space: Mapping[str, Any]
    """Ray domains by name."""
    steps: int
    """Inner steps in one training run."""
    optimizer: str = "sgd"
    """Inner optimizer."""
    seed: int = 0
    """Seeds the method and its trials."""
    ensemble: int = 1
    """Seeds that a hypergradient is averaged over, where the method knows of that."""


@dataclass(frozen=True)
class Method:
    """A way to choose hyperparameters."""

    name: str
    """What the command line calls it."""
    description: str
    """One line for people."""
    make: Callable[[Task], tuple[type[tune.Trainable], Searcher]]
    """Its trainable and its searcher for a task."""
    concurrent: Callable[[Task], int | None] = lambda task: None
    """Trials it can run at once; None is no limit."""


def _random_search(task: Task) -> tuple[type[tune.Trainable], Searcher]:
    trainable = FixedSchedule.from_problem(
        task.problem, steps=task.steps, optimizer=task.optimizer, seed=task.seed, reports=1
    )
    return trainable, RandomSearch(task.space, metric="val_loss", mode="min", seed=task.seed)


def _fds(task: Task) -> tuple[type[tune.Trainable], Searcher]:
    common = {"steps": task.steps, "optimizer": task.optimizer, "seed": task.seed}
    if task.ensemble > 1:
        search = HypergradientSearch(task.space, metric="val_loss", mode="min", ensemble=task.ensemble, seed=task.seed)
        return InnerRun.from_problem(task.problem, **common, reports=1), search
    return FDS.from_problem(task.problem, space=task.space, **common, reports=4), _restarts(task)


def _hypergradient_descent(task: Task) -> tuple[type[tune.Trainable], Searcher]:
    space = {name: _one_window(value) for name, value in task.space.items()}
    trainable = HD.from_problem(
        task.problem, space=space, steps=task.steps, optimizer=task.optimizer, seed=task.seed, reports=1
    )
    return trainable, _restarts(replace(task, space=space))


def _restarts(task: Task) -> Searcher:
    """Begin from zero; where budget is left when that has ended, begin again from random points."""
    origin = Descent(gradient_ranges(task.space)[0]).values
    point = Schedule({name: tuple(values.tolist()) for name, values in origin.items()}).to_config()
    return RandomSearch(task.space, metric="val_loss", mode="min", seed=task.seed, points_to_evaluate=[point])


def _one_window(value: Any) -> Any:
    return next(iter(value.values())) if isinstance(value, Mapping) else value


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "fds",
            "forward-mode differentiation with sharing: descend by exact hypergradients of whole runs",
            _fds,
            lambda task: task.ensemble,
        ),
        Method(
            "hd",
            "hypergradient descent: hyperparameters move at every inner step, greedily",
            _hypergradient_descent,
            lambda task: 1,
        ),
        Method("rs", "random search: independent draws, each trained in full", _random_search),
    )
}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        InputError: there is none.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name.lower(), METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"there is no method {name!r}: choose one of {', '.join(METHODS)}{hint}")
    return METHODS[name]


def default_space(optimizer: str, windows: int) -> dict[str, Any]:
    """A space for the inner optimizer: a learning-rate schedule, and momentum and weight decay where it has them."""
    known = get_optimizer(optimizer).hyperparameters
    largest = {"lr": 1.0 if optimizer in ("sgd", "nesterov") else 0.03, "momentum": 0.99, "weight_decay": 0.01}
    domains = {name: tune.uniform(0, upper) for name, upper in largest.items() if name in known}
    return {**domains, "lr": schedule(domains["lr"], windows)}
