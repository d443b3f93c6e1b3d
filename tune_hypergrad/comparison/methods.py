"""The methods by name: which trainable and which searcher each is made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from math import cos, pi
from numbers import Integral
from statistics import fmean
from typing import Any, NamedTuple, TypeAlias

import torch
from ray import tune
from ray.tune import PlacementGroupFactory
from ray.tune.search import Searcher

from tune_hypergrad.curves import split_group
from tune_hypergrad.domains import Choices, Constant, Formless, Numbers, grid_values, is_grid, is_logarithmic, read
from tune_hypergrad.errors import InputError, UnsuitedError, did_you_mean
from tune_hypergrad.groups import Groups
from tune_hypergrad.hypergradients import InnerLoop, Optimizer, TrainingSettings, get_optimizer
from tune_hypergrad.hypergradients.loop_values import EMA
from tune_hypergrad.hypergradients.optimizers import OPTIMIZERS
from tune_hypergrad.outer import Descent, SearchSettings
from tune_hypergrad.problem import Problem
from tune_hypergrad.regularisers import Strength
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.searchers import BOHBSearch, BOSearch, HyperBandSearch, HypergradientSearch, RandomSearch
from tune_hypergrad.space import (
    complement,
    gradient_ranges,
    in_form_of,
    is_hyperparameter,
    longest_schedule,
    schedule,
    without_schedule,
)
from tune_hypergrad.trainables import HD, STN, CenteredSTN, DeltaSTN, FixedSchedule, InnerRun

LEAST_TRAININGS = 4.0
"""Plain trainings that a search which plans its budget needs at the least: an outer step costs as much."""
_GROUPS = "groups"  # key of a problem's findings
_STEPS_PER_REPORT = 150  # what a result costs beside them is little


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, Python's or NumPy's; booleans are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


class JudgedBy(NamedTuple):
    """The figure that trials are judged by, and its direction, as a Ray searcher takes them."""

    metric: str
    """Name of the figure among the entries of a trial's results, such as "val_loss"."""
    mode: str
    """Which way the figure is better: "min" or "max"."""


