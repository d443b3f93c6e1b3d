"""What our Ray trainables share: a problem, settings that a trial's config may override, costs, exact checkpoints."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import ray
import torch
from ray import tune
from ray.tune.search.repeater import TRIAL_INDEX

from tune_hypergrad.budget import Cost
from tune_hypergrad.errors import InputError, UnsuitedError
from tune_hypergrad.groups import ungrouped
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.hypergradients.loop_values import EMA
from tune_hypergrad.hypergradients.memory import set_processes
from tune_hypergrad.hypergradients.optimizers import Optimizer, get_optimizer
from tune_hypergrad.hypergradients.state import State
from tune_hypergrad.problem import Problem
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.results import evaluation_results, objective_results
from tune_hypergrad.schedules import SCHEDULE_FILE, Schedule
from tune_hypergrad.trainables.promoted import PROMOTED_FROM

_OF_SEARCHERS = (PROMOTED_FROM, TRIAL_INDEX)  # in a trial's config, but neither settings nor hyperparameters
_STATE_FILE = "state.pt"


@dataclass(frozen=True)
class TrialSettings:
    """Settings that every trainable of this package has; a trial's config may override each by its name."""

    steps: int
    """Inner steps in one training run."""
    optimizer: str | Optimizer = "sgd"
    """Inner optimizer, by name (`OPTIMIZERS` lists them) or an `Optimizer` of one's own; "sgd" by default."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters that are not tuned (numbers, or windows of numbers); the rest take the defaults of `torch.optim`
    and of the train loss."""
    seed: int = 0
    """Seeds the initial weights, the order of examples, augmentation and dropout; under Ray's `Repeater`, a trial's
    index is folded in, so that repeats differ."""
    clip_gradient: float | None = None
    """Value that every element of the training gradient is clamped to, +-; None does not clamp."""
    clip_norm: float | None = None
    """Norm over all weights that a longer training gradient is scaled down to; None does not scale."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is then judged in their place; None judges the
    weights. A trial's config may have it as a hyperparameter."""
    autocast: str | None = None
    """"bfloat16" for the model's forward pass under `torch.autocast`; None is the model's own type."""
    capture: bool = False
    """On a GPU, replay steps as CUDA graphs where they are the same when replayed."""
    channels_last: bool = False
    """Whether the model is given images with their channels last in memory, as convolutions are often faster."""
    tf32: bool | None = None
    """Whether float32 products and convolutions may run on a GPU's TF32 tensor cores; None is as torch is set."""
    reports: int = 10
    """Results in one training run; each evaluates the validation and test splits where that makes sense."""

    def __post_init__(self) -> None:
        self._check_reports()
        object.__setattr__(self, "fixed", ungrouped(self.fixed))
        self.training()
        get_optimizer(self.optimizer)

    def _check_reports(self) -> None:
        if isinstance(self.reports, bool) or not isinstance(self.reports, int) or self.reports < 1:
            raise InputError(f"reports is {self.reports!r}: a run makes a whole number of at least 1")

    def constants(self) -> Mapping[str, Any]:
        """Entries that every trial's config has unless it says otherwise itself."""
        return {}

    def training(self, **changes: Any) -> TrainingSettings:
        """The settings of an inner loop that follow from these; `changes` go before them."""
        shared = {f.name: getattr(self, f.name) for f in fields(TrainingSettings) if hasattr(self, f.name)}
        return TrainingSettings(**{**shared, **changes})


