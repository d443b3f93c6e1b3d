"""Incumbents trained again from scratch: one routine for all methods, and the first that reads the test split."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from ray import tune
from ray.tune.search import Searcher

from tune_hypergrad.comparison.ledger import RETRAINING, START, Account
from tune_hypergrad.comparison.methods import Task, is_whole, optimizers_of, training_reports
from tune_hypergrad.comparison.running.labels import PORTFOLIO, RETRAINS
from tune_hypergrad.comparison.running.portfolio import portfolio_of
from tune_hypergrad.comparison.running.queue import QueueSearch
from tune_hypergrad.comparison.running.retrained import Retrained
from tune_hypergrad.comparison.telling.records import Comparison
from tune_hypergrad.domains import is_number
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.optimizers import is_built_in
from tune_hypergrad.problems.splits import with_val
from tune_hypergrad.results import Position

_logger = logging.getLogger(__name__)

_FIRST_SEED = 1_000_000  # beyond those that searches use
_KEPT = ("batch_size", "optimizer", "clip_gradient", "clip_norm", "autocast")


@dataclass(frozen=True)
class Retraining:
    """How a comparison trains incumbents again, from scratch, for the test."""

    seeds: int = 3
    """Number of trainings of each incumbent, with seeds that no search has used; 3 by default, 0 leaves retraining
    out."""
    shares: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    """Shares of the budget, above 0 and up to 1, after which the incumbents are trained; what is the incumbent twice is
    trained once."""
    data: str = "train"
    """What incumbents are trained on: "train", or "train+val", so that the test split is predicted from more
    examples."""
    same_training: bool = False
    """Whether all incumbents are trained for the inner steps of a plain training run, their schedules stretched or
    pressed to it; else (by default) each as it was found, for as many steps as the run that found it."""

    def __post_init__(self) -> None:
        if not is_whole(self.seeds) or self.seeds < 0:
            raise InputError(f"retraining with {self.seeds!r} seeds: give a whole number; 0 leaves it out")
        if self.data not in ("train", "train+val"):
            raise InputError(f'retraining on {self.data!r}: give "train" or "train+val"')
        if not isinstance(self.same_training, bool):
            raise InputError(f"retraining has same_training={self.same_training!r}: it is True or False")
        shares = tuple(self.shares) if isinstance(self.shares, Iterable) else ()
        if not shares or not all(map(_is_share, shares)) or max(shares) != 1:
            raise InputError(f"retraining after the shares {self.shares!r}: give some above 0, the largest of them 1")
        object.__setattr__(self, "seeds", int(self.seeds))  # NumPy's are no JSON
        object.__setattr__(self, "shares", tuple(map(float, shares)))

    def trainable(self, task: Task) -> type[tune.Trainable]:
        """The Ray trainable that the retrainings on a task run."""
        problem = task.problem if self.data == "train" else with_val(task.problem)
        own = {optimizer.name: optimizer for optimizer in optimizers_of(task) if not is_built_in(optimizer)}
        return Retrained.from_problem(problem, **task.training, reports=training_reports(task), own_optimizers=own)


class RetrainingSearch(QueueSearch):
    """Suggests the retrainings of every account that has come to its end; where there is a start, when that has.

    A start has the same settings with every seed, so only the first seed's is trained again.

    Args:
        folder: the comparison's.
        key: of the portfolio that this is part of.
        retraining: how many, and of what.
        kept: entries of a trial's config that are no hyperparameters of a schedule, such as the model's arguments.
    """

    def __init__(self, folder: Path, key: str, retraining: Retraining, kept: Sequence[str]) -> None:
        super().__init__([])
        self._folder, self._key, self._retraining, self._kept = folder, key, retraining, (*_KEPT, *kept)
        self._seen: set[Account] = set()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next retraining; None while accounts are still at work."""
        portfolio = portfolio_of(self._key)
        ended = portfolio.ended_accounts()
        known = all(account in ended for account in portfolio.contenders if account.method == START)
        for account in ended:
            if account not in self._seen and known:
                self._seen.add(account)
                self.queue.extend(self._jobs(account))
        suggestion = super().suggest(trial_id)
        others = {account for account in portfolio.contenders if account.method != RETRAINING}
        return None if suggestion == Searcher.FINISHED and not others <= self._seen else suggestion

    def get_state(self) -> dict[str, Any]:
        """The search's state, which `save` writes."""
        return {**super().get_state(), "_seen": self._seen}

    def _jobs(self, account: Account) -> list[dict[str, Any]]:
        """Configs of an account's retrainings."""
        comparison = Comparison(self._folder, only=frozenset([account]))
        once = account.method != START or account.seed == comparison.settings["seeds"][0]
        if not self._retraining.seeds or not once:
            return []
        rows = comparison.incumbents(account)
        if rows.empty:
            return []
        positions = {index: Position.from_result(row) for index, row in rows.iterrows()}
        if not all(position.is_known for position in positions.values()):
            told = "%s is not trained again and tested: its trials do not report run/step, run/steps and schedule/..."
            _logger.warning(told, account)
            return []
        configs = comparison.trials.drop_duplicates("id").set_index("id")["config"]
        budget = comparison.budget
        spent = rows[f"spent/{budget.unit}"]
        latest: dict[int, float] = {}  # row to the largest share after which it was the incumbent
        for share in sorted(self._retraining.shares):
            # the last result of a trial may go over the budget and still counts
            within = rows if share == 1 else rows[spent <= share * budget.amount]
            if len(within):
                latest[int(within.index[-1])] = share
        jobs = []
        before = comparison.retrained
        for index, share in latest.items():
            row = rows.loc[index]
            if not before.empty and comparison.extensions and _is_done(before, account, spent[index], budget.unit):
                continue
            config = configs[row["id"]]
            of = {**account._asdict(), "share": share}
            of |= {str(key): float(row[key]) for key in rows.columns if str(key).startswith("spent/")}
            length = {"steps": max(1, int(positions[index].steps)), "until": int(positions[index].step)}
            if self._retraining.same_training:
                length = dict.fromkeys(("steps", "until"), comparison.settings["steps"])
            job = {
                **{name: config[name] for name in self._kept if name in config},
                **comparison.schedule_of(row).to_config(),
                **length,
            }
            for seed in range(self._retraining.seeds):
                label = {RETRAINS: {**of, "training_seed": seed}}
                jobs.append({**job, "seed": _FIRST_SEED + seed, PORTFOLIO: label})
        return jobs


def _is_done(trained: pd.DataFrame, account: Account, spent: float, unit: str) -> bool:
    """Whether an account's incumbent at a cost was trained again before the comparison was extended."""
    own = (trained["method"] == account.method) & (trained["seed"] == account.seed)
    return bool((own & (trained[f"spent/{unit}"] == spent)).any())


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 < value <= 1
