"""`starting_points`: finished trials of another experiment as what a searcher begins with."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ConfigSpace import ConfigurationSpace
from ray import tune

from tune_hypergrad.domains import is_number
from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.ray_internals import saved_trials
from tune_hypergrad.searchers.configspace import Translation, translate
from tune_hypergrad.searchers.hypergradient_search import OURS
from tune_hypergrad.searchers.restorable import flat
from tune_hypergrad.trainables.promoted import PROMOTED_FROM

_OF_SEARCHERS = (PROMOTED_FROM, *OURS)  # in configs, but no hyperparameters unless the space has them

Source: TypeAlias = "tune.ResultGrid | str | PathLike[str] | Any"
"""Where finished trials are read from: what `Tuner.fit` returned, the local folder of a Ray experiment, or an Optuna
study."""


class _Trial(NamedTuple):
    name: str
    config: dict[str, Any]
    result: dict[str, Any]


@dataclass(frozen=True)
class StartingPoints:
    """Finished trials as points of a search space, the best first."""

    points: tuple[dict[str, Any], ...]
    """Configurations of the trials in the form of the space, the best first."""
    rewards: tuple[float, ...]
    """The metric of each point, in the order of `points`."""
    passed_over: Mapping[str, str]
    """Names of trials that do not fit the space or were not finished, each with the reason."""

    def best(self, count: int) -> list[dict[str, Any]]:
        """The best `count` points, or all if they are fewer: `points_to_evaluate` of any searcher; one may be the
        `start` of a comparison."""
        return list(self.points[:count])

    def evaluated(self) -> dict[str, Any]:
        """Arguments `points_to_evaluate` and `evaluated_rewards` of `RandomSearch`, `BOSearch`, `HyperBandSearch` and
        `BOHBSearch`, which then know these results and do not train them again."""
        return {"points_to_evaluate": list(self.points), "evaluated_rewards": list(self.rewards)}


def starting_points(
    source: Source,
    space: Mapping[str, Any] | ConfigurationSpace,
    *,
    metric: str | None = None,
    mode: str | None = None,
    names: Mapping[str, str | None] | None = None,
    budget_key: str = "budget",
) -> StartingPoints:
    """Finished trials of an earlier experiment, for a searcher to begin with.

    ```python
    known = starting_points("~/ray_results/old", space, metric="val_accuracy", mode="max", names={"rate": "lr"})
    BOSearch(space, metric="val_accuracy", mode="max", **known.evaluated())
    HypergradientSearch(space, points_to_evaluate=known.best(2))
    ```

    Of trials with budgets of their own only those of the largest count. Trials that failed, did not end, have no finite
    metric, or values outside the space are passed over.

    Args:
        source: what `Tuner.fit` returned, the local folder of a Ray experiment, or an Optuna study.
        space: Ray domains by name, or a ConfigSpace.
        metric: of the trials; None is an Optuna study's own value.
        mode: "min" or "max"; None is the study's direction.
        names: by the source's name of a hyperparameter the space's ("lr/0" is the first window of a schedule), or None
            for what is to be left out. What this package's searchers add to configs, such as `seed`, is left out where
            the space has no such name.
        budget_key: where a trial's budget stands in its config, the same as the searcher's.

    Raises:
        InputError: the source is of no known kind, the space has no such name, a trial lacks one of the space's names,
            or no trial fits.
    """
    if mode not in (None, "min", "max"):
        raise InputError(f'mode is {mode!r}: it must be "min" or "max"')
    study = _is_study(source)
    if study and metric is None:
        metric, mode = "value", mode or _direction(source)
    if metric is None or mode is None:
        raise InputError('starting_points needs to know what was best: pass metric, and mode="min" or "max"')
    trials, passed_over = _read_study(source) if study else _read(source)
    translation, names = translate(space, seed=0), dict(names or {})
    complete = not isinstance(space, ConfigurationSpace)  # which may have conditions
    most = max((trial.config.get(budget_key, -math.inf) for trial in trials), default=-math.inf)
    found: list[tuple[float, dict[str, Any]]] = []
    for trial in trials:
        reward = trial.result.get(metric)
        if trial.config.get(budget_key, most) != most:
            passed_over[trial.name] = f"its {budget_key} is {trial.config[budget_key]}, and others' {most}"
        elif reward is None or not is_number(reward) or not math.isfinite(reward):
            passed_over[trial.name] = f"its {metric} is {reward!r}"
        else:
            point = _renamed(trial, names, translation, {budget_key, *_OF_SEARCHERS})
            try:
                configuration = translation.from_trial(point, f"trial {trial.name}")
            except InputError as error:
                passed_over[trial.name] = str(error)
                continue
            lacking = [name for name in translation.paths if name not in configuration]
            if complete and lacking:
                raise InputError(
                    f"trial {trial.name} has no {lacking[0]!r}, which the search space has: map a name to it in names, "
                    "or leave it out of the space"
                )
            found.append((float(reward), translation.to_trial(configuration)))
    if not found:
        why = next(iter(passed_over.values()), "it has no trials")
        raise InputError(f"no trial can be begun with ({why}): give others, or another space")
    found.sort(key=lambda pair: -pair[0] if mode == "max" else pair[0])
    return StartingPoints(tuple(point for _, point in found), tuple(reward for reward, _ in found), passed_over)


def _renamed(
    trial: _Trial, names: Mapping[str, str | None], translation: Translation, passed_over: Collection[str]
) -> dict[str, Any]:
    """A trial's config with the space's names, flat names as paths, without those to be passed over that the space has
    not.

    Raises:
        InputError: the space has no such name.
    """
    tops = {path[0] for path in (*translation.paths.values(), *translation.constants)}
    config: dict[str, Any] = {}
    for name, value in trial.config.items():
        new = names.get(name, None if name in passed_over and name not in tops else name)
        if new is None:
            continue
        top, *rest = new.split("/") if new not in tops else [new]
        if top not in tops:
            raise InputError(
                f"trial {trial.name} has {name!r}, which the search space has not: give its name there in names, or "
                f"None to leave it out{did_you_mean(top, tops)}"
            )
        place = config
        for part in [top, *rest][:-1]:
            place = place.setdefault(part, {})
        place[[top, *rest][-1]] = value
    return config


def _read(source: Any) -> tuple[list[_Trial], dict[str, str]]:
    """The trials of a source that have ended, and, by name, why others do not count."""
    if isinstance(source, tune.ResultGrid):
        results = [(str(number), source[number]) for number in range(len(source))]
        failed = {name: "it failed" for name, result in results if result.error is not None}
        return [
            _Trial(name, dict(result.config or {}), flat(result.metrics or {}))
            for name, result in results
            if result.error is None
        ], failed
    if not isinstance(source, str | PathLike):
        raise InputError(
            f"starting_points was given a {type(source).__name__}: give a ResultGrid, the folder of a Ray experiment, "
            "or an Optuna study"
        )
    saved = saved_trials(str(Path(source).expanduser()))
    if saved is None:
        raise InputError(f"{source} has no experiment_state-*.json: give the local folder of a Ray Tune experiment")
    passed = {name: f"it is {trial.status}" for name, trial in saved.items() if trial.status != "TERMINATED"}
    ended = ((name, trial) for name, trial in saved.items() if name not in passed)
    return [_Trial(name, trial.config, flat(trial.last_result)) for name, trial in ended], passed


def _is_study(source: Any) -> bool:
    """Whether a source is an Optuna study; Optuna need not be installed to ask."""
    return all(hasattr(source, name) for name in ("trials", "directions", "best_trials"))


def _direction(study: Any) -> str:
    if len(study.directions) != 1:
        raise InputError(f"the study has {len(study.directions)} objectives: give one that has one")
    return "max" if study.directions[0].name == "MAXIMIZE" else "min"


def _read_study(study: Any) -> tuple[list[_Trial], dict[str, str]]:
    _direction(study)
    passed, trials = dict[str, str](), list[_Trial]()
    for trial in study.trials:
        if trial.state.name == "COMPLETE":
            result = {**trial.user_attrs, "value": trial.value}
            trials.append(_Trial(str(trial.number), dict(trial.params), result))
        else:
            passed[str(trial.number)] = f"it is {trial.state.name}"
    return trials, passed
