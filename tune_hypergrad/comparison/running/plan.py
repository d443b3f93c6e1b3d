"""`Plan`: what a comparison compares, checked before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any
from zlib import crc32

import ray
from ray.tune import PlacementGroupFactory
from ray.tune.search import Searcher

from tune_hypergrad.budget import Budget
from tune_hypergrad.comparison.ledger import GRID, RETRAINING, START, Account
from tune_hypergrad.comparison.methods import (
    BY_DEFAULT,
    FLOOR,
    METHODS,
    Method,
    Task,
    get_method,
    hyperparameters_of,
    optimizer_space,
    paper_space,
    plain_training,
    regularisation_space,
    taken_by,
)
from tune_hypergrad.comparison.running.fair_share import Claim
from tune_hypergrad.comparison.running.growth import Continuation
from tune_hypergrad.comparison.running.placement import IN_PIECES, can_be_placed
from tune_hypergrad.comparison.running.portfolio import Contender, PortfolioSearch
from tune_hypergrad.comparison.running.queue import QueueSearch
from tune_hypergrad.comparison.running.reference import grid_points
from tune_hypergrad.comparison.running.retraining import Retraining, RetrainingSearch
from tune_hypergrad.curves import KNOTS, ONE_MINUS, PARTS
from tune_hypergrad.domains import is_number
from tune_hypergrad.errors import InputError, UnsuitedError, did_you_mean
from tune_hypergrad.groups import regrouped
from tune_hypergrad.hypergradients import Optimizer, get_optimizer
from tune_hypergrad.hypergradients.optimizers import is_built_in
from tune_hypergrad.problem import Problem
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.ray_internals import cluster_grows

OF_TASKS = (
    *("min_epochs", "max_epochs", "eta", "fixed", "self_tuning_epochs", "check"),
    *("clip_gradient", "clip_norm", "ema", "autocast", "channels_last", "tf32", "max_memory"),
)
"""Names of the fields of `Task` that `compare` takes as they are."""

_VERSION = 1
_STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@dataclass(frozen=True)
class Plan:
    """What a comparison compares, checked before anything runs."""

    problem: Problem
    """The problem that incumbents are trained on again."""
    task: Task
    """The task that methods work on."""
    methods: tuple[Method, ...]
    """The methods that take part."""
    budget: Budget
    """Budget of each method with each seed."""
    seeds: tuple[int, ...]
    """Seeds of the methods and their trials."""
    resources: Mapping[str, float] | PlacementGroupFactory
    """Resources of a trial whose method does not say otherwise."""
    retraining: Retraining = field(default_factory=Retraining)
    """How incumbents are trained again."""
    reference: float | str = "best"
    """What regret is measured from: a value, "best", or "grid:N" for N trainings."""
    max_concurrent: int | None = None
    """Number of trials that may run at once; None leaves it to the cluster."""
    start: Mapping[str, Any] | None = None
    """The settings that methods begin from, as they were given and complete; `task` has them in the space's form."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Methods that do not take part since they cannot work on the task, by name, and the reason of each."""
    continuation: Continuation | None = None
    """What an extension of a comparison begins with; None where this is no extension."""
    _made: dict[str, Any] = field(default_factory=dict, repr=False)
    """The trainables that have been made so far, by method: they are kept, since trying a problem out takes time."""

    def __post_init__(self) -> None:
        self.grid  # noqa: B018, what cannot work is found here
        self.factories()
        # their trials are those of random search
        plain = [name for name, asked in ((GRID, self.grid), (START, self.start)) if asked]
        _check_names(self.task, [*self.methods, *(replace(METHODS["rs"], name=name) for name in plain)])

    @property
    def grid(self) -> list[dict[str, Any]]:
        """The configurations of the grid search; none where the reference is another one."""
        if not isinstance(self.reference, str) or self.reference == "best":
            return []
        return grid_points(self.task.space, int(self.reference.removeprefix(f"{GRID}:")))

    def suited(self) -> Plan:
        """This plan without the methods that cannot work on the task, each left out with its reason.

        Raises:
            InputError: none is left, or plain training cannot work on the task, and so nothing can.
        """
        unsuited: dict[str, UnsuitedError] = {}
        for method in self.methods:
            try:
                self._trainable(method)
                self._searcher(method, self.seeds[0])
            except UnsuitedError as error:
                unsuited[method.name] = error
        if not unsuited:
            return self
        plain_training(self.task)
        left = tuple(method for method in self.methods if method.name not in unsuited)
        if not left:
            first, *others = unsuited
            told = f"; nor can {' and '.join(others)} run" if others else ""
            raise InputError(f"{first}: {unsuited[first]}{told}")
        reasons = {name: str(error) for name, error in unsuited.items()}
        return replace(self, methods=left, left_out={**self.left_out, **reasons})

    def trainables(self) -> dict[str, Any]:
        """The trainable that each method's trials run, by method.

        Raises:
            InputError: a method cannot work on the task.
        """
        made = {method.name: self._trainable(method) for method in self.methods}
        made[RETRAINING] = self.retraining.trainable(replace(self.task, problem=self.problem))
        if self.grid or self.start:
            plain = next((made[method.name] for method in self.methods if method.trainable is plain_training), None)
            made |= dict.fromkeys((GRID, START), plain or plain_training(self.task))
        return made

    def _trainable(self, method: Method) -> Any:
        if method.name in self._made:
            return self._made[method.name]
        try:
            made = method.trainable(self.task)
        except UnsuitedError:
            raise
        except InputError as error:
            raise InputError(f"{method.name}: {error}") from error
        if not callable(made):
            raise InputError(
                f"{method.name}'s trainable is {made!r}: make a ray.tune Trainable, or a function of a config"
            )
        self._made[method.name] = made
        return made

    def factories(self) -> dict[str, PlacementGroupFactory]:
        """What each method's trials ask of the cluster, by method."""
        asked = {m.name: self.resources if m.resources is None else m.resources for m in self.methods}
        asked |= dict.fromkeys((RETRAINING, GRID, START), self.resources)
        return {name: factory_of(name, resources) for name, resources in asked.items()}

    @property
    def kinds(self) -> int:
        """Number of kinds of resources that trials ask for."""
        return len(set(map(_kind, self.factories().values())))

    def searchers(self) -> dict[Account, Searcher]:
        """The searchers of all methods, one for every method and seed.

        Raises:
            InputError: a method cannot work on the task.
        """
        pairs = ((method, seed) for seed in self.seeds for method in self.methods)
        made: dict[Account, Searcher] = {}
        for method, seed in pairs:
            searcher = self._searcher(method, seed)
            if any(searcher is other for other in made.values()):
                raise InputError(f"{method.name} gives a searcher that is in use already: make a new one at every call")
            made[Account(method.name, seed)] = searcher
        return made

    def portfolio(self, searchers: Mapping[Account, Searcher], folder: Path, key: str) -> PortfolioSearch:
        """The searcher that owns all methods' searchers."""
        methods = {method.name: method for method in self.methods}
        kinds = {name: _kind(factory) for name, factory in self.factories().items()}
        contenders = []
        if self.start:  # the first, so that what it is worth is known when incumbents are trained again
            asked = kinds[START]
            contenders += [
                Contender(Account(START, seed), QueueSearch([self.start]), Claim(self.budget, 1, asked), {"seed": seed})
                for seed in self.seeds
            ]
        contenders += [
            Contender(
                account,
                searcher,
                Claim(self.budget, methods[account.method].concurrent, kinds[account.method]),
                {"seed": account.seed},
            )
            for account, searcher in searchers.items()
        ]
        if self.grid:
            claim = Claim(None, resources=kinds[GRID])
            contenders.append(Contender(Account(GRID, 0), QueueSearch(self.grid), claim, {"seed": 0}))
        again = RetrainingSearch(folder, key, self.retraining, self.problem.model_hyperparameters)
        contenders.append(Contender(Account(RETRAINING, 0), again, Claim(None, resources=kinds[RETRAINING])))
        criterion = self.problem.criterion
        return PortfolioSearch(contenders, folder, key, max_concurrent=self.max_concurrent, criterion=criterion)

    def _searcher(self, method: Method, seed: int) -> Searcher:
        # methods of one seed do not share their draws, lest they look at the same configurations
        own = fold_seed(seed, crc32(method.name.encode())) % 2**32
        task = replace(self.task, seed=own)
        if self.continuation is not None and Account(method.name, seed) in self.continuation.known:
            task = _going_on(task, Account(method.name, seed), self.continuation)
        searcher = method.searcher(task)
        if not isinstance(searcher, Searcher):
            raise InputError(f"{method.name}'s searcher is a {type(searcher).__name__}: make a ray.tune Searcher")
        searcher.set_search_properties(*task.judged_by, regrouped(task.space))
        return searcher

    def check_resources(self) -> None:
        """See that every method's trials fit the cluster; one that grows may have more nodes by then.

        Raises:
            InputError: some never will.
        """
        if cluster_grows():
            return
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        # one search for each kind, told of by the first that asks for it
        first = {_kind(factory): (name, factory) for name, factory in reversed(self.factories().items())}
        for name, factory in first.values():
            for bundle in factory.bundles:
                if not any(all(node.get(key, 0) >= amount for key, amount in bundle.items()) for node in nodes):
                    most = _amounts({key: max(node.get(key, 0) for node in nodes) for key in bundle})
                    raise InputError(
                        f"a trial of {name} asks for {_amounts(bundle)}, but no node has it (at most {most})"
                    )
            if not can_be_placed(factory.bundles, factory.strategy, nodes):
                together = " and ".join(map(_amounts, factory.bundles))
                raise InputError(
                    f"a trial of {name} asks for {together} at once ({factory.strategy}), for which the nodes "
                    "have no room together: ask for less, or choose another strategy"
                )

    def settings(self) -> dict[str, Any]:
        """What `settings.json` says of this plan."""
        tunable = {method.name: _tunable(method, self.task) for method in self.methods}
        optimizer = get_optimizer(self.task.optimizer)
        return {
            "version": _VERSION,
            "problem": self.problem.name,
            "objective": self.problem.objective,
            "directions": self.problem.declared_directions,
            "steps": self.task.steps,
            "optimizer": optimizer.name,
            "own_optimizer": None if is_built_in(optimizer) else repr(optimizer),
            "steps_per_epoch": self.problem.steps_per_epoch,
            **{name: getattr(self.task, name) for name in OF_TASKS},
            "start": None if self.start is None else {name: _as_json(value) for name, value in self.start.items()},
            "max_concurrent": self.max_concurrent,
            "budget": [self.budget.amount, self.budget.unit],
            "methods": [
                {
                    "name": method.name,
                    "description": method.description,
                    "black_box": is_black_box(method),
                    "cannot_tune": [name for name in self.task.space if name not in tunable[method.name]],
                    "resources": self.factories()[method.name].required_resources,
                }
                for method in self.methods
            ],
            "left_out": dict(self.left_out),
            "seeds": list(self.seeds),
            "space": {name: _in_words(entry) for name, entry in self.task.space.items()},
            "reference": self.reference,
            "retraining": {
                "seeds": self.retraining.seeds,
                "shares": list(self.retraining.shares),
                "data": self.retraining.data,
                "same_training": self.retraining.same_training,
            },
        }


