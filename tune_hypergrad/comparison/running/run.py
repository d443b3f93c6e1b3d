"""`compare`: methods side by side, in one `tune.Tuner` on one cluster, each with the same budget."""

from __future__ import annotations

import json
import logging
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray import tune
from ray.tune import (
    Callback,
    CheckpointConfig,
    FailureConfig,
    PlacementGroupFactory,
    RunConfig,
    TuneConfig,
)
from ray.tune.search import Searcher

from tune_hypergrad.budget import Budget
from tune_hypergrad.comparison.ledger import (
    BUDGET_SPENT,
    GRID,
    LEDGER_FILE,
    RETRAINING,
    SEARCH_ENDED,
    START,
    Account,
    Ledger,
    read_events,
)
from tune_hypergrad.comparison.methods import BY_DEFAULT, Method, Task
from tune_hypergrad.comparison.running.arguments import checked
from tune_hypergrad.comparison.running.dispatching import Dispatching
from tune_hypergrad.comparison.running.fair_share import WAITING
from tune_hypergrad.comparison.running.folders import contents, folder_for, joined, new_file, raise_if_full, storage_for
from tune_hypergrad.comparison.running.growth import EXTENSIONS, Growth, continuation_of, growth_of
from tune_hypergrad.comparison.running.labels import PORTFOLIO, trial_name
from tune_hypergrad.comparison.running.plan import Plan, chosen_methods, default_space
from tune_hypergrad.comparison.running.portfolio import (
    SNAPSHOT_FILE,
    PortfolioStopper,
    portfolio_of,
)
from tune_hypergrad.comparison.running.retraining import Retraining
from tune_hypergrad.comparison.running.scheduling import PatientScheduler
from tune_hypergrad.comparison.running.session import cluster_session
from tune_hypergrad.comparison.running.start import complete_start
from tune_hypergrad.comparison.running.sweeping import sweep_all
from tune_hypergrad.comparison.telling.progress import Display, Status, make_display
from tune_hypergrad.comparison.telling.records import SETTINGS_FILE, Comparison
from tune_hypergrad.comparison.telling.report import write_report
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import Optimizer
from tune_hypergrad.problem import Problem
from tune_hypergrad.ray_internals import put_snapshot_back, run_config_of, saved_searcher
from tune_hypergrad.schedules import Schedule

COMMAND_FILE = "command.json"
"""In a comparison's folder, where the command line made it: its options, for resuming."""

_TRIALS_FOLDER = "trials"
_BEFORE = (COMMAND_FILE, "settings.tmp")  # what a folder may have before anything has begun there
_BESIDE_LEDGER = (SETTINGS_FILE, "settings.tmp", SNAPSHOT_FILE, "snapshot.tmp", _TRIALS_FOLDER)
_OF_RUNS = ("out", "resume", "max_failures", "storage", "address", "progress", "callbacks")
_logger = logging.getLogger(__name__)

_PACKAGES = ("tune_hypergrad", "torch", "ray", "hpbandster", "ConfigSpace", "numpy")


class Interrupted(Exception):
    """A person stopped the comparison; it can be resumed."""


