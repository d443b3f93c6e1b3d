"""`fds-fig2`: error of the hypergradient against the size of the windows that share it (Micaelli & Storkey 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tune_hypergrad.recipes.recipe import scaled
from tune_hypergrad.recipes.searching import cosine
from tune_hypergrad.recipes.training import Experiment

PUBLISHED: Mapping[str, float] = {"greedy": 0.393, "W=1": 0.072, "W=50": 0.0376, "W=250": 0.065}
"""Published mean squared error of the hypergradient, read off Figure 2, by window size W; W=1 shares nothing."""


@dataclass(frozen=True)
class Settings:
    """The published settings."""

    problem: str = "svhn"
    batch_size: int = 128
    eval_batch_size: int = 1000
    clip_gradient: float | None = 1.0
    momentum: float = 0.9
    peak: float = 0.01
    """Where the cosine schedule of learning rates begins, which hypergradients are taken at."""
    steps: int = scaled(250, least=20)
    """Inner steps T."""
    seeds: int = scaled(100, least=4)
    """Runs whose hypergradients are compared."""

    @property
    def experiment(self) -> Experiment:
        """What is trained."""
        fixed = {"momentum": self.momentum}
        return Experiment(self.problem, self.batch_size, self.eval_batch_size, self.clip_gradient, fixed)

    @property
    def learning_rates(self) -> list[float]:
        """A learning rate for every step."""
        return cosine(self.peak, self.steps)