def _going_on(task: Task, account: Account, continuation: Continuation) -> Task:
    """The task of an account that has worked before: with draws of its own, from its incumbent, with what is left."""
    return replace(
        task,
        seed=fold_seed(task.seed, continuation.number) % 2**32,
        start=continuation.starts.get(account, task.start),
        trainings=continuation.trainings.get(account, task.trainings),
    )


SPACES: Mapping[str | None, Callable[[str | Optimizer, int], dict[str, Any]]] = {
    None: optimizer_space,
    "paper": paper_space,
}
"""Search spaces for the inner optimizer by name, each a function of the optimizer and the windows of its learning
rate; None is what is searched where nothing else is said."""


def checked_space_name(name: str) -> str:
    """A name in `SPACES`.

    Raises:
        InputError: there is no space of that name.
    """
    known = [each for each in SPACES if each is not None]
    if name not in known:
        raise InputError(
            f"there is no search space called {name!r}: choose {' or '.join(known)}, or leave space out"
            f"{did_you_mean(name, known)}"
        )
    return name


def default_space(
    problem: Problem, optimizer: str | Optimizer = "sgd", windows: int = 7, name: str | None = None
) -> dict[str, Any]:
    """A search space for the optimizer, one of `SPACES`, and for what regularisers the problem has."""
    regularisation = regularisation_space(problem) if problem.regulariser_hyperparameters else {}
    return {**SPACES[name](optimizer, windows), **regularisation}


