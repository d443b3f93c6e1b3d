"""The outer searches that recipes compare, by name, and their next values after some runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.outer import Descent, Outcome, OuterSearch, PaperSearch, RobustSearch
from tune_hypergrad.outer.natural_scales import natural_start
from tune_hypergrad.space import Range, Scale

Windows = Mapping[str, int]
"""What is tuned: the number of windows by name."""


def paper(windows: Windows, step_sizes: Mapping[str, float]) -> OuterSearch:
    """Sign steps on a linear scale from zero, halved where a sign flips (Micaelli & Storkey 2021, Appendix G).

    Values stay at 0 or above; theirs may become negative, and then count as converged.
    """
    upper = {"momentum": 0.999}
    ranges = {name: Range(count, 0.0, upper.get(name, math.inf)) for name, count in windows.items()}
    return PaperSearch(Descent(ranges, step_sizes=step_sizes), tolerance=0.0)


def ours(windows: Windows, step_sizes: Mapping[str, float]) -> OuterSearch:
    """`RobustSearch` in the default search space, all of whose runs are outer steps: without confirmations, and without
    plain trainings before them. The paper's step sizes do not apply."""
    known: dict[str, tuple[float, float, Scale]] = {
        "lr": (1e-4, 1.0, "log"),
        "momentum": (0.0, 0.99, "complement"),
        "weight_decay": (1e-6, 1e-2, "log"),
    }
    ranges = {name: Range(count, *known[name]) for name, count in windows.items()}
    start = {name: natural_start(name, limits) for name, limits in ranges.items()}
    return RobustSearch(ranges, initial=start, confirmations=0)


RULES: dict[str, Callable[[Windows, Mapping[str, float]], OuterSearch]] = {"paper": paper, "ours": ours}
"""`rule(windows, the paper's step sizes)`, by name."""


def after(rule: OuterSearch, rows: Sequence[Mapping[str, Any]]) -> OuterSearch:
    """The rule after runs, each a row of `differentiate`: what it needs to know is played back to it."""
    for row in rows:
        gradients = {name: torch.tensor(g, dtype=torch.float64) for name, g in row["hypergradients"].items()}
        rule.tell([Outcome(row["val_loss"], row["untrained_loss"], gradients)])
    return rule


def as_lists(values: Hyperparameters) -> dict[str, list[float]]:
    """Values as JSON has them."""
    return {name: windows.tolist() for name, windows in values.items()}
