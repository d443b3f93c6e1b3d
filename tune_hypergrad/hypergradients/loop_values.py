"""The hyperparameters of an inner loop: which it has, which are fixed, and the values in force at a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite, isnan
from typing import Any

import torch
from torch import Tensor

from tune_hypergrad.curves import (
    SUFFIXES,
    Curve,
    base_names,
    curves_of,
    forms_of,
    refuse_incomplete,
    split_group,
    split_name,
    window_at,
)
from tune_hypergrad.errors import InputError
from tune_hypergrad.groups import Groups
from tune_hypergrad.hypergradients.optimizers import Optimizer
from tune_hypergrad.problem import Problem
from tune_hypergrad.space import flat_values

EMA = "ema"
"""Name of the hyperparameter that is the decay of the weights' average."""


def check_strength(problem: Problem, name: str, values: Iterable[float]) -> None:
    """Refuse values that a regulariser's hyperparameter cannot have.

    Raises:
        InputError: one is outside what it can be.
    """
    strength = problem.regulariser_hyperparameters.get(name)
    if strength is None:
        return
    for value in values:
        if not (isfinite(value) and strength.lower <= value <= strength.upper):
            raise InputError(
                f"{name!r} is {value!r}: its regulariser takes finite numbers from {strength.lower:g} to "
                f"{strength.upper:g}"
            )


