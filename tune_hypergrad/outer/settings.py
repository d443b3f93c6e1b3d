"""Outer searches by the name of their rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tune_hypergrad.domains import is_number
from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.outer.line_search import LineSearch
from tune_hypergrad.outer.robust import RobustSearch
from tune_hypergrad.outer.searches import Descent, OuterSearch, PaperSearch
from tune_hypergrad.space import Range

_OWN: dict[str, dict[str, Any]] = {
    "robust": {"lengths": None, "trainings": None, "confirmations": None, "polish": False, "adaptive_sharing": False},
    "line-search": {"trainings": None},
    "paper": {"lengths": None, "update": "sign", "default_step": 0.1, "tolerance": 1e-3},
}
"""Settings that not all rules have, with their defaults, by rule."""

RULES = tuple(_OWN)
"""Rules of outer searches, the default first: `RobustSearch`, `LineSearch` and `PaperSearch`."""


@dataclass(frozen=True)
class SearchSettings:
    """How hyperparameters are searched by hypergradients.

    Raises:
        InputError: a setting that cannot work, or that belongs to another rule.
    """

    rule: str = "robust"
    """"robust" (see `RobustSearch`), "line-search": steps that are known to lower the loss (see `LineSearch`), or
    "paper": sign steps from zero (Micaelli & Storkey 2021, Appendix G)."""
    step_sizes: Mapping[str, float] = field(default_factory=dict)
    """First outer step sizes by name, on the scale of the domain; those missing are the rule's own."""
    ensemble: int = 1
    """Runs of an outer step, with different seeds, whose hypergradients are averaged. The robust rule takes more where
    nothing gets better, line searches where noise hides whether anything does."""
    outer_steps: int | None = None
    """Outer steps (of line searches: trials) at the most; None is no limit."""
    new_seeds: bool = True
    """Whether every outer step has initial weights, order and draws of its own; without, all have the same."""
    new_splits: bool = False
    """Whether every run draws training and validation examples anew from both, by class."""
    lengths: Sequence[int] | None = None
    """Robust and paper's rule: inner steps of successive outer steps' runs, the last one for all further ones, such as
    (100, 1000): short runs find the way for long ones. None: all have as many as the setting `steps` says."""
    adaptive_sharing: bool | None = None
    """Robust rule: whether neighbouring windows, of a hyperparameter that has at least 16, move together where that is
    better (see `Sharing`); None is False."""
    trainings: float | None = None
    """Robust rule and line searches: what the search may cost, in plain trainings, confirmations included; None is no
    limit."""
    confirmations: int | None = None
    """Robust rule: other seeds with which the two best schedules, and where it began if `polish`, are trained before
    the search ends; None is 3, or fewer where those of two schedules would cost more than a fifth of `trainings`."""
    polish: bool | None = None
    """Robust rule: whether the outcome must not be worse than where it began, by validation; None is False."""
    update: str | None = None
    """Paper's rule: "sign", "sgd" or "adam"; None is "sign"."""
    default_step: float | None = None
    """Paper's rule: step size as a share of the range; None is 0.1."""
    tolerance: float | None = None
    """Paper's rule: converged when no step size is above this share of its range; None is 0.001."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InputError(
                f"unknown rule {self.rule!r}: choose one of {', '.join(RULES)}{did_you_mean(self.rule, RULES)}"
            )
        for name, least in (("ensemble", 1), ("outer_steps", 1), ("confirmations", 0)):
            count = getattr(self, name)
            whole = isinstance(count, int) and not isinstance(count, bool) and count >= least
            if not whole and not (count is None and name != "ensemble"):
                raise InputError(f"{name} is {count!r}: it must be a whole number of at least {least}")
        if self.lengths is not None:
            lengths = tuple(self.lengths)
            if not lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths):
                raise InputError(f"lengths is {self.lengths!r}: give inner steps, whole numbers of at least 1")
            object.__setattr__(self, "lengths", lengths)
        if self.trainings is not None and not is_number(self.trainings):
            raise InputError(f"trainings is {self.trainings!r}: give a number of plain trainings, or None for no limit")
        for name in dict.fromkeys(name for settings in _OWN.values() for name in settings):
            if getattr(self, name) is not None and name not in _OWN[self.rule]:
                others = " or ".join(repr(rule) for rule, settings in _OWN.items() if name in settings)
                raise InputError(f"{name} belongs to rule={others}: drop it, or set the rule")

    def search(
        self,
        ranges: Mapping[str, Range],
        initial: Mapping[str, Tensor] | None = None,
        *,
        polish: bool | None = None,
    ) -> OuterSearch:
        """The search at its beginning.

        Args:
            ranges: what is tuned, by flat name.
            initial: values to begin with, each of shape [N]; those missing begin where the rule does.
            polish: in place of the setting.

        Raises:
            InputError: names, values or step sizes that do not fit.
        """
        shared: dict[str, Any] = {
            "ensemble": self.ensemble,
            "outer_steps": self.outer_steps,
            "new_seeds": self.new_seeds,
        }
        own = {
            name: default if getattr(self, name) is None else getattr(self, name)
            for name, default in _OWN[self.rule].items()
        }
        if self.rule == "line-search":
            return LineSearch(ranges, initial=initial, step_sizes=self.step_sizes, **shared, **own)
        if self.rule == "robust":
            own["polish"] = own["polish"] if polish is None else polish
            return RobustSearch(ranges, initial=initial, step_sizes=self.step_sizes, **shared, **own)
        steps = {name: own.pop(name) for name in ("update", "default_step")}
        descent = Descent(ranges, initial=initial, step_sizes=self.step_sizes, **steps)
        return PaperSearch(descent, **shared, **own)
