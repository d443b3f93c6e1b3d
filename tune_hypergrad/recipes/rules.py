"""The outer searches that recipes compare, by name, and their next values after some runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch

from tune_hypergrad.hypergradients import Descent, OuterLoop
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.space import Range

Windows = Mapping[str, int]
"""What is tuned: the number of windows by name."""


class Rule(Protocol):
    """A search by hypergradients."""

    @property
    def values(self) -> Hyperparameters:
        """What to run next."""

    def tell(self, val_loss: float, hypergradients: Hyperparameters, untrained_loss: float, /) -> object:
        """Take a run with `values` into account."""


class Bare:
    """The paper's search: every run is followed by a step, and nothing is taken back (Micaelli & Storkey 2021)."""

    def __init__(self, descent: Descent) -> None:
        self.descent = descent

    @property
    def values(self) -> Hyperparameters:
        """What to run next."""
        return dict(self.descent.values)

    def tell(self, val_loss: float, hypergradients: Hyperparameters, untrained_loss: float, /) -> None:
        """Step along the hypergradients."""
        self.descent.step(hypergradients)


def paper(windows: Windows, step_sizes: Mapping[str, float]) -> Bare:
    """Sign steps on a linear scale from zero, halved where a sign flips (Micaelli & Storkey 2021, Appendix G).

    Values stay at 0 or above; theirs may become negative, and then count as converged.
    """
    upper = {"momentum": 0.999}
    ranges = {name: Range(count, 0.0, upper.get(name, math.inf)) for name, count in windows.items()}
    return Bare(Descent(ranges, step_sizes=step_sizes))


def natural(windows: Windows, step_sizes: Mapping[str, float]) -> OuterLoop:
    """Sign steps on natural scales with `OuterLoop`'s safeguard: logarithms of rates and decay, and of 1 - momentum.

    Begins at a learning rate of 0.01, momentum 0.5, weight decay 1e-5. The paper's step sizes do not apply.
    """
    ranges = {name: replace(_NATURAL[name].limits, windows=count) for name, count in windows.items()}
    starts = {name: torch.full((count,), _NATURAL[name].start, dtype=torch.float64) for name, count in windows.items()}
    return OuterLoop(Descent(ranges, initial=starts, step_sizes={name: _NATURAL[name].step for name in windows}))


class _Natural(NamedTuple):
    """What a hyperparameter is searched by on its natural scale."""

    limits: Range
    start: float
    step: float
    """On the internal scale."""


_NATURAL = {
    "lr": _Natural(Range(1, 1e-4, 1.0, "log"), 0.01, 0.7),
    "momentum": _Natural(Range(1, 0.0, 0.99, "complement"), 0.5, 0.5),
    "weight_decay": _Natural(Range(1, 1e-6, 1e-2, "log"), 1e-5, 1.0),
}

RULES: dict[str, Callable[[Windows, Mapping[str, float]], Rule]] = {
    "paper": paper,
    "ours": natural,
}
"""`rule(windows, the paper's step sizes)`, by name."""


def after(rule: Rule, rows: Sequence[Mapping[str, Any]]) -> Rule:
    """The rule after runs, each a row of `differentiate`: what it needs to know is played back to it."""
    for row in rows:
        gradients = {name: torch.tensor(g, dtype=torch.float64) for name, g in row["hypergradients"].items()}
        rule.tell(row["val_loss"], gradients, row["untrained_loss"])
    return rule


def as_lists(values: Hyperparameters) -> dict[str, list[float]]:
    """Values as JSON has them."""
    return {name: windows.tolist() for name, windows in values.items()}
