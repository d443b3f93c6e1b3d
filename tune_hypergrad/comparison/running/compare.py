"""`compare`: methods side by side, in one `tune.Tuner` on one cluster, each with the same budget."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

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
    LEDGER_FILE,
    RETRAINING,
    Account,
    Ledger,
)
from tune_hypergrad.comparison.methods import BY_DEFAULT, Method, Task
from tune_hypergrad.comparison.running.arguments import checked
from tune_hypergrad.comparison.running.callback import DISPLAYS, ComparisonCallback
from tune_hypergrad.comparison.running.dispatching import Dispatching
from tune_hypergrad.comparison.running.fair_share import WAITING
from tune_hypergrad.comparison.running.folders import contents, folder_for, joined, new_file, raise_if_full, storage_for
from tune_hypergrad.comparison.running.growth import Growth
from tune_hypergrad.comparison.running.labels import PORTFOLIO, trial_name
from tune_hypergrad.comparison.running.plan import Plan, chosen_methods, default_space
from tune_hypergrad.comparison.running.portfolio import (
    SNAPSHOT_FILE,
    PortfolioSearch,
    PortfolioStopper,
    portfolio_of,
)
from tune_hypergrad.comparison.running.profiling import Phases, profiled
from tune_hypergrad.comparison.running.recorder import Recorder
from tune_hypergrad.comparison.running.resuming import (
    as_begun,
    continued,
    forget_unsaved,
    growth_in,
    key_of,
    snapshot_before,
    write_extension,
)
from tune_hypergrad.comparison.running.retraining import Retraining
from tune_hypergrad.comparison.running.scheduling import PatientScheduler
from tune_hypergrad.comparison.running.session import cluster_session
from tune_hypergrad.comparison.running.settings import write_settings
from tune_hypergrad.comparison.running.start import complete_start
from tune_hypergrad.comparison.running.sweeping import sweep_all
from tune_hypergrad.comparison.telling.progress import make_display
from tune_hypergrad.comparison.telling.records import PROFILE_FILE, SETTINGS_FILE, Comparison
from tune_hypergrad.comparison.telling.report import write_report
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import Optimizer
from tune_hypergrad.problem import Problem
from tune_hypergrad.ray_internals import KILLS_ARE_DEATHS, put_snapshot_back, run_config_of, saved_searcher
from tune_hypergrad.schedules import Schedule

COMMAND_FILE = "command.json"
"""File name in a comparison's folder: the options of the command line that began it, for resuming."""

