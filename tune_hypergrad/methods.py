"""The methods by name: which trainable and which searcher each is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.hypergradients import Descent, get_optimizer
from tune_hypergrad.problem import Problem
from tune_hypergrad.regularisers import Strength
from tune_hypergrad.searchers import BOHBSearch, BOSearch, HyperBandSearch, RandomSearch
from tune_hypergrad.space import gradient_ranges, schedule
from tune_hypergrad.trainables import FDS, HD, STN, CenteredSTN, DeltaSTN, FixedSchedule


@dataclass(frozen=True)
class Task:
    """What a method is to work on."""

    problem: Problem
    """What is trained."""
    space: Mapping[str, Any]
    """Ray domains by name."""
    steps: int
    """Inner steps in one training run."""
    optimizer: str = "sgd"
    """Inner optimizer."""
    seed: int = 0
    """Seeds the method and its trials."""
    min_budget: float | None = None
    """Epochs in the shortest training run of methods that judge configurations early; None is a 27th of the longest,
    or what a schedule's windows need."""
    max_budget: float | None = None
    """Epochs in the longest training run of black-box methods; None is `steps`."""
    eta: float = 3
    """One in eta configurations is promoted to eta times the epochs."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters held, by every method."""
    self_tuning_epochs: float | None = None
    """Epochs in the training run of a self-tuning network; None is ten times `steps`."""

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
        """The space's hyperparameters that are the training loss's and its regularisers', or those that are not."""
        of_loss = self.problem.loss_hyperparameters
        return {name: value for name, value in self.space.items() if (name in of_loss) == of_training_loss}

    @property
    def longest(self) -> float:
        """Epochs in the longest training run of black-box methods.

        Raises:
            InputError: `max_budget` gives a schedule's windows less than one inner step each.
        """
        if self.max_budget is None:
            return self.steps / self.problem.steps_per_epoch
        self._check_length("max_budget", self.max_budget)
        return self.max_budget

    @property
    def shortest(self) -> float:
        """Epochs in the shortest training run of methods that judge configurations early.

        Raises:
            InputError: `min_budget` gives a schedule's windows less than one inner step each.
        """
        if self.min_budget is None:
            return min(max(self.longest / 27, self._windows / self.problem.steps_per_epoch), self.longest)
        self._check_length("min_budget", self.min_budget)
        return self.min_budget

    @property
    def _windows(self) -> int:
        return max((len(value) for value in self.space.values() if isinstance(value, Mapping)), default=1)

    def _check_length(self, name: str, epochs: float) -> None:
        needed = self._windows / self.problem.steps_per_epoch
        if 0 < epochs < needed:  # what is not above 0 the searchers refuse
            raise InputError(
                f"{name} is {epochs:g} epochs, but a schedule of {self._windows} windows needs {needed:.3g}, "
                f"an inner step for each: raise {name}, or use fewer windows"
            )


@dataclass(frozen=True)
class Method:
    """A way to choose hyperparameters."""

    name: str
    """What the command line calls it."""
    description: str
    """One line for people."""
    make: Callable[[Task], tuple[type[tune.Trainable], Searcher]]
    """Its trainable and its searcher for a task."""
    concurrent: int | None = None
    """Trials it can run at once; None is no limit."""
    tunes_regularisation: bool = False
    """Whether it tunes the training loss and its regularisers within a training run."""
    tunable: Callable[[Task], Mapping[str, Any]] = field(default=lambda task: task.space)
    """The part of a task's space that it can tune."""


def _black_box(make: Callable[[Task], Searcher]) -> Callable[[Task], tuple[type[tune.Trainable], Searcher]]:
    """A searcher's trials train plainly, from scratch to their budget, and are judged by the last validation loss."""

    def of_task(task: Task) -> tuple[type[tune.Trainable], Searcher]:
        return FixedSchedule.from_problem(task.problem, **_common(task), reports=1), make(task)

    return of_task


def _random_search(task: Task) -> Searcher:
    return RandomSearch(task.space, "val_loss", "min", task.longest, task.seed)


def _bo(task: Task) -> Searcher:
    return BOSearch(task.space, "val_loss", "min", task.longest, task.seed)


def _hyperband(task: Task) -> Searcher:
    return HyperBandSearch(task.space, "val_loss", "min", task.shortest, task.longest, task.eta, task.seed)


def _bohb(task: Task) -> Searcher:
    return BOHBSearch(task.space, "val_loss", "min", task.shortest, task.longest, task.eta, task.seed)


def _common(task: Task) -> dict[str, Any]:
    return {"steps": task.steps, "optimizer": task.optimizer, "seed": task.seed, "fixed": task.fixed}


def _fds(task: Task) -> tuple[type[tune.Trainable], Searcher]:
    task = replace(task, space=_derivable(task))
    return FDS.from_problem(task.problem, space=task.space, **_common(task), reports=4), _restarts(task)


