"""HpBandSter's master without its network: which configuration runs next at which budget, and what its result changes.

The brackets are HpBandSter's own `SuccessiveHalving`, the configurations come from its own generators.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hpbandster.core.dispatcher import Job
from hpbandster.optimizers.iterations import SuccessiveHalving

from tune_hypergrad.searchers.brackets import Bracket
from tune_hypergrad.searchers.results import ExperimentResult

ConfigId = tuple[int, int, int]
"""Identity of a configuration: its bracket, the rung on which it began, and its index there."""


class Generator(Protocol):
    """What HpBandSter's configuration generators have in common."""

    def get_config(self, budget: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """A configuration for this budget, and what is known of how it was chosen."""

    def new_result(self, job: Job) -> None:
        """Learn from a finished job."""


@dataclass
class Sampler:
    """Where brackets get configurations from: first the queue, then the generator."""

    generator: Generator
    canonical: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Gives a configuration in the plain values with which it is trained."""
    queue: deque[dict[str, Any]]

    def __call__(self, budget: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """A configuration for this budget, and what is known of how it was chosen."""
        if self.queue:
            return self.queue.popleft(), {"model_based_pick": False}
        config, info = self.generator.get_config(budget)
        return self.canonical(config), info


class Master:
    """Runs brackets one after another, and several at a time while rungs wait for results.

    Args:
        sampler: where configurations come from.
        bracket: makes bracket `index`, counted from 0.
        brackets: how many to run; None goes on for ever.
        settings: what HpBandSter's `Result` says of the run: `min_budget`, `max_budget`, `budgets`.
    """

    def __init__(
        self, sampler: Sampler, bracket: Callable[[int], Bracket], brackets: int | None, settings: Mapping[str, Any]
    ) -> None:
        self.sampler, self.bracket, self.brackets = sampler, bracket, brackets
        self.settings = {**settings, "time_ref": time.time()}
        self._iterations: list[SuccessiveHalving] = []
        self._active: list[SuccessiveHalving] = []

    def next_job(self) -> Job | None:
        """The next job to run; None while every rung waits for results, or when `finished`."""
        for iteration in self._active:
            run = iteration.get_next_run()
            if run is not None:
                return _job(*run)
        self._active = [iteration for iteration in self._active if not iteration.is_finished]
        if self.brackets is not None and len(self._iterations) >= self.brackets:
            return None
        index = len(self._iterations)
        bracket = self.bracket(index)
        iteration = SuccessiveHalving(
            HPB_iter=index,
            num_configs=list(bracket.num_configs),
            budgets=list(bracket.budgets),
            config_sampler=self.sampler,
        )
        self._iterations.append(iteration)
        self._active.append(iteration)
        return self.next_job()

    def finish(self, job: Job, loss: float | None, info: Any = None, exception: str | None = None) -> None:
        """Take a job's loss (None: it failed); losses that are not finite count as the worst."""
        job.time_it("finished")
        job.result = None if loss is None else {"loss": loss, "info": info}
        job.exception = exception
        self._iterations[job.id[0]].register_result(job)
        self.sampler.generator.new_result(job)

    @property
    def finished(self) -> bool:
        """Whether all brackets have ended."""
        return len(self._iterations) == self.brackets and not self._active

    def result(self) -> ExperimentResult:
        """Everything that has run, for HpBandSter's analysis; losses that are not finite are failures there."""
        data = copy.deepcopy([iteration.data for iteration in self._iterations])
        for datum in (datum for bracket in data for datum in bracket.values()):
            for budget, result in datum.results.items():
                if result is not None and not math.isfinite(result["loss"]):
                    datum.results[budget] = None
                    datum.exceptions[budget] = f"the loss is {result['loss']}"
        return ExperimentResult(data, dict(self.settings))


def _job(config_id: ConfigId, config: dict[str, Any], budget: float) -> Job:
    job = Job(config_id, config=config, budget=budget)
    job.time_it("submitted")
    job.time_it("started")
    return job