class Stored:
    """A problem that goes to Ray's object store once, however many trainables are made for it.

    Args:
        problem: what is stored when this is first pickled within a Ray session.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem: Problem | None = problem
        self._reference: ray.ObjectRef[Problem] | None = None
        self._session = ""

    def get(self) -> Problem:
        """The problem; its tensors are shared by the processes of a node."""
        if self._problem is None:
            assert self._reference is not None
            self._problem = ray.get(self._reference)
        return self._problem

    def __getstate__(self) -> dict[str, Any]:
        if not ray.is_initialized():
            return {"_problem": self._problem, "_reference": None, "_session": ""}
        context = ray.get_runtime_context()
        session = f"{context.get_node_id()} {context.get_job_id()}"  # every new cluster begins at the same job
        if self._reference is None or self._session != session:
            self._reference, self._session = ray.put(self.get()), session
        return {"_problem": None, "_reference": self._reference, "_session": session}


_STORED: WeakValueDictionary[int, Stored] = WeakValueDictionary()  # by the problem's id, which it keeps from reuse


def stored(problem: Problem) -> Stored:
    """The one `Stored` of a problem, made when it is first asked for."""
    return _STORED.setdefault(id(problem), Stored(problem))


class ProblemTrainable(tune.Trainable):
    """Base of the trainables that work on a `Problem`.

    Use a subclass through `from_problem`. A subclass says how a trial begins (`begin`), what the next piece of work is
    (`work`), and what its state is (`state_dict`, `load_state_dict`).
    """

    Settings: ClassVar[type[TrialSettings]] = TrialSettings
    schedule_by_step: ClassVar[bool] = False
    """Whether `found` has a value for every step so far of the run that the last result judged, so that the result's
    own scalars do not tell it."""

    @classmethod
    def from_problem(cls, problem: Problem, *, check: bool = True, **settings: Any) -> type[tune.Trainable]:
        """This trainable for one problem, as a class that `tune.Tuner` takes.

        The problem goes to Ray's object store once; trials of a node share its tensors.

        Args:
            problem: what to train; one batch of it is tried out first.
            check: also try out, once per problem, whether training is what plain torch makes of it and, where
                hypergradients are followed, whether they are right: a few steps on small batches (see
                `check_problem`).
            **settings: fields of `cls.Settings`.

        Raises:
            InputError: an unknown setting, or a problem that does not run.
            UnsuitedError: this trainable cannot work on the problem, such as for want of right hypergradients.
        """
        names = [f.name for f in fields(cls.Settings)]
        for name in settings:
            if name not in names:
                raise InputError(f"{cls.__name__} has no setting {name!r}: it has {', '.join(names)}")
        problem.check()
        made = cls.Settings(**settings)
        try:
            cls.validate(*split_config(problem, made, {}), check=check)
        except InputError as error:
            raise UnsuitedError(str(error)) from error
        return tune.with_parameters(cls, problem=stored(problem), settings=made)  # type: ignore[no-any-return]

    @classmethod
    @abstractmethod
    def validate(cls, problem: Problem, settings: Any, hyperparameters: dict[str, Any], *, check: bool) -> None:
        """Raise `InputError` for what can be known to fail before any trial starts.

        Args:
            problem: what is trained.
            settings: of all trials.
            hyperparameters: as `begin` has them.
            check: also compare training, and hypergradients where they are followed, with plain torch.
        """

    @abstractmethod
    def begin(self, settings: Any, hyperparameters: dict[str, Any]) -> None:
        """Start a trial with these settings; `hyperparameters` is the rest of its config."""

    @abstractmethod
    def work(self) -> dict[str, Any]:
        """Do one report's worth of work; returns the result without its costs, `done` included."""

    @property
    @abstractmethod
    def spent(self) -> Cost:
        """What the trial has spent so far (see `Cost`), seconds aside."""

    @property
    @abstractmethod
    def found(self) -> Schedule | None:
        """The schedule that the trial stands for so far: what a checkpoint's `schedule.json` holds."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The trial's state, of tensors and plain Python values."""

    @abstractmethod
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a `state_dict`; called after `begin`."""

    def setup(  # type: ignore[override]
        self, config: dict[str, Any], problem: Problem | Stored, settings: TrialSettings
    ) -> None:
        """Take the problem and the settings that every trial has, then the first trial's config, as an actor starts."""
        resources = getattr(self.trial_resources, "required_resources", {}) or {}
        cpus, gpus = resources.get("CPU", 1), resources.get("GPU", 0)
        torch.set_num_threads(max(1, int(cpus)))
        _share_memory(cpus, gpus)
        self._devices = gpus or max(1, cpus)
        if gpus and not torch.cuda.is_available():
            raise InputError(
                "the trial was granted a GPU, but this torch cannot use one: install a CUDA build of torch"
            )
        self.device = "cuda" if gpus else None
        whole = problem.get() if isinstance(problem, Stored) else problem
        self._problem = whole.with_workers_up_to(max(1, int(cpus)))
        self._settings = settings
        self._of_trial: set[str] = set()  # names of what trials set
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in the same actor, from its config."""
        self._seconds = self._uncharged = 0.0
        self._last: dict[str, Any] = {}
        self._let_go_of_trial()
        self.problem, settings, hyperparameters = split_config(self._problem, self._settings, new_config)
        before = set(vars(self))
        self.begin(settings, hyperparameters)
        self._of_trial = set(vars(self)) - before
        return True

    def _let_go_of_trial(self) -> None:
        """Let go of what the trial before has begun with, whose memory would be taken for used, and give a GPU's free
        memory back to others on it."""
        for name in self._of_trial:
            vars(self).pop(name, None)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def step(self) -> dict[str, Any]:
        """Work up to the next result: flat scalars, with the cost so far."""
        if self._last.get("done"):  # restored at its end, which the driver did not live to see
            return dict(self._last)
        begun, uncharged = time.perf_counter(), self._uncharged
        result = self.work()
        self._seconds += time.perf_counter() - begun - (self._uncharged - uncharged)
        seconds = Cost(device_seconds=self._seconds * self._devices, wall_seconds=self._seconds)
        objective = objective_results(self._problem.criterion, result)
        self._last = {**result, **objective, **(self.spent + seconds).as_result()}
        return dict(self._last)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the state, from which a trial continues to the same numbers, and the schedule that it stands for."""
        last = {"of": self.trial_id, "result": self._last}
        saved = {"trial": self.state_dict(), "seconds": self._seconds, "last": last}
        torch.save(saved, Path(checkpoint_dir) / _STATE_FILE)
        if self.found is not None:
            self.found.save(Path(checkpoint_dir) / SCHEDULE_FILE)

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]
        """Continue from what `save_checkpoint` wrote."""
        # to the host, whatever device they are from: runs have theirs where they train
        saved = torch.load(Path(checkpoint) / _STATE_FILE, weights_only=True, map_location="cpu")
        self._seconds, last = saved["seconds"], saved["last"]
        self._last = last["result"] if last["of"] == self.trial_id else {}  # other trials go on from its end
        self.load_state_dict(saved["trial"])

    def evaluate_test(self, loop: InnerLoop, state: State) -> dict[str, float]:
        """`test_loss` and `test_<metric>`, where there is a test split; reading it is not charged."""
        if loop.batches.test is None:
            return {}
        with self._off_the_clock():
            return evaluation_results("test", loop.evaluate(state, "test"))

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what has been launched before is charged
        begun = time.perf_counter()
        yield
        self._uncharged += time.perf_counter() - begun