_TRIALS_FOLDER = "trials"
_OF_DRIVER: Phases = {
    "suggestions": ((PortfolioSearch, "suggest"), (PortfolioSearch, "on_trial_result")),
    "ends to searchers": ((PortfolioSearch, "on_trial_complete"),),
    "ledger": ((Recorder, "reported"), (Recorder, "started"), (Recorder, "ended"), (Recorder, "failed")),
    "snapshots": ((PortfolioSearch, "save"),),
    "progress": ((ComparisonCallback, "show"),),
}
"""Phases that the driver's time is told apart by; the rest is Ray's, most of it waiting for trials."""
_BEFORE = (COMMAND_FILE, "settings.tmp")  # what a folder may have before anything has begun there
_BESIDE_LEDGER = (SETTINGS_FILE, PROFILE_FILE, "settings.tmp", SNAPSHOT_FILE, "snapshot.tmp", _TRIALS_FOLDER)
_OF_RUNS = ("out", "resume", "max_failures", "storage", "address", "progress", "callbacks", "profile")
_logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """Raised where a person has stopped a comparison, which can be resumed."""


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
    profile: bool = False,
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
        profile: whether the report says where the time of trials and of the driver went, which takes a little itself.
        **settings: further fields of `Task`: min_epochs, max_epochs, eta, fixed, self_tuning_epochs, clip_gradient,
            clip_norm, ema, autocast, channels_last, tf32, max_memory, and check (False leaves out the comparison of
            training and hypergradients with plain torch before anything runs).

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
    """The plan of a comparison, made of the arguments of `compare` when each has been checked."""
    problem.check()
    steps = round(epochs * problem.steps_per_epoch)
    if steps < 1:
        raise InputError(f"epochs is {epochs:g}, less than one inner step of {problem.steps_per_epoch} an epoch")
    if space is None or isinstance(space, str):
        fixed, named = of_task.get("fixed", {}), default_space(problem, optimizer, name=space)
        space = {name: entry for name, entry in named.items() if name not in fixed}
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
    profile: bool = False,
) -> Comparison:
    """Carry a plan out, or go on with it, and write the report; arguments are those of `compare` when `checked`, and so
    are errors."""
    folder = Path(out).resolve()
    # whoever has named methods wants to know at once; of all the usual ones the report says it
    were_named = {method.name for method in plan.methods} != set(BY_DEFAULT)
    plan = (as_begun(plan, folder) if resume else plan).suited()
    growth = growth_in(folder, plan, storage) if resume else Growth()
    plan = continued(plan, folder, growth) if resume else plan
    for name, reason in plan.left_out.items():
        _logger.log(logging.WARNING if were_named else logging.INFO, "%s is left out: %s", name, reason)
    display = make_display(progress, plan.left_out, plan.problem.criterion)
    trainables, searchers = plan.trainables(), plan.searchers()
    key = key_of(folder) if resume else _new_key(folder)
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
            stack.enter_context(KILLS_ARE_DEATHS.entered())
            plan.check_resources()
            if not resume:
                stack.enter_context(new_file(folder / LEDGER_FILE, _BESIDE_LEDGER, begun))
            write_settings(folder, plan, key, storage, growth)
            DISPLAYS[key] = display
            if profile:
                stack.enter_context(profiled(folder / PROFILE_FILE, _OF_DRIVER))
            finished = _run(plan, trainables, searchers, folder, key, max_failures, trials, callbacks, profile)
    except Exception as error:
        try:
            raise_if_full(str(error))  # Ray gives the text of what a callback raises
        except OSError:
            remedy = "make room, then resume" if begun() else "make room"
            raise InputError(f"the disk of {folder} is full: {remedy}") from error
        raise
    finally:
        DISPLAYS.pop(key, None)
        display.close()
    comparison = Comparison(folder)
    write_report(comparison)
    if not finished:
        raise Interrupted(
            f"stopped: {folder} has the results so far; the same call with resume=True goes on from there"
        )
    return comparison


def _run(
    plan: Plan,
    trainables: Mapping[str, Any],
    searchers: Mapping[Account, Searcher],
    folder: Path,
    key: str,
    max_failures: int,
    trials: str,
    callbacks: Sequence[Callback],
    profile: bool,
) -> bool:
    """Run a plan, or go on with it, with Ray's files in the folder `trials`; returns whether it came to its end."""
    dispatching = tune.with_parameters(
        Dispatching,
        trainables=dict(trainables),
        unit=plan.budget.unit,
        criterion=plan.problem.criterion,
        profile=profile,
    )
    factories = plan.factories()
    trainable = tune.with_resources(dispatching, lambda config: factories[config[PORTFOLIO]["method"]])
    name = _TRIALS_FOLDER if plan.continuation is None else f"{_TRIALS_FOLDER}-{plan.continuation.number}"
    path = joined(trials, name)
    if plan.continuation is not None:
        write_extension(folder, plan)
    known = put_snapshot_back(folder / SNAPSHOT_FILE, path)
    if known:
        sweep_all(path, keep=known)
        tuner = tune.Tuner.restore(path, trainable)
        run_config = run_config_of(tuner)
        run_config.callbacks = [ComparisonCallback(key, max_failures), *callbacks]
        run_config.failure_config = FailureConfig(max_failures=max_failures)
    else:
        forget_unsaved(folder, path)
        portfolio = plan.portfolio(searchers, folder, key)
        if plan.continuation is not None:
            anew = {*plan.continuation.anew, Account(RETRAINING, 0)}
            portfolio.extend(saved_searcher(snapshot_before(folder, plan)), anew)
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


def _new_key(folder: Path) -> str:
    """A key for a new portfolio.

    Raises:
        InputError: its folder holds something.
    """
    if any(file.name not in _BEFORE for file in contents(folder)):
        raise InputError(f"{folder} is not empty: choose another folder, resume what is in it, or remove it")
    return uuid4().hex[:8]


def _trial_name(trial: Any) -> str:
    return trial_name(trial.config)


def _trial_folder(trial: Any) -> str:
    label = trial.config[PORTFOLIO]
    # what continues a shorter trial finds its folder by the id between underscores
    return f"{label['method']}_{trial.trial_id}_{label['seed']}-{label['trial']}"
