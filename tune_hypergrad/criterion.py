"""`Criterion`: what incumbents are chosen by, a figure of the validation split, and which way is better."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from tune_hypergrad.errors import InputError, did_you_mean

LOSS = "loss"
"""The name of the validation loss among metrics."""
MODES = ("min", "max")


class Figures(Protocol):
    """What a split was evaluated to: its loss and its metrics."""

    @property
    def loss(self) -> float:
        """The mean loss over the split."""

    @property
    def metrics(self) -> Any:
        """The split's metrics by name."""


@dataclass(frozen=True)
class Criterion:
    """The figure that incumbents are chosen by, and its direction; by default the validation loss, the lower the
    better."""

    metric: str = LOSS
    """A metric's name, or "loss"."""
    mode: str = "min"
    """Which way the figure is better: "min" or "max"; "min" by default."""

    @classmethod
    def parse(cls, text: Any, metrics: Collection[str] | None = None) -> Criterion:
        """The criterion that a text such as "max accuracy" states.

        Args:
            text: a direction and a name.
            metrics: names that there are besides "loss"; None: any.

        Raises:
            InputError: it says nothing of the kind, or there is no such metric.
        """
        mode, _, metric = text.strip().partition(" ") if isinstance(text, str) else ("", "", "")
        metric = metric.strip()
        if mode not in MODES or not metric:
            raise InputError(f'objective is {text!r}: give a direction and a metric, such as "max accuracy"')
        known = [LOSS, *(metrics or ())]
        if metrics is not None and metric not in known:
            close = did_you_mean(metric, known)
            raise InputError(f"objective is {text!r}, but there is no such metric: there are {', '.join(known)}{close}")
        if metric == LOSS and mode == "max":
            raise InputError(f'objective is {text!r}: hypergradients lower the loss; give "min loss", or a metric')
        return cls(metric, mode)

    def __str__(self) -> str:
        return f"{self.mode} {self.metric}"

    @property
    def column(self) -> str:
        """The figure's name in results, such as "val_accuracy"."""
        return f"val_{self.metric}"

    @property
    def larger_is_better(self) -> bool:
        """Whether larger values of the figure are better, as for accuracies."""
        return self.mode == "max"

    @property
    def is_loss(self) -> bool:
        """Whether the figure is the validation loss, which hypergradients follow."""
        return self.metric == LOSS

    def turned(self, value: Any) -> Any:
        """A value of the figure, or each in a series, turned so that less is better; turned again, it is the value."""
        return -value if self.larger_is_better else value

    def score(self, figures: Figures) -> float:
        """The figure of an evaluated split, turned so that less is better."""
        return float(self.turned(figures.loss if self.is_loss else figures.metrics[self.metric]))
