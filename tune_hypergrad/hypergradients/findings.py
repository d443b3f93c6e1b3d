"""What has been found out of a problem and of how it is trained, remembered with the problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from tune_hypergrad.curves import base_names
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.optimizers import is_built_in
from tune_hypergrad.space import flat_values

T = TypeVar("T")


def recall(
    loop: InnerLoop, hyperparameters: Iterable[str], subject: str, find: Callable[[], T], *, anew: bool = False
) -> T:
    """What `find` tells of a problem and of how it is trained, remembered: it is called the first time, or `anew`."""
    findings, key = findings_of(loop), (subject, *recipe_key(loop, hyperparameters))
    if anew or key not in findings:
        findings[key] = find()
    return findings[key]  # type: ignore[no-any-return]


def findings_of(loop: InnerLoop) -> dict[Any, Any]:
    """The dict in which findings are remembered: with the problem, or with the loop, whose optimizer may be like no
    other."""
    return loop.source.findings if is_built_in(loop.optimizer) else loop.findings


def recipe_key(loop: InnerLoop, hyperparameters: Iterable[str]) -> tuple[Any, ...]:
    """By what findings are remembered: how a problem is trained, and which hyperparameters are tuned."""
    settings = loop.settings
    fixed = tuple(sorted(flat_values(settings.fixed).items()))
    optional = settings.clip_gradient, settings.clip_norm, settings.ema, settings.autocast
    recipe = *(value is not None for value in optional), settings.channels_last
    return loop.optimizer.name, loop.device.type, recipe, fixed, *sorted(base_names(hyperparameters))
