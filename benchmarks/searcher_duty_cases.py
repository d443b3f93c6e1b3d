"""What Ray Tune asks of a searcher: every duty is a function that tries it, and its docstring the table's row."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray import cloudpickle, tune
from ray.train.constants import _get_ray_train_session_dir
from ray.tune import ResumeConfig
from ray.tune.schedulers import (
    ASHAScheduler,
    HyperBandForBOHB,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
)
from ray.tune.search import ConcurrencyLimiter, Repeater, Searcher
from ray.tune.search.repeater import TRIAL_INDEX
from searcher_duty_tools import (
    COLUMNS,
    ITERATIONS,
    OURS,
    SPACE,
    TARGET,
    Bowl,
    Cell,
    SlowBowl,
    Unmet,
    UnresettableBowl,
    Watch,
    alive,
    bowl,
    changed,
    counted_slow,
    drive,
    environment,
    failing,
    refusal,
    require,
)

HYPERGRADIENT = ("HypergradientSearch",)
ENDLESS = ("RandomSearch", "BOSearch", "TuneBOHB", "OptunaSearch")


@dataclass(frozen=True)
class Duty:
    """One row."""

    name: str
    description: str
    attempt: Callable[[Cell], str | None] = field(repr=False)
    """Returns if the searcher does its duty, with a remark at most."""
    may_refuse: Collection[str] = ()
    """Searchers that may refuse it in one line."""
    not_for: Collection[str] = ()
    """Searchers to which it does not apply."""
    patience: float = 25
    """Seconds without a sign of life after which it hangs."""


DUTIES: dict[str, Duty] = {}
Attempt = Callable[[Cell], str | None]


def duty(
    *, may_refuse: Collection[str] = (), not_for: Collection[str] = (), patience: float = 25
) -> Callable[[Attempt], Attempt]:
    """Make a function a row, which is named after it and described by its docstring."""

    def register(attempt: Attempt) -> Attempt:
        description = " ".join((attempt.__doc__ or "").split()).removesuffix(".")
        DUTIES[attempt.__name__] = Duty(
            attempt.__name__, description, attempt, tuple(may_refuse), tuple(not_for), patience
        )
        return attempt

    return register


# ---------------------------------------------------------------------------------------------------------------------
# what to search for


@duty()
def metric_of_tune_config(cell: Cell) -> None:
    """Metric and mode from `TuneConfig`."""
    search, grid = cell.plain()
    cell.whole(grid)
    require((search.metric, search.mode) == ("val_loss", "min"), f"has {search.metric!r} and {search.mode!r}")


@duty()
def metric_of_constructor(cell: Cell) -> None:
    """Metric and mode from the constructor."""
    search = cell.make(metric="val_loss", mode="min")
    cell.whole(cell.fit(search, tune_options={"metric": None, "mode": None}))


@duty()
def mode_max(cell: Cell) -> None:
    """`mode="max"`: the same search as for the negative with "min", and another than for the same with "min"."""

    def configs(metric: str, mode: str) -> list[dict[str, Any]]:
        random.seed(0)  # for searchers that draw from the global generators
        np.random.seed(0)
        return drive(cell.opened(metric=metric, mode=mode), 24)

    highest = configs("gain", "max")
    require(configs("val_loss", "min") == highest, "another search than for the negative")
    if cell.column.model or cell.column.halving:
        require(configs("gain", "min") != highest, "the mode does not matter")


@duty()
def wrong_mode(cell: Cell) -> None:
    """A wrong mode is refused."""
    refusal(cell, lambda: cell.make(metric="val_loss", mode="median"))
    refusal(cell, lambda: cell.make(mode="median"))


# ---------------------------------------------------------------------------------------------------------------------
# where to search


@duty()
def param_space(cell: Cell) -> None:
    """`param_space` is the space."""
    _, grid = cell.plain()
    cell.whole(grid)
    for result in grid:
        require(all(0 <= (result.config or {})[name] <= 1 for name in SPACE), "values out of range")


@duty()
def space_of_constructor(cell: Cell) -> None:
    """A space given to the constructor."""
    search = cell.make(space=dict(SPACE), metric="val_loss", mode="min")
    cell.whole(cell.fit(search, space={}, tune_options={"metric": None, "mode": None}))


@duty()
def space_of_constructor_metric_of_tune_config(cell: Cell) -> None:
    """A space given to the constructor, metric and mode to `TuneConfig`, with constants in `param_space`."""
    cell.whole(cell.fit(cell.make(space=dict(SPACE)), space={"constant": 1}))


def drawn(cell: Cell, domain: Any) -> list[Any]:
    """Thirty values of a domain."""
    return [config["x"] for config in drive(cell.opened({"x": domain, "y": tune.uniform(0, 1)}), 30)]


def require_all(values: list[Any], fits: Callable[[Any], bool]) -> None:
    """Require that values fit and differ."""
    strange = [value for value in values if not fits(value)]
    require(not strange, f"gives {strange[:1]}")
    require(len(set(values)) > 1, f"gives nothing but {values[:1]}")


@duty()
def uniform(cell: Cell) -> None:
    """`tune.uniform`."""
    require_all(drawn(cell, tune.uniform(-1, 2)), lambda x: isinstance(x, float) and -1 <= x <= 2)


@duty()
def loguniform(cell: Cell) -> None:
    """`tune.loguniform`."""
    values = drawn(cell, tune.loguniform(1e-4, 1))
    require_all(values, lambda x: isinstance(x, float) and 1e-4 * (1 - 1e-9) <= x <= 1 + 1e-9)
    require(min(values) < 0.1, "draws on a linear scale")


@duty(may_refuse=HYPERGRADIENT)
def quniform(cell: Cell) -> None:
    """`tune.quniform`: multiples of the quantum."""
    require_all(drawn(cell, tune.quniform(0, 3, 0.25)), lambda x: x * 4 == round(x * 4) and 0 <= x <= 3)


@duty(may_refuse=HYPERGRADIENT)
def randint(cell: Cell) -> None:
    """`tune.randint`: whole numbers without the upper bound."""
    values = drawn(cell, tune.randint(1, 4))
    require_all(values, lambda x: isinstance(x, int) and x in (1, 2, 3))


@duty(may_refuse=HYPERGRADIENT)
def choice(cell: Cell) -> None:
    """`tune.choice`, also of things that are not numbers."""
    kinds = ["a", None, (1, 2)]
    require_all(drawn(cell, tune.choice(kinds)), lambda x: x in kinds)


@duty(may_refuse=HYPERGRADIENT)
def nested_space(cell: Cell) -> None:
    """A nested space gives nested configs."""
    space = {"optimizer": {"x": tune.uniform(0, 1)}, "y": tune.uniform(0, 1)}
    for config in drive(cell.opened(space), 3):
        require(0 <= config["optimizer"]["x"] <= 1, "x is out of range")


def constants_arrive(cell: Cell, constants: Mapping[str, Any], check: Callable[[Mapping[str, Any]], bool]) -> None:
    """Run a search whose trials fail unless their config passes a check."""

    class Reading(Bowl):
        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config)
            if not check(config):
                raise RuntimeError("the constants are not what they were")

    cell.whole(cell.fit(cell.make(), space={**SPACE, **constants}, trainable=Reading))


@duty()
def constants(cell: Cell) -> None:
    """Constants are passed on: numbers, strings, lists, None."""
    given = {"number": 3, "word": "adam", "list": [1, 2], "nothing": None}
    constants_arrive(cell, given, lambda config: all(config[name] == value for name, value in given.items()))


@duty(may_refuse=HYPERGRADIENT)
def nested_constants(cell: Cell) -> None:
    """Nested dicts of constants are passed on."""
    given = {"data": {"name": "digits", "sizes": {"train": 10, "val": [1, 2]}}}
    constants_arrive(cell, given, lambda config: bool(config["data"] == given["data"]))


@duty()
def constant_functions(cell: Cell) -> None:
    """Functions and classes among the constants are passed on."""

    class Model:
        width = 3

    given = {"double": lambda value: 2 * value, "model": Model}
    constants_arrive(cell, given, lambda config: bool(config["double"](2) == 4 and config["model"]().width == 3))


@duty()
def nothing_to_search(cell: Cell) -> None:
    """A space with nothing to search is refused."""
    refusal(cell, lambda: cell.fit(cell.make(), space={"x": 0.5, "y": 0.5}))


# ---------------------------------------------------------------------------------------------------------------------
# what is known before


POINTS = [{"x": 0.25, "y": 0.75}, {"x": 0.5, "y": 0.125}]


def suggested(grid: Any) -> list[tuple[float, float]]:
    """Where trials were, in the order in which they were made."""
    return [(result.config["x"], result.config["y"]) for result in grid]


@duty()
def points_to_evaluate(cell: Cell) -> None:
    """`points_to_evaluate` come first."""
    grid = cell.fit(cell.make(points_to_evaluate=[dict(point) for point in POINTS]))
    require(not grid.num_errors, "trials fail")
    first = suggested(grid)[:2]
    close = np.allclose(first, [tuple(point.values()) for point in POINTS], rtol=1e-6)
    require(close, f"begins with {first}")


@duty()
def wrong_point(cell: Cell) -> None:
    """A point with an unknown name, or out of range, is refused with the words `points_to_evaluate`."""
    for point in ({"x": 0.5, "y": 0.5, "z": 0.5}, {"x": 7.0, "y": 0.5}):
        message = refusal(cell, lambda point=point: drive(cell.opened(points_to_evaluate=[point]), 1))  # type: ignore[misc]
        require("points_to_evaluate" in message, f"the refusal does not say where: {message}")


@duty(not_for=HYPERGRADIENT)
def evaluated_rewards(cell: Cell) -> None:
    """Points with `evaluated_rewards` are not run again."""
    search = cell.make(points_to_evaluate=[dict(point) for point in POINTS], evaluated_rewards=[0.2, 0.4])
    grid = cell.fit(search)
    cell.whole(grid)
    known = {tuple(point.values()) for point in POINTS}
    require(not known & set(suggested(grid)), "a point is run again")


@duty(not_for=HYPERGRADIENT)
def add_evaluated_point(cell: Cell) -> None:
    """`add_evaluated_point`, and a model learns from it."""
    search, ignorant = cell.opened(), cell.opened()
    for index in range(16):
        search.add_evaluated_point({"x": 0.9 + index / 200, "y": 0.05 + index / 200}, 0.01 * index)
    told, untold = drive(search, 12), drive(ignorant, 12)
    if cell.column.model:
        require(told != untold, "the model does not learn from it")


@duty(not_for=HYPERGRADIENT)
def add_evaluated_trials(cell: Cell) -> None:
    """`add_evaluated_trials` of an earlier experiment."""
    _, earlier = cell.plain()
    search = cell.opened()
    search.add_evaluated_trials(earlier._experiment_analysis, "val_loss")
    drive(search, 4)


# ---------------------------------------------------------------------------------------------------------------------
# how many trials


@duty()
def num_samples(cell: Cell) -> None:
    """`num_samples` is kept."""
    cell.whole(cell.fit(cell.make(), samples=3), trials=3)


@duty(not_for=ENDLESS)
def num_samples_without_end(cell: Cell) -> None:
    """With `num_samples=-1`, a search that has an end comes to it."""
    cell.whole(cell.plain()[1])


# ---------------------------------------------------------------------------------------------------------------------
# what trials may do


@duty()
def metric_nan(cell: Cell) -> None:
    """A metric that is NaN does not stop the search."""

    def spoil(number: int, result: dict[str, Any]) -> dict[str, Any]:
        return {k: math.nan if number == 2 and isinstance(v, float) else v for k, v in result.items()}

    grid = cell.fit(cell.make(), trainable=changed(cell.folder / "numbers", spoil))
    require(not grid.num_errors and len(grid) == cell.column.trials, f"{len(grid)} trials, {grid.num_errors} errors")


@duty(may_refuse=HYPERGRADIENT)
def metric_missing(cell: Cell) -> None:
    """A trial without the metric does not stop the search (`TUNE_DISABLE_STRICT_METRIC_CHECKING=1`)."""

    def spoil(number: int, result: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in result.items() if number != 2 or name != "val_loss"}

    with environment(TUNE_DISABLE_STRICT_METRIC_CHECKING="1"):
        grid = cell.fit(cell.make(), trainable=changed(cell.folder / "numbers", spoil))
    require(not grid.num_errors and len(grid) == cell.column.trials, f"{len(grid)} trials, {grid.num_errors} errors")


@duty()
def trial_fails(cell: Cell) -> None:
    """A trial that fails does not stop the search."""
    grid = cell.fit(cell.make(), trainable=failing(cell.folder / "numbers"))
    require(len(grid) == cell.column.trials, f"{len(grid)} trials in place of {cell.column.trials}")
    require(grid.num_errors == 1, f"{grid.num_errors} errors in place of 1")


@duty()
def trial_is_retried(cell: Cell) -> None:
    """A trial that fails and is retried (`max_failures=1`) counts as the one that it is."""
    flag = cell.folder / "has failed"

    def fail_once(number: int, result: dict[str, Any]) -> dict[str, Any]:
        if number == 2 and not flag.exists():
            flag.touch()
            raise RuntimeError("this trial fails on purpose")
        return result

    cell.whole(cell.fit(cell.make(), trainable=changed(cell.folder / "numbers", fail_once), max_failures=1))
    require(flag.exists(), "no trial has failed")


@duty()
def all_trials_fail(cell: Cell) -> None:
    """Where every trial fails, the search comes to its end."""
    grid = cell.fit(cell.make(), trainable=failing(cell.folder / "numbers", range(1, 99)))
    require(grid.num_errors == len(grid) > 0, f"{grid.num_errors} errors in {len(grid)} trials")


# ---------------------------------------------------------------------------------------------------------------------
# how many at once


SMALL = tune.with_resources(Bowl, {"cpu": 0.25})


def limited(cell: Cell, search: Searcher, most: int, trials: int | None = None, **settings: Any) -> None:
    """Require that a search runs to its end, and no more trials at once than there may."""
    cell.whole(cell.fit(search, trainable=SMALL, **settings), trials=trials)
    require(Watch.most <= most, f"{Watch.most} trials at once")


@duty()
def concurrency_limiter(cell: Cell) -> None:
    """`ConcurrencyLimiter`: never more trials at once."""
    limited(cell, ConcurrencyLimiter(cell.make(), max_concurrent=2), 2)


@duty()
def concurrency_limiter_batch(cell: Cell) -> None:
    """`ConcurrencyLimiter(batch=True)`: results come in batches."""
    limited(cell, ConcurrencyLimiter(cell.make(), max_concurrent=2, batch=True), 2)


@duty()
def concurrency_limiter_large_batch(cell: Cell) -> None:
    """`ConcurrencyLimiter(batch=True)` with batches larger than what the searcher gives at once."""
    limited(cell, ConcurrencyLimiter(cell.make(), max_concurrent=8, batch=True), 8)


@duty()
def max_concurrent_trials(cell: Cell) -> None:
    """`TuneConfig(max_concurrent_trials=)`: never more trials at once."""
    limited(cell, cell.make(), 2, tune_options={"max_concurrent_trials": 2})


class Repeated(Bowl):
    """Trials of which the first and the second repeat are far apart, with a mean between them."""

    def step(self) -> dict[str, Any]:
        result = super().step()
        index = self.config[TRIAL_INDEX]
        return {**result, "val_loss": 3 * result["val_loss"] if index else -result["val_loss"]}


@duty(may_refuse=HYPERGRADIENT)
def repeater(cell: Cell) -> None:
    """`Repeater`: the mean of the repeats counts."""
    told: dict[str, Any] = {}
    search = cell.make()
    original = type(search).on_trial_complete

    def listen(self: Any, trial_id: str, result: Any = None, **more: Any) -> None:
        told[trial_id] = (result or {}).get("val_loss")
        original(self, trial_id, result, **more)

    with mock.patch.object(type(search), "on_trial_complete", listen):
        grid = cell.fit(
            Repeater(search, repeat=2),
            trainable=Repeated,
            samples=-1 if cell.column.ends else 2 * cell.column.trials,
        )
    cell.whole(grid, trials=2 * cell.column.trials)
    firsts = [result for result in grid if result.config[TRIAL_INDEX] == 0]
    means = sorted(bowl(result.config)["val_loss"] for result in firsts)
    require(np.allclose(sorted(told.values()), means), "the searcher is told something other than the means")
    if cell.column.halving:
        short = [result.config for result in firsts if result.config["budget"] == 1]
        (long,) = {result.config["x"] for result in firsts if result.config["budget"] > 1}
        best = min(short, key=lambda config: bowl(config)["val_loss"])
        require(long == best["x"], "another than the best is promoted")


@duty(may_refuse=HYPERGRADIENT)
def limiter_of_repeater(cell: Cell) -> None:
    """`ConcurrencyLimiter` of a `Repeater`."""
    search = ConcurrencyLimiter(Repeater(cell.make(), repeat=2), max_concurrent=2)
    limited(cell, search, 2, 2 * cell.column.trials, samples=-1 if cell.column.ends else 2 * cell.column.trials)


@duty(may_refuse=HYPERGRADIENT)
def repeater_of_limiter(cell: Cell) -> None:
    """`Repeater` of a `ConcurrencyLimiter`."""
    search = Repeater(ConcurrencyLimiter(cell.make(), max_concurrent=1), repeat=2)
    limited(cell, search, 2, 2 * cell.column.trials, samples=-1 if cell.column.ends else 2 * cell.column.trials)


# ---------------------------------------------------------------------------------------------------------------------
# schedulers and stoppers


@duty()
def asha(cell: Cell) -> None:
    """`ASHAScheduler`."""
    cell.whole(cell.fit(cell.make(), scheduler=ASHAScheduler(max_t=ITERATIONS, grace_period=1, reduction_factor=2)))


@duty()
def median_stopping(cell: Cell) -> None:
    """`MedianStoppingRule`."""
    cell.whole(cell.fit(cell.make(), scheduler=MedianStoppingRule(grace_period=1, min_samples_required=1)))


@duty(may_refuse=OURS)
def hyperband_scheduler(cell: Cell) -> None:
    """`HyperBandScheduler`, which pauses trials."""
    scheduler = HyperBandScheduler(max_t=3 * ITERATIONS)
    cell.whole(cell.fit(cell.make(**cell.column.longer), scheduler=scheduler))


@duty(may_refuse=OURS)
def hyperband_for_bohb(cell: Cell) -> None:
    """`HyperBandForBOHB`, which pauses trials and tells the searcher of it."""
    scheduler = HyperBandForBOHB(time_attr="training_iteration", max_t=3 * ITERATIONS, reduction_factor=3)
    cell.whole(cell.fit(cell.make(**cell.column.longer), scheduler=scheduler))


@duty(not_for=COLUMNS)
def population_based_training(cell: Cell) -> None:
    """`PopulationBasedTraining`, beside which Ray takes no searcher."""
    scheduler = PopulationBasedTraining(perturbation_interval=1, hyperparam_mutations={"x": tune.uniform(0, 1)})
    cell.whole(cell.fit(cell.make(), scheduler=scheduler))


@duty(may_refuse=HYPERGRADIENT)
def stop_dict(cell: Cell) -> None:
    """`RunConfig(stop={...})` ends trials early."""
    grid = cell.fit(cell.make(), run_options={"stop": {"training_iteration": 1}})
    require(len(grid) > 0 and not grid.num_errors, f"{len(grid)} trials, {grid.num_errors} errors")
    require({result.metrics["training_iteration"] for result in grid} == {1}, "trials go on")


@duty()
def time_budget(cell: Cell) -> None:
    """`time_budget_s` ends a search that has no end."""
    began = time.monotonic()
    grid = cell.fit(cell.make(**cell.column.endless), samples=-1, tune_options={"time_budget_s": 2})
    require(len(grid) > 0, "no trials")
    require(time.monotonic() - began < 20, "goes on much longer")


# ---------------------------------------------------------------------------------------------------------------------
# going on


def cut_off_at_two(cell: Cell) -> tuple[Searcher, list[tuple[float, float]]]:
    """A search after two of its four trials, and where they were."""
    search = cell.make()
    return search, suggested(cell.fit(search, samples=2))


def goes_on(cell: Cell, search: Searcher, before: list[tuple[float, float]]) -> None:
    """Require that a search runs the trials that are missing, and does not begin again."""
    grid = cell.fit(search, space={}, samples=-1 if cell.column.ends else 2, name="second")
    cell.whole(grid, trials=cell.column.trials - len(before))
    begins_again = set(before) & set(suggested(grid)[: 1 if cell.column.halving else 2])
    require(not begins_again, "begins again")


@duty()
def save_and_restore(cell: Cell) -> None:
    """`save`, and `restore(file)` in a new Tuner: the search goes on."""
    search, before = cut_off_at_two(cell)
    search.save(str(cell.folder / "state.pkl"))
    second = cell.make()
    second.restore(str(cell.folder / "state.pkl"))
    goes_on(cell, second, before)


@duty()
def restore_from_dir(cell: Cell) -> None:
    """`restore_from_dir(experiment)` in a new Tuner: the search goes on."""
    _, before = cut_off_at_two(cell)
    second = cell.make()
    second.restore_from_dir(str(cell.folder / "run"))
    goes_on(cell, second, before)


@duty()
def restore_after_interruption(cell: Cell) -> None:
    """`Tuner.restore` after an exception in the driver."""
    cell.cut_short(cell.make())
    cell.whole(cell.restored())


@duty(patience=40)
def restore_after_kill(cell: Cell) -> None:
    """`Tuner.restore` after the driver was killed."""
    numbers = cell.folder / "numbers"
    script = str(Path(__file__).with_name("searcher_duties.py"))
    victim = subprocess.Popen(
        [sys.executable, script, "--victim", str(cell.folder), "--searchers", cell.column.name],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(1000):
            if victim.poll() is not None or (numbers / "3").is_symlink():
                break
            alive()
            time.sleep(0.1)
        require(victim.poll() is None, "the search ended before its driver could be killed")
        require((numbers / "3").is_symlink(), "its third trial has not begun after a hundred seconds")
        time.sleep(0.5)  # a snapshot
    finally:
        victim.kill()
        victim.wait()
    grid = cell.restored(counted_slow(numbers))
    cell.whole(grid, trials=max(len(grid), cell.column.trials))


def run_to_be_killed(cell: Cell) -> None:
    """The search of `restore_after_kill`."""
    cell.fit(cell.make(), trainable=counted_slow(cell.folder / "numbers"))


@duty()
def restore_without_unfinished(cell: Cell) -> None:
    """`Tuner.restore(resume_unfinished=False)`, which passes over trials that were cut off."""
    cell.cut_short(cell.make())
    grid = cell.restored(resume_unfinished=False)
    require(not grid.num_errors, f"{grid.num_errors} errors")
    require(len(grid) >= cell.column.trials, f"{len(grid)} trials in place of {cell.column.trials}")


@duty()
def restart_unfinished(cell: Cell) -> None:
    """`ResumeConfig(unfinished=RESTART)`, which begins cut-off trials again under other names."""
    cell.cut_short(cell.make())
    restart: Any = ResumeConfig.ResumeType.RESTART
    grid = cell.restored(_resume_config=ResumeConfig(unfinished=restart))
    require(not grid.num_errors, f"{grid.num_errors} errors")
    require(len(grid) >= cell.column.trials, f"{len(grid)} trials in place of {cell.column.trials}")


def errored_again(cell: Cell, **how: Any) -> None:
    """Run a search one of whose trials fails, and restore it when that trial would not."""
    mended = cell.folder / "mended"
    trainable = failing(cell.folder / "numbers", until=mended)
    require(cell.fit(cell.make(), trainable=trainable).num_errors == 1, "not one error at first")
    mended.touch()
    grid = cell.restored(trainable, **how)
    require(not grid.num_errors, "the trial that failed is not run again")
    require(len(grid) >= cell.column.trials, f"{len(grid)} trials in place of {cell.column.trials}")


@duty()
def resume_errored(cell: Cell) -> None:
    """`Tuner.restore(resume_errored=True)`."""
    errored_again(cell, resume_errored=True)


@duty()
def restart_errored(cell: Cell) -> None:
    """`Tuner.restore(restart_errored=True)`, which begins failed trials again under other names."""
    errored_again(cell, restart_errored=True)


def spoilt_state(cell: Cell, spoil: Callable[[Path], Any]) -> None:
    """Spoil the searcher's state of an interrupted experiment; it goes on, or is refused with the place's name."""
    name = cell.folder.name
    cell.cut_short(cell.make(), name=name)
    experiment = cell.folder / name
    # a driver on another machine, or after a reboot, does not have Ray's copies in its session's folder
    copies = Path(_get_ray_train_session_dir()).glob(f"*/{name}/driver_artifacts/searcher-state-*.pkl")
    files = [*experiment.glob("searcher-state-*.pkl"), *copies]
    require(files, "there is no state file")
    for file in files:
        spoil(file)
    try:
        cell.whole(cell.restored(folder=experiment))
    except Unmet:
        raise
    except Exception as error:
        message = refusal(cell, raising(error)) if cell.column.ours else str(error)
        require("searcher-state" in message or name in message, f"the file is not named: {message}")


def raising(error: Exception) -> Callable[[], None]:
    """A function that raises an exception."""

    def again() -> None:
        raise error

    return again


@duty()
def torn_state(cell: Cell) -> None:
    """A torn state file at restore is named in one line, or made good."""
    spoilt_state(cell, lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]))


@duty()
def missing_state(cell: Cell) -> None:
    """A missing state file at restore is named in one line, or made good."""
    spoilt_state(cell, Path.unlink)


@duty()
def storage_filesystem(cell: Cell) -> None:
    """Storage on another file system (`storage_filesystem=`), and a restore from there."""
    (cell.folder / "bucket").mkdir()
    folder = cell.folder / "bucket" / "results" / "run"
    filesystem = SubTreeFileSystem(str(cell.folder / "bucket"), LocalFileSystem())
    cell.cut_short(cell.make(), run_options={"storage_path": "results", "storage_filesystem": filesystem})
    cell.whole(cell.restored(folder=folder, path="results/run", storage_filesystem=filesystem))


# ---------------------------------------------------------------------------------------------------------------------
# one object in several Tuners


@duty()
def second_tuner_after_interruption(cell: Cell) -> None:
    """The same object in a second Tuner after an interrupted one."""
    search = cell.make()
    cell.cut_short(search)
    grid = cell.fit(search, space={}, samples=-1 if cell.column.ends else 2, name="second")
    require(not grid.num_errors and len(grid) > 0, f"{len(grid)} trials, {grid.num_errors} errors")


@duty()
def second_tuner(cell: Cell) -> None:
    """The same object in a second Tuner after a complete one: both come to their ends."""
    search = cell.make()
    cell.whole(cell.fit(search))
    again = cell.fit(search, space={}, samples=-1 if cell.column.ends else 2, name="second")
    require(not again.num_errors, f"{again.num_errors} errors")


# ---------------------------------------------------------------------------------------------------------------------
# actors


@duty()
def reuse_actors(cell: Cell) -> None:
    """`reuse_actors=True`: every trial is run with its own config."""
    _, grid = cell.plain()
    cell.whole(grid)
    require(all(result.metrics["trained_x"] == result.config["x"] for result in grid), "another trial's config is run")
    require(len({result.metrics["worker"] for result in grid}) <= 2, "actors are not reused")


@duty()
def reuse_actors_without_reset(cell: Cell) -> None:
    """`reuse_actors=True` with a class that cannot be reset does not hang."""
    grid = cell.fit(cell.make(), trainable=UnresettableBowl)
    require(len(grid) > 0, "no trials")


# ---------------------------------------------------------------------------------------------------------------------
# state


@duty()
def same_seed(cell: Cell) -> None:
    """The same seed gives the same configs, another gives others."""
    require(drive(cell.opened(seed=1), 12) == drive(cell.opened(seed=1), 12), "configs differ")
    require(drive(cell.opened(seed=1), 12) != drive(cell.opened(seed=2), 12), "the seed does not matter")


@duty()
def global_generators(cell: Cell) -> None:
    """NumPy's, Python's and torch's global generators are left as they were found."""
    import torch

    def states() -> dict[str, Any]:
        numpy_state: Any = np.random.get_state()
        found = random.getstate(), (numpy_state[1].tolist(), numpy_state[2:]), torch.get_rng_state().tolist()
        return dict(zip(("Python's", "NumPy's", "torch's"), found, strict=True))

    before = states()
    drive(cell.opened(), 12)
    advanced = [name for name, state in states().items() if state != before[name]]
    require(not advanced, f"{' and '.join(advanced)} generator has been advanced")


