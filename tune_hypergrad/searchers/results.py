"""Finished experiments as HpBandSter's `Result`: ours for its analysis, and its own to learn from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import ray.cloudpickle as pickle
from hpbandster.core.result import Result, Run, logged_results_to_HBS_result
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem
from ray import tune

from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.ray_internals import SEARCHER_FILES
from tune_hypergrad.searchers.restorable import STATE_KEY

_LOGGED = ("configs.json", "results.json")  # what HpBandSter's json_result_logger writes


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
        experiment: what `Tuner.fit` returned, on whatever file system; or the experiment's folder, a path or a URI such
            as "s3://bucket/experiment".

    Raises:
        InputError: no such searcher's state is there, or it cannot be read.
    """
    place = _locate(experiment)
    names = [name for name in place.file_names() if fnmatch(name, SEARCHER_FILES)]
    newest = max(names, default=None)  # named by when each session of Ray's began
    if newest is None:
        raise InputError(f"{place} has no state of a searcher: give the folder of a Ray Tune experiment")
    content = place.read(newest)
    try:
        state = pickle.loads(content)
    except Exception as error:  # a torn pickle, and one of other versions, raises anything
        raise InputError(
            f"{newest} in {place} cannot be read ({in_one_line(error)}): it is torn, or of other versions: copy it "
            "again, or read it with the versions that wrote it"
        ) from error
    found = state.get(STATE_KEY) if isinstance(state, dict) else None
    master = found.get("_master") if isinstance(found, dict) else None
    if master is None:
        raise InputError(f"{place} was not run by RandomSearch, BOSearch, HyperBandSearch or BOHBSearch")
    result: ExperimentResult = master.result()
    return result


def read_result(source: Result | tune.ResultGrid | str | PathLike[str]) -> Result:
    """An earlier experiment's `Result`.

    Args:
        source: the `Result` itself; the folder of HpBandSter's `json_result_logger`, a path or a URI; or what
            `hpbandster_result` takes.

    Raises:
        InputError: there is none.
    """
    if isinstance(source, Result):
        return source
    if not isinstance(source, tune.ResultGrid | str | PathLike):
        raise InputError(f"previous_result is {source!r}: give HpBandSter's Result, a ResultGrid, a folder or a URI")
    place = _locate(source)
    if _LOGGED[0] not in place.file_names():
        return hpbandster_result(source)
    with TemporaryDirectory() as copied:  # HpBandSter reads local files only
        for name in _LOGGED:
            (Path(copied) / name).write_bytes(place.read(name))
        try:
            return logged_results_to_HBS_result(copied)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(
                f"{place} is no folder of HpBandSter's json_result_logger: {in_one_line(error)}"
            ) from error


@dataclass(frozen=True)
class _Place:
    """A folder on any file system."""

    filesystem: FileSystem
    path: str
    """Path of the folder on its file system."""
    name: str
    """What a person calls the folder."""

    def __str__(self) -> str:
        return self.name

    def file_names(self) -> list[str]:
        """Names of the files right in the folder; none where there is no such folder."""
        with self._troubles_in_one_line():
            found = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        return [info.base_name for info in found if info.type != FileType.Directory]

    def read(self, name: str) -> bytes:
        """Content of a file in the folder."""
        with self._troubles_in_one_line(), self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
            return bytes(stream.read())

    @contextmanager
    def _troubles_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # storage that answers with anything: file systems can be anybody's
            raise InputError(
                f"{self} cannot be read ({in_one_line(error)}): give an experiment's folder, on storage that answers"
            ) from error


def _locate(experiment: tune.ResultGrid | str | PathLike[str]) -> _Place:
    if isinstance(experiment, tune.ResultGrid):
        return _Place(experiment.filesystem, experiment.experiment_path, experiment.experiment_path)
    name = str(experiment)
    if "://" not in name:
        return _Place(LocalFileSystem(), str(Path(name).expanduser().absolute()), name)
    try:
        filesystem, path = FileSystem.from_uri(name)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        raise InputError(
            f"{name} cannot be reached ({in_one_line(error)}): correct the URI, or give what Tuner.fit returned, or "
            "the folder of a copy"
        ) from error
    return _Place(filesystem, path, name)
