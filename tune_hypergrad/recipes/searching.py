"""Searches by hypergradients as chains of jobs: every outer step is a job, whose input follows from those before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.recipes.jobs import Job, Results
from tune_hypergrad.recipes.rules import RULES, after, as_lists
from tune_hypergrad.recipes.training import Experiment, differentiate, retrain

FIRST_RETRAINING_SEED = 1000
"""Beyond the seeds of searches."""

Found = dict[str, list[float]]
"""Hyperparameters by name, a value for each window."""


@dataclass(frozen=True)
class Search:
    """One search by hypergradients."""

    name: str
    """Names its jobs."""
    rule: str
    """One of `RULES`."""
    experiment: Experiment
    """What is trained."""
    windows: Mapping[str, int]
    """What is tuned."""
    step_sizes: Mapping[str, float]
    """The paper's step sizes by name."""
    epochs: Sequence[float]
    """Length of every outer step's run."""
    redrawn: bool
    """Whether every outer step draws initial weights, order and validation examples anew."""
    seed: int = 0
    """Of the search."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `differentiate`, such as `horizon`."""

    def job_name(self, outer_step: int) -> str:
        """What the job of an outer step is called."""
        return f"search/{self.name}/{self.seed}/{outer_step:02d}"

    def rows(self, results: Results) -> list[dict[str, Any]]:
        """What the outer steps gave, as far as they are done."""
        names = [self.job_name(outer_step) for outer_step in range(len(self.epochs))]
        return [results[name] for name in names if name in results]

    def found(self, results: Results, outer_steps: int) -> Found:
        """The rule's values after so many outer steps, which have been done."""
        rule = RULES[self.rule](self.windows, self.step_sizes)
        return as_lists(after(rule, self.rows(results)[:outer_steps]).values)

    def best(self, results: Results, outer_steps: int) -> int | None:
        """The outer step, among the first so many, whose run is the best by validation: of the longest ones, those of
        another length being no match; None where no such run has come to a finite loss."""
        rows = enumerate(self.rows(results)[:outer_steps])
        losses = {index: row["val_loss"] for index, row in rows if row["epochs"] == max(self.epochs)}
        living = [index for index, loss in losses.items() if math.isfinite(loss)]
        return min(living, key=lambda index: losses[index], default=None)

    def next_job(self, results: Results) -> Job | None:
        """The job of the next outer step; None where all are done."""
        done = len(self.rows(results))
        if done == len(self.epochs):
            return None
        stream = done if self.redrawn else 0
        arguments = {
            "experiment": self.experiment,
            "values": self.found(results, done),
            "epochs": self.epochs[done],
            "seed": fold_seed(self.seed, stream) & 0x7FFFFFFF,
            "split_seed": fold_seed(self.seed, stream) & 0x7FFFFFFF if self.redrawn else None,
            **self.options,
        }
        return Job(self.job_name(done), differentiate, arguments)


def retrainings(
    name: str, experiment: Experiment, values: Found, *, epochs: float, seeds: int, all_data: bool
) -> list[Job]:
    """Jobs that train with a schedule anew, with seeds that no search has used, and test."""
    arguments = {"experiment": experiment, "values": values, "epochs": epochs, "all_data": all_data}
    seeded = [FIRST_RETRAINING_SEED + seed for seed in range(seeds)]
    return [Job(f"{name}/{seed}", retrain, {**arguments, "seed": seed}) for seed in seeded]


def test_accuracies(results: Results, name: str) -> list[float]:
    """Test accuracies of the retrainings of this name that are done."""
    return [result["test_accuracy"] for key, result in results.items() if key.rpartition("/")[0] == name]


def cosine(peak: float, windows: int) -> list[float]:
    """Learning rates from `peak` to zero along half a cosine."""
    return [peak / 2 * (1 + math.cos(math.pi * window / windows)) for window in range(windows)]
