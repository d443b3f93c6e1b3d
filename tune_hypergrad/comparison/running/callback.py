"""`ComparisonCallback`: what Ray tells of trials reaches the portfolio, and how all stand reaches a display."""

from __future__ import annotations

import time
from typing import Any

from ray.tune import Callback

from tune_hypergrad.comparison.running.portfolio import portfolio_of
from tune_hypergrad.comparison.telling.progress import Display, Status
from tune_hypergrad.ray_internals import forget_statistics

DISPLAYS: dict[str, Display] = {}
"""Displays that are shown, by the portfolio's key, which is all that a callback has of them: Ray saves it with the
experiment."""


class ComparisonCallback(Callback):
    """Tells the portfolio of its trials' beginnings and ends, and a display of everybody's progress.

    Args:
        key: of the portfolio.
        max_failures: restarts of a trial that fails, also of one that was begun before the comparison was resumed.
    """

    def __init__(self, key: str, max_failures: int) -> None:
        self.key, self.max_failures = key, max_failures
        self._shown = 0.0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Let a trial restart as often as it may, and tell the portfolio that its process begins."""
        trial.max_failures = self.max_failures
        portfolio_of(self.key).started(trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell the portfolio that a trial has come to its end."""
        portfolio_of(self.key).ended(trial)
        forget_statistics(trial)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell the portfolio that a trial has failed and is tried again."""
        portfolio_of(self.key).retried(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell the portfolio that a trial has failed for good."""
        portfolio_of(self.key).failed(trial)
        forget_statistics(trial)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Show how all accounts stand, a few times a second."""
        if time.monotonic() - self._shown >= 0.25:
            self.show()

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Show how all accounts stand in the end."""
        self.show(finished=portfolio_of(self.key).finished)

    def show(self, finished: bool = False) -> None:
        """Show how all accounts stand at present."""
        self._shown = time.monotonic()
        portfolio = portfolio_of(self.key)
        best = portfolio.best
        statuses = [
            Status(
                account,
                contender.claim.share(portfolio.ledger.spent(account)),
                contender.suggested,
                len(contender.claim.live),
                best.get(account, float("inf")),
                portfolio.ledger.reason(account),
                sum(trial.status == "failed" for trial in portfolio.ledger.trials_of(account)),
            )
            for account, contender in portfolio.contenders.items()
        ]
        DISPLAYS[self.key].update(statuses, finished=finished)
