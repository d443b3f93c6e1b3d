"""The inner loop: one training run as a pure function of its weights, its hyperparameters and (seed, step)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tune_hypergrad.budget import GRADIENTS_PER, Cost
from tune_hypergrad.data import Batch, Split, cast_batch
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.heap import kept_heap
from tune_hypergrad.hypergradients.optimizers import Optimizer, get_optimizer
from tune_hypergrad.hypergradients.supported import refuse_unsupported, twice_differentiable
from tune_hypergrad.problem import Problem
from tune_hypergrad.randomness import fold_seed, preserved_generators, seed_everything
from tune_hypergrad.space import windows_of

Hyperparameters = dict[str, Tensor]
"""Name to values, shape [N]: N windows of steps/N inner steps each."""

Buffers = dict[str, Tensor]

# What a draw is for; one stream each, so that none depends on how often another is used.
_INITIALISATION, _ORDER, _AUGMENTATION, _MODEL, _VALIDATION, _VALIDATION_ORDER = range(6)


class State(NamedTuple):
    """Everything an inner step reads and writes."""

    params: Tensor
    """The model's trainable parameters, flattened: shape [P]."""
    slots: tuple[Tensor, ...]
    """The optimizer's state vectors, each of shape [P]."""
    buffers: Buffers
    """The model's buffers (BatchNorm's running statistics): carried, not differentiated."""


class Evaluation(NamedTuple):
    """How good some weights are on a split."""

    loss: float
    metrics: dict[str, float]
    gradient: Tensor | None
    """Gradient of the loss by the weights, shape [P], where it was asked for."""


@dataclass(frozen=True)
class TrainingSettings:
    """What defines an inner loop besides its problem and its hyperparameters' values."""

    steps: int
    """Inner steps in one run, T."""
    optimizer: str | Optimizer = "sgd"
    """Name of an inner optimizer (`OPTIMIZERS` lists them), or an `Optimizer` of one's own."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters without a derivative, each a number or windows of numbers; the rest take the optimizer's and the
    loss's defaults."""
    seed: int = 0
    """Seeds the initial weights, the order of examples, augmentation and dropout."""
    clip_gradient: float | None = None
    """Clamp every element of the training gradient to +- this value; part of the step, and differentiated as such."""
    device: str | None = None
    """Where to train; None leaves the model where its factory puts it."""

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"steps is {self.steps!r}: an inner run needs a whole number of at least 1")
        if self.clip_gradient is not None and not self.clip_gradient > 0:
            raise InputError(
                f"clip_gradient is {self.clip_gradient!r}: give a positive number, or None for no clipping"
            )


def check_strength(problem: Problem, name: str, values: Iterable[float]) -> None:
    """Refuse values that a regulariser's hyperparameter cannot have.

    Raises:
        InputError: one is outside what it can be.
    """
    strength = problem.regulariser_hyperparameters.get(name)
    if strength is None:
        return
    for value in values:
        if not (isfinite(value) and strength.lower <= value <= strength.upper):
            raise InputError(
                f"{name!r} is {value!r}: its regulariser takes finite numbers from {strength.lower:g} to "
                f"{strength.upper:g}"
            )


