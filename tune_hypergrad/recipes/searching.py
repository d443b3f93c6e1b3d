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

Found = dict[str, list[float]]
"""Hyperparameters by name, a value for each window."""

_FIRST_RETRAINING_SEED = 1000


@dataclass(frozen=True)
class Retraining:
    """How schedules are trained anew and tested."""

    epochs: float
    """Length of a run."""
    seeds: int
    """How many runs, with seeds that no search has used."""
    all_data: bool
    """Whether the validation examples are trained on, too."""

    def jobs(self, name: str, experiment: Experiment, values: Found) -> list[Job]:
        """The runs of a schedule; `name` names them."""
        arguments = {"experiment": experiment, "values": values, "epochs": self.epochs, "all_data": self.all_data}
        seeds = [_FIRST_RETRAINING_SEED + seed for seed in range(self.seeds)]
        return [Job(f"{name}/{seed}", retrain, {**arguments, "seed": seed}) for seed in seeds]


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
        """The values after so many outer steps, which have been done: those that were run next, or the rule's."""
        rows = self.rows(results)
        if outer_steps < len(rows):
            return dict(rows[outer_steps]["values"])
        return as_lists(after(RULES[self.rule](self.windows, self.step_sizes), rows).values)

    def best(self, results: Results, outer_steps: int) -> int | None:
        """The outer step, among the first so many, whose run is the best by validation: of the longest ones, those of
        another length being no match; None where no such run has come to a finite loss."""
        rows = enumerate(self.rows(results)[:outer_steps])
        losses = {index: row["val_loss"] for index, row in rows if row["epochs"] == max(self.epochs)}
        living = [index for index, loss in losses.items() if math.isfinite(loss)]
        return min(living, key=lambda index: losses[index], default=None)

    def stands_for(self, results: Results, outer_steps: int) -> int | None:
        """The outer step whose schedule the search stands for after so many: the next one's by the paper's rule, which
        retrains what it has come to, and the best one's by validation otherwise."""
        return outer_steps if self.rule == "paper" else self.best(results, outer_steps)

    def ends(self, results: Results) -> dict[str, int]:
        """What a search has come to, once it is done: outer steps by "last schedule" and "best by validation"."""
        if len(self.rows(results)) < len(self.epochs):
            return {}
        best = self.best(results, len(self.epochs))
        return {"last schedule": len(self.epochs)} | ({} if best is None else {"best by validation": best})

    def test_name(self, outer_step: int) -> str:
        """What retrainings of an outer step's schedule are called."""
        return f"test/{self.name}/{self.seed}/step-{outer_step:02d}"

    def retrained(self, results: Results, outer_step: int, how: Retraining) -> list[Job]:
        """Retrainings of the schedule that an outer step runs, or would run after the last."""
        return how.jobs(self.test_name(outer_step), self.experiment, self.found(results, outer_step))

    def tested(self, results: Results, which: str) -> list[float]:
        """Test accuracies, as far as they are known, of one of the schedules that it has come to (see `ends`)."""
        step = self.ends(results).get(which)
        return [] if step is None else test_accuracies(results, self.test_name(step))

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


def test_accuracies(results: Results, name: str) -> list[float]:
    """Test accuracies of the retrainings of this name that are done."""
    return [result["test_accuracy"] for key, result in results.items() if key.rpartition("/")[0] == name]


def cosine(peak: float, windows: int) -> list[float]:
    """Learning rates from `peak` to zero along half a cosine."""
    return [peak / 2 * (1 + math.cos(math.pi * window / windows)) for window in range(windows)]
