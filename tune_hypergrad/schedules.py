"""`Schedule`: the values of hyperparameters over training progress, and their replay on a `torch.optim` optimizer."""

from __future__ import annotations

import json
import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tune_hypergrad.curves import Curve, curves_of, split_group, window_at
from tune_hypergrad.errors import InputError
from tune_hypergrad.groups import group_name, in_group, listed, ungrouped
from tune_hypergrad.space import flat_values, is_hyperparameter

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCHEDULE_FILE = "schedule.json"
"""File name of a schedule: beside a checkpoint's state, that which the trial stands for; in a report's folders, a
method's best."""

_FORMAT, _VERSION = "tune_hypergrad/schedule", 2
_READABLE = (1, 2)  # version 1 had windows only
_DRAWN = 200
"""Number of equal parts of training in which a curve is drawn."""
_BETAS = ("beta1", "beta2")
_EPS2 = "eps2"  # the second of `torch.optim.Adafactor`'s two


@dataclass(frozen=True)
class Schedule:
    """Values of hyperparameters over training progress in [0, 1): what a gradient method finds.

    Raises:
        InputError: there is no hyperparameter, or a value is neither finite numbers nor such numbers by window, or as
            a trial's config has them for another kind of schedule.

    Examples:
        >>> found = Schedule({"lr": (0.1, 0.05, 0.01), "lr/backbone": 0.001, "momentum": {"one_minus": 0.1}})
        >>> found.at(0.5)  # "backbone" is a parameter group, and `lr` is then that of the others
        {'lr': 0.05, 'lr/backbone': 0.001, 'momentum': 0.9}
        >>> print(Schedule({"lr": {"cosine": {"peak": 0.1, "warm_up": 0.05, "floor": 0.01}}}))
        lr cosine (peak 0.1, warm_up 0.05, floor 0.01)

        Its replay, for which `scheduler.step()` follows every `optimizer.step()`:

        >>> optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)])
        >>> scheduler = Schedule({"lr": (0.1, 0.01)}).scheduler(optimizer, total_steps=3000)
        >>> scheduler.get_last_lr()
        [0.1]
    """

    values: Mapping[str, tuple[float, ...] | Curve]
    """Name to one value per window, window i of N covering progress [i/N, (i+1)/N), or to a `Curve`. Numbers, lists and
    entries of trial configs are read too; of complements, the values themselves are kept: 0.9 of {"one_minus": 0.1}. A
    hyperparameter of a parameter group has a name such as `lr/backbone`; `lr` is then that of the others."""

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping) or not self.values:
            raise InputError("a schedule needs at least one hyperparameter, such as Schedule({'lr': (0.1, 0.01)})")
        object.__setattr__(self, "values", {name: _read(name, value) for name, value in ungrouped(self.values).items()})

    def __str__(self) -> str:
        return ", ".join(f"{name} {_in_words(value)}" for name, value in self.values.items())

    @classmethod
    def from_config(cls, config: Mapping[str, Any], names: Iterable[str] | None = None) -> Schedule:
        """The schedule in a resolved trial config.

        Args:
            config: name to number, windows, knots or a shape of numbers (see `flat_values`), or anything else.
            names: exactly these hyperparameters; by default every entry that is one.

        Raises:
            InputError: a name is missing or not numeric, or no entry is numeric.
        """
        if names is None:
            names = [name for name, value in config.items() if is_hyperparameter(value)]
        names = list(names)
        missing = [name for name in names if name not in config]
        if missing:
            raise InputError(f"the config has no {missing[0]!r}: it has {', '.join(map(str, config)) or 'no entries'}")
        return cls({name: config[name] for name in names})

    @classmethod
    def from_tensors(cls, values: Mapping[str, Tensor], fixed: Mapping[str, Any] | None = None) -> Schedule:
        """The schedule of hyperparameters' values as the engine has them.

        Args:
            values: by flat name: `lr` of shape [windows], `lr/knots` of shape [knots], `lr/cosine/peak` of shape [1].
            fixed: entries of hyperparameters, and of parts of curves by flat name, that are not tuned.

        Raises:
            InputError: a curve lacks a part, or there is nothing.
        """
        numbers = {**flat_values(fixed or {}), **{name: tuple(value.tolist()) for name, value in values.items()}}
        return cls(curves_of(numbers))

    def to_tensors(self) -> dict[str, Tensor]:
        """The values as the engine takes them, by flat name (see `from_tensors`): float64."""
        return {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in flat_values(self.values).items()}

    def to_config(self) -> dict[str, Any]:
        """The schedule as config entries: a float for one window, `{"0": float, ...}` for several, and such as
        `{"cosine": {"peak": float, ...}}` for a curve."""
        return {name: _entry(value) for name, value in self.values.items()}

    def entries(self) -> dict[str, Any]:
        """The schedule's values in plain Python types, as a file has them: a tuple of windows, or a curve's config."""
        return {name: v.entry if isinstance(v, Curve) else v for name, v in self.values.items()}

    def at(self, progress: float) -> dict[str, float]:
        """Every hyperparameter's value at a training progress in [0, 1).

        Raises:
            InputError: `progress` is outside [0, 1).
        """
        if not 0 <= progress < 1:
            raise InputError(f"training progress is {progress!r}: it must be at least 0 and below 1")
        # comparing with i/N, rounded as the caller rounds it, puts at(i/N) into window i; N * progress may fall below i
        return {
            name: value.at(progress)
            if isinstance(value, Curve)
            else value[bisect_right([i / len(value) for i in range(1, len(value))], progress)]
            for name, value in self.values.items()
        }

    def at_step(self, step: int, total_steps: int) -> dict[str, float]:
        """Every hyperparameter's value at an inner step: the very value that training has there.

        Of N windows it is element floor(N step / total_steps), in integer arithmetic; a curve is taken in the middle
        of the step, at progress (step + 1/2) / total_steps.

        Args:
            step: from 0 to `total_steps` - 1.
            total_steps: inner steps of the whole training run.

        Raises:
            InputError: `step` or `total_steps` is out of range.
        """
        _check_total_steps(total_steps)
        if not isinstance(step, int) or not 0 <= step < total_steps:
            raise InputError(
                f"step is {step!r}: with total_steps={total_steps} it must be a whole number in 0..{total_steps - 1}"
            )
        return {
            name: value.at_step(step, total_steps)
            if isinstance(value, Curve)
            else value[window_at(step, total_steps, len(value))]
            for name, value in self.values.items()
        }

    def windows(self, name: str, count: int = _DRAWN) -> tuple[float, ...]:
        """One hyperparameter's values by window: its own windows, or a curve's values in the middles of `count` equal
        parts."""
        value = self.values[name]
        return value.at_steps(count) if isinstance(value, Curve) else value

    def span(self, name: str) -> tuple[float, ...]:
        """One hyperparameter's values by which an axis is chosen: those of `windows`, but for how near to 0 a curve
        with a peak begins and ends, which is no reason for a logarithm."""
        value, windows = self.values[name], self.windows(name)
        least = max(windows) / 50 if isinstance(value, Curve) and value.has_peak else min(windows)
        return tuple(max(each, least) for each in windows)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the schedule as a JSON file that `load` reads back exactly; a file is replaced whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        text = json.dumps({"format": _FORMAT, "version": _VERSION, "values": self.entries()}, indent=2)
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise InputError(f"cannot write schedule file {target}: {error.strerror}: choose another path") from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Schedule:
        """Read a schedule that `save` wrote.

        Raises:
            InputError: the file cannot be read, or holds no valid schedule.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read schedule file {path}: {error.strerror}: check the path") from error
        except ValueError as error:
            raise InputError(
                f"{path} is no schedule file: it is not JSON ({error}): use one that Schedule.save wrote"
            ) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InputError(
                f"{path} is no schedule file: its format is not {_FORMAT!r}: use one that Schedule.save wrote"
            )
        if content.get("version") not in _READABLE:
            raise InputError(
                f"schedule file {path} has version {content.get('version')!r}, not {_VERSION}: upgrade tune_hypergrad"
            )
        values: Any = content.get("values")
        try:
            return cls(values)
        except InputError as error:
            raise InputError(f"schedule file {path}: {error}") from error

    def to_frame(self) -> pd.DataFrame:
        """One row per hyperparameter and window: `hyperparameter`, `window`, `start`, `end` (progress), `value`.

        A curve has its values in the middles of 200 equal parts.
        """
        import pandas as pd

        rows = [
            (name, i, i / len(windows), (i + 1) / len(windows), value)
            for name, windows in ((name, self.windows(name)) for name in self.values)
            for i, value in enumerate(windows)
        ]
        return pd.DataFrame(rows, columns=["hyperparameter", "window", "start", "end", "value"])

    def to_scalars(self, prefix: str = "schedule") -> dict[str, float]:
        """Flat scalars for TensorBoard: `schedule/lr/0`, `schedule/lr/1`, ...; `schedule/momentum` for one window;
        `schedule/lr/knots/0`, ... and `schedule/lr/cosine/peak` of curves."""
        scalars: dict[str, float] = {}
        for name, windows in flat_values(self.values).items():
            if len(windows) == 1:
                scalars[f"{prefix}/{name}"] = windows[0]
            else:
                scalars.update({f"{prefix}/{name}/{i}": value for i, value in enumerate(windows)})
        return scalars

    @classmethod
    def from_scalars(cls, scalars: Mapping[str, float], prefix: str = "schedule") -> Schedule:
        """The schedule that `to_scalars` wrote; what else `scalars` has, and NaN, is left out.

        Raises:
            InputError: there is none.
        """
        found: dict[str, dict[int, float]] = {}
        for key, value in scalars.items():
            path = str(key).removeprefix(f"{prefix}/")
            if path == str(key) or value != value:
                continue
            name, _, window = path.rpartition("/")
            if window.isdigit():
                found.setdefault(name, {})[int(window)] = float(value)
            else:
                found[path] = {0: float(value)}
        for name, windows in found.items():
            if sorted(windows) != list(range(len(windows))):
                raise InputError(f"hyperparameter {name!r} has the windows {sorted(windows)} only: give all of them")
        return cls(curves_of({name: [windows[i] for i in range(len(windows))] for name, windows in found.items()}))

    def plot(self, axes: Axes | Sequence[Axes] | None = None) -> Figure:
        """Draw every hyperparameter over training progress, one panel each.

        Values that span a factor of 100 or more are drawn on a logarithmic axis, linear around 0 where some are 0,
        unless they are a curve's with a peak, which begins and may end near 0. Of parameter groups there is a line
        each, or, of more than eight, a row each whose colour is the value.

        Args:
            axes: as many matplotlib axes as there are hyperparameters, groups aside; by default a new figure, which
                pyplot does not know and so never has to close: write it with `figure.savefig(path)`.

        Returns:
            The figure that was drawn on.

        Raises:
            InputError: the number of axes is not that of the hyperparameters.
        """
        from tune_hypergrad.plotting import plot_schedule

        return plot_schedule(self, axes)

    def apply(
        self, optimizer: Optimizer, step: int, total_steps: int, groups: Mapping[int, str] | None = None
    ) -> dict[str, float]:
        """Set the values of an inner step in the param groups of a `torch.optim` optimizer.

        Names are those of the param groups (`lr`, `momentum`, `dampening`, `weight_decay`, `eps`, `alpha`); `beta1` and
        `beta2` are the two elements of `betas`, `eps2` the second of `Adafactor`'s `eps`. `lr/backbone` is set in the
        param groups whose `name` is "backbone" (the first is called "group0" where it has none, and so on), `lr` in the
        others; what the schedule has of other groups only stays as it is. Where you have given these param groups
        different values, a 0 is kept, such as the `weight_decay` of biases, and of others what is not the optimizer's
        default, unless `groups` is given. Call it before `optimizer.step()`.

        Args:
            optimizer: any `torch.optim` optimizer, fresh or at this step of its training.
            step: from 0 to `total_steps` - 1.
            total_steps: inner steps of the whole training run.
            groups: the schedule's group by position in `optimizer.param_groups`, where their `name` does not tell it.
                Common values are for all that it does not list, too.

        Returns:
            The values that the optimizer has no place for, such as `label_smoothing`: they belong to your own loss, or,
            `ema`, to your average of the weights.

        Raises:
            InputError: `step` or `total_steps` is out of range, the optimizer lacks a group of the schedule, or all its
                param groups have different values of their own where the schedule has one for all.
        """
        values, own_names = self.at_step(step, total_steps), self._groups_in(optimizer, groups)
        mine = {name: name for name in values if self._is_on(optimizer, own_names, name)}
        taken = self._taken(optimizer, mine, own_names, given=groups is not None)
        for group, own in zip(optimizer.param_groups, taken, strict=True):
            for hyperparameter, name in own.items():
                _assign(group, hyperparameter, self._on_optimizer(name, values[name]))
        return {name: value for name, value in values.items() if name not in mine}

    def _groups_in(self, optimizer: Optimizer, groups: Mapping[int, str] | None) -> list[str]:
        """The name of each param group of an optimizer as a group; those without one are called as `Problem.groups` has
        it.

        Raises:
            InputError: the schedule has a group that is not there.
        """
        count, known = len(optimizer.param_groups), groups or {}
        if any(position not in range(count) for position in known):
            raise InputError(f"groups is {dict(known)!r}: its keys are positions of param groups, 0 to {count - 1}")
        found = [known.get(i, group_name(group, i)) for i, group in enumerate(optimizer.param_groups)]
        scheduled = [split_group(name) for name in self.values]
        of_groups = {group for name, group in scheduled if group and any(_has(g, name) for g in optimizer.param_groups)}
        missing = sorted(of_groups - set(found))
        if missing:
            raise InputError(
                f"the schedule has the groups {listed(sorted(of_groups))}, and the optimizer's param groups are called "
                f"{listed(found)}: give them such a 'name', or pass groups={{0: {missing[0]!r}}}"
            )
        return found

    def _taken(
        self, optimizer: Optimizer, names: Mapping[str, str], own_names: Sequence[str], *, given: bool
    ) -> list[dict[str, str]]:
        """The names of the values that each param group takes, by hyperparameter.

        Args:
            optimizer: whose param groups they are.
            names: of the schedule's values that have a place there.
            own_names: the schedule's group by param group.
            given: whether a person has said which is which: then common values are for all that have none of their own.

        Raises:
            InputError: a common value is for none, since all have values of their own.
        """
        taken = [dict(in_group(names, own_name)) for own_name in own_names]
        for name in {} if given else names:
            common = [i for i, own in enumerate(taken) if own.get(name) == name]
            keeping = _keeping([optimizer.param_groups[i] for i in common], name, optimizer.defaults)
            for i, keeps in zip(common, keeping, strict=True):
                if keeps:
                    del taken[i][name]
        return taken

    def _is_on(self, optimizer: Optimizer, own_names: Sequence[str], name: str) -> bool:
        """Whether the param groups whose value it is have a place for the value of that name."""
        hyperparameter, group = split_group(name)
        named = zip(optimizer.param_groups, own_names, strict=True)
        own = [each for each, own_name in named if not group or own_name == group]
        return bool(own) and all(_has(each, hyperparameter) for each in own)

    def scheduler(self, optimizer: Optimizer, total_steps: int, groups: Mapping[int, str] | None = None) -> ScheduleLR:
        """A `torch.optim` learning-rate scheduler that sets every scheduled value, not the learning rate alone.

        Args:
            optimizer: a fresh `torch.optim` optimizer; it gets the values of step 0 at once.
            total_steps: inner steps of the whole training run; later steps keep the last window's values.
            groups: as for `apply`.

        Raises:
            InputError: `total_steps` is below 1, or the optimizer lacks a group of the schedule.
        """
        return ScheduleLR(optimizer, self, total_steps, groups)

    def _on_optimizer(self, name: str, value: float) -> float:
        # While momentum is 0, torch.optim.SGD keeps no buffer and RMSprop never makes one: when a later window turns
        # momentum on, SGD would have forgotten the last gradient and RMSprop would fail. The smallest normal float
        # keeps the buffer going and multiplies it by what rounds to nothing.
        if split_group(name)[0] == "momentum" and value == 0 and any(self.windows(name)):
            return sys.float_info.min
        return value


def stretched(values: Sequence[float], windows: int) -> tuple[float, ...]:
    """A schedule's values in another number of windows, each the mean over its part of the training run."""
    if len(values) == windows:
        return tuple(values)
    integral = np.concatenate([[0.0], np.cumsum(values) / len(values)])
    at = np.interp(np.linspace(0, 1, windows + 1), np.linspace(0, 1, len(values) + 1), integral)
    means = np.clip(np.diff(at) * windows, min(values), max(values))  # rounding must not leave the range
    return tuple(map(float, means))