class InnerLoop:
    """A problem, an optimizer and a seed, ready to train.

    Methods are pure functions of their arguments: the module that the problem's factory made serves as a template
    for `torch.func.functional_call` only.

    Raises:
        InputError: the model has a module the engine cannot differentiate, or no trainable parameter.
    """

    def __init__(self, problem: Problem, settings: TrainingSettings) -> None:
        self.problem, self.settings = problem, settings
        self.optimizer = get_optimizer(settings.optimizer)
        with preserved_generators():
            seed_everything(fold_seed(settings.seed, _INITIALISATION))
            self.model: nn.Module = problem.model()
        if settings.device is not None:
            self.model.to(settings.device)
        refuse_unsupported(self.model)
        self.objective = problem.objective(self.model)
        trainable = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        if not trainable:
            raise InputError("the model has no parameter that requires a gradient: there is nothing to train")
        self._names = tuple(trainable)
        self._shapes = [p.shape for p in trainable.values()]
        self._sizes = [p.numel() for p in trainable.values()]
        self._initial = torch.cat([p.reshape(-1) for p in trainable.values()])
        self.device, self.dtype = self._initial.device, self._initial.dtype
        self.train, self.val, self.test = (
            None if split is None else split.to(self.device, self.dtype)  # type: ignore[union-attr]
            for split in (problem.train, problem.val, problem.test)
        )
        self._held = {name: windows_of(value) for name, value in settings.fixed.items()}
        self._orders: dict[str, tuple[int, Tensor]] = {}  # of the present epoch, by split

    @property
    def steps(self) -> int:
        """Inner steps in one run, T."""
        return self.settings.steps

    @property
    def size(self) -> int:
        """Number of trainable weights, P."""
        return len(self._initial)

    def check_names(self, tuned: Mapping[str, Any]) -> None:
        """Refuse hyperparameters that nothing in this inner loop reads.

        Raises:
            InputError: a name is unknown, tuned and fixed at once, or has no value and no default.
        """
        of_optimizer, of_loss = self.optimizer.hyperparameters, self.problem.train_loss_hyperparameters
        of_regularisers = self.problem.regulariser_hyperparameters
        for name in (*of_loss, *of_regularisers):
            if name in of_optimizer:
                other, remedy = (
                    ("the train loss", "rename the train loss's argument")
                    if name in of_loss
                    else ("a regulariser", "rename the regulariser's")
                )
                raise InputError(
                    f"{name!r} is a hyperparameter of both {other} and optimizer {self.optimizer.name!r}: {remedy}"
                )
        for name in (*tuned, *self.settings.fixed):
            if name in of_optimizer or name in of_loss or name in of_regularisers:
                continue
            if name in self.problem.model_hyperparameters:
                raise InputError(
                    f"hyperparameter {name!r} is an argument of the model factory, which no gradient reaches: fix it, "
                    "or tune it outside with a black-box searcher"
                )
            takes = ", ".join(of_loss) or "none (give Problem a train_loss with keyword-only arguments)"
            raise InputError(
                f"unknown hyperparameter {name!r}: optimizer {self.optimizer.name!r} has {', '.join(of_optimizer)}, "
                f"the train loss {takes}, and regularisers {', '.join(of_regularisers) or 'none'}"
            )
        for name in tuned:
            if name in self.settings.fixed:
                raise InputError(f"hyperparameter {name!r} is both tuned and fixed: drop one of the two")
        for name, default in of_loss.items():
            if isnan(default) and name not in tuned and name not in self.settings.fixed:
                raise InputError(f"the train loss needs {name!r}, which has no default: tune it or fix it to a value")
        for name, values in self._held.items():
            check_strength(self.problem, name, values)
        self._check_completeness({*tuned, *self.settings.fixed})

    def _check_completeness(self, given: set[str]) -> None:
        for regulariser in self.problem.regularisers:
            names = list(regulariser.hyperparameters)
            missing = [name for name in names if name not in given]
            if missing and len(missing) < len(names):
                raise InputError(
                    f"{type(regulariser).__name__} has no value for {missing[0]!r}: tune it or fix it as well"
                )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Enter before calling the methods below: right kernels, and global generators given back afterwards."""
        with preserved_generators(), twice_differentiable(self.model), kept_heap():
            yield

    def initial_state(self) -> State:
        """Fresh weights (drawn from the seed), zero optimizer state, fresh buffers."""
        buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        slots = tuple(torch.zeros_like(self._initial) for _ in self.optimizer.slots)
        return State(self._initial.clone(), slots, buffers)

    def scalars(self, hyperparameters: Hyperparameters, step: int) -> dict[str, Tensor]:
        """The tuned hyperparameters' values in force at `step`: element floor(N step / T) of each, 0-dim."""
        return {name: values[len(values) * step // self.steps] for name, values in hyperparameters.items()}

    def held_at(self, step: int) -> dict[str, float]:
        """The held hyperparameters' values in force at `step`."""
        return {name: values[len(values) * step // self.steps] for name, values in self._held.items()}

    def batch(self, step: int) -> Batch:
        """The training batch of `step`, a function of (seed, step) only."""
        split, size = self.split("train"), self.problem.batch_size
        if size == len(split):
            indices: slice | Tensor = slice(None)
        else:
            epoch, position = divmod(step, len(split) // size)
            indices = self._epoch_order("train", epoch)[position * size : (position + 1) * size]
        seed_everything(fold_seed(self.settings.seed, _AUGMENTATION, step))
        return self._cast(split.batch(indices))

    def seed_model(self, step: int) -> None:
        """Seed the global generators for what a training step draws: dropout, noise, augmentation on the device."""
        seed_everything(fold_seed(self.settings.seed, _MODEL, step))

    def val_batch(self, number: int, size: int) -> Batch:
        """Batch `number` of the validation split, of `size` examples or all of them, in passes of a random order."""
        split = self.split("val")
        size = min(size, len(split))
        epoch, position = divmod(number, len(split) // size)
        return self._cast(split.batch(self._epoch_order("val", epoch)[position * size : (position + 1) * size]))

    def train_loss(
        self, params: Tensor, buffers: Buffers, h: Mapping[str, Any], batch: Batch, step: int
    ) -> tuple[Tensor, Buffers]:
        """Training loss (0-dim) on a batch, and the buffers after it; `h` holds scalars by name."""
        self.model.train()
        self.seed_model(step)
        named = self.unflatten(params)
        tensors = {**named, **{name: buffer.clone() for name, buffer in buffers.items()}}
        values = {**self.held_at(step), **h}
        *inputs, target = self.objective.transform(batch, values)

        def call(factors: dict[str, Tensor]) -> Any:
            tensors.update({name: named[name] * factor for name, factor in factors.items()})
            return functional_call(self.model, tensors, tuple(inputs))  # writes buffers that are assigned anew back

        prediction = self.objective.predict(call, named, values)
        loss = self.objective.loss(prediction, target, lambda: named, values)
        return loss, {name: tensors[name] for name in buffers}

    def gradient(self, state: State, h: Mapping[str, Any], step: int) -> tuple[Tensor, Buffers]:
        """Gradient of the step's training loss, shape [P], and the buffers after the forward pass."""
        params = state.params.detach().requires_grad_()
        with torch.enable_grad():
            loss, buffers = self.train_loss(params, state.buffers, h, self.batch(step), step)
            (gradient,) = torch.autograd.grad(loss, params)
        return gradient, {name: buffer.detach() for name, buffer in buffers.items()}

    def update(
        self, params: Tensor, gradient: Tensor, slots: tuple[Tensor, ...], h: Mapping[str, Any], step: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The optimizer's update, gradient clipping included."""
        clip = self.settings.clip_gradient
        if clip is not None:
            gradient = gradient.clamp(-clip, clip)
        values = {**self.optimizer.hyperparameters, **self.held_at(step), **h}
        return self.optimizer.update(params, gradient, slots, values, step)

    def step(self, state: State, h: Mapping[str, Any], step: int) -> State:
        """One plain training step."""
        gradient, buffers = self.gradient(state, h, step)
        with torch.no_grad():
            params, slots = self.update(state.params, gradient, state.slots, h, step)
        return State(params, slots, buffers)

    def run(self, hyperparameters: Hyperparameters) -> State:
        """A whole training run without any hypergradient."""
        state = self.initial_state()
        for step in range(self.steps):
            state = self.step(state, self.scalars(hyperparameters, step), step)
        return state

    def evaluate(
        self, state: State, which: str = "val", *, gradient: bool = False, examples: int | None = None, draw: int = 0
    ) -> Evaluation:
        """Mean loss and metrics over a split, in evaluation mode; with `gradient`, the loss's by the weights as well.

        Args:
            which: "train", "val" or "test".
            examples: how many examples to take, drawn from (seed, `draw`); None for the whole split.
        """
        split = self.split(which)
        self.model.eval()
        seed_everything(fold_seed(self.settings.seed, _VALIDATION))
        params = state.params.detach().requires_grad_(gradient)
        buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}  # a model may count its calls
        total = torch.zeros_like(params) if gradient else None
        loss, metrics = 0.0, dict.fromkeys(self.problem.metrics, 0.0)
        for batch, weight in self._eval_batches(split, self._sample(split, draw, examples)):
            with torch.set_grad_enabled(gradient):
                output = functional_call(self.model, {**self.unflatten(params), **buffers}, batch[:-1])
                batch_loss = weight * self.problem.loss(output, batch[-1])
            if total is not None:
                total += torch.autograd.grad(batch_loss, params)[0]
            loss += float(batch_loss.detach())
            for name, metric in self.problem.metrics.items():
                metrics[name] += weight * float(metric(output.detach(), batch[-1]))
        return Evaluation(loss, metrics, total)

    def step_cost(self, hessian_columns: int = 0) -> Cost:
        """Cost of one training step that also carries `hessian_columns` tangent columns."""
        tangents = hessian_columns * GRADIENTS_PER["hessian_column"]
        gradients = GRADIENTS_PER["step"] + tangents
        return Cost(steps=1, examples=self.problem.batch_size, gradients=gradients, hypergradients=tangents)

    def eval_cost(self, which: str = "val", examples: int | None = None, *, gradient: bool = False) -> Cost:
        """Cost of evaluating a split, or `examples` of it, with or without its gradient."""
        total = len(self.split(which))
        batches = (total if examples is None else min(examples, total)) / self.problem.batch_size
        if gradient:
            spent = batches * GRADIENTS_PER["val_gradient"]
            return Cost(gradients=spent, hypergradients=spent)
        spent = batches * GRADIENTS_PER["evaluation"]
        return Cost(gradients=spent, evaluations=spent)

    def unflatten(self, params: Tensor) -> dict[str, Tensor]:
        """Views of the flat weights by parameter name."""
        chunks = params.split(self._sizes)
        return {name: chunk.view(shape) for name, chunk, shape in zip(self._names, chunks, self._shapes, strict=True)}

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Undo `unflatten`: shape [P]."""
        return torch.cat([params[name].reshape(-1) for name in self._names])

    def split(self, which: str) -> Split:
        """The "train", "val" or "test" split, where training happens."""
        split: Split | None = getattr(self, which)
        if split is None:
            raise InputError(f"the problem has no {which} split")
        return split

    def _cast(self, batch: Batch) -> Batch:
        return cast_batch(batch, self.device, self.dtype)

    def _epoch_order(self, which: str, epoch: int) -> Tensor:
        known = self._orders.get(which)
        if known is None or known[0] != epoch:
            stream = _ORDER if which == "train" else _VALIDATION_ORDER
            generator = torch.Generator().manual_seed(fold_seed(self.settings.seed, stream, epoch))
            order = torch.randperm(len(self.split(which)), generator=generator)
            known = self._orders[which] = epoch, order.to(self.device)
        return known[1]

    def _sample(self, split: Split, draw: int, examples: int | None) -> Tensor | None:
        if examples is None or examples >= len(split):
            return None
        generator = torch.Generator().manual_seed(fold_seed(self.settings.seed, _VALIDATION, draw))
        return torch.randperm(len(split), generator=generator)[:examples].to(self.device)

    def _eval_batches(self, split: Split, sample: Tensor | None) -> Iterator[tuple[Batch, float]]:
        """Batches of the split (or of a sample of it) with the share of the examples that each holds."""
        size = self.problem.eval_batch_size
        total = len(split) if sample is None else len(sample)
        for start in range(0, total, size):
            stop = min(start + size, total)
            indices = slice(start, stop) if sample is None else sample[start:stop]
            yield self._cast(split.batch(indices)), (stop - start) / total