@dataclass(frozen=True)
class Task:
    """What a method of a comparison is to work on."""

    problem: Problem
    """The problem that is trained."""
    space: Mapping[str, Any]
    """The search space: Ray domains by hyperparameter."""
    steps: int
    """Inner steps in one training run."""
    optimizer: str | Optimizer = "sgd"
    """Inner optimizer, by name or an `Optimizer` of one's own; "sgd" by default."""
    clip_gradient: float | None = None
    """Value that every element of the training gradient is clamped to, +-; None does not clamp."""
    clip_norm: float | None = None
    """Norm over all weights that a longer training gradient is scaled down to; None does not scale."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is then judged in their place; None judges the
    weights."""
    autocast: str | None = None
    """"bfloat16" for the model's forward pass under `torch.autocast`; None is the model's own type."""
    channels_last: bool = False
    """Whether the model is given images with their channels last in memory, as convolutions are often faster."""
    tf32: bool | None = None
    """Whether float32 products and convolutions may run on a GPU's TF32 tensor cores; None is as torch is set."""
    max_memory: float | str | None = None
    """What a trial may keep for hypergradients: bytes, or such as "2GiB"; None is at most a quarter of what is free
    when it begins. What it keeps it does not compute again, so that it costs less."""
    seed: int = 0
    """Seed of the method's searcher and of its trials; 0 by default."""
    min_epochs: float | None = None
    """Epochs in the shortest training run of methods that judge configurations early; None is a 27th of the longest,
    or what a schedule's windows need."""
    max_epochs: float | None = None
    """Epochs in the longest training run of black-box methods; None is `steps`."""
    eta: float = 3
    """One in `eta` configurations is promoted to `eta` times the epochs, by methods that judge configurations early."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters that no method tunes, and their values."""
    self_tuning_epochs: float | None = None
    """Epochs in the training run of a self-tuning network; None is ten times `steps`."""
    trainings: float | None = None
    """What the method may spend, in plain training runs of `steps`; None where its budget is in other units."""
    check: bool = True
    """Whether the problem's training and hypergradients are compared with plain torch before anything runs."""
    start: Mapping[str, Any] | None = None
    """A person's own settings, from which every method begins: a value for everything in the space that has a domain,
    in the space's form (`{"0": ..., "1": ...}` for a schedule); None leaves the beginning to each method."""

    @property
    def training(self) -> dict[str, Any]:
        """Settings that every trainable takes, of how trials train besides their hyperparameters."""
        recipe = ("clip_gradient", "clip_norm", "ema", "autocast", "channels_last", "tf32")
        names = ("steps", "optimizer", *recipe, "check")
        return {name: getattr(self, name) for name in names}

    @property
    def judged_by(self) -> JudgedBy:
        """The problem's objective as a Ray searcher is given it, by `metric` and `mode`."""
        return JudgedBy(self.problem.criterion.column, self.problem.criterion.mode)

    @property
    def self_tuning_steps(self) -> int:
        """Inner steps in the training run of a self-tuning network.

        Raises:
            InputError: they are less than one.
        """
        if self.self_tuning_epochs is None:
            return 10 * self.steps
        steps = round(self.self_tuning_epochs * self.problem.steps_per_epoch)
        if steps < 1:
            raise InputError(f"self_tuning_epochs is {self.self_tuning_epochs:g}, less than one inner step: raise it")
        return steps

    def part(self, of_training_loss: bool) -> dict[str, Any]:
        """The hyperparameters of the space that are the training loss's and its regularisers', or else those that are
        not."""
        of_loss = self.problem.loss_hyperparameters
        return {name: value for name, value in self.space.items() if (name in of_loss) == of_training_loss}

    @property
    def longest(self) -> float:
        """Epochs in the longest training run of black-box methods.

        Raises:
            InputError: `max_epochs` gives a schedule's windows less than one inner step each.
        """
        if self.max_epochs is None:
            return self.steps / self.problem.steps_per_epoch
        self._check_length("max_epochs", self.max_epochs)
        return self.max_epochs

    @property
    def shortest(self) -> float:
        """Epochs in the shortest training run of methods that judge configurations early.

        Raises:
            InputError: `min_epochs` gives a schedule's windows less than one inner step each, or is above `longest`.
        """
        if self.min_epochs is None:
            return min(max(self.longest / 27, self._windows / self.problem.steps_per_epoch), self.longest)
        self._check_length("min_epochs", self.min_epochs)
        if self.min_epochs > self.longest:
            raise InputError(f"min_epochs {self.min_epochs:g} is above max_epochs {self.longest:g}: lower it")
        return self.min_epochs

    @property
    def _windows(self) -> int:
        return longest_schedule(self.space)

    def _check_length(self, name: str, epochs: float) -> None:
        needed = self._windows / self.problem.steps_per_epoch
        if 0 < epochs < needed:  # what is not above 0 the searchers refuse
            raise InputError(
                f"{name} is {epochs:g} epochs, but a schedule of {self._windows} windows needs {needed:.3g}, "
                f"an inner step for each: raise {name}, or use fewer windows"
            )


Trainable: TypeAlias = type[tune.Trainable] | Callable[[dict[str, Any]], Any]


def plain_training(task: Task) -> Trainable:
    """`FixedSchedule` on the task: what trials of black-box searchers run, whose configs hold the hyperparameters."""
    return FixedSchedule.from_problem(task.problem, **_common(task), reports=training_reports(task))


def hyperparameters_of(task: Task) -> tuple[str, ...]:
    """Names that trials on a task can be given besides settings: hyperparameters of the optimizer, or of those that the
    space has, and of the training loss, arguments of the model factory, and the batch size."""
    problem = task.problem
    of_optimizers = (name for known in optimizers_of(task) for name in known.hyperparameters)
    of_loss = sorted(problem.loss_hyperparameters)
    of_average = () if task.ema is None else (EMA,)
    known = dict.fromkeys((*of_optimizers, *of_average, *of_loss, *problem.model_hyperparameters, "batch_size"))
    of_groups = [name for name in task.space if _is_of_group(name, task)]
    return tuple(dict.fromkeys((*known, *of_groups)))