def _hypergradient_descent(task: Task) -> tuple[type[tune.Trainable], Searcher]:
    task = replace(task, space={name: _one_window(value) for name, value in _derivable(task).items()})
    return HD.from_problem(task.problem, space=task.space, **_common(task), reports=1), _restarts(task)


def _derivable(task: Task) -> dict[str, Any]:
    """The space without what a training loss has no derivative by, such as dropout's rate."""
    without = task.problem.underivable_hyperparameters
    return {name: value for name, value in task.space.items() if name not in without}


def _self_tuning(trainable: type[DeltaSTN]) -> Callable[[Task], tuple[type[tune.Trainable], Searcher]]:
    """Regularisation is tuned inside the training run, the optimizer outside, from run to run."""

    def of_task(task: Task) -> tuple[type[tune.Trainable], Searcher]:
        inside = task.part(of_training_loss=True)
        if not inside:
            raise InputError(
                f"a self-tuning network has nothing to tune in {', '.join(task.space)}: the search space needs a "
                "hyperparameter of the problem's regularisers or train loss"
            )
        outside = {name: _one_window(value) for name, value in task.part(of_training_loss=False).items()}
        epochs = task.self_tuning_steps / task.problem.steps_per_epoch
        settings = {**_common(task), "steps": task.self_tuning_steps, "warm_up": min(5, epochs / 20)}
        made = trainable.from_problem(task.problem, space=inside, **settings)
        # a run is a search of its own: the optimizer's hyperparameters begin at customary values
        first = {name: value for name, value in customary(task.optimizer).items() if name in outside}
        space = outside or {"seed": tune.randint(0, 2**31)}
        return made, RandomSearch(
            space, "val_loss", "min", seed=task.seed, points_to_evaluate=[first or {"seed": task.seed}]
        )

    return of_task


def _restarts(task: Task) -> Searcher:
    """Begin from zero; where budget is left when that has ended, begin again from random points."""
    origin = Descent(gradient_ranges(task.space)[0]).values
    point = {name: _like(task.space[name], values.tolist()) for name, values in origin.items()}
    return RandomSearch(task.space, metric="val_loss", mode="min", seed=task.seed, points_to_evaluate=[point])


def _like(entry: Any, values: list[float]) -> Any:
    """Values in the form of a space's entry: by window for a schedule, else the only one."""
    return {str(window): value for window, value in enumerate(values)} if isinstance(entry, Mapping) else values[0]


def _one_window(value: Any) -> Any:
    return next(iter(value.values())) if isinstance(value, Mapping) else value


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "fds",
            "forward-mode differentiation with sharing: descend by exact hypergradients of whole runs",
            _fds,
            1,
            tunable=_derivable,
        ),
        Method(
            "hd",
            "hypergradient descent: hyperparameters move at every inner step, greedily",
            _hypergradient_descent,
            1,
            tunable=_derivable,
        ),
        Method("rs", "random search: independent draws, each trained in full", _black_box(_random_search)),
        Method("bo", "Bayesian optimisation: BOHB's model, each configuration trained in full", _black_box(_bo)),
        Method("hb", "Hyperband: random draws, of which the best train longer", _black_box(_hyperband)),
        Method("bohb", "BOHB: Hyperband with draws from a model of the results so far", _black_box(_bohb)),
        Method(
            "stn",
            "self-tuning network: regularisation is tuned while the weights train",
            _self_tuning(STN),
            1,
            tunes_regularisation=True,
        ),
        Method(
            "centered-stn",
            "STN whose responses are centred, Delta-STN's ablation",
            _self_tuning(CenteredSTN),
            1,
            tunes_regularisation=True,
        ),
        Method(
            "delta-stn",
            "Delta-STN: a self-tuning network with linearised responses",
            _self_tuning(DeltaSTN),
            1,
            tunes_regularisation=True,
        ),
    )
}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        InputError: there is none.
    """
    if name not in METHODS:
        raise InputError(
            f"there is no method {name!r}: choose one of {', '.join(METHODS)}{did_you_mean(name, METHODS)}"
        )
    return METHODS[name]


def customary(optimizer: str) -> dict[str, float]:
    """Values of an inner optimizer's hyperparameters to begin with where nothing is known of a problem."""
    values = {"lr": 0.1 if optimizer in ("sgd", "nesterov") else 0.003, "momentum": 0.9, "weight_decay": 0.0}
    return {name: value for name, value in values.items() if name in get_optimizer(optimizer).hyperparameters}


def optimizer_space(optimizer: str, windows: int) -> dict[str, Any]:
    """A space for the inner optimizer: a learning-rate schedule, and momentum and weight decay where it has them."""
    known = get_optimizer(optimizer).hyperparameters
    largest = {"lr": 1.0 if optimizer in ("sgd", "nesterov") else 0.03, "momentum": 0.99, "weight_decay": 0.01}
    domains = {name: tune.uniform(0, upper) for name, upper in largest.items() if name in known}
    return {**domains, "lr": schedule(domains["lr"], windows)}


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
