"""Does the engine give right hypergradients on this problem? A comparison with finite differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.hypergradients.hypergradient import hypergradient_run
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, TrainingSettings
from tune_hypergrad.hypergradients.optimizers import Optimizer
from tune_hypergrad.hypergradients.run import check_values
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.problem import Problem


@dataclass(frozen=True)
class ProblemCheck:
    """What `check_problem` found."""

    ok: bool
    """Whether every mode that works agrees with finite differences."""
    message: str
    """One line: all is well, or what will not work and why."""
    errors: dict[str, float] = field(default_factory=dict)
    """Largest relative error against finite differences, by mode."""

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
    tolerance: float = 1e-4,
) -> ProblemCheck:
    """Compare the engine's hypergradients with central finite differences on the user's own model, in float64.

    Args:
        problem: the problem; its data is used as it is, its model converted to float64.
        hyperparameters: values to differentiate by, as for `hypergradient`; None takes a learning rate of 0.05 and,
            where the optimizer has them, a momentum of 0.5 and a weight decay of 1e-3.
        steps: inner steps; few are enough, since an error in one step is an error in all.
        optimizer: inner optimizer.
        fixed: hyperparameters held constant.
        seed: seeds the runs.
        tolerance: relative error up to which the two agree. A ReLU or max-pooling may sit on a kink, where finite
            differences are off: try another seed before you distrust the engine.

    Returns:
        `ProblemCheck`: `.ok`, and a one-line `.message`. Nothing that the problem does wrong is raised.
    """
    try:
        problem.check()
        settings = TrainingSettings(steps, optimizer, fixed or {}, seed)
        loop = InnerLoop(problem.replace(model=partial(_double, problem.model)), settings)
        values = _default_values(loop, fixed or {}) if hyperparameters is None else dict(hyperparameters)
        check_values(loop, values)
        values = {name: value.detach().double() for name, value in values.items()}
        expected = finite_differences(loop, values)
    except InputError as error:
        return ProblemCheck(False, str(error))
    except Exception as error:
        return ProblemCheck(False, f"the model does not train in float64, which this check needs: {in_one_line(error)}")
    errors, failures = {}, []
    for mode in ("forward", "reverse"):
        try:
            errors[mode] = _relative_error(_run(loop, values, mode), expected)
        except Exception as error:
            failures.append(f"{mode} mode does not work on this model ({in_one_line(error)})")
    return _verdict(errors, failures, tolerance)


def finite_differences(loop: InnerLoop, hyperparameters: Hyperparameters, epsilon: float = 1e-6) -> Hyperparameters:
    """Central finite differences of the validation loss by every element, over the whole run; meant for float64."""
    differences = {name: torch.zeros_like(values) for name, values in hyperparameters.items()}
    with loop.running():
        for name, values in hyperparameters.items():
            for element in range(len(values)):
                losses = []
                for shift in (epsilon, -epsilon):
                    moved = values.clone()
                    moved[element] += shift
                    state = loop.run({**hyperparameters, name: moved})
                    losses.append(loop.evaluate(state).loss)
                differences[name][element] = (losses[0] - losses[1]) / (2 * epsilon)
    return differences


def _run(loop: InnerLoop, values: Hyperparameters, mode: str) -> Hyperparameters:
    run = hypergradient_run(loop, values, differentiation=mode)
    with loop.running():
        run.advance(run.length)
    return run.result().hypergradients


def _verdict(errors: dict[str, float], failures: list[str], tolerance: float) -> ProblemCheck:
    wrong = [f"{mode} mode is off by {error:.1e}" for mode, error in errors.items() if not error <= tolerance]
    if wrong:
        advice = (
            "a module without exact second derivatives, or a kink: try another seed, then replace modules one by one"
        )
        message = f"hypergradients differ from finite differences: {', '.join(wrong)} ({advice})"
        return ProblemCheck(False, "; ".join([message, *failures]), errors)
    if not errors:
        return ProblemCheck(False, "; ".join(failures))
    agreed = ", ".join(f"{mode} {error:.1e}" for mode, error in errors.items())
    message = f"hypergradients agree with finite differences (relative error: {agreed})"
    return ProblemCheck(True, "; ".join([message, *failures]), errors)


def _relative_error(actual: Hyperparameters, expected: Hyperparameters) -> float:
    """Largest difference within a hyperparameter, relative to its largest element."""
    worst = 0.0
    for name, reference in expected.items():
        scale = float(reference.abs().max().clamp_min(1e-8))
        error = float((actual[name] - reference).abs().max()) / scale
        worst = error if error != error else max(worst, error)
    return worst


def _default_values(loop: InnerLoop, fixed: Mapping[str, Any]) -> Hyperparameters:
    defaults = {"lr": 0.05, "momentum": 0.5, "weight_decay": 1e-3}
    names = [name for name in defaults if name in loop.optimizer.hyperparameters and name not in fixed]
    return {name: torch.tensor([defaults[name]], dtype=torch.float64) for name in names}


def _double(factory: Any) -> nn.Module:
    model: nn.Module = factory()
    return model.double()