@duty()
def global_seeds(cell: Cell) -> None:
    """Seeding NumPy's and Python's global generators differently gives the same configs."""
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        found.append(drive(cell.opened(), 12))
    require(found[0] == found[1], "configs differ")


@duty()
def picklable(cell: Cell) -> None:
    """It can be pickled before it is used and meanwhile, and the copy goes on in the same way."""
    search = cloudpickle.loads(cloudpickle.dumps(cell.make(**cell.column.endless)))
    search.set_search_properties("val_loss", "min", dict(SPACE))
    drive(search, 6)
    copy = cloudpickle.loads(cloudpickle.dumps(search))
    require(drive(search, 6, first=6) == drive(copy, 6, first=6), "the copy goes on differently")


@duty()
def state_size(cell: Cell) -> str:
    """The state file grows by 2 kB a trial at the most."""
    search, sizes = cell.opened(), []
    file = cell.folder / "state.pkl"
    count = 0
    for upto in (40, 120):
        count += len(drive(search, upto - count, first=count))
        search.save(str(file))
        sizes.append(file.stat().st_size)
    require(count == 120, f"the search ends after {count} trials")
    growth = (sizes[1] - sizes[0]) / 80
    require(growth <= 2000, f"{growth:.0f} bytes a trial")
    return f"{max(growth, 0):.0f} B"


assert set(TARGET) == set(SPACE) and SlowBowl.seconds > Bowl.seconds
