"""PyTorch Lightning: a problem from a module, its data and its trainer, and a callback that replays a schedule there.

Needs `lightning` (the extra `lightning`).
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from tune_hypergrad.bridges import missing

try:
    import lightning
    from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler, StochasticWeightAveraging
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise missing("lightning", error) from error

from tune_hypergrad.bridges.lightning_steps import (
    TRAINING,
    VALIDATION,
    Inside,
    Logged,
    NoTrainer,
    Outside,
    attempt,
    find_network,
    run_step,
)
from tune_hypergrad.bridges.optimizers import engine_optimizer, held_by_group, parameter_groups
from tune_hypergrad.bridges.replay import replay
from tune_hypergrad.data import cast_batch
from tune_hypergrad.defaults import TrainingDefaults
from tune_hypergrad.errors import InputError
from tune_hypergrad.groups import group_name
from tune_hypergrad.hypergradients import get_optimizer
from tune_hypergrad.problem import Problem
from tune_hypergrad.randomness import seeded_generators
from tune_hypergrad.schedules import Schedule

_CHANGE_THE_STEP = (
    *("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step"),
    *("on_before_batch_transfer", "on_after_batch_transfer"),
)
_AUTOCAST = {"bf16-mixed": "bfloat16"}
"""The type that forward passes are computed in, by the `precision` of a `lightning.Trainer`, where it is a lower
one."""
_NOT_CALLED = (
    *("on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end"),
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"),
)


def problem_from_lightning(
    module: Callable[..., lightning.LightningModule],
    datamodule: lightning.LightningDataModule,
    *,
    trainer: lightning.Trainer,
    val_loss: str = "val_loss",
    **arguments: Any,
) -> Problem:
    """The training that `trainer.fit(module(**arguments), datamodule)` is; see `Problem.from_lightning`."""
    _refuse_trainer(trainer)
    with seeded_generators(0):
        loaders = _loaders(datamodule)
        steps = _steps(trainer, loaders["train"])
        known = NoTrainer({"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps, **steps})
        make = _Factory(module, arguments, known)
        own = make()
        _refuse_module(own)
        like = next(own.parameters())
        batches = {TRAINING: _first_batch(loaders["train"], like), VALIDATION: _first_batch(loaders["val"], like)}
        validated = run_step(own.eval(), known, VALIDATION, batches[VALIDATION], measuring=True)
        validated.loss(val_loss)  # there is one
        network = find_network(own, known, batches, val_loss)
        step = Inside(known, val_loss) if network is None else Outside(own, known, network, val_loss)
        problem = Problem(
            model=make,
            train=loaders["train"],
            val=loaders["val"],
            test=loaders.get("test"),
            forward=step.predict,
            target=_whole,
            loss=step.val_loss_of,
            train_loss=step.train_loss_of,
            metrics={name.removeprefix("val_"): Logged(step, name) for name in validated.numbers() if name != val_loss},
            eval_batch_size=loaders["val"].batch_size or 1,
            name=type(own).__name__,
            accumulate=trainer.accumulate_grad_batches,
        )
        _refuse_remainder(problem)
        defaults = _defaults(own.train(), trainer, problem)
        several = len(defaults.groups) > 1
        return problem.replace(
            defaults=defaults, groups=_ParamGroups(held_by_group(defaults.schedule)) if several else None
        )


class ScheduleCallback(lightning.Callback):  # type: ignore[misc]
    """Sets the optimizers' hyperparameters from a `Schedule` before every optimizer step of a `lightning.Trainer`.

    ```python
    lightning.Trainer(max_epochs=10, callbacks=[ScheduleCallback(Schedule.load("schedule.json"))])
    ```

    It has the last word over the module's own learning-rate schedulers, and goes on where a checkpoint ends. The step
    is `trainer.global_step` of `trainer.estimated_stepping_batches`. Values of groups are set in the param groups of
    these names; one without is called `group0`, `group1`, ... by its position.

    Args:
        schedule: what to replay.
        groups: the schedule's group by position of a param group, as for `Schedule.apply`.

    Raises:
        InputError: at the first step, where an optimizer has no such param group, or no place for a hyperparameter, or
            training has no end.
    """

    def __init__(self, schedule: Schedule, groups: Mapping[int, str] | None = None) -> None:
        self.schedule, self.groups = schedule, groups

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        total = trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise InputError("a schedule needs an end of training: give the Trainer max_epochs or max_steps")
        replay(self.schedule, trainer.optimizers, trainer.global_step, int(total), self.groups)


@dataclass(frozen=True)
class _Factory:
    """Makes a fresh Lightning module; those of its arguments that no optimizer has are hyperparameters for black-box
    methods."""

    module: Callable[..., lightning.LightningModule]
    arguments: Mapping[str, Any]
    trainer: NoTrainer

    def __call__(self, **changes: Any) -> lightning.LightningModule:
        made = self.module(**{**self.arguments, **changes})
        if not isinstance(made, lightning.LightningModule):
            raise InputError(f"module made a {type(made).__name__}: give a function that makes a LightningModule")
        made.trainer = self.trainer
        made.setup("fit")
        made.configure_model()
        return made

    @property
    def __signature__(self) -> inspect.Signature:
        of_optimizers = {name for each in ("sgd", "adamw", "rmsprop") for name in get_optimizer(each).hyperparameters}
        parameters = inspect.signature(self.module).parameters.values()
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        own = [each for each in parameters if each.kind in by_name and each.name not in of_optimizers]
        return inspect.Signature([each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own])


@dataclass(frozen=True)
class _ParamGroups:
    """Makes the param groups of a Lightning module's optimizer, with the constants that each has of its own."""

    fixed: Mapping[str, Mapping[str, float]]

    def __call__(self, module: Any) -> list[dict[str, Any]]:
        optimizer, _ = _configured(attempt("configure_optimizers", module.configure_optimizers))
        names = [group_name(group, number) for number, group in enumerate(optimizer.param_groups)]
        return [
            {"params": group["params"], "name": name, **self.fixed.get(name, {})}
            for name, group in zip(names, optimizer.param_groups, strict=True)
        ]