def compare(
    problem: Problem,
    methods: Sequence[str | Method] | None = None,
    *,
    budget: str | Budget = "300e",
    space: Mapping[str, Any] | str | None = None,
    start: str | Path | Schedule | Mapping[str, Any] | None = None,
    seeds: int | Sequence[int] = 1,
    epochs: float = 10.0,
    optimizer: str | Optimizer = "sgd",
    resources: Mapping[str, float] | PlacementGroupFactory | None = None,
    out: str | Path = "results",
    resume: bool = False,
    retraining: Retraining | None = None,
    reference: float | str = "best",
    max_concurrent: int | None = None,
    max_failures: int = 2,
    storage: str | None = None,
    address: str | None = None,
    progress: str = "auto",
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Comparison:
    """Tune a problem by several methods at once, each with the same budget, and report what they found.

    ```python
    comparison = compare(problem, ["fds", "bohb", "rs"], budget="600e", seeds=3, out="results")
    comparison.summary                      # and results/report.html
    comparison.schedule("fds")
    ```

    All trials share one Ray cluster; the next is always one of the method that has spent the smallest share of its
    budget. The test split is not read before all is found: then incumbents are trained again from scratch, by one
    routine for all, and tested.

    Args:
        problem: what is trained.
        methods: names of built-in methods, or `Method`s of your own; by default all but the ablation "centered-stn".
            Those that cannot work on the problem are left out, and the reason is told.
        budget: what every method with every seed may spend, such as "600e" (see `Budget.parse`). At the most one
            result of one trial goes over it. Retraining is not part of it.
        space: Ray domains by name, the same for all; by default a learning-rate schedule of 7 windows, momentum and
            weight decay (see `optimizer_space`), and the problem's regularisers; "paper" has the same in the wide
            linear ranges of Micaelli and Storkey (2021, see `paper_space`).
        start: your own settings, from which all methods begin: a file that `Schedule.save` wrote or with a JSON
            object, a `Schedule`, or a dict of numbers and windows, for any part of the space (see `complete_start` for
            the rest). It is trained once with every seed, which costs no method's budget, and no method's incumbent is
            worse than it by validation.
        seeds: of the methods and their trials: a number of them, from 0 on, or a list.
        epochs: length of one training run.
        optimizer: inner optimizer, by name or an `Optimizer` of one's own.
        resources: what every trial gets, by default {"cpu": 1}; {"gpu": 0.25} puts four on a GPU; a `Method` may
            say otherwise for its own.
        out: folder for everything, which must be empty or not there; where the cluster has several nodes, on a file
            system that all see, or give `storage`.
        resume: go on with the comparison in `out`, with the same arguments. One that is finished may be extended by a
            larger budget, further methods and further seeds: what was done is kept and counted. `max_failures` and
            `callbacks` may be others.
        retraining: how incumbents are trained again.
        reference: what regret is measured from: a value on the test split, "best" (the best seen), or "grid:N", a
            grid search of at most N trainings, which is not part of any budget.
        max_concurrent: trials at once; None leaves it to the cluster. With 1, the same seeds give the same trials.
        max_failures: restarts of a trial that fails, from its last checkpoint; -1 is no limit.
        storage: where Ray keeps trials and checkpoints, such as "s3://bucket/folder"; by default in `out`.
        address: a Ray cluster to join, as host:port ("auto" finds it); by default this session's, else one of this
            machine's own.
        progress: "auto" (a table in a terminal or a notebook, lines in a log), "quiet" or "json".
        callbacks: further Ray callbacks, such as MLflow's or Weights & Biases'.
        **settings: further fields of `Task`: min_budget, max_budget, eta, fixed, self_tuning_epochs, clip_gradient,
            clip_norm, ema, autocast, and check (False leaves out the comparison of training and hypergradients with
            plain torch before anything runs).

    Returns:
        What was found; `out` has it as report.html, summary.md, results.csv, ledger.jsonl and pictures.

    Raises:
        InputError: something cannot work; nothing has been run then, and `out` is as it was.
        Interrupted: Ctrl-C; `resume=True` goes on.
    """
    given = checked({**{name: value for name, value in locals().items() if name != "settings"}, **settings})
    of_run = {name: given.pop(name) for name in _OF_RUNS}
    return run_plan(_plan(**given), **of_run)


def _plan(
    problem: Problem,
    methods: Sequence[str | Method] | None,
    *,
    budget: str | Budget,
    space: Mapping[str, Any] | str | None,
    start: Mapping[str, Any] | None,
    seeds: tuple[int, ...],
    epochs: float,
    optimizer: str | Optimizer,
    resources: Mapping[str, float] | PlacementGroupFactory | None,
    retraining: Retraining | None,
    reference: float | str,
    max_concurrent: int | None,
    **of_task: Any,
) -> Plan:
    """What `compare` is to do, of its arguments one by one checked."""
    problem.check()
    steps = round(epochs * problem.steps_per_epoch)
    if steps < 1:
        raise InputError(f"epochs is {epochs:g}, less than one inner step of {problem.steps_per_epoch} an epoch")
    if space is None or isinstance(space, str):
        held, named = of_task.get("fixed", {}), default_space(problem, optimizer, name=space)
        space = {name: entry for name, entry in named.items() if name not in held}
    # searches never see the test split
    limit = budget if isinstance(budget, Budget) else Budget.parse(budget, steps_per_epoch=problem.steps_per_epoch)
    trainings = limit.amount / steps if limit.unit == "gradients" else None
    task = Task(problem.replace(test=None), space, steps, optimizer, trainings=trainings, **of_task)
    begin = None if start is None else complete_start(start, task)
    if begin is not None:
        task = replace(task, start=begin.point)
    return Plan(
        problem=problem,
        task=task,
        methods=chosen_methods(methods),
        budget=limit,
        seeds=seeds,
        resources={"cpu": 1} if resources is None else resources,
        retraining=retraining or Retraining(),
        reference=reference,
        max_concurrent=max_concurrent,
        start=None if begin is None else begin.exact,
    )


def run_plan(
    plan: Plan,
    out: str | Path,
    *,
    resume: bool = False,
    max_failures: int = 2,
    storage: str | None = None,
    address: str | None = None,
    progress: str = "auto",
    callbacks: Sequence[Callback] = (),
) -> Comparison:
    """Carry a plan out, or go on with it, and write the report; arguments are those of `compare` when `checked`, and so
    are errors."""
    folder = Path(out).resolve()
    # whoever has named methods wants to know at once; of all the usual ones the report says it
    were_named = {method.name for method in plan.methods} != set(BY_DEFAULT)
    plan = (_as_begun(plan, folder) if resume else plan).suited()
    growth = _growth_in(folder, plan, storage) if resume else Growth()
    plan = _continued(plan, folder, growth) if resume else plan
    for name, reason in plan.left_out.items():
        _logger.log(logging.WARNING if were_named else logging.INFO, "%s is left out: %s", name, reason)
    display = make_display(progress, plan.left_out, plan.problem.criterion)
    trainables, searchers = plan.trainables(), plan.searchers()
    key = _key_of(folder) if resume else _new_key(folder)
    trials = joined(storage, f"{folder.name}-{key}") if storage else str(folder)

    @cache  # asked when something has failed, by whoever clears up
    def begun() -> bool:
        return resume or bool(Ledger(folder / LEDGER_FILE).trials)

    try:
        with ExitStack() as stack:
            stack.enter_context(folder_for(folder))
            if storage:
                stack.enter_context(storage_for(trials, begun))
            stack.enter_context(cluster_session(address, pending=WAITING * plan.kinds))
            plan.check_resources()
            if not resume:
                stack.enter_context(new_file(folder / LEDGER_FILE, _BESIDE_LEDGER, begun))
            _write_settings(folder, plan, key, storage, growth)
            _DISPLAYS[key] = display
            finished = _run(plan, trainables, searchers, folder, key, max_failures, trials, callbacks)
    except Exception as error:
        try:
            raise_if_full(str(error))  # Ray gives the text of what a callback raises
        except OSError:
            remedy = "make room, then resume" if begun() else "make room"
            raise InputError(f"the disk of {folder} is full: {remedy}") from error
        raise
    finally:
        _DISPLAYS.pop(key, None)
        display.close()
    comparison = Comparison(folder)
    write_report(comparison)
    if not finished:
        raise Interrupted(
            f"stopped: {folder} has the results so far; the same call with resume=True goes on from there"
        )
    return comparison


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
        """Called by Ray."""
        trial.max_failures = self.max_failures
        portfolio_of(self.key).started(trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Ray."""
        portfolio_of(self.key).ended(trial)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Ray when a trial has failed and is tried again."""
        portfolio_of(self.key).retried(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Ray when a trial has failed for good."""
        portfolio_of(self.key).failed(trial)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Ray."""
        if time.monotonic() - self._shown >= 0.25:
            self._show()

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Called by Ray."""
        self._show(finished=portfolio_of(self.key).finished)

    def _show(self, finished: bool = False) -> None:
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
        _DISPLAYS[self.key].update(statuses, finished=finished)


_DISPLAYS: dict[str, Display] = {}


def _run(
    plan: Plan,
    trainables: Mapping[str, Any],
    searchers: Mapping[Account, Searcher],
    folder: Path,
    key: str,
    max_failures: int,
    trials: str,
    callbacks: Sequence[Callback],
) -> bool:
    """Run or go on, with Ray's files in the folder `trials`; whether it came to its end."""
    parameters = {"trainables": dict(trainables), "unit": plan.budget.unit, "criterion": plan.problem.criterion}
    dispatching = tune.with_parameters(Dispatching, **parameters)
    factories = plan.factories()
    trainable = tune.with_resources(dispatching, lambda config: factories[config[PORTFOLIO]["method"]])
    name = _TRIALS_FOLDER if plan.continuation is None else f"{_TRIALS_FOLDER}-{plan.continuation.number}"
    path = joined(trials, name)
    if plan.continuation is not None:
        _write_extension(folder, plan)
    known = put_snapshot_back(folder / SNAPSHOT_FILE, path)
    if known:
        sweep_all(path, keep=known)
        tuner = tune.Tuner.restore(path, trainable)
        run_config = run_config_of(tuner)
        run_config.callbacks = [ComparisonCallback(key, max_failures), *callbacks]
        run_config.failure_config = FailureConfig(max_failures=max_failures)
    else:
        _forget(folder, path)
        portfolio = plan.portfolio(searchers, folder, key)
        if plan.continuation is not None:
            anew = {*plan.continuation.anew, Account(RETRAINING, 0)}
            portfolio.extend(saved_searcher(_snapshot_before(folder, plan)), anew)
        tuner = tune.Tuner(
            trainable,
            tune_config=TuneConfig(
                search_alg=portfolio,
                scheduler=PatientScheduler(),
                metric=plan.problem.criterion.column,
                mode=plan.problem.criterion.mode,
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_folder,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=trials,
                stop=PortfolioStopper(key),
                verbose=0,
                callbacks=[ComparisonCallback(key, max_failures), *callbacks],
                failure_config=FailureConfig(max_failures=max_failures),
                checkpoint_config=CheckpointConfig(checkpoint_frequency=1),
            ),
        )
    tuner.fit()
    finished = portfolio_of(key).finished  # Ray catches Ctrl-C, stops the trials and returns
    if finished:
        sweep_all(path)
    return finished


def _forget(folder: Path, trials: str) -> None:
    """What a driver left that was killed before Ray had saved anything."""
    events = read_events(folder / LEDGER_FILE)
    if events and events[-1]["event"] != "extend":
        Ledger(folder / LEDGER_FILE).write("resume", known=[])
    with suppress(FileNotFoundError):
        if "://" not in trials:
            shutil.rmtree(trials)


def _as_begun(plan: Plan, folder: Path) -> Plan:
    """A plan without the methods that were left out as the comparison in a folder began."""
    file = folder / SETTINGS_FILE
    reasons = json.loads(file.read_text()).get("left_out", {}) if file.is_file() else {}
    known = {method.name: reasons[method.name] for method in plan.methods if method.name in reasons}
    left = tuple(method for method in plan.methods if method.name not in known)
    return replace(plan, methods=left, left_out=known)


def _growth_in(folder: Path, plan: Plan, storage: str | None) -> Growth:
    """By what a plan extends the comparison in a folder.

    Raises:
        InputError: there is none, it had another plan, or it is not finished and so cannot be extended.
    """
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise InputError(f"{folder} has nothing to resume: there is no {SETTINGS_FILE}")
    saved = json.loads(file.read_text())
    growth = growth_of(saved, {**plan.settings(), "storage": storage}, folder)
    if saved["folder"] != str(folder):
        raise InputError(f"{folder} was begun as {saved['folder']}: move it back there to resume")
    if growth and not Comparison(folder).finished:
        raise InputError(f"{folder} is not finished: resume it with the arguments that it has, then extend it")
    return growth


def _continued(plan: Plan, folder: Path, growth: Growth) -> Plan:
    """A plan with what its extension, if it is one, begins with, and in the order in which things were added."""
    saved = json.loads((folder / SETTINGS_FILE).read_text())
    number = len(saved.get(EXTENSIONS, ())) + bool(growth)
    names, own = [method["name"] for method in saved["methods"]], {method.name: method for method in plan.methods}
    order = [*names, *growth.methods]
    plan = replace(plan, methods=tuple(own[name] for name in order), seeds=(*saved["seeds"], *growth.seeds))
    if not number:
        return plan
    new = growth.said() if growth else saved[EXTENSIONS][-1]
    known = frozenset(
        Account(method, seed)
        for method in (*order, START, GRID, RETRAINING)
        for seed in plan.seeds
        if method not in new["methods"] and seed not in new["seeds"]
    )
    return replace(plan, continuation=continuation_of(folder, number, own, plan.task, plan.budget, known))


def _snapshot_before(folder: Path, plan: Plan) -> Path:
    """The copy of Ray's last snapshot before an extension."""
    assert plan.continuation is not None
    file = folder / SNAPSHOT_FILE
    return file.with_stem(f"{file.stem}-{plan.continuation.number}")


def _write_extension(folder: Path, plan: Plan) -> None:
    """Tell the ledger of an extension that has just begun, and put what was before it aside."""
    assert plan.continuation is not None
    before, file = _snapshot_before(folder, plan), folder / SNAPSHOT_FILE
    if not before.exists() and file.exists():  # from now on that is the extension's own
        file.rename(before)
    events = read_events(folder / LEDGER_FILE)
    if sum(event["event"] == "extend" for event in events) >= plan.continuation.number:
        return
    ledger, said = Ledger(folder / LEDGER_FILE), json.loads((folder / SETTINGS_FILE).read_text())[EXTENSIONS][-1]
    ended = {account for account, why in ledger.stopped.items() if why in (BUDGET_SPENT, SEARCH_ENDED)}
    methods = {method.name for method in plan.methods}
    grown = {account for account in ended if account.method in methods and said["budget_before"]}
    grown -= plan.continuation.waiting
    ledger.write("extend", **said, reopened=sorted([*map(list, grown), [RETRAINING, 0]]))


def _key_of(folder: Path) -> str:
    """The key of the portfolio to go on with."""
    return str(json.loads((folder / SETTINGS_FILE).read_text())["key"])


def _new_key(folder: Path) -> str:
    """A key for a new portfolio.

    Raises:
        InputError: its folder holds something.
    """
    if any(file.name not in _BEFORE for file in contents(folder)):
        raise InputError(f"{folder} is not empty: choose another folder, resume what is in it, or remove it")
    return uuid4().hex[:8]


def _write_settings(folder: Path, plan: Plan, key: str, storage: str | None, growth: Growth) -> None:
    """Write what is compared, how, with what versions and on which machine; where it was begun already, only the
    latter anew, what it has grown by, and what was left out beside what has been."""
    file = folder / SETTINGS_FILE
    resources = ray.cluster_resources()
    machine = {
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "CPU": resources.get("CPU", 0),
        "GPU": resources.get("GPU", 0),
        "processor": _processor(),
    }
    versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    begun = datetime.now(timezone.utc).isoformat(timespec="seconds")
    settings = {
        **plan.settings(),
        "storage": storage,
        "key": key,
        "folder": str(folder),
        "started": begun,
        "versions": versions,
    }
    if file.exists():
        saved = json.loads(file.read_text())
        grown = {**plan.settings(), EXTENSIONS: [*saved.get(EXTENSIONS, ()), growth.said()]} if growth else {}
        settings = {**saved, **grown, "left_out": {**saved.get("left_out", {}), **plan.left_out}}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({**settings, "machine": machine}, indent=1))
    temporary.replace(file)


def _processor() -> str:
    """This node's, by its name where the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _trial_name(trial: Any) -> str:
    return trial_name(trial.config)


def _trial_folder(trial: Any) -> str:
    label = trial.config[PORTFOLIO]
    # what continues a shorter trial finds its folder by the id between underscores
    return f"{label['method']}_{trial.trial_id}_{label['seed']}-{label['trial']}"
