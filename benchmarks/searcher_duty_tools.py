"""What the duties of `searcher_duties.py` are tried with: the searchers, trials without any training, and a Tuner."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig, Trainable, TuneConfig
from ray.tune.search import Searcher
from ray.tune.utils import flatten_dict

ITERATIONS = 3
SPACE = {"x": tune.uniform(0, 1), "y": tune.uniform(0, 1)}
TARGET = {"x": 0.3, "y": 0.6}
SNAPSHOTS = {"TUNE_GLOBAL_CHECKPOINT_S": "0.2", "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0"}


Grid: TypeAlias = Any
"""Ray's `ResultGrid`, whose iteration it does not declare."""


class Unmet(Exception):
    """A duty that a searcher does not fulfil; the message is the reason."""


def require(condition: Any, reason: str) -> None:
    """Raise `Unmet` with the reason unless the condition holds."""
    if not condition:
        raise Unmet(reason)


# ---------------------------------------------------------------------------------------------------------------------
# searchers


@dataclass(frozen=True)
class Column:
    """A searcher, with settings under which a whole search is four trials."""

    name: str
    module: str
    options: Mapping[str, Any]
    endless: Mapping[str, Any] = field(default_factory=dict)
    """What to change in `options` for a search without an end of its own."""
    longer: Mapping[str, Any] = field(default_factory=dict)
    """What to change in `options` for trials of at least `ITERATIONS` iterations."""
    ends: bool = False
    """Whether the search ends by itself after four trials."""
    model: bool = False
    """Whether suggestions depend on a model of the results."""
    halving: bool = False
    """Whether the best of three short trials is run again for longer."""
    needs_bohb_scheduler: bool = False
    ours: bool = True

    trials = 4

    @property
    def installed(self) -> bool:
        """Whether the searcher and what it is made of can be imported."""
        try:
            self.make()
        except (ImportError, AssertionError):
            return False
        return True

    @property
    def samples(self) -> int:
        """`num_samples` for a whole search."""
        return -1 if self.ends else self.trials

    def make(self, **options: Any) -> Searcher:
        """The searcher, with further options."""
        return getattr(import_module(self.module), self.name)(**{**self.options, **options})  # type: ignore[no-any-return]

    def scheduler(self, **options: Any) -> Any:
        """The scheduler that the searcher cannot do without."""
        if not self.needs_bohb_scheduler:
            return None
        from ray.tune.schedulers import HyperBandForBOHB

        return HyperBandForBOHB(time_attr="training_iteration", max_t=ITERATIONS, reduction_factor=3, **options)


_HYPERBAND = {"min_budget": 1, "max_budget": ITERATIONS, "brackets": 1, "seed": 0}
_LONGER = {"min_budget": ITERATIONS, "max_budget": 3 * ITERATIONS}
_OURS = "tune_hypergrad.searchers"
_ALL = (
    Column("RandomSearch", _OURS, {"max_budget": ITERATIONS, "seed": 0}),
    Column("BOSearch", _OURS, {"max_budget": ITERATIONS, "seed": 0}, model=True),
    Column("HyperBandSearch", _OURS, _HYPERBAND, {"brackets": None}, _LONGER, ends=True, halving=True),
    Column("BOHBSearch", _OURS, _HYPERBAND, {"brackets": None}, _LONGER, ends=True, halving=True, model=True),
    Column(
        "HypergradientSearch",
        _OURS,
        {"outer_steps": 4, "confirmations": 0, "seed": 0},
        {"outer_steps": None, "trainings": 1e9},
        ends=True,
    ),
    Column("TuneBOHB", "ray.tune.search.bohb", {"seed": 0}, model=True, needs_bohb_scheduler=True, ours=False),
    Column("OptunaSearch", "ray.tune.search.optuna", {"seed": 0}, model=True, ours=False),
)
COLUMNS = {column.name: column for column in _ALL}
OURS = tuple(column.name for column in _ALL if column.ours)


# ---------------------------------------------------------------------------------------------------------------------
# trials


def bowl(config: Mapping[str, Any]) -> dict[str, Any]:
    """A quadratic's value, the same as a gain, and its derivatives under the names of hypergradients."""
    paths = flatten_dict(dict(config))
    values = {path: value for path, value in paths.items() if path.split("/")[-1] in TARGET}
    offsets = {p: v - TARGET[p.split("/")[-1]] for p, v in values.items() if isinstance(v, int | float)}
    loss = 0.1 + sum(offset**2 for offset in offsets.values())
    gradient = {f"hypergradient/{path}/0": 2 * offset for path, offset in offsets.items()}
    return {"val_loss": loss, "untrained_val_loss": 9.0, "gain": -loss, **gradient}


