"""Results: what the flat entries of a trial's result are called, each written and read in one place.

Trainables write them, Ray carries them, searches and comparisons read them. What a trial has cost is `Cost`'s own pair,
and a schedule's scalars are `Schedule`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import nan
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tune_hypergrad.criterion import Criterion, Figures

VAL_LOSS = "val_loss"
"""Entry of a result: the validation loss."""
UNTRAINED_VAL_LOSS = "untrained_val_loss"
"""Entry of a result: the validation loss of the weights that the run began with."""
OBJECTIVE = "objective"
"""Entry of a result: the figure that the problem's objective names; `best_objective` is the incumbent's."""
SCHEDULE = "schedule"
"""Prefix of entries `schedule/<name>`, or `schedule/<name>/<window>`: the schedule that a result's figures were reached
with (see `Schedule.to_scalars`)."""
WHOLE_SCHEDULE = "found"
"""Entry of a result: a schedule that is too long for scalars, as `{name: values}`."""
SCHEDULE_COLUMN = "schedule_file"
"""Entry of a comparison's results: the name of the file with a schedule that is too long for scalars."""
HYPERGRADIENT = "hypergradient"
"""Prefix of entries `hypergradient/<name>/<window>`; a hyperparameter's norm is `hypergradient_norm/<name>`."""

_BEST, _PROFILE = "best", "profile"
_STEP, _STEPS, _COMPLETED = "run/step", "run/steps", "run/completed"
_CONFIRMATIONS, _FALLEN = "run/confirmations", "run/fallen"


def number(result: Mapping[str, Any], name: str) -> float:
    """A result's entry as a float; NaN where it has none of that name that is a number."""
    value = result.get(name)
    return float(value) if isinstance(value, Real) else nan


class Position(NamedTuple):
    """How far a training run had come when the weights were reached that a result judges."""

    step: float = nan
    """Inner steps that the judged weights were trained for; 0 where they are untrained, NaN where a result does not
    say."""
    steps: float = nan
    """Inner steps of the whole training run; NaN where a result does not say."""
    completed: float = nan
    """Number of a trial's training runs that have come to their end, where it makes several; NaN where that is not
    counted."""

    def as_result(self) -> dict[str, float]:
        """The position as entries of a result: `run/step`, `run/steps`, and `run/completed` where that is counted."""
        counted = {} if self.completed != self.completed else {_COMPLETED: self.completed}
        return {_STEP: self.step, _STEPS: self.steps, **counted}

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> Position:
        """The position that a result tells; NaN where it does not say."""
        return cls(*(number(result, name) for name in (_STEP, _STEPS, _COMPLETED)))

    @property
    def is_known(self) -> bool:
        """Whether both `step` and `steps` are known."""
        return self.step == self.step and self.steps == self.steps

    @property
    def is_trained(self) -> bool:
        """Whether the judged weights are not, for certain, those that the run began with."""
        return self.step != 0

    @property
    def is_end(self) -> bool:
        """Whether the position may be the end of the run: where a result does not say, any moment may be."""
        return not self.step < self.steps


class Confirmation(NamedTuple):
    """What a training run that is made to confirm a schedule says of it."""

    trainings: int = 0
    """Number of confirming runs over which `val_loss` is the mean; 0 where the run is none."""
    has_fallen: bool = False
    """Whether the run speaks against the schedule, by its own validation loss."""

    def as_result(self) -> dict[str, float]:
        """The confirmation as entries of a result: `run/confirmations` and `run/fallen`."""
        return {_CONFIRMATIONS: self.trainings, _FALLEN: self.has_fallen}

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> Confirmation:
        """The confirmation that a result tells of."""
        trainings = number(result, _CONFIRMATIONS)
        return cls(int(trainings) if trainings > 0 else 0, bool(result.get(_FALLEN) == 1))


def evaluation_results(split: str, evaluation: Figures) -> dict[str, float]:
    """The entries `<split>_loss` and `<split>_<metric>` of an evaluation of a split, "val" or "test"."""
    return {f"{split}_loss": evaluation.loss, **{f"{split}_{name}": v for name, v in evaluation.metrics.items()}}


