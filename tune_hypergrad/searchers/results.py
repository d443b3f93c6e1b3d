"""Finished experiments as HpBandSter's `Result`: ours for its analysis, and its own to learn from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import ray.cloudpickle as pickle
from hpbandster.core.result import Result, Run, logged_results_to_HBS_result
from ray import tune

from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.searchers.restorable import STATE_KEY


class ExperimentResult(Result):  # type: ignore[misc]
    """HpBandSter's `Result`, with two of its errors mended: see the methods."""

    def get_incumbent_trajectory(self, all_budgets: bool = True, **options: bool) -> dict[str, list[Any]]:
        """The best configurations over time; HpBandSter's own fails with `all_budgets=False`, and without a loss."""
        considered = self
        if not all_budgets:
            considered = copy.deepcopy(self)
            full = self.HB_config["max_budget"]
            for datum in considered.data.values():
                datum.results = {budget: result for budget, result in datum.results.items() if budget == full}
        if all(run.loss is None for run in considered.get_all_runs()):
            return {"config_ids": [], "times_finished": [], "budgets": [], "losses": []}
        trajectory: dict[str, list[Any]] = Result.get_incumbent_trajectory(considered, **options)
        return trajectory

    def get_pandas_dataframe(
        self, budgets: Sequence[float] | None = None, loss_fn: Callable[[Run], float] = lambda run: run.loss
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Configurations with their budgets, and losses, a row for each run; HpBandSter's own confuses the budgets."""
        budgets = self.HB_config["budgets"] if budgets is None else budgets
        configs = self.get_id2config_mapping()
        runs = [run for run in self.get_all_runs() if run.budget in budgets and run.loss is not None]
        frame = pd.DataFrame([configs[run.config_id]["config"] for run in runs])
        if len(budgets) > 1:
            frame["run budget" if "budget" in frame else "budget"] = [run.budget for run in runs]
        return frame, pd.DataFrame({"loss": [loss_fn(run) for run in runs]})


def hpbandster_result(experiment: tune.ResultGrid | str | PathLike[str]) -> ExperimentResult:
    """HpBandSter's `Result` of an experiment that one of our HpBandSter searchers ran, finished or not.

    `get_incumbent_trajectory`, `get_pandas_dataframe`, `get_fANOVA_data` and `hpbandster.visualization` work on it.
    Losses are minimised: with mode="max" they are the metric's negative. Hyperparameters of nested spaces have their
    path for a name, such as "optimizer/lr".

    Args:
        experiment: what `Tuner.fit` returned, or the experiment's folder.

    Raises:
        InputError: no such searcher's state is there.
    """
    folder = Path(experiment.experiment_path if isinstance(experiment, tune.ResultGrid) else experiment).expanduser()
    newest = max(folder.glob("searcher-state-*.pkl"), default=None)  # named by when each session of Ray's began
    if newest is None:
        raise InputError(f"{folder} has no state of a searcher: give the folder of a Ray Tune experiment")
    state = pickle.loads(newest.read_bytes())
    master = state.get(STATE_KEY, {}).get("_master") if isinstance(state, dict) else None
    if master is None:
        raise InputError(f"{folder} was not run by RandomSearch, BOSearch, HyperBandSearch or BOHBSearch")
    result: ExperimentResult = master.result()
    return result


def read_result(source: Result | tune.ResultGrid | str | PathLike[str]) -> Result:
    """An earlier experiment's `Result`.

    Args:
        source: the `Result` itself; the folder of HpBandSter's `json_result_logger`; or what `hpbandster_result` takes.

    Raises:
        InputError: there is none.
    """
    if isinstance(source, Result):
        return source
    if not isinstance(source, tune.ResultGrid | str | PathLike):
        raise InputError(f"previous_result is {source!r}: give HpBandSter's Result, a ResultGrid or a folder")
    if isinstance(source, tune.ResultGrid) or not (Path(source) / "configs.json").is_file():
        return hpbandster_result(source)
    try:
        return logged_results_to_HBS_result(str(source))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{source} is no folder of HpBandSter's json_result_logger: {in_one_line(error)}") from error