def _is_of_group(name: str, task: Task) -> bool:
    """Whether a name is that of an optimizer's hyperparameter in one of the problem's parameter groups.

    Raises:
        InputError: the problem has no such group.
    """
    hyperparameter, group = split_group(name)
    if not group or not any(hyperparameter in known.hyperparameters for known in optimizers_of(task)):
        return False
    _groups(task.problem).check_name(name)
    return True


def _groups(problem: Problem) -> Groups:
    """The problem's parameter groups; they are found once, since a model has to be made for it."""
    if problem.groups is None:
        return Groups()
    if _GROUPS not in problem.findings:
        problem.findings[_GROUPS] = InnerLoop(problem, TrainingSettings(1)).groups
    return problem.findings[_GROUPS]  # type: ignore[no-any-return]


def optimizers_of(task: Task) -> list[Optimizer]:
    """The inner optimizers that a trial on a task can have.

    Raises:
        InputError: two of them have the same name, by which a trial's records tell them.
    """
    given = task.space.get("optimizer", task.optimizer)
    entry = Choices(grid_values(given)) if is_grid(given) else read(given)
    if isinstance(entry, Formless):  # it may draw any
        return list(OPTIMIZERS.values())
    choices = entry.values if isinstance(entry, Choices) else (entry.value if isinstance(entry, Constant) else entry,)
    found = [get_optimizer(choice) for choice in choices]
    for optimizer in found:
        if any(other.name == optimizer.name and other != optimizer for other in found):
            raise InputError(f"two optimizers in the search space are called {optimizer.name!r}: rename one")
    return found


