"""Which modes have right derivatives of a problem: found out once, and remembered with the problem."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.check import CHECKED_MODES, check_problem, usual_values
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.inspection import Refusals, inspect, inspect_training

EXAMPLES = 8
"""Training examples in a step of a check that runs by itself."""


def refusals_of(loop: InnerLoop, hyperparameters: Mapping[str, Tensor], *, check: bool) -> Refusals:
    """Why modes have no right derivative of a problem, by mode.

    Args:
        loop: a problem and how it is trained.
        hyperparameters: what is tuned, values by name.
        check: also compare the modes with plain training, on a few small batches.

    Raises:
        InputError: no mode has, or training is not what a loop of the program's own would do.
    """
    problem, key = loop.source, _key(loop, hyperparameters)
    known = problem.findings.get(key)
    if known is None or (check and not known["checked"]):
        problem.check()
        found = _checked(loop, hyperparameters) if check else _inspected(loop, hyperparameters)
        problem.findings[key] = known = {"refusals": found, "checked": check}
    refusals: Refusals = known["refusals"]
    if all(mode in refusals for mode in CHECKED_MODES):
        raise InputError("; ".join(dict.fromkeys(refusals.values())))
    return refusals


def check_training(loop: InnerLoop) -> None:
    """Refuse a problem that plain training gets wrong, for whatever is searched.

    Raises:
        InputError: it does.
    """
    key = ("training", loop.settings.optimizer)
    if key not in loop.source.findings:
        inspect_training(InnerLoop(loop.source.independent(), loop.settings))
        loop.source.findings[key] = True


def remember(loop: InnerLoop, hyperparameters: Iterable[str], refusals: Refusals) -> None:
    """Add what a run has found out."""
    loop.source.findings[_key(loop, hyperparameters)]["refusals"].update(refusals)


def _inspected(loop: InnerLoop, hyperparameters: Mapping[str, Tensor]) -> Refusals:
    # of a loop of its own, whose model may be left with what it keeps between calls
    own = {name: v.detach().to(device=loop.device, dtype=loop.dtype) for name, v in hyperparameters.items()}
    return inspect(InnerLoop(loop.source.independent(), loop.settings), own, tuple(CHECKED_MODES))


def _checked(loop: InnerLoop, hyperparameters: Mapping[str, Tensor]) -> Refusals:
    settings = loop.settings
    values = {name: v[:1] for name, v in hyperparameters.items()}
    check = check_problem(
        loop.source,
        {**values, **usual_values(loop, hyperparameters)},
        optimizer=settings.optimizer,
        fixed=settings.fixed,
        seed=settings.seed,
        clip_gradient=settings.clip_gradient,
        examples=EXAMPLES,
    )
    if not check.ok:
        raise InputError(check.message)
    return dict(check.refusals)


def _key(loop: InnerLoop, hyperparameters: Iterable[str]) -> Any:
    settings = loop.settings
    return settings.optimizer, settings.clip_gradient is None, *sorted({*hyperparameters, *settings.fixed})