class Bowl(Trainable):
    """A trial of a few iterations; like those of `InnerRun`, its hypergradients are NaN before the last."""

    seconds = 0.05

    def setup(self, config: dict[str, Any]) -> None:
        self.config = config

    def step(self) -> dict[str, Any]:
        time.sleep(self.seconds)
        result = bowl(self.config)
        done = self.iteration + 1 >= self.config.get("budget", ITERATIONS)
        if not done:
            result.update({key: math.nan for key in result if key.startswith("hypergradient")})
        return {**result, "done": done, "trained_x": self.config["x"], "worker": os.getpid()}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {"iteration": self.iteration}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """The iteration is all there is, and Ray keeps it."""


class SlowBowl(Bowl):
    """Time enough to be cut off."""

    seconds = 0.6


class UnresettableBowl(Bowl):
    """Cannot be given another configuration."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return False


def changed(folder: Path, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> type[Bowl]:
    """Trials whose results are changed, given a trial's number, from 1 in the order in which they begin to run."""

    class Changed(Bowl):
        def step(self) -> dict[str, Any]:
            return change(number_of(folder, self.trial_id), super().step())

    return Changed


def counted_slow(folder: Path) -> type[SlowBowl]:
    """Slow trials that leave their numbers in a folder as they begin."""

    class CountedSlow(SlowBowl):
        def step(self) -> dict[str, Any]:
            number_of(folder, self.trial_id)
            return super().step()

    return CountedSlow


def failing(folder: Path, which: Sequence[int] = (2,), until: Path | None = None) -> type[Bowl]:
    """Trials of which those with the given numbers fail, until a file exists."""

    def fail(number: int, result: dict[str, Any]) -> dict[str, Any]:
        if number in which and not (until and until.exists()):
            raise RuntimeError("this trial fails on purpose")
        return result

    return changed(folder, fail)


def number_of(folder: Path, trial_id: str) -> int:
    """A trial's number among those that leave links in a folder, which all processes agree upon."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        link = folder / str(number)
        try:
            link.symlink_to(trial_id)
        except FileExistsError:
            if os.readlink(link) != trial_id:
                continue
        return number
    raise AssertionError


# ---------------------------------------------------------------------------------------------------------------------
# callbacks


def alive() -> None:
    """Tell who waits for this process that something has happened."""
    print("alive", flush=True)


class Watch(Callback):
    """Tells of every trial's beginning and end, and remembers how many were under way at once at the most."""

    most = 0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        alive()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        alive()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        under_way = sum(trial.status in ("PENDING", "RUNNING") for trial in trials)
        Watch.most = max(Watch.most, under_way)


class Interrupt(Callback):
    """Ends the driver's loop, once, when a trial has ended and another one has run long enough for a snapshot."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag
        self.since: dict[str, float] = {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        running = [trial.trial_id for trial in trials if trial.status == "RUNNING"]
        self.since = {trial_id: self.since.get(trial_id, now) for trial_id in running}
        ended = any(trial.status == "TERMINATED" for trial in trials)
        if ended and any(now - since > 0.35 for since in self.since.values()) and not self.flag.exists():
            self.flag.touch()
            raise RuntimeError("interrupted on purpose")


# ---------------------------------------------------------------------------------------------------------------------
# one cell of the table


@dataclass(frozen=True)
class Cell:
    """One duty's trial by one searcher, in a folder of its own."""

    column: Column
    folder: Path

    def make(self, **options: Any) -> Searcher:
        """The searcher."""
        return self.column.make(**options)

    def opened(
        self, space: Mapping[str, Any] = SPACE, metric: str = "val_loss", mode: str = "min", **options: Any
    ) -> Any:
        """The searcher without an end of its own, and with what a Tuner hands it."""
        search = self.make(**{**self.column.endless, **options})
        require(search.set_search_properties(metric, mode, dict(space)), "the param_space is not taken")
        return search

    def fit(
        self,
        search: Searcher,
        *,
        trainable: Any = Bowl,
        space: Mapping[str, Any] = SPACE,
        samples: int | None = None,
        scheduler: Any = None,
        callbacks: Sequence[Callback] = (),
        max_failures: int = 0,
        name: str = "run",
        tune_options: Mapping[str, Any] | None = None,
        run_options: Mapping[str, Any] | None = None,
    ) -> Grid:
        """Run a search to its end in a Tuner."""
        own_metric = {} if (tune_options or {}).get("metric", "") is not None else {"metric": "val_loss", "mode": "min"}
        tune_settings = {
            "search_alg": search,
            "metric": "val_loss",
            "mode": "min",
            "num_samples": self.column.samples if samples is None else samples,
            "reuse_actors": True,
            "scheduler": scheduler or self.column.scheduler(**own_metric),
            **(tune_options or {}),
        }
        run_settings = {
            "name": name,
            "storage_path": str(self.folder),
            "verbose": 0,
            "callbacks": [Watch(), *callbacks],
            "failure_config": FailureConfig(max_failures=max_failures),
            **(run_options or {}),
        }
        Watch.most = 0
        tuner = tune.Tuner(
            trainable,
            param_space=dict(space),
            tune_config=TuneConfig(**tune_settings),
            run_config=RunConfig(**run_settings),
        )
        return tuner.fit()

    def cut_short(self, search: Searcher, **settings: Any) -> None:
        """Run a search that an exception ends while a trial runs."""
        try:
            self.fit(search, callbacks=[Interrupt(self.folder / "interrupted")], trainable=SlowBowl, **settings)
        except Exception as error:
            if "interrupted on purpose" not in "".join(map(str, chain(error))):
                raise
        else:
            raise Unmet("the search ended before it could be interrupted")

    def plain(self) -> tuple[Searcher, Grid]:
        """A whole search with nothing special about it, which is run once for all duties."""
        if self.column.name not in _PLAIN:
            search = self.make()
            _PLAIN[self.column.name] = search, self.fit(search)
        return _PLAIN[self.column.name]

    def restored(self, trainable: Any = SlowBowl, folder: Path | None = None, **settings: Any) -> Grid:
        """`Tuner.restore(...).fit()`; Ray begins a new experiment where it cannot restore one."""
        folder = folder or self.folder / "run"
        before = set(ended_trials(folder))
        grid: Grid = tune.Tuner.restore(settings.pop("path", str(folder)), trainable=trainable, **settings).fit()
        after = {(result.metrics or {}).get("trial_id") for result in grid} | set(ended_trials(folder))
        require(before <= after, "the experiment begins again")
        return grid

    def whole(self, grid: Grid, trials: int | None = None) -> None:
        """Require that all trials of a whole search have come to their ends."""
        if grid.num_errors:
            raise Unmet(f"{grid.num_errors} of {len(grid)} trials fail: {last_line(grid.errors[0])}")
        wanted = self.column.trials if trials is None else trials
        require(len(grid) == wanted, f"{len(grid)} trials in place of {wanted}")
        values = [(result.metrics or {}).get("val_loss") for result in grid]
        require(None not in values, "a trial has no result")