def training_reports(task: Task) -> int:
    """Number of results in one plain training run: one an epoch, but at most one in 150 inner steps."""
    return max(1, task.steps // max(task.problem.steps_per_epoch, _STEPS_PER_REPORT))


@dataclass(frozen=True)
class Method:
    """A way to choose hyperparameters: any Ray searcher, with the trainable that its trials run.

    ```python
    tpe = Method("tpe", searcher=lambda task: OptunaSearch(**task.judged_by._asdict(), seed=task.seed))
    compare(problem, ["fds", "bohb", tpe], budget="600e")
    ```

    A searcher without a space of its own is given the task's, as Ray gives it the Tuner's `param_space`. Trials report
    `val_loss`, the objective's metric and, in the unit of the budget, `cost/...`, as all trainables of this package do;
    seconds are taken by the clock where a trainable does not say.
    """

    name: str
    """Name of the method in reports and on the command line."""
    searcher: Callable[[Task], Searcher]
    """Makes the method's Ray searcher for a task; called once for every seed."""
    trainable: Callable[[Task], Trainable] = plain_training
    """Makes the Ray trainable that the method's trials run on a task; by default plain training with the config's
    hyperparameters."""
    resources: Mapping[str, float] | PlacementGroupFactory | None = None
    """Resources of each of the method's trials, such as {"cpu": 1, "gpu": 0.25}; None is what all methods get."""
    description: str = ""
    """Description of the method in one line, for people."""
    concurrent: int | None = None
    """Trials of one seed that the method can run at once; None is no limit."""
    tunable: Callable[[Task], Mapping[str, Any]] = field(default=lambda task: task.space)
    """Gives the part of a task's space that the method can tune; all of it by default."""
    plans_budget: bool = False
    """Whether the method's searcher plans for `Task.trainings`. Where a comparison gets more budget, the search of such
    a method begins again from its incumbent, with what is left; others go on where they were. Where less than four
    trainings are left it does not begin, and has them for a later extension."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"a method is called {self.name!r}: choose a name of letters, digits, - and _")
        for part in ("searcher", "trainable", "tunable"):
            value = getattr(self, part)
            if not callable(value) or (isinstance(value, type) and issubclass(value, tune.Trainable)):
                shown = value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"
                raise InputError(
                    f"{self.name}'s {part} is {shown}: give a function that makes it for a task, lambda task: ..."
                )
        if self.concurrent is not None and not (is_whole(self.concurrent) and self.concurrent >= 1):
            raise InputError(
                f"{self.name}'s concurrent is {self.concurrent!r}: give a whole number of at least 1, or None"
            )


def _black_box(search: Callable[..., Searcher], *settings: str) -> Callable[[Task], Searcher]:
    """Makes searchers whose trials train plainly, from scratch, for as many epochs as the searcher says; the first
    trial has the task's start, on the lowest rung where there are several."""

    def of_task(task: Task) -> Searcher:
        arguments = [getattr(task, name) for name in settings]
        points = None if task.start is None else [task.start]
        return search(task.space, *task.judged_by, *arguments, task.seed, points_to_evaluate=points)

    return of_task


def _common(task: Task) -> dict[str, Any]:
    return {**task.training, "seed": task.seed, "fixed": task.fixed}


def _inner_runs(task: Task) -> Trainable:
    return InnerRun.from_problem(task.problem, **_common(task), reports=4, max_memory=task.max_memory)


def _by_hypergradients(task: Task) -> Searcher:
    """The search by hypergradients with one trial for every run of the robust rule, which confirms what it finds as far
    as the budget has room."""
    affordable = task.trainings is not None and task.trainings >= LEAST_TRAININGS
    settings = SearchSettings(trainings=task.trainings if affordable else None)
    return _hypergradient_search(task, _differentiable(task), settings)


def _by_the_papers_rule(task: Task) -> Searcher:
    """The search of the FDS paper (Micaelli & Storkey 2021): linear scales within the space's bounds, from zero or the
    bound nearest to it."""
    return _hypergradient_search(task, _linear(_differentiable(task)), SearchSettings(rule="paper"))


def _hypergradient_search(task: Task, tuned: Mapping[str, Any], settings: SearchSettings) -> Searcher:
    for name, limits in gradient_ranges(tuned)[0].items():
        if limits.windows > task.steps:
            raise InputError(
                f"hyperparameter {name!r} has {limits.windows} windows, and a training run {task.steps} inner steps: "
                "use fewer windows, or train longer"
            )
    start = {name: value for name, value in (task.start or {}).items() if name in tuned}
    return HypergradientSearch(
        tuned,
        metric=task.judged_by.metric,
        mode=task.judged_by.mode,
        points_to_evaluate=[start] if start else None,
        seed=task.seed,
        **{f.name: getattr(settings, f.name) for f in fields(settings)},
    )


def _linear(space: Any) -> Any:
    """A space in which logarithmic domains have become uniform ones between the same bounds."""
    if isinstance(space, Mapping):
        return {name: _linear(entry) for name, entry in space.items()}
    return tune.uniform(space.lower, space.upper) if is_logarithmic(space) else space


def _hypergradient_descent(task: Task) -> Trainable:
    return HD.from_problem(task.problem, space=_constants(task), max_memory=task.max_memory, **_common(task))


def _derivable(task: Task) -> dict[str, Any]:
    """A task's space without what a training loss has no derivative by, such as dropout's rate."""
    without = task.problem.underivable_hyperparameters
    return {name: value for name, value in task.space.items() if name not in without}


def _differentiable(task: Task) -> dict[str, Any]:
    """The part of a task's space that hypergradients tune.

    Raises:
        UnsuitedError: there is nothing, or something that has no derivative, such as a choice.
    """
    tuned = _derivable(task)
    try:
        gradient_ranges(tuned)
    except InputError as error:
        raise UnsuitedError(str(error)) from error
    return tuned


def _constants(task: Task) -> dict[str, Any]:
    """The part of a task's space that has a derivative, without windows: hypergradient descent makes its own
    schedule."""
    return {name: without_schedule(value) for name, value in _differentiable(task).items()}


def _restarts(space: Callable[[Task], dict[str, Any]]) -> Callable[[Task], Searcher]:
    """Makes searchers that begin at the task's start, of a schedule the mean over the run, or from zero; where budget
    is left when that has ended, they begin again from random points."""

    def of_task(task: Task) -> Searcher:
        tuned = space(task)
        origin = Descent(gradient_ranges(tuned)[0]).values
        point = {**in_form_of(tuned, origin), **_in_form(tuned, _start_of(task, tuned))}
        return RandomSearch(tuned, *task.judged_by, seed=task.seed, points_to_evaluate=[point])

    return of_task


def _inside(task: Task) -> dict[str, Any]:
    """The part of a task's space that a self-tuning network tunes inside its training run.

    Raises:
        UnsuitedError: the search space has none of it.
    """
    inside = task.part(of_training_loss=True)
    if not inside:
        raise UnsuitedError(
            f"a self-tuning network has nothing to tune in {', '.join(task.space)}: the search space needs a "
            "hyperparameter of the problem's regularisers or train loss"
        )
    return inside


def _by_self_tuning(task: Task) -> Mapping[str, Any]:
    """The part of a task's space that methods of self-tuning networks tune: all but values of parameter groups, the
    optimizer from run to run, if there is something to tune inside a run, whose own weights are judged; nothing where
    groups have values that are fixed, which such a network refuses."""
    has_fixed = any(_is_of_group(name, task) for name in task.fixed) or bool(_groups(task.problem).values)
    if has_fixed or _judges_average(task) or not task.part(of_training_loss=True):
        return {}
    return {name: entry for name, entry in task.space.items() if not _is_of_group(name, task)}


def _judges_average(task: Task) -> bool:
    return task.ema is not None or any(optimizer.validated is not None for optimizer in optimizers_of(task))


def _self_tuning(trainable: type[DeltaSTN]) -> Callable[[Task], Trainable]:
    """Makes trainables in which regularisation is tuned inside the training run; it begins at the task's start where
    that is not on the edge of a range, which the unconstrained scale does not reach."""

    def of_task(task: Task) -> Trainable:
        epochs, inside = task.self_tuning_steps / task.problem.steps_per_epoch, _inside(task)
        settings = {**_common(task), "steps": task.self_tuning_steps, "warm_up": min(5, epochs / 20)}
        initial = {name: value for name, value in _start_of(task, inside).items() if not _on_edge(inside[name], value)}
        return trainable.from_problem(task.problem, space=inside, initial=initial, **settings)

    return of_task


def _around_self_tuning(task: Task) -> Searcher:
    """A search around runs of self-tuning networks, by which the optimizer is tuned from run to run; it begins at the
    task's start, of a schedule the mean over the run, else at customary values, since a run is a search of its own."""
    outside = {
        name: without_schedule(value)
        for name, value in task.part(of_training_loss=False).items()
        if not _is_of_group(name, task)
    }
    if not outside:
        return _seeds(task)
    known = {name: entry for name, entry in outside.items() if name in customary(task.optimizer)}
    first = {**_customary_point(known, task), **_in_form(outside, _start_of(task, outside))}
    return RandomSearch(outside, *task.judged_by, seed=task.seed, points_to_evaluate=[first])


def _customary_point(space: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Customary values of hyperparameters as a point of a space that has some of them: the nearest in range, without
    those that the space has no range of."""
    point: dict[str, Any] = {}
    for name, entry in space.items():
        with suppress(InputError):
            limits = gradient_ranges({name: entry})[0][name]
            nearest = limits.project(torch.tensor([customary(task.optimizer)[name]], dtype=torch.float64))
            point |= in_form_of(space, {name: nearest})
    return point


def _start_of(task: Task, names: Collection[str]) -> dict[str, Any]:
    """The task's start for some hyperparameters, without schedules: of these, the mean over the run."""
    start = {name: value for name, value in (task.start or {}).items() if name in names}
    return {
        name: fmean(Schedule({name: value}).windows(name)) if is_hyperparameter(value) else value
        for name, value in start.items()
    }


def _in_form(space: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as a point of a space without schedules, which may have complements."""
    return {
        name: _entry_of(space, name, value) if is_hyperparameter(value) else value for name, value in values.items()
    }


def _entry_of(space: Mapping[str, Any], name: str, value: float) -> Any:
    """A value in the form of the space's entry, or the nearest one in range: the mean of a schedule may be out of
    range."""
    with suppress(InputError):  # whole numbers and choices
        value = float(gradient_ranges({name: space[name]})[0][name].project(torch.tensor(value, dtype=torch.float64)))
    return in_form_of(space, {name: [value]})[name]


def _on_edge(domain: Any, value: float) -> bool:
    """Whether a value is the least or the greatest of a continuous domain."""
    found = read(domain)
    return isinstance(found, Numbers) and not found.whole and not found.lower < value < found.upper


def _seeds(task: Task) -> Searcher:
    """A search of nothing: trials differ by their random numbers."""
    return RandomSearch({"seed": tune.randint(0, 2**31)}, *task.judged_by, seed=task.seed)


def _cosine(task: Task) -> Trainable:
    """Plain training with customary hyperparameters and a learning rate that falls as half a cosine.

    Raises:
        UnsuitedError: the optimizer has no learning rate.
    """
    values = {**customary(task.optimizer), **task.fixed}
    if "lr" not in values:
        raise UnsuitedError(f"{get_optimizer(task.optimizer).name} has no hyperparameter 'lr' that could fall")
    lr, steps = values["lr"], task.steps
    if isinstance(lr, int | float):  # else it is fixed to a schedule
        values["lr"] = {str(step): lr * (1 + cos(pi * step / steps)) / 2 for step in range(steps)}
    return plain_training(replace(task, fixed=values))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "fds",
            _by_hypergradients,
            _inner_runs,
            description="forward-mode differentiation with sharing: descend by exact hypergradients of whole runs",
            tunable=_derivable,
            plans_budget=True,
        ),
        Method(
            "fds-paper",
            _by_the_papers_rule,
            _inner_runs,
            description="FDS as published: sign steps on linear scales from zero, halved where a sign flips",
            tunable=_derivable,
        ),
        Method(
            "hd",
            _restarts(_constants),
            _hypergradient_descent,
            description="hypergradient descent: hyperparameters move at every inner step, greedily",
            concurrent=1,
            tunable=_derivable,
        ),
        Method(
            "stn",
            _around_self_tuning,
            _self_tuning(STN),
            description="self-tuning network: regularisation is tuned while the weights train",
            concurrent=1,
            tunable=_by_self_tuning,
        ),
        Method(
            "centered-stn",
            _around_self_tuning,
            _self_tuning(CenteredSTN),
            description="STN whose responses are centred, Delta-STN's ablation",
            concurrent=1,
            tunable=_by_self_tuning,
        ),
        Method(
            "delta-stn",
            _around_self_tuning,
            _self_tuning(DeltaSTN),
            description="Delta-STN: a self-tuning network with linearised responses",
            concurrent=1,
            tunable=_by_self_tuning,
        ),
        Method(
            "rs",
            _black_box(RandomSearch, "longest"),
            description="random search: independent draws, each trained in full",
        ),
        Method(
            "bo",
            _black_box(BOSearch, "longest"),
            description="Bayesian optimisation: BOHB's model, each configuration trained in full",
        ),
        Method(
            "hb",
            _black_box(HyperBandSearch, "shortest", "longest", "eta"),
            description="Hyperband: random draws, of which the best train longer",
        ),
        Method(
            "bohb",
            _black_box(BOHBSearch, "shortest", "longest", "eta"),
            description="BOHB: Hyperband with draws from a model of the results so far",
        ),
        Method(
            "cosine",
            _seeds,
            _cosine,
            description="no search: customary hyperparameters and a cosine learning rate, the best of many seeds",
            tunable=lambda task: {},
        ),
    )
}

FLOOR = "cosine"
"""Name of the method that tunes nothing, which others should be better than."""

BY_DEFAULT = tuple(name for name in METHODS if name != "centered-stn")
"""Names of the methods that `compare` compares by default."""


_RUN_BY = {
    "fds": InnerRun,
    "fds-paper": InnerRun,
    "hd": HD,
    "stn": STN,
    "centered-stn": CenteredSTN,
    "delta-stn": DeltaSTN,
}
_RUN_BY |= dict.fromkeys(("rs", "cosine"), FixedSchedule)
# whose searchers say how long their trials train
_SAY_BUDGETS = ("rs", "bo", "hb", "bohb")


def taken_by(method: Method, task: Task) -> frozenset[str]:
    """Names that the config of a method's trials can have on a task: with a trainable of one's own, those that the
    method says it can tune; else hyperparameters, and settings that nothing else says."""
    runs = next((own for name, own in _RUN_BY.items() if METHODS[name].trainable is method.trainable), None)
    if runs is None:
        return frozenset(method.tunable(task))
    settings = {"budget", *(f.name for f in fields(runs.Settings))} - {"fixed", "space", EMA}
    if any(METHODS[name].searcher is method.searcher for name in _SAY_BUDGETS):
        settings -= {"budget", "steps"}
    return frozenset({*settings, *hyperparameters_of(task)})


def get_method(name: str) -> Method:
    """The built-in method of that name.

    Raises:
        InputError: there is none.
    """
    if name not in METHODS:
        raise InputError(
            f"there is no method {name!r}: choose one of {', '.join(METHODS)}{did_you_mean(name, METHODS)}"
        )
    return METHODS[name]


_CUSTOMARY_LR = {"sgd": 0.1, "nesterov": 0.1, "lion": 3e-4, "adafactor": 0.01}


def customary(optimizer: str | Optimizer) -> dict[str, float]:
    """Values of an inner optimizer's hyperparameters to begin with where nothing is known of a problem."""
    known = get_optimizer(optimizer)
    values = {"lr": _CUSTOMARY_LR.get(known.name, 0.003), "momentum": 0.9, "weight_decay": 0.0}
    return {name: value for name, value in values.items() if name in known.hyperparameters}


def optimizer_space(optimizer: str | Optimizer, windows: int) -> dict[str, Any]:
    """A space for the inner optimizer: a learning-rate schedule, and momentum and weight decay where it has them.

    Each is on the scale on which people choose it: the learning rate log-uniform in [1e-4, 1] (of optimizers that adapt
    to the gradient's size [1e-5, 0.1]), weight decay log-uniform in [1e-6, 1e-2], and 1 minus momentum log-uniform in
    [0.01, 1].
    """
    known = get_optimizer(optimizer)
    plain = known.name in ("sgd", "nesterov")
    entries = {
        "lr": schedule(tune.loguniform(1e-4, 1) if plain else tune.loguniform(1e-5, 0.1), windows),
        "momentum": complement(tune.loguniform(0.01, 1)),
        "weight_decay": tune.loguniform(1e-6, 1e-2),
    }
    return {name: entry for name, entry in entries.items() if name in known.hyperparameters}


def paper_space(optimizer: str | Optimizer, windows: int) -> dict[str, Any]:
    """The FDS paper's wide linear space (Micaelli & Storkey 2021): `optimizer_space` without knowledge of scales.

    All are uniform: the learning rate in (0, 1), of optimizers that adapt to the gradient's size in (0, 0.03), momentum
    in (0, 0.99), weight decay in (0, 0.01).
    """
    known = get_optimizer(optimizer)
    largest = {"lr": 1.0 if known.name in ("sgd", "nesterov") else 0.03, "momentum": 0.99, "weight_decay": 0.01}
    domains = {name: tune.uniform(0, upper) for name, upper in largest.items() if name in known.hyperparameters}
    return {name: schedule(domain, windows) if name == "lr" else domain for name, domain in domains.items()}


def regularisation_space(problem: Problem) -> dict[str, Any]:
    """A space for the strengths of a problem's regularisers, each over its usual range.

    Raises:
        InputError: the problem has none.
    """
    strengths = problem.regulariser_hyperparameters
    if not strengths:
        raise InputError(
            f"{problem.name} has no regularisers to tune: give its Problem some, such as "
            "regularisers=[Dropout(), WeightDecay()]"
        )
    return {name: _domain(strength) for name, strength in strengths.items()}


def _domain(strength: Strength) -> Any:
    lower, upper = strength.usual
    if strength.whole:
        return tune.randint(int(lower), int(upper) + 1)
    return tune.loguniform(lower, upper) if strength.log else tune.uniform(lower, upper)
