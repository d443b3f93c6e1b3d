"""`Dispatching`: one Ray trainable that runs the trials of many, so that they take part in one `tune.Tuner`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, cast

from ray import tune
from ray.tune.result import RESULT_DUPLICATE, TIME_TOTAL_S, TRIAL_INFO
from ray.tune.trainable import wrap_function

from tune_hypergrad.budget import Cost, cost_key
from tune_hypergrad.comparison.running.labels import PORTFOLIO
from tune_hypergrad.comparison.running.profiling import TrialStopwatch
from tune_hypergrad.criterion import Criterion
from tune_hypergrad.errors import InputError
from tune_hypergrad.ray_internals import (
    count_checkpoints_from,
    folder_in,
    saved_as,
    seconds_of,
    storage_of,
    trial_info_of,
)
from tune_hypergrad.results import (
    VAL_LOSS,
    WHOLE_SCHEDULE,
    Confirmation,
    Position,
    objective_results,
    profile_results,
    without_schedules_of,
)
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.space import flat_values
from tune_hypergrad.trainables.checkpoints import (
    checkpoint_number,
    checkpoints_in,
    delete_checkpoints,
    read_result,
    write_result,
)

LONG = 50
"""Number of windows beyond which a schedule is not recorded as scalars."""


class Dispatching(tune.Trainable):
    """A trainable that passes everything on to the one of the trial's method, which the trial's config names.

    Ray reuses actors for trials of equal resources, whatever their class: hence one class for all methods.

    Ray is told of no checkpoints, since it remembers trials as they were at its last snapshot: a trial goes on from the
    newest whole checkpoint in its folder. The result that belongs to it comes once more first, since the driver that
    has had it may not be there any more. Older checkpoints are deleted.

    Args:
        trainables: by method, classes or functions.
        unit: of the budget; every result has to have `cost/<unit>`.
        criterion: what trials are judged by; every result has to have that figure, and the validation loss.
        profile: whether results tell where the time went.
    """

    _has_begun: bool
    _unsaved: bool

    def setup(  # type: ignore[override]
        self,
        config: dict[str, Any],
        trainables: Mapping[str, Any],
        unit: str,
        criterion: Criterion,
        profile: bool = False,
    ) -> None:
        """Take the methods' trainables and what trials are judged by, then the first trial's config."""
        self._trainables = {name: _as_class(trainable) for name, trainable in trainables.items()}
        self._unit, self._criterion = unit, criterion
        self._stopwatch = TrialStopwatch() if profile else None
        self._make(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in the same actor: in the same inner trainable, if that can be reused, or a new one."""
        same = new_config[PORTFOLIO]["method"] == self._method
        if same and self._inner.reset(self._own(new_config), storage=storage_of(self)):
            self._begin()
        else:
            self._inner.stop()
            self._make(new_config)
        return True

    def train(self) -> dict[str, Any]:
        """One result of the trial's own trainable, with its cost by the clock, and where the time went if asked.

        Raises:
            InputError: it lacks the metric, or its cost in the budget's unit, or they are no numbers.
        """
        if self._stopwatch is None:
            return self._train()
        with self._stopwatch.result():
            result = self._train()
        return {**result, **profile_results(self._stopwatch.taken())}

    def _train(self) -> dict[str, Any]:
        if not self._has_begun:
            self._has_begun = True
            restored = self._restore_newest()
            if restored is not None:
                return {**restored, "config": self.config}
        result: dict[str, Any] = self._inner.train()
        result["config"] = self.config
        result.pop(WHOLE_SCHEDULE, None)  # that name is ours
        self._unsaved = RESULT_DUPLICATE not in result
        if not self._unsaved and self._inner.training_iteration:
            return result  # a function has returned: Ray takes its last result once more
        for name in dict.fromkeys((self._criterion.column, VAL_LOSS)):
            if not isinstance(result.get(name), Real):
                raise InputError(f"{self._method}'s trials do not report {name!r}, a number, which they are judged by")
        result = {**self._cost_by_the_clock(result), **objective_results(self._criterion, result), **result}
        if cost_key(self._unit) not in result:
            raise InputError(
                f"{self._method}'s trials do not report {cost_key(self._unit)!r}, the unit of the budget: report it, "
                "or give the budget in seconds"
            )
        for name, cost in Cost.from_result(result).as_result().items():
            if not isinstance(cost, Real) or not math.isfinite(cost):
                raise InputError(f"{self._method}'s trials report {name!r} as {cost!r}: it must be a finite number")
        self._reported = self._with_long_schedule(result)
        return dict(self._reported)

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Save the inner trainable's state after a result, with that result."""
        if self._unsaved:
            saved = self._inner.save(checkpoint_dir).checkpoint
            if saved is not None:
                write_result(saved, {key: value for key, value in self._reported.items() if key != "config"})
                storage = storage_of(self)
                if storage is not None:
                    delete_checkpoints(*folder_in(storage), before=saved)
            self._unsaved = False
        return saved_as(None, {})

    def cleanup(self) -> None:
        """Stop the inner trainable, as the trial ends, if one has been made."""
        if "_inner" in vars(self):
            self._inner.stop()
        if self._stopwatch is not None:
            self._stopwatch.close()

    def _make(self, config: dict[str, Any]) -> None:
        self._method = config[PORTFOLIO]["method"]
        vars(self).pop("_inner", None)  # what it has in memory goes before another one is made
        self._inner = self._trainables[self._method](config=self._own(config), storage=storage_of(self))
        self._begin()

    def _begin(self) -> None:
        self._lowest = float("inf")
        self._has_begun = self._unsaved = False
        self._seconds_before = seconds_of(self._inner)  # of a shorter trial that this one continues

    def _restore_newest(self) -> dict[str, Any] | None:
        """Go on from the newest whole checkpoint, if there is one; returns the result that belongs to it, else None.

        Not as the trial begins: Ray does not try again what fails before the first result is asked for.
        """
        storage = storage_of(self)
        if storage is None:
            return None
        there = checkpoints_in(*folder_in(storage))
        if there:  # those to come must not be written over one that a process has left unfinished
            count_checkpoints_from(storage, checkpoint_number(there[-1]))
        for checkpoint in reversed(there):
            result = read_result(checkpoint)
            if result is not None:
                self._inner.restore(saved_as(checkpoint, dict(result)))
                return result
        return None

    def _own(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config that the method's own searcher suggested, with what Ray tells trials of themselves."""
        own = {name: value for name, value in config.items() if name != PORTFOLIO}
        return {**own, TRIAL_INFO: trial_info_of(self)}

    def _with_long_schedule(self, result: dict[str, Any]) -> dict[str, Any]:
        """A result with a long schedule in one piece instead of scalar by scalar, and only if the schedule may be an
        incumbent, or the result speaks against one that may be. Hypergradients stay: a searcher may need them."""
        found: Schedule | None = getattr(self._inner, "found", None)
        if found is None:
            return result
        long = {name for name, windows in flat_values(found.values).items() if len(windows) > LONG}
        trained = Position.from_result(result).is_trained
        score = self._criterion.turned(result[self._criterion.column])
        improved = trained and score < self._lowest
        self._lowest = min(self._lowest, score) if trained else self._lowest
        kept = without_schedules_of(result, long)
        by_step = getattr(self._inner, "schedule_by_step", False)
        told = improved or (trained and Confirmation.from_result(result).has_fallen)
        return {**kept, WHOLE_SCHEDULE: found.entries()} if told and (long or by_step) else kept

    def _cost_by_the_clock(self, result: Mapping[str, Any]) -> dict[str, float]:
        granted = getattr(self.trial_resources, "required_resources", {}) or {}
        devices = granted.get("GPU") or max(1, granted.get("CPU", 1))
        seconds = result[TIME_TOTAL_S] - self._seconds_before
        costs = Cost(device_seconds=seconds * devices, wall_seconds=seconds).as_result()
        return {name: value for name, value in costs.items() if name.endswith("seconds")}


def _as_class(trainable: Any) -> type[tune.Trainable]:
    return cast("type[tune.Trainable]", trainable if inspect.isclass(trainable) else wrap_function(trainable))