def is_black_box(method: Method) -> bool:
    """Whether a method trains plainly with what its searcher suggests, and searches something."""
    return method.trainable is plain_training and method.name != FLOOR


def chosen_methods(methods: Iterable[str | Method] | None) -> tuple[Method, ...]:
    """The methods that take part, by default those of `BY_DEFAULT`.

    Raises:
        InputError: there is none, one is not known, or two have the same name.
    """
    if methods is None:
        return tuple(map(get_method, BY_DEFAULT))
    chosen = [method if isinstance(method, Method) else get_method(method) for method in methods]
    names = [method.name for method in chosen]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"there are two methods called {name!r}: leave one out, or give it another name")
        if name in (RETRAINING, GRID, START):
            raise InputError(f"a method is called {name!r}, which every comparison has: choose another name")
    if not chosen:
        raise InputError(f"there are no methods to compare: choose some of {', '.join(METHODS)}")
    return tuple(chosen)


def _tunable(method: Method, task: Task) -> Mapping[str, Any]:
    tunable: Any = method.tunable(task)
    if not isinstance(tunable, Mapping):
        raise InputError(f"{method.name}'s tunable gives {tunable!r}: give a part of the task's space")
    return tunable


def _check_names(task: Task, methods: Sequence[Method]) -> None:
    """See that all names in the search space mean something to the methods that are to tune them.

    Raises:
        InputError: one does not, or is fixed.
    """
    hyperparameters = hyperparameters_of(task)
    tunable = {method.name: _tunable(method, task) for method in methods}
    taken = {method.name: taken_by(method, task) for method in methods}
    for name in task.space:
        if name in task.fixed:
            raise InputError(f"{name!r} is in the search space and in fixed: leave it out of one")
        if not any(name in names for names in taken.values()) and name not in hyperparameters:
            raise InputError(
                f"the search space has {name!r}, which nothing takes: there are {', '.join(hyperparameters)}"
                f"{did_you_mean(name, hyperparameters)}"
            )
        cannot = [method for method in tunable if name in tunable[method] and name not in taken[method]]
        if cannot:
            raise InputError(
                f"the search space has {name!r}, which {' and '.join(cannot)} cannot take: leave out one or the other"
            )


