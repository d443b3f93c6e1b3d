"""An experiment: methods that work on one problem, each with the same budget, on one Ray cluster."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, TuneConfig
from ray.tune.search import Searcher

from tune_hypergrad.budget import Budget, Ledger
from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.searchers.budgeted import Budgeted, BudgetStopper
from tune_hypergrad.trainables.base import SCHEDULE_FILE

RESULTS_FILE = "results.jsonl"
"""In a method's folder: one line per result of its trials, written as they come."""

# Ray's own tables would tear our progress bars, and it warns of snapshots that short trials need
_QUIET = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0"}

_RECORDED = ("val_", "test_", "best_", "cost/", "schedule/", "scale/", "outer_step", "setbacks")
_BUDGET = "budget"  # in a trial's config: the length of its training run in epochs


class Interrupted(Exception):
    """A person stopped the run."""


@dataclass(frozen=True)
class Resources:
    """What one trial gets."""

    cpus: float = 1
    """CPUs, which are its torch threads as well."""
    gpus: float = 0
    """GPUs; fractions share one."""


class Recorder(Callback):
    """Append every result to a file, with the method's spending so far.

    Args:
        path: the file.
        method: name of the method whose trials these are.
    """

    def __init__(self, path: Path, method: str) -> None:
        self.path, self.method = path, method
        self._ledger = Ledger()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Called by Ray."""
        self._ledger.charge(trial.trial_id, result)
        row = {"method": self.method, "trial": trial.trial_id, "time": time.time()}
        row |= {f"spent/{name}": value for name, value in vars(self._ledger.total()).items()}
        row |= {name: value for name, value in result.items() if name.startswith(_RECORDED)}
        row |= {name: value for name, value in result.get("config", {}).items() if name == _BUDGET}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def get_state(self) -> dict[str, Any]:
        """What Ray saves."""
        return {"ledger": self._ledger}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        self._ledger = state["ledger"]


def run_method(
    name: str,
    trainable: type[tune.Trainable],
    searcher: Searcher,
    budget: Budget,
    folder: Path,
    *,
    resources: Resources | None = None,
    concurrent: int | None = None,
    callbacks: Sequence[Callback] = (),
    max_failures: int = 2,
) -> tune.ResultGrid:
    """Run one method until its budget is spent or it has nothing more to suggest.

    Args:
        name: the method's, for the results.
        trainable: what its trials run.
        searcher: what chooses their hyperparameters.
        budget: what its trials may spend together; the last result of each that runs then may overrun it.
        folder: where Ray keeps the trials (in `ray/`) and the results go (`RESULTS_FILE`).
        resources: what each trial gets.
        concurrent: trials at once, at the most; None is as many as the cluster has room for.
        callbacks: further Ray callbacks.
        max_failures: restarts of a trial that fails, from its last checkpoint.

    Raises:
        InputError: no trial fits the cluster, or every trial failed.
        Interrupted: Ctrl-C ended it; the results so far are written.
    """
    resources = resources or Resources()
    slots = _slots(resources)
    folder.mkdir(parents=True, exist_ok=True)
    request = {"cpu": resources.cpus, **({"gpu": resources.gpus} if resources.gpus else {})}
    search = Budgeted(searcher, budget, max_concurrent=min(concurrent or slots, slots))
    tuner = tune.Tuner(
        tune.with_resources(trainable, request),
        tune_config=TuneConfig(
            search_alg=search,
            metric="val_loss",
            mode="min",
            num_samples=-1,
            reuse_actors=True,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder.resolve()),
            stop=BudgetStopper(budget),
            verbose=0,
            callbacks=[Recorder(folder / RESULTS_FILE, name), *callbacks],
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(checkpoint_frequency=1, num_to_keep=1),
        ),
    )
    results = tuner.fit()
    if not search.finished:
        raise Interrupted  # Ray catches Ctrl-C, stops the trials and returns
    if results.num_errors and not (folder / RESULTS_FILE).exists():
        reason = str(results.errors[0]).strip().split("\n")[-1]
        raise InputError(f"every trial of {name} failed: {reason} (see error.txt in {folder / 'ray'})")
    return results


def read_results(folder: Path) -> pd.DataFrame:
    """Every result in an experiment's folder: one row each, in the order they came.

    Raises:
        InputError: the folder has none.
    """
    files = sorted(folder.glob(f"*/{RESULTS_FILE}"))
    # a line without its end was being written when the driver was killed
    lines = (line for file in files for line in file.read_text().splitlines(keepends=True) if line.endswith("\n"))
    rows = [json.loads(line) for line in lines]
    if not rows:
        raise InputError(f"{folder} has no results: give the folder that `tune-hypergrad run --out` wrote")
    return pd.DataFrame(rows).sort_values("time", kind="stable", ignore_index=True)


def incumbents(results: pd.DataFrame) -> pd.DataFrame:
    """The rows at which a method's validation loss was the lowest so far."""
    finite = results[np.isfinite(results["val_loss"])]
    best_before = finite.groupby("method")["val_loss"].transform(lambda loss: loss.cummin().shift())
    return finite[best_before.isna() | (finite["val_loss"] < best_before)]