class ScheduleLR(LRScheduler):
    """Replays a `Schedule` on an optimizer, one inner step at each `step()`.

    Lightning takes it as `{"scheduler": schedule.scheduler(optimizer, total_steps), "interval": "step"}`.

    Args:
        optimizer: a fresh `torch.optim` optimizer; the values of step 0 are set at construction.
        schedule: what to replay.
        total_steps: inner steps of the whole training run; after them the last window's values stay.
        groups: as for `Schedule.apply`.

    Raises:
        InputError: `total_steps` is below 1, or the optimizer lacks a group of the schedule.
    """

    loss_values: dict[str, float]
    """The current values that the optimizer has no place for, such as `label_smoothing`, for your own loss."""

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        total_steps: int,
        groups: Mapping[int, str] | None = None,
    ) -> None:
        _check_total_steps(total_steps)
        self.schedule, self.total_steps = schedule, total_steps
        self.groups = None if groups is None else dict(groups)
        super().__init__(optimizer)  # takes the initial step, to last_epoch = 0

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of every param group at the current step."""
        scheduled = self.schedule.at_step(self._current_step(), self.total_steps)
        own_names = self.schedule._groups_in(self.optimizer, self.groups)
        names = {name: name for name in scheduled if split_group(name)[0] == "lr"}
        taken = self.schedule._taken(self.optimizer, names, own_names, given=self.groups is not None)
        return [
            scheduled[own["lr"]] if "lr" in own else group["lr"]
            for group, own in zip(self.optimizer.param_groups, taken, strict=True)
        ]

    def step(self, epoch: int | None = None) -> None:
        """Advance by one inner step; call it after `optimizer.step()`."""
        super().step(epoch)
        self._set_values()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's position and schedule as plain Python values, which `torch.load` reads with
        `weights_only=True`."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "total_steps": self.total_steps,
            "schedule": self.schedule.to_config(),
            "groups": self.groups,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`: take its schedule and position, and set that step's values."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self.total_steps = state_dict["total_steps"]
        self.schedule, self.groups = Schedule.from_config(state_dict["schedule"]), state_dict.get("groups")
        self._set_values()

    def _set_values(self) -> None:
        self.loss_values = self.schedule.apply(self.optimizer, self._current_step(), self.total_steps, self.groups)
        self._last_lr = [_copied(group["lr"]) for group in self.optimizer.param_groups]

    def _current_step(self) -> int:
        return min(self.last_epoch, self.total_steps - 1)


def _read(name: str, value: Any) -> tuple[float, ...] | Curve:
    if not isinstance(name, str):
        raise InputError(f"a hyperparameter is called {name!r}: its name must be a string")
    (read,) = curves_of(flat_values({name: value})).values()
    if isinstance(read, Curve):
        read.refuse_impossible(name)
    elif not all(map(math.isfinite, read)):
        raise InputError(f"hyperparameter {name!r} has a value that is not finite in {list(read)}: replace it")
    return read


def _entry(value: tuple[float, ...] | Curve) -> Any:
    if isinstance(value, Curve):
        return value.entry
    return value[0] if len(value) == 1 else {str(i): each for i, each in enumerate(value)}


def _in_words(value: tuple[float, ...] | Curve) -> str:
    return str(value) if isinstance(value, Curve) else " | ".join(f"{each:.4g}" for each in value)


def _check_total_steps(total_steps: int) -> None:
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise InputError(f"total_steps is {total_steps!r}: it must be a whole number of at least 1")


def _has(group: Mapping[str, Any], name: str) -> bool:
    if name in _BETAS:
        return "betas" in group
    if name == _EPS2:
        return isinstance(group.get("eps"), tuple)
    value = group.get(name)
    return isinstance(value, float | int | Tensor) and not isinstance(value, bool)


_KEPT = "keeps_its_own"
"""Key of a param group under which it remembers, in checkpoints too, which values a schedule for all groups is not
for."""


def _keeping(groups: Sequence[dict[str, Any]], name: str, defaults: Mapping[str, Any]) -> list[bool]:
    """Whether each param group keeps its own value of a hyperparameter of which a schedule has one for all groups.

    Where they have been given different ones, zeros are kept, and of others what is not the optimizer's default. The
    decision is made before the first step, and remembered.

    Raises:
        InputError: all would be kept.
    """
    if not all(name in each.get(_KEPT, {}) for each in groups):
        values = [_value_in(each, name) for each in groups]
        default = common_value(values, lambda: _value_in(defaults, name))
        if default not in values:
            raise InputError(
                f"the optimizer's param groups have {name} {', '.join(map(str, values))}, and the schedule one for all"
                f": give them a 'name' each and the schedule '{name}/<name>', or pass groups={{}} to set all of them"
            )
        for each, value in zip(groups, values, strict=True):
            each[_KEPT] = {**each.get(_KEPT, {}), name: value != default}
    return [each[_KEPT][name] for each in groups]


def common_value(values: Collection[float], default: Callable[[], float]) -> float:
    """The value of param groups that were given none of their own, told from the values of all groups: the only one
    beside 0, and where there are several, the optimizer's default."""
    others = {value for value in values if value != 0} or {0.0}
    return next(iter(others)) if len(others) == 1 else default()


def _value_in(group: Mapping[str, Any], name: str) -> float:
    if name == _EPS2:
        return float(group["eps"][1])
    value = group["betas"][_BETAS.index(name)] if name in _BETAS else group[name]
    return float(value)


def _assign(group: dict[str, Any], name: str, value: float) -> None:
    if name in _BETAS:
        betas = list(group["betas"])
        betas[_BETAS.index(name)] = value
        group["betas"] = tuple(betas)
    elif name == _EPS2:
        group["eps"] = group["eps"][0], value
    elif isinstance(group[name], Tensor):
        group[name].fill_(value)  # a captured graph reads this very tensor
    else:
        group[name] = value


def _copied(value: float | Tensor) -> float | Tensor:
    return value.clone() if isinstance(value, Tensor) else value