def factory_of(name: str, resources: Mapping[str, float] | PlacementGroupFactory) -> PlacementGroupFactory:
    """What a method's trials ask for, in Ray's terms.

    Raises:
        InputError: that can be asked of no cluster.
    """
    given: Any = resources
    if isinstance(resources, PlacementGroupFactory):
        given = bundles = resources.bundles
        if resources.strategy not in _STRATEGIES:
            raise InputError(
                f"{name}'s resources have the strategy {resources.strategy!r}: choose one of {', '.join(_STRATEGIES)}"
            )
    else:
        short = {"cpu": "CPU", "gpu": "GPU", "cpus": "CPU", "gpus": "GPU"}
        named = resources if isinstance(resources, Mapping) else {}
        asked = {key: int(amount) if isinstance(amount, bool) else amount for key, amount in named.items()}
        bundles = [
            {short.get(str(key).lower(), key): amount for key, amount in asked.items() if not _is_nothing(amount)}
        ]
    if not all(map(_is_bundle, bundles)):
        raise InputError(f"{name}'s resources are {given!r}: give amounts above 0, such as {{'cpu': 1, 'gpu': 0.25}}")
    workers_only = isinstance(resources, PlacementGroupFactory) and resources.head_bundle_is_empty
    for key in () if workers_only else IN_PIECES & bundles[0].keys():  # of the bundle that the trial itself runs in
        if bundles[0][key] > 1 and bundles[0][key] % 1:
            raise InputError(f"{name}'s resources are {bundles[0][key]:g} {key}: above 1, give a whole number")
    return resources if isinstance(resources, PlacementGroupFactory) else PlacementGroupFactory(bundles)


def _is_nothing(amount: Any) -> bool:
    return amount is None or (is_number(amount) and amount == 0)


def _is_bundle(bundle: Mapping[str, float]) -> bool:
    """Whether a bundle is amounts of resources by name, and not of nothing."""
    named = all(isinstance(name, str) for name in bundle)
    return named and all(is_number(n) and 0 <= n < inf for n in bundle.values()) and any(bundle.values())


def _amounts(bundle: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def _kind(factory: PlacementGroupFactory) -> str:
    return json.dumps([factory.bundles, factory.strategy], sort_keys=True)


def _as_json(value: Any) -> Any:
    """A value in JSON's types: a number, windows of numbers or a text; of a choice between objects, its text."""
    return value if isinstance(value, int | float | str | Mapping) else str(value)


def _in_words(entry: Any) -> str:
    if not isinstance(entry, Mapping) or not entry:
        domain: Any = entry
        if not hasattr(domain, "domain_str"):
            return str(domain)
        sampler = type(domain.get_sampler()).__name__.strip("_").lower()
        return f"{sampler} {domain.domain_str}"
    key, inner = next(iter(entry.items()))
    if key == ONE_MINUS:
        return f"1 - {_in_words(inner)}"
    if key == KNOTS:
        return f"{_in_words(next(iter(inner.values())))}, {len(inner)} knots"
    if key in PARTS:
        return f"{key}: {', '.join(f'{part} {_in_words(domain)}' for part, domain in inner.items())}"
    return _in_words(inner) + (f", {len(entry)} windows" if hasattr(inner, "domain_str") else "")
