"""Does the engine give right hypergradients on this problem? A comparison with differences of plain training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import inf, isfinite, isnan, nan
from typing import Any

import torch
from torch import Tensor

from tune_hypergrad.batches import Batch
from tune_hypergrad.curves import split_group
from tune_hypergrad.data import Split
from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.hypergradients.double_precision import DoublePrecision, in_double_precision
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.graph_size import try_graph
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, TrainingSettings
from tune_hypergrad.hypergradients.inspection import Refusals, inspect
from tune_hypergrad.hypergradients.keeping import Room
from tune_hypergrad.hypergradients.loop_batches import LoopBatches
from tune_hypergrad.hypergradients.loop_costs import LoopCosts
from tune_hypergrad.hypergradients.loop_values import EMA
from tune_hypergrad.hypergradients.narrowing import culprit
from tune_hypergrad.hypergradients.optimizers import Optimizer, is_built_in
from tune_hypergrad.hypergradients.plain_training import (
    differences,
    estimates,
    plain_val_loss,
)
from tune_hypergrad.hypergradients.reverse import ReverseRun
from tune_hypergrad.hypergradients.run import HypergradientRun, check_values
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.problem import Problem

_USUAL = {"lr": 0.05, "momentum": 0.5, "weight_decay": 1e-3}
_ADAPTIVE = {"lr": 1e-3, "momentum": 0.5, "weight_decay": 1e-2}
_VAL_EXAMPLES = 64
CHECKED_GROUPS = 2
"""Number of parameter groups in which a hyperparameter's values are compared, unless they are named: one is as
another."""
_NUDGE = 1e-13
"""Relative change of the weights that a training run in double precision should hardly notice."""
_ROUNDING = torch.finfo(torch.float64).eps
"""Relative rounding error of a validation loss after a few steps in double precision."""


@dataclass(frozen=True)
class ProblemCheck:
    """What `check_problem` found: whether hypergradients are right on a problem, and by which mode."""

    ok: bool
    """Whether at least one mode gives right hypergradients; a mode that does not is in `refusals`, and "auto" does not
    take it."""
    message: str
    """One line for people: that all is well, or what will not work and why."""
    errors: dict[str, float] = field(default_factory=dict)
    """By mode, the largest error of its hypergradients against differences, relative to a hyperparameter's largest
    element."""
    refusals: Refusals = field(default_factory=dict)
    """By mode, why its hypergradients are not right: one line each."""

    def __str__(self) -> str:
        return self.message


def check_problem(
    problem: Problem,
    hyperparameters: Mapping[str, Tensor] | None = None,
    *,
    steps: int = 3,
    optimizer: str | Optimizer = "sgd",
    fixed: Mapping[str, Any] | None = None,
    seed: int = 0,
    clip_gradient: float | None = None,
    clip_norm: float | None = None,
    ema: float | None = None,
    autocast: str | None = None,
    channels_last: bool = False,
    device: str | None = None,
    modes: Sequence[str] = ("forward", "reverse"),
    examples: int | None = None,
    tolerance: float = 1e-4,
) -> ProblemCheck:
    """Compare the engine's hypergradients with differences of plain torch training on the user's own model.

    First, one training step and one evaluation are searched for what has no derivative, such as numbers that leave
    torch. Then a few steps are trained in double precision, by the engine and by a loop of `torch.optim` and
    `loss.backward()`, and the derivative of the validation loss is compared with central differences of several step
    sizes, of which an element's nearest counts: a kink of a ReLU or of max-pooling spoils some, but not all. Where they
    differ, the step's operations are tested one by one for the culprit.

    Args:
        problem: the problem; its data is used as it is, its model converted to float64 for the comparison.
        hyperparameters: values to differentiate by, as for `hypergradient`; None takes customary values of the
            learning rate, momentum and weight decay, of the learning rate in the first two parameter groups, and of all
            that the train loss and the regularisers are differentiable by.
        steps: inner steps; few are enough, since an error in one step is an error in all.
        optimizer: inner optimizer.
        fixed: hyperparameters that are not tuned.
        seed: seeds the runs.
        clip_gradient: clamp the training gradient's elements to +- this value.
        clip_norm: scale the training gradient down to this norm.
        ema: judge an exponential moving average of the weights, of this decay.
        autocast: "bfloat16" for the model's forward pass under `torch.autocast`. The first step is tried out so; the
            comparison is in float64, which autocast leaves as it is, and the message says so.
        channels_last: give the model images with their channels last in memory.
        device: where to train; None leaves the model where its factory puts it.
        modes: which modes to compare.
        examples: examples in a step of the comparison, and in its validation, at the most; None is the problem's
            batch size, and 64.
        tolerance: error, relative to a hyperparameter's largest element, up to which the two agree.

    Returns:
        `ProblemCheck`: `.ok`, and a one-line `.message`. Nothing that the problem does wrong is raised.
    """
    try:
        problem.check()
        problem = problem.independent()
        settings = TrainingSettings(
            steps,
            optimizer,
            fixed or {},
            seed,
            clip_gradient,
            device,
            clip_norm,
            ema,
            autocast,
            channels_last=channels_last,
        )
        loop = InnerLoop(problem, settings)
        values = usual_values(loop) if hyperparameters is None else dict(hyperparameters)
        check_values(loop, values)
        placed = {name: loop.values.placed(name, value) for name, value in values.items()}
        refusals = inspect(InnerLoop(problem.independent(), settings), placed, modes)
    except InputError as error:
        return ProblemCheck(False, str(error))
    except Exception as error:
        return ProblemCheck(False, f"the model does not train: {in_one_line(error)}")
    working = [mode for mode in modes if mode not in refusals]
    values = {name: value.detach().double().cpu() for name, value in values.items()}
    errors, wrong, note = _compare(problem, settings, values, working, examples, tolerance)
    if errors and autocast is not None:
        note = "; ".join(filter(None, ["compared in float64, which autocast leaves as it is", note]))
    return _verdict(modes, errors, {**refusals, **wrong}, note)


def usual_values(loop: InnerLoop, names: Mapping[str, Any] | None = None) -> Hyperparameters:
    """Customary values of hyperparameters, one window each: those at which a check trains.

    Args:
        loop: whose optimizer and losses have them.
        names: which; None are learning rate, momentum and weight decay, the learning rate in a few groups, the decay of
            an average, and all that losses can be differentiated by.
    """
    problem, of_optimizer = loop.problem, loop.values.of_update
    usual = _USUAL if loop.optimizer.name in ("sgd", "nesterov") else _ADAPTIVE
    known = {**of_optimizer, **{name: value for name, value in usual.items() if name in of_optimizer}}
    of_losses = {
        name: 0.1 if isnan(default) else default
        for name, default in problem.train_loss_hyperparameters.items()
        if name not in problem.whole_hyperparameters
    }
    of_losses |= {
        name: _between(*strength.usual, log=strength.log)
        for name, strength in problem.regulariser_hyperparameters.items()
        if name not in problem.underivable_hyperparameters
    }
    found = {**known, **of_losses}
    if names is None:
        names = dict.fromkeys([name for name in (*usual, EMA, *of_losses) if name in found])
        names = {name: None for name in names if name not in loop.settings.fixed}
        of_groups = [f"lr/{group}" for group in loop.groups.names[:CHECKED_GROUPS] if "lr" in names]
        names |= {name: None for name in of_groups if name not in loop.settings.fixed}
        with_own = {*names, *loop.settings.fixed, *loop.groups.values}
        names = {name: None for name in names if not loop.groups.is_idle(name, with_own)}
    known_as = {name: name if name in found else split_group(name)[0] for name in names}
    return {name: torch.tensor([found[own]], dtype=torch.float64) for name, own in known_as.items() if own in found}


def finite_differences(loop: InnerLoop, hyperparameters: Hyperparameters, epsilon: float = 1e-6) -> Hyperparameters:
    """Central differences of the engine's own training run by every element; meant for float64."""

    def loss(values: Hyperparameters) -> float:
        return loop.evaluate(loop.run(values)).loss

    with loop.running():
        return {
            name: torch.tensor(
                [differences(loss, hyperparameters, name, element, epsilon) for element in range(len(values))],
                dtype=torch.float64,
            )
            for name, values in hyperparameters.items()
        }


