"""Which modes have right derivatives of a problem: found out once, and remembered with the problem."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.check import check_problem, usual_values
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.inspection import inspect, inspect_training

EXAMPLES = 8
"""Training examples in a step of a check that runs by itself."""


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
    findings, key = loop.source.findings, (mode, *_key(loop, hyperparameters))
    known = findings.get(key)
    if known is None or (check and not known.checked and known.refusal is None):
        loop.source.check()
        refusal = (_checked if check else _inspected)(loop, hyperparameters, mode)
        findings[key] = known = _Finding(refusal, check)
    return known.refusal


def check_training(loop: InnerLoop) -> None:
    """Refuse a problem that plain training gets wrong, for whatever is searched.

    Raises:
        InputError: it does.
    """
    key = ("training", *_key(loop, ()))
    if key not in loop.source.findings:
        inspect_training(InnerLoop(loop.source.independent(), loop.settings))
        loop.source.findings[key] = True


def remember(loop: InnerLoop, hyperparameters: Iterable[str], mode: str, refusal: str) -> None:
    """Refuse a mode from now on, after what a run has found out."""
    loop.source.findings[(mode, *_key(loop, hyperparameters))] = _Finding(refusal, checked=True)


class _Finding(NamedTuple):
    refusal: str | None
    checked: bool
    """Whether the mode was compared with plain training."""


def _inspected(loop: InnerLoop, hyperparameters: Mapping[str, Tensor], mode: str) -> str | None:
    # of a loop of its own, whose model may be left with what it keeps between calls
    own = {name: v.detach().to(device=loop.device, dtype=loop.dtype) for name, v in hyperparameters.items()}
    return inspect(InnerLoop(loop.source.independent(), loop.settings), own, (mode,)).get(mode)


def _checked(loop: InnerLoop, hyperparameters: Mapping[str, Tensor], mode: str) -> str | None:
    settings = loop.settings
    values = {name: v[:1] for name, v in hyperparameters.items()}
    check = check_problem(
        loop.source,
        {**values, **usual_values(loop, hyperparameters)},
        modes=(mode,),
        optimizer=settings.optimizer,
        fixed=settings.fixed,
        seed=settings.seed,
        clip_gradient=settings.clip_gradient,
        examples=EXAMPLES,
    )
    if not check.ok and mode not in check.refusals:
        raise InputError(check.message)
    return check.refusals.get(mode)


def _key(loop: InnerLoop, hyperparameters: Iterable[str]) -> tuple[Any, ...]:
    settings, update = loop.settings, loop.optimizer.update
    optimizer = (loop.optimizer.name, update.__module__, update.__qualname__)
    return optimizer, settings.clip_gradient is None, *sorted({*hyperparameters, *settings.fixed})