_PLAIN: dict[str, tuple[Searcher, Grid]] = {}


def ended_trials(folder: Path) -> list[str]:
    """Ids of the trials that have ended without an error, as Ray's newest snapshot of an experiment has it."""
    states = json.loads(max(folder.glob("experiment_state-*.json")).read_text())
    trials = [json.loads(description) for description, _ in states["trial_data"]]
    return [trial["trial_id"] for trial in trials if trial["status"] == "TERMINATED"]


def drive(
    search: Searcher, count: int, respond: Callable[[Mapping[str, Any]], Mapping[str, Any]] = bowl, first: int = 0
) -> list[dict[str, Any]]:
    """Configs of trials that are run one after the other without Ray, up to the search's end."""
    configs: list[dict[str, Any]] = []
    for index in range(first, first + count):
        trial_id = f"trial{index}"
        config: Any = search.suggest(trial_id)
        if config == Searcher.FINISHED:
            break
        require(config is not None, "waits though no trial runs")
        configs.append(config)
        result = {**respond(config), "training_iteration": 1, "hyperband_info": {"budget": 1}, "trial_id": trial_id}
        search.on_trial_result(trial_id, result)
        search.on_trial_complete(trial_id, {**result, "done": True})
    return configs


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it came from."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def last_line(error: BaseException) -> str:
    """The last line of an exception that holds another one's traceback."""
    return str(error).strip().split("\n")[-1]


def in_words(error: BaseException) -> str:
    """An exception in one line."""
    text = last_line(error) or type(error).__name__
    name = type(error).__name__
    return text if text.startswith(name) else f"{name}: {text}"


def without_paths(text: str) -> str:
    """A line in which places on this machine and in memory, and trials' names, are left out."""
    text = re.sub(r"(?<![\w/.])(file://)?/[^\s'\",:)]+", "…", text)
    text = re.sub(r"0x[0-9a-f]+", "0x…", text)
    return re.sub(r"\b[0-9a-f]{8}\b", "(a trial)", text)


def refusal(cell: Cell, action: Callable[[], Any]) -> str:
    """The line in which something is refused.

    Raises:
        Unmet: it is not, or with something other than a plain line.
    """
    from tune_hypergrad import InputError

    try:
        action()
    except Unmet:
        raise
    except Exception as error:
        refusals = [link for link in chain(error) if isinstance(link, InputError)]
        if not cell.column.ours:
            return in_words(list(chain(error))[-1])
        if not refusals:
            raise Unmet(f"no plain refusal: {in_words(list(chain(error))[-1])}") from error
        require("\n" not in str(refusals[0]), "the refusal has several lines")
        return str(refusals[0])
    raise Unmet("accepted")


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