def split_config(
    problem: Problem, settings: TrialSettings, config: Mapping[str, Any]
) -> tuple[Problem, TrialSettings, dict[str, Any]]:
    """What a trial's config means: the problem with its model arguments and batch size, the settings with those that
    it overrides, and the rest, which are hyperparameters.

    `budget`, which searchers of several budgets set, is the length of the training run in epochs, in place of `steps`.
    The index that Ray's `Repeater` sets makes the seed another one; the first of the repeats keeps its own.
    """
    repeat = config.get(TRIAL_INDEX, 0)
    config = {name: value for name, value in {**settings.constants(), **config}.items() if name not in _OF_SEARCHERS}
    names = {f.name for f in fields(settings)} - {EMA}
    arguments = {name: config[name] for name in problem.model_hyperparameters if name in config}
    changes: dict[str, Any] = {"model": partial(problem.model, **arguments)} if arguments else {}
    if "batch_size" in config:
        changes["batch_size"] = config["batch_size"]
    taken = names | {"batch_size", "budget"} | set(arguments)
    changed = problem.replace(**changes) if changes else problem
    overrides = {name: value for name, value in config.items() if name in names}
    if "budget" in config:
        if "steps" in config:
            raise InputError("the trial's config has both 'steps' and 'budget', in epochs: remove one of them")
        overrides["steps"] = _steps_within(config["budget"], changed.steps_per_epoch)
    rest = ungrouped({name: value for name, value in config.items() if name not in taken})
    made = replace(settings, **overrides)
    return changed, replace(made, seed=fold_seed(made.seed, repeat)) if repeat else made, rest


def _share_memory(cpus: float, gpus: float) -> None:
    """Have runs of this process leave memory to as many trials of its size as have room on its node, and on its GPU."""
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes()} if ray.is_initialized() else {}
    there = nodes.get(ray.get_runtime_context().get_node_id(), {}) if nodes else {}
    granted = {"CPU": cpus, "GPU": gpus}
    on_node = min((_how_many(there.get(kind, 0.0), size) for kind, size in granted.items() if size), default=1)
    set_processes("cpu", on_node)
    set_processes("cuda", min(on_node, _how_many(1.0, gpus)) if gpus else 1)


def _how_many(whole: float, size: float) -> int:
    """Parts of a size that a whole has, at least 1, whatever rounding does to fractions."""
    return max(1, int(whole / size + 1e-9))


def _steps_within(epochs: Any, steps_per_epoch: int) -> int:
    if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs < float("inf"):
        raise InputError(f"budget is {epochs!r}: it must be a number of epochs above 0")
    return max(1, round(epochs * steps_per_epoch))