def within(results: pd.DataFrame, budget: Budget) -> pd.DataFrame:
    """The results that count: those after which a method's budget was spent already are left out."""
    spent = results.groupby("method")[f"spent/{budget.unit}"].shift(fill_value=0)
    return results[spent < budget.amount]


def best_row(results: pd.DataFrame, method: str) -> pd.Series | None:
    """A method's result with the lowest validation loss; None if it has no finite one."""
    rows = incumbents(results)
    rows = rows[rows["method"] == method]
    return None if rows.empty else rows.iloc[-1]


def found_schedule(folder: Path, row: pd.Series) -> Schedule:
    """The schedule that a method's best result stands for: its trial's checkpoint holds it whole."""
    checkpoints = folder.glob(f"{row['method']}/ray/*_{row['trial']}_*/checkpoint_*/{SCHEDULE_FILE}")
    saved = max(checkpoints, default=None)
    return schedule_of(row) if saved is None else Schedule.load(saved)


def schedule_of(row: Mapping[str, Any] | pd.Series) -> Schedule:
    """The schedule that a result was reached with, from its `schedule/...` scalars."""
    windows: dict[str, dict[int, float]] = {}
    for key, value in row.items():
        prefix, _, name = str(key).partition("/")
        if prefix == "schedule" and value == value:
            name, _, window = name.partition("/")
            windows.setdefault(name, {})[int(window or 0)] = float(value)
    return Schedule({name: tuple(values[i] for i in sorted(values)) for name, values in windows.items()})


@contextmanager
def ray_session(address: str | None = None) -> Iterator[None]:
    """A Ray session for the body: an existing one, the cluster at `address`, or one of this machine's own."""
    if ray.is_initialized():
        yield
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # NaN is what a diverged run reports
    logging.getLogger("hpbandster").setLevel(logging.ERROR)  # Ray tells of failed trials itself
    dashboard = False if address is None else None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, include_dashboard=dashboard)
    except ConnectionError as error:
        raise InputError(f"no Ray cluster answers at {address!r}: {in_one_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _slots(resources: Resources) -> int:
    """Trials that fit the cluster at once, by what it has in all."""
    cluster = ray.cluster_resources()
    by_cpu = cluster.get("CPU", 1) / resources.cpus if resources.cpus else float("inf")
    by_gpu = cluster.get("GPU", 0) / resources.gpus if resources.gpus else float("inf")
    slots = int(min(by_cpu, by_gpu))
    if slots < 1:
        raise InputError(
            f"a trial asks for {resources.cpus:g} CPUs and {resources.gpus:g} GPUs, more than the cluster's "
            f"{cluster.get('CPU', 0):g} and {cluster.get('GPU', 0):g}: lower --cpus or --gpus"
        )
    return slots