class LoopValues:
    """What an inner loop's hyperparameters are at every step.

    Args:
        problem: whose training loss and regularisers have some.
        optimizer: which has others.
        groups: of the parameters, that may have values of their own.
        steps: inner steps of the run, T.
        fixed: those without a derivative, as `TrainingSettings.fixed`.
        ema: the default of the decay of the weights' average; None where there is none.
        device: where training happens.
        dtype: of its floating tensors.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: Optimizer,
        groups: Groups,
        steps: int,
        fixed: Mapping[str, Any],
        ema: float | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.problem, self.optimizer, self.groups = problem, optimizer, groups
        self.device, self.dtype = device, dtype
        self.of_update: dict[str, float] = {**optimizer.hyperparameters, **({} if ema is None else {EMA: ema})}
        """Default values of the optimizer's hyperparameters, and of the average's decay where there is an average, by
        name."""
        self._steps, self._given_fixed = steps, fixed
        self._fixed = flat_values(fixed)
        self._given, self._fixed_parts = _whole_and_parts(self._fixed)
        of_groups = {name: (value,) for name, value in groups.values.items()}
        self._fixed_values: dict[str, tuple[float, ...] | Curve] = {**of_groups, **self._given}

    def check_names(self, tuned: Mapping[str, Any]) -> None:
        """Refuse hyperparameters that nothing in this inner loop reads.

        Raises:
            InputError: a name is unknown, tuned and fixed at once, or has no value and no default.
        """
        of_optimizer, of_loss = self.of_update, self.problem.train_loss_hyperparameters
        of_regularisers = self.problem.regulariser_hyperparameters
        for name in (*of_loss, *of_regularisers):
            if name in of_optimizer:
                other, remedy = (
                    ("the train loss", "rename the train loss's argument")
                    if name in of_loss
                    else ("a regulariser", "rename the regulariser's")
                )
                raise InputError(
                    f"{name!r} is a hyperparameter of both {other} and optimizer {self.optimizer.name!r}: {remedy}"
                )
        bases = base_names(tuned)
        for name in dict.fromkeys((*bases, *base_names(self._fixed), *self.groups.values)):
            if name in of_optimizer or name in of_loss or name in of_regularisers:
                continue
            if split_group(name)[0] in self.optimizer.hyperparameters:
                self.groups.check_name(name)
                continue
            if split_group(name)[0] == EMA and name != EMA:
                raise InputError(f"{name!r}: all weights have one average, whose decay is {EMA!r}")
            if name in self.problem.model_hyperparameters:
                raise InputError(
                    f"hyperparameter {name!r} is an argument of the model factory, which no gradient reaches: fix it, "
                    "or tune it outside with a black-box searcher"
                )
            hyperparameter, group = split_group(name)
            if group and (hyperparameter in of_loss or hyperparameter in of_regularisers):
                raise InputError(
                    f"{name!r}: only hyperparameters of the optimizer have values by group, and {hyperparameter!r} is "
                    "one of the training loss"
                )
            if name == EMA:
                raise InputError(f"{EMA!r} is given, but no average is kept: set {EMA} to its decay, such as 0.99")
            takes = ", ".join(of_loss) or "none (give Problem a train_loss with keyword-only arguments)"
            raise InputError(
                f"unknown hyperparameter {name!r}: optimizer {self.optimizer.name!r} has {', '.join(of_optimizer)}, "
                f"the train loss {takes}, and regularisers {', '.join(of_regularisers) or 'none'}"
            )
        for name in bases:
            if name in self.problem.whole_hyperparameters:
                raise InputError(
                    f"hyperparameter {name!r} of the train loss is a whole number by its default, and has no "
                    f"derivative: fix it or tune it outside, or write {float(of_loss[name])!r} if it is a real number"
                )
            if name in self._given:
                raise InputError(f"hyperparameter {name!r} is both tuned and fixed: drop one of the two")
        for name in tuned:
            if name in self._fixed:
                raise InputError(f"{name!r} is both tuned and fixed: drop one of the two")
        given = {*bases, *base_names(self._fixed)}
        for name, default in of_loss.items():
            if isnan(default) and name not in given:
                raise InputError(f"the train loss needs {name!r}, which has no default: tune it or fix it to a value")
        for name in (*bases, *base_names(self._fixed)):
            if name in self.optimizer.hyperparameters:
                self.groups.refuse_idle(name, {*given, *self.groups.values})
        refuse_incomplete((*self._fixed_parts, *tuned))
        for name, values in self._fixed_values.items():
            self.check_values(name, values)
        self._check_completeness(given)

    def check_values(self, name: str, values: tuple[float, ...] | Curve) -> None:
        """Refuse values of a hyperparameter that its form, or its regulariser, cannot have.

        Raises:
            InputError: one is outside what it can be.
        """
        if isinstance(values, Curve):
            values.refuse_impossible(name)
            values = values.at_steps(self._steps)
        check_strength(self.problem, name, values)
        if name == EMA and not all(0 <= value <= 1 for value in values):
            raise InputError(f"{EMA!r} is {list(values)!r}: an average's decay is between 0 and 1")

    def _check_completeness(self, given: set[str]) -> None:
        for regulariser in self.problem.regularisers:
            names = list(regulariser.hyperparameters)
            missing = [name for name in names if name not in given]
            if missing and len(missing) < len(names):
                raise InputError(
                    f"{type(regulariser).__name__} has no value for {missing[0]!r}: tune it or fix it as well"
                )

    def tuned_at(self, hyperparameters: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The tuned hyperparameters' values in force at `step`, 0-dim, by hyperparameter, of groups by such names as
        `lr/backbone`: element floor(N step / T) of windows, and a curve's at progress (step + 1/2) / T."""
        windows = {
            name: v[window_at(step, self._steps, len(v))]
            for name, v in hyperparameters.items()
            if not split_name(name)[1]
        }
        if len(windows) == len(hyperparameters):
            return windows
        curves = self.curves(hyperparameters)
        values = {name: curve.tensor(self._steps, self.device, self.dtype)[step] for name, curve in curves.items()}
        return {name: {**windows, **values}[name] for name in base_names(hyperparameters)}

    def placed(self, name: str, values: Tensor) -> Tensor:
        """A tuned tensor where training needs it: windows on the run's device and in its type, a curve's numbers in
        float64 on the CPU, where curves are computed."""
        if split_name(name)[1]:
            return values.detach().to(device="cpu", dtype=torch.float64)
        return values.detach().to(device=self.device, dtype=self.dtype)

    def curves(self, hyperparameters: Mapping[str, Tensor]) -> dict[str, Curve]:
        """The tuned curves by hyperparameter, with what is fixed of them."""
        tuned = {name: values.tolist() for name, values in hyperparameters.items() if split_name(name)[1]}
        bases = set(base_names(tuned))
        fixed = {name: values for name, values in self._fixed_parts.items() if split_name(name)[0] in bases}
        found = curves_of({**fixed, **tuned}) if tuned else {}
        return {name: curve for name, curve in found.items() if isinstance(curve, Curve)}

    def fixed_at(self, step: int) -> dict[str, float]:
        """The fixed hyperparameters' values in force at `step`."""
        return {
            name: values.at_step(step, self._steps)
            if isinstance(values, Curve)
            else values[window_at(step, self._steps, len(values))]
            for name, values in self._fixed_values.items()
        }

    def fixed_by_step(self) -> dict[str, Tensor]:
        """The fixed hyperparameters that are not the same at every step: their values by step, each of shape [T], where
        training happens."""
        found = {}
        for name, values in self._fixed_values.items():
            if isinstance(values, Curve):
                found[name] = values.tensor(self._steps, self.device, self.dtype)
            elif len(values) > 1:
                by_step = [values[window_at(step, self._steps, len(values))] for step in range(self._steps)]
                found[name] = torch.tensor(by_step, device=self.device, dtype=self.dtype)
        return found

    @property
    def fixed_names(self) -> list[str]:
        """The hyperparameters that are fixed, in the order of `fixed_at`."""
        return list(self._fixed_values)

    def fixed_beside(self, tuned: Iterable[str]) -> dict[str, Any]:
        """Everything that is fixed while hyperparameters, or numbers of curves, are tuned: the settings' `fixed`, and
        what the problem's groups have brought along, as entries by name."""
        bases = {*base_names(tuned), *base_names(self._fixed)}
        of_groups = {name: value for name, value in self.groups.values.items() if name not in bases}
        return {**of_groups, **self._given_fixed}


def _whole_and_parts(
    fixed: Mapping[str, tuple[float, ...]],
) -> tuple[dict[str, tuple[float, ...] | Curve], dict[str, tuple[float, ...]]]:
    """Numbers by flat name, parted: windows and complete curves by hyperparameter, and the numbers of incomplete
    curves."""
    incomplete = {
        name
        for name, forms in forms_of(fixed).items()
        if len(forms) == 1 and any(form and len(own) < len(SUFFIXES[form]) for form, own in forms.items())
    }
    parts = {name: values for name, values in fixed.items() if split_name(name)[0] in incomplete}
    return curves_of({name: values for name, values in fixed.items() if name not in parts}), parts
