"""`Budgeted` and `BudgetStopper`: any searcher under a limit on what its trials spend together."""

from __future__ import annotations

from typing import Any

from ray.tune import Stopper
from ray.tune.search import Searcher

from tune_hypergrad.budget import Budget, Ledger

_FAILURES_IN_A_ROW = 3


class Budgeted(Searcher):
    """Pass suggestions of `searcher` on until its trials have spent the budget, a limited number at a time.

    Goes together with `BudgetStopper`, which ends trials that run when the budget is spent. Each keeps its own ledger:
    Ray restores searchers and stoppers separately.

    Args:
        searcher: whose suggestions to run.
        budget: what its trials may spend in all.
        max_concurrent: trials that may run at once.

    When three trials in a row fail before their first result, nothing more is suggested: what fails so is not the
    hyperparameters' fault, and a trial that never reports spends nothing, so that the budget would not end it.
    """

    def __init__(self, searcher: Searcher, budget: Budget, *, max_concurrent: int = 1) -> None:
        super().__init__(metric=searcher.metric, mode=searcher.mode)
        self.searcher, self.budget, self.max_concurrent = searcher, budget, max_concurrent
        self._ledger = Ledger()
        self._live: set[str] = set()
        self._failures = 0
        self.finished = False
        """Whether the search came to its end: there is nothing more to suggest."""

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Called by Ray; the searcher inside takes them."""
        self._metric, self._mode = metric or self._metric, mode or self._mode
        return bool(self.searcher.set_search_properties(metric, mode, config, **spec))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The searcher's next suggestion; None while enough trials run; FINISHED once the budget is spent."""
        if self.budget.spent_by(self._ledger.total()) >= 1 or self._failures >= _FAILURES_IN_A_ROW:
            self.finished = True
            return Searcher.FINISHED
        if len(self._live) >= self.max_concurrent:
            return None
        suggestion = self.searcher.suggest(trial_id)
        self.finished = isinstance(suggestion, str)
        if isinstance(suggestion, dict):
            self._live.add(trial_id)
        return suggestion

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Charge a result and pass it on."""
        self._ledger.charge(trial_id, result)
        self.searcher.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Charge a trial's last result and pass it on."""
        self._live.discard(trial_id)
        if result is not None:
            self._ledger.charge(trial_id, result)
        self._failures = self._failures + 1 if error and trial_id not in self._ledger else 0
        self.searcher.on_trial_complete(trial_id, result=result, error=error)

    def get_state(self) -> dict[str, Any]:
        """What Ray saves of this wrapper; it saves the searcher inside by itself."""
        return {"ledger": self._ledger, "live": self._live, "failures": self._failures}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        self._ledger, self._live, self._failures = state["ledger"], state["live"], state["failures"]

    def save(self, checkpoint_path: str) -> None:
        """Write the state of the searcher inside."""
        self.searcher.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        """Continue the searcher inside from `save`."""
        self.searcher.restore(checkpoint_path)


class BudgetStopper(Stopper):
    """Stop trials, one by one at their next result, once together they have spent the budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self._ledger = budget, Ledger()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Charge a result; whether its trial has to stop."""
        self._ledger.charge(trial_id, result)
        return self.budget.spent_by(self._ledger.total()) >= 1

    def stop_all(self) -> bool:
        """Never: it would skip `on_trial_complete` and the last checkpoint."""
        return False

    def get_state(self) -> dict[str, Any]:
        """What Ray saves."""
        return {"ledger": self._ledger}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        self._ledger = state["ledger"]