def incumbent_results(of_it: Mapping[str, Any]) -> dict[str, Any]:
    """An incumbent's entries of a result, renamed `best_...` for later results; hypergradients are left out."""
    return {f"{_BEST}_{name}": value for name, value in of_it.items() if not name.startswith(HYPERGRADIENT)}


def objective_results(criterion: Criterion, result: Mapping[str, Any]) -> dict[str, Any]:
    """The entries `objective`, the figure of a result that the problem's objective names, and `best_objective` where
    the result has an incumbent's."""
    columns = {OBJECTIVE: criterion.column, f"{_BEST}_{OBJECTIVE}": f"{_BEST}_{criterion.column}"}
    return {name: result[column] for name, column in columns.items() if column in result}


def hypergradient_results(hypergradients: Mapping[str, Tensor]) -> dict[str, float]:
    """The entries `hypergradient/lr/0`, ... and `hypergradient_norm/lr`, ... of tensors of shape [windows] by flat
    name."""
    scalars: dict[str, float] = {}
    for name, values in hypergradients.items():
        scalars |= dict(zip(_windows_of(name, len(values)), values.tolist(), strict=True))
        scalars[f"{HYPERGRADIENT}_norm/{name}"] = float(values.norm())
    return scalars


def hypergradients_in(result: Mapping[str, Any], windows: Mapping[str, int]) -> dict[str, Tensor]:
    """The hypergradients in a result, float64 of shape [windows], for the numbers of windows by flat name.

    Raises:
        KeyError: one is not there.
    """
    return {
        name: torch.tensor([result[key] for key in _windows_of(name, count)], dtype=torch.float64)
        for name, count in windows.items()
    }


def without_long_hypergradients(result: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """A result without the hypergradients of hyperparameters that have more than `longest` windows."""
    long = {_split(key)[1] for key in result if _split(key)[0] == HYPERGRADIENT and _split(key)[2] >= longest}
    return {key: v for key, v in result.items() if _split(key)[0] != HYPERGRADIENT or _split(key)[1] not in long}


def without_schedules_of(result: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A result without the windows of these hyperparameters, in its own schedule and in the incumbent's; a single value
    stays, which is the present one of a schedule that has one for every step."""

    def is_window(key: str) -> bool:
        kind, name, window = _split(key)
        return kind in (SCHEDULE, f"{_BEST}_{SCHEDULE}") and name in names and window >= 0

    return {key: value for key, value in result.items() if not is_window(key)}


def profile_results(seconds: Mapping[str, float]) -> dict[str, float]:
    """The entries `profile/<phase>`: seconds, by phase, since the trial's last result."""
    return {f"{_PROFILE}/{phase}": value for phase, value in seconds.items()}


def profile_in(result: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by phase that `profile_results` has written into a result; empty where a trial is not profiled."""
    entries = {_split(key)[1]: number(result, key) for key in result if _split(key)[0] == _PROFILE}
    return {phase: seconds for phase, seconds in entries.items() if seconds == seconds}


def schedule_identity(result: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    """What a result's schedule is told from others by: the first twelve digits of numbers, since scales are passed
    through; for windows that are all the same, that one value; for a file, its name."""
    windows: dict[str, list[Any]] = {}
    for key, value in result.items():
        if value is None or value != value:
            continue
        kind, name, window = _split(key)
        if kind == SCHEDULE:
            rounded = float(f"{value:.12g}") if isinstance(value, float) else value
            windows.setdefault(name, []).append((window, rounded))
        elif key == SCHEDULE_COLUMN:
            windows[key] = [(0, value)]
    return frozenset(
        (name, values[0][1] if len({value for _, value in values}) == 1 else tuple(sorted(values)))
        for name, values in windows.items()
    )


def _windows_of(name: str, count: int) -> list[str]:
    return [f"{HYPERGRADIENT}/{name}/{window}" for window in range(count)]


def _split(key: Any) -> tuple[str, str, int]:
    """An entry's kind, the flat name of its hyperparameter, and its window, -1 where it has none."""
    kind, _, rest = str(key).partition("/")
    name, _, window = rest.rpartition("/")
    return (kind, name, int(window)) if window.isdecimal() else (kind, rest, -1)