def _whole(batch: Any) -> Any:
    return batch


def _loaders(datamodule: lightning.LightningDataModule) -> dict[str, DataLoader[Any]]:
    """The loaders of a data module that has been set up."""
    datamodule.prepare_data()
    datamodule.setup("fit")
    loaders = {"train": datamodule.train_dataloader(), "val": datamodule.val_dataloader()}
    if is_overridden("test_dataloader", datamodule, lightning.LightningDataModule):
        datamodule.setup("test")
        loaders["test"] = datamodule.test_dataloader()
    for name, loader in loaders.items():
        if isinstance(loader, list | tuple) and len(loader) == 1:
            loaders[name] = loader[0]
        elif not isinstance(loader, DataLoader):
            raise InputError(f"{name}_dataloader gives a {type(loader).__name__}: let it give one DataLoader")
    return loaders


def _first_batch(loader: DataLoader[Any], like: Tensor) -> Any:
    batches = DataLoader(loader.dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
    return cast_batch(next(iter(batches)), like.device, like.dtype)


def _steps(trainer: lightning.Trainer, loader: DataLoader[Any]) -> dict[str, int]:
    """The length of training as a module's trainer has it, by the names of the trainer's attributes: batches and
    steps."""
    batches, accumulate = len(loader), trainer.accumulate_grad_batches
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    ends = [each for each in (epochs * math.ceil(batches / accumulate), trainer.max_steps) if each > 0]
    if not ends:
        raise InputError("the trainer trains without an end: give it max_epochs or max_steps")
    return {
        "estimated_stepping_batches": min(ends),
        "num_training_batches": batches,
        "accumulate_grad_batches": accumulate,
    }


def _defaults(module: lightning.LightningModule, trainer: lightning.Trainer, problem: Problem) -> TrainingDefaults:
    """The optimizer and schedule that `configure_optimizers` gives."""
    optimizer, configurations = _configured(attempt("configure_optimizers", module.configure_optimizers))
    schedulers, left_out = [], _left_out(module, trainer)
    for configuration in configurations:
        scheduler = configuration["scheduler"]
        if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            left_out.append(
                f"the {type(scheduler).__name__} follows a metric, and is no schedule: it is not taken over"
            )
            continue
        every = int(configuration.get("frequency", 1))
        by_epoch = configuration.get("interval", "epoch") == "epoch"
        schedulers.append((scheduler, every * problem.steps_per_epoch if by_epoch else every))
    name, steps = engine_optimizer(optimizer), int(module.trainer.estimated_stepping_batches)
    groups, schedule = parameter_groups(optimizer, module, steps=steps, schedulers=schedulers)
    for sentence in left_out:
        warnings.warn(sentence, stacklevel=5)
    clip = float(trainer.gradient_clip_val or 0)
    by = "clip_gradient" if trainer.gradient_clip_algorithm == "value" else "clip_norm"
    return TrainingDefaults(
        name,
        steps,
        steps / problem.steps_per_epoch,
        groups,
        schedule,
        tuple(left_out),
        autocast=_AUTOCAST.get(str(trainer.precision)),
        **({by: clip} if clip > 0 else {}),
    )


def _configured(configuration: Any) -> tuple[Optimizer, list[Mapping[str, Any]]]:
    """The only optimizer of a configuration, and its schedulers with how they are stepped."""
    schedulers: Any = []
    if (
        isinstance(configuration, tuple | list)
        and len(configuration) == 2
        and isinstance(configuration[0], list | tuple)
    ):
        configuration, schedulers = configuration
    if isinstance(configuration, tuple | list) and len(configuration) == 1:
        (configuration,) = configuration
    if isinstance(configuration, Mapping):
        configuration, schedulers = configuration["optimizer"], configuration.get("lr_scheduler", [])
    if not isinstance(configuration, Optimizer):
        count = len(configuration) if isinstance(configuration, list | tuple) else "no"
        raise InputError(
            f"configure_optimizers gives {count} optimizers: an inner loop has one; tune one network at a time, or "
            "state the training as a Problem with a loss of its own"
        )
    listed = schedulers if isinstance(schedulers, list | tuple) else [schedulers]
    return configuration, [each if isinstance(each, Mapping) else {"scheduler": each} for each in listed]


def _left_out(module: lightning.LightningModule, trainer: lightning.Trainer) -> list[str]:
    """What a trainer is to do and the engine does not do, one sentence each."""
    found = []
    if str(trainer.precision) not in ("32-true", *_AUTOCAST):
        found.append(f"precision={trainer.precision!r} is not taken over: training is in the module's own type")
    hooks = [name for name in _NOT_CALLED if is_overridden(name, module, lightning.LightningModule)]
    if hooks:
        found.append(f"{', '.join(hooks)} of the module is not called: what it changes does not change here")
    return found


def _refuse_trainer(trainer: lightning.Trainer) -> None:
    """Refuse a trainer whose training the engine cannot repeat.

    Raises:
        InputError: names the argument and the remedy.
    """
    if trainer.world_size > 1:
        raise InputError(f"the trainer is of {trainer.world_size} processes: give one with devices=1")
    for name in ("limit_train_batches", "limit_val_batches"):
        if getattr(trainer, name) != 1.0:
            raise InputError(f"{name}={getattr(trainer, name)!r} is not supported: let the data module have less data")
    for callback in trainer.callbacks:
        if isinstance(callback, BaseFinetuning | GradientAccumulationScheduler | StochasticWeightAveraging):
            raise InputError(f"the trainer's {type(callback).__name__} changes training: give a trainer without it")


def _refuse_remainder(problem: Problem) -> None:
    """Refuse accumulation whose last step of a pass has fewer batches: Lightning does not take their mean.

    Raises:
        InputError: there are such steps.
    """
    rest = problem.batches_per_epoch % problem.accumulate
    if rest:
        raise InputError(
            f"accumulate_grad_batches={problem.accumulate} leaves {rest} of {problem.batches_per_epoch} batches for a "
            f"pass's last step, whose losses Lightning divides by {problem.accumulate}: give the train_dataloader a "
            "whole number of steps by its sampler or its data set, or choose a divisor"
        )


def _refuse_module(module: lightning.LightningModule) -> None:
    """Refuse a module whose training the engine cannot repeat.

    Raises:
        InputError: names what it does and the remedy.
    """
    if not module.automatic_optimization:
        raise InputError(
            f"{type(module).__name__} has manual optimization, whose steps are its own code: let training_step return "
            "the loss of one optimizer, or state the training as a Problem with a loss of its own"
        )
    for name in _CHANGE_THE_STEP:
        if is_overridden(name, module, lightning.LightningModule):
            raise InputError(
                f"{type(module).__name__} has its own {name}, which the engine cannot repeat: leave it out"
            )
    for name in (TRAINING, VALIDATION):
        if not is_overridden(name, module, lightning.LightningModule):
            raise InputError(f"{type(module).__name__} has no {name}: give it one")
