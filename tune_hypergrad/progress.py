"""Progress in the terminal while a method runs: budget spent, trials, incumbent, time."""

from __future__ import annotations

from typing import Any

from ray.tune import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tune_hypergrad.budget import Budget, Ledger


class ProgressBar(Callback):
    """One method's bar: how much of its budget is spent.

    Args:
        method: name of the method.
        budget: its budget.
    """

    def __init__(self, method: str, budget: Budget) -> None:
        self.method, self.budget = method, budget
        self._ledger = Ledger()
        self._best = float("inf")
        self._trials: set[str] = set()
        self._progress: Progress | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_progress": None}  # a terminal does not pickle

    def setup(self, *args: Any, **info: Any) -> None:
        """Called by Ray when the experiment starts."""
        self._progress = Progress(
            TextColumn("[bold]{task.description:>4}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[news]}"),
            console=Console(stderr=True),
        )
        self._bar = self._progress.add_task(self.method, total=1.0, news="waiting for the first result")
        self._progress.start()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Called by Ray."""
        self._ledger.charge(trial.trial_id, result)
        self._trials.add(trial.trial_id)
        if result["val_loss"] < self._best:
            self._best = result["val_loss"]
        outer_step = f", outer step {result['outer_step']}" if "outer_step" in result else ""
        news = f"{len(self._trials)} trials{outer_step}, best val loss {self._best:.4f}"
        if self._progress is not None:
            done = min(1.0, self.budget.spent_by(self._ledger.total()))
            self._progress.update(self._bar, completed=done, news=news)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Called by Ray."""
        if self._progress is not None:
            self._progress.stop()