class _ReadOnce(LoopBatches):
    """Training batches that are read once, so that data which is another one each time stays the same; `read` has, by
    step and number, those that were."""

    def __init__(self, read: Mapping[tuple[int, int], Batch], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._read = dict(read)

    def of_step(self, step: int, number: int = 0, *, again: bool = False) -> Batch:
        if (step, number) not in self._read:
            self._read[step, number] = super().of_step(step, number, again=again)
        return self._read[step, number]


class _ReadingOnce(InnerLoop):
    """An inner loop whose training batches are read once, as `_ReadOnce` does it."""

    def __init__(
        self, problem: Problem, settings: TrainingSettings, read: Mapping[tuple[int, int], Batch] | None = None
    ) -> None:
        super().__init__(problem, settings)
        self.batches = _ReadOnce(read or {}, self.problem, settings.steps, settings.seed, self.device, self.dtype)
        self.costs = LoopCosts(self.batches)


def _compare(
    problem: Problem,
    settings: TrainingSettings,
    values: Hyperparameters,
    modes: list[str],
    examples: int | None,
    tolerance: float,
) -> tuple[dict[str, float], Refusals, str]:
    """Errors of modes, why those that are wrong are refused, and what to add to the message."""
    if not modes:
        return {}, {}, ""
    for small in dict.fromkeys((examples, None)):
        try:
            return _Comparison(in_double_precision(_reduced(problem, small)), settings, values).of(modes, tolerance)
        except Exception as error:
            failure = in_one_line(error)
    return {}, {}, f"not compared with finite differences, since it does not train in float64 ({failure})"


class _Comparison:
    """Modes against differences of plain training, in double precision."""

    def __init__(self, problem: Problem, settings: TrainingSettings, values: Hyperparameters) -> None:
        self._problem, self._settings = problem, settings
        self._loop = self._fresh_loop()
        self._values = {name: self._loop.values.placed(name, value) for name, value in values.items()}
        self._differences: dict[tuple[str, int, float], float] = {}
        with self._loop.running():
            self._batches = [
                [self._loop.batches.of_step(step, number) for number in range(problem.batches_in(step))]
                for step in range(settings.steps)
            ]

    def of(self, modes: list[str], tolerance: float) -> tuple[dict[str, float], Refusals, str]:
        obstacle = self._obstacle()
        if obstacle:
            return {}, {}, f"not compared with finite differences: {obstacle}"
        errors: dict[str, float] = {}
        wrong: Refusals = {}
        untold: set[str] = set()
        for mode in modes:
            try:
                val_loss, found = self._run(mode)
            except Exception as error:
                fault = f"{mode} mode fails after the first step ({in_one_line(error)}){self._named_culprit}"
                wrong[mode] = str(error) if isinstance(error, InputError) else fault  # which says what and where
                continue
            if _differ(val_loss, self._loss):
                wrong[mode] = (
                    f"{mode} mode trains another network than plain torch does (a validation loss of {val_loss:.8g}, "
                    f"not {self._loss:.8g}){self._named_culprit}"
                )
                continue
            by_name = self._errors(found, tolerance)
            untold |= found.keys() - by_name.keys()
            if not by_name:
                continue
            name = max(by_name, key=lambda each: _or_infinite(by_name[each]))
            errors[mode] = by_name[name]
            if not errors[mode] <= tolerance:
                wrong[mode] = (
                    f"hypergradients differ from finite differences: {mode} mode is off by {errors[mode]:.1e} in the "
                    f"derivative by {name!r}{self._named_culprit}"
                )
        listed = ", ".join(map(repr, sorted(untold)))
        return errors, wrong, f"too small for a comparison: the derivative by {listed}" if untold else ""

    @cached_property
    def _loss(self) -> float:
        with self._loop.running():
            return self._plain_loss(self._values)

    def _obstacle(self) -> str:
        if not isfinite(self._loss):
            return "the run diverges in its first steps"
        with self._loop.running():
            if _differ(self._plain_loss(self._values), self._loss):
                return "no two trainings are the same"
            nudged = self._plain_loss(self._values, nudge=_NUDGE)
        if _differ(nudged, self._loss):
            return (
                "rounding decides how it trains, as where an optimizer that does not look at a gradient's size follows "
                "one that is 0 but for rounding (that of a bias before a batch normalisation: leave such biases out)"
            )
        return ""

    def _fresh_loop(self) -> _ReadingOnce:
        read = {
            (step, number): batch
            for step, batches in enumerate(getattr(self, "_batches", ()))
            for number, batch in enumerate(batches)
        }
        return _ReadingOnce(self._problem, self._settings, read)

    def _plain_loss(self, values: Hyperparameters, nudge: float = 0.0) -> float:
        if is_built_in(self._loop.optimizer):
            with self._loop.replaying:  # it drops the units that the engine drops
                return plain_val_loss(self._problem, self._loop, values, self._batches, DoublePrecision(), nudge)
        with DoublePrecision():
            return self._loop.evaluate(self._loop.run(values)).loss

    def _run(self, mode: str) -> tuple[float, Hyperparameters]:
        loop = self._fresh_loop()
        if mode == "forward":
            run: HypergradientRun = ForwardRun(loop, self._values)
        else:
            size = try_graph(self._problem, self._settings, self._values, DoublePrecision()).size
            run = ReverseRun(loop, self._values, room=Room(inf, 1, size))  # with all graphs, where there may be any
        with loop.running(), DoublePrecision():
            run.advance(run.length)
        result = run.result()
        return result.val_loss, result.hypergradients

    def _errors(self, found: Hyperparameters, tolerance: float) -> dict[str, float]:
        """By hyperparameter, the largest error of its elements relative to the largest of them, without hyperparameters
        whose derivatives differences cannot tell."""
        errors: dict[str, float] = {}
        with self._loop.running():
            for name, gradients in found.items():
                scale = float(gradients.abs().max())
                each = [self._nearest(name, i, g, scale, tolerance) for i, g in enumerate(gradients.tolist())]
                told = [error for error in each if error is not None]
                if told:
                    errors[name] = max(told, key=_or_infinite)
        return errors

    def _nearest(self, name: str, element: int, gradient: float, scale: float, tolerance: float) -> float | None:
        """Distance from the nearest difference of those that rounding leaves exact enough, if there are any."""
        if not isfinite(gradient):
            return nan
        nearest = None
        difference = partial(self._difference, name, element)
        for estimate, step in estimates(difference, float(self._values[name][element])):
            largest = max(scale, abs(estimate))
            if not isfinite(estimate) or _ROUNDING * max(abs(self._loss), 1e-3) / step > tolerance * largest:
                continue
            error = abs(gradient - estimate) / largest
            nearest = error if nearest is None else min(nearest, error)
            if nearest <= tolerance:
                break
        return nearest

    def _difference(self, name: str, element: int, step: float) -> float:
        key = name, element, step
        if key not in self._differences:  # the modes share them
            self._differences[key] = differences(self._plain_loss, self._values, name, element, step)
        return self._differences[key]

    @cached_property
    def _named_culprit(self) -> str:
        loop = self._fresh_loop()
        with suppress(Exception), loop.running(), DoublePrecision():  # that something is wrong is known
            found = culprit(loop, self._values)
            return f": {found}" if found else ""
        return ""


def _reduced(problem: Problem, examples: int | None) -> Problem:
    """A problem with small batches and a part of its validation split, of which metrics may have no value."""
    split: Split = problem.val  # type: ignore[assignment]
    size = min(len(split), examples or _VAL_EXAMPLES)
    batch_size = problem.batch_size if examples is None else min(problem.batch_size, examples)
    without: dict[str, Any] = {"test": None, "metrics": {}, "objective": None, "directions": {}}
    small = {"batch_size": batch_size, "eval_batch_size": size}
    return problem.replace(val=split.head(size), workers=0, **without, **small)


def _differ(val_loss: float, other: float) -> bool:
    """Whether two validation losses after a few steps differ by more than rounding."""
    return abs(val_loss - other) > 1e-8 * max(abs(other), 1e-3)


def _or_infinite(error: float) -> float:
    """An error as a key to order by: inf where it is not a number."""
    return inf if isnan(error) else error


def _between(lower: float, upper: float, *, log: bool) -> float:
    return float((lower * upper) ** 0.5) if log else (lower + upper) / 2


def _verdict(modes: Sequence[str], errors: dict[str, float], refusals: Refusals, note: str) -> ProblemCheck:
    works = [mode for mode in modes if mode not in refusals]
    lines = list(dict.fromkeys(refusals.values()))
    if not works:
        return ProblemCheck(False, "; ".join(lines), errors, refusals)
    agreed = ", ".join(f"{mode} {errors[mode]:.1e}" for mode in works if mode in errors)
    message = f"hypergradients agree with finite differences (relative error: {agreed})" if agreed else ""
    return ProblemCheck(True, "; ".join(filter(None, [message, note, *lines])), errors, refusals)
