"""Which modes have right derivatives of a problem: found out once, and remembered with the problem."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

from torch import Tensor

from tune_hypergrad.curves import split_group, split_name
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.check import CHECKED_GROUPS, check_problem, usual_values
from tune_hypergrad.hypergradients.findings import findings_of, recipe_key
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.inspection import inspect, inspect_training

T = TypeVar("T")

EXAMPLES = 8
"""Number of training examples in a step of a check that runs by itself."""


def refusal_of(loop: InnerLoop, hyperparameters: Mapping[str, Tensor], mode: str, *, check: bool) -> str | None:
    """Why a mode has no right derivative of a problem: one line, or None.

    Args:
        loop: a problem and how it is trained.
        hyperparameters: what is tuned, values by name.
        mode: "forward" or "reverse".
        check: also compare the mode with plain training, on a few small batches.

    Raises:
        InputError: training fails, or is not what a loop of the program's own would do.
    """
    findings, key = findings_of(loop), (mode, *recipe_key(loop, hyperparameters))
    known = findings.get(key)
    if known is None or (check and not known.checked and known.refusal is None):
        loop.source.check()
        refusal = (_checked if check else _inspected)(loop, hyperparameters, mode)
        findings[key] = known = _Finding(refusal, check)
    return known.refusal


def check_training(loop: InnerLoop) -> None:
    """Refuse a problem that plain training gets wrong, whatever is searched.

    Raises:
        InputError: it does.
    """
    key = ("training", *recipe_key(loop, ()))
    if key not in findings_of(loop):
        inspect_training(InnerLoop(loop.source.independent(), loop.settings))
        findings_of(loop)[key] = True


def remember(loop: InnerLoop, hyperparameters: Iterable[str], mode: str, refusal: str) -> None:
    """Refuse a mode from now on, after what a run has found out of it."""
    findings_of(loop)[(mode, *recipe_key(loop, hyperparameters))] = _Finding(refusal, checked=True)


class _Finding(NamedTuple):
    refusal: str | None
    checked: bool
    """Whether the mode was compared with plain training."""


def _inspected(loop: InnerLoop, hyperparameters: Mapping[str, Tensor], mode: str) -> str | None:
    # of a loop of its own, whose model may be left with what it keeps between calls
    own = {name: loop.values.placed(name, v) for name, v in hyperparameters.items()}
    return inspect(InnerLoop(loop.source.independent(), loop.settings), own, (mode,)).get(mode)


def _checked(loop: InnerLoop, hyperparameters: Mapping[str, Tensor], mode: str) -> str | None:
    settings, of_losses = loop.settings, loop.problem.loss_hyperparameters
    # the optimizer's values may be such as training diverges with, the losses' are what makes them what they are
    first = {name: value.reshape(1) for name, value in InnerLoop.scalars(loop, hyperparameters, 0).items()}
    first = _of_few_groups(first)
    usual = usual_values(loop, first)
    values = {name: v if name in of_losses else usual.get(name, v) for name, v in first.items()}
    fixed = {name: value for name, value in settings.fixed.items() if split_name(name)[0] not in values}
    check = check_problem(
        loop.source,
        values,
        modes=(mode,),
        optimizer=settings.optimizer,
        fixed=fixed,
        seed=settings.seed,
        clip_gradient=settings.clip_gradient,
        clip_norm=settings.clip_norm,
        ema=settings.ema,
        autocast=settings.autocast,
        channels_last=settings.channels_last,
        device=settings.device,
        examples=EXAMPLES,
    )
    if not check.ok and mode not in check.refusals:
        raise InputError(check.message)
    if check.ok and not check.errors:
        warnings.warn(f"hypergradients of {mode} mode: {check.message}", stacklevel=2)
    return check.refusals.get(mode)


def _of_few_groups(values: Mapping[str, T]) -> dict[str, T]:
    """Values without those of groups beyond the first few that a hyperparameter has, since all groups are computed
    alike."""
    few: dict[str, list[str]] = {}
    for name in values:
        few.setdefault(split_group(name)[0], []).append(name)
    kept = {name for names in few.values() for name in names[: CHECKED_GROUPS + 1]}
    return {name: value for name, value in values.items() if name in kept}
