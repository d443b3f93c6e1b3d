"""The training run of a self-tuning network: training and validation steps in turn, in resumable pieces."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite, isnan, log
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tune_hypergrad.batches import Batch
from tune_hypergrad.budget import GRADIENTS_PER, Cost
from tune_hypergrad.curves import split_group
from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.figures import as_mean
from tune_hypergrad.hypergradients.evaluation import Evaluation
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.optimizers import get_optimizer, initial_slots
from tune_hypergrad.hypergradients.partial_update import counted, step_blocks
from tune_hypergrad.hypergradients.state import State, on_device
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.stn.buffers import load_buffers
from tune_hypergrad.stn.convert import SelfTuningNetwork, responding_layers, self_tuning
from tune_hypergrad.stn.hyperparameters import TunedHyperparameter, TunedHyperparameters
from tune_hypergrad.stn.steps import VARIANTS, response_inputs, training_gradients, validation_gradients
from tune_hypergrad.stn.uses import used_elsewhere
from tune_hypergrad.stn.verification import (
    refuse_gradients_lost,
    refuse_inexact_linearisation,
    refuse_unlike_reported,
    why_one_for_all,
)

# What a draw is for, beside the inner loop's streams.
_TRAINING_PERTURBATION, _VALIDATION_PERTURBATION = range(100, 102)


@dataclass(frozen=True)
class SelfTuningSettings:
    """How a self-tuning network is trained; defaults are those of Delta-STN's published runs."""

    variant: str = "delta-stn"
    """The method that trains the network: "stn", "centered-stn" or "delta-stn"."""
    initial: Mapping[str, float] = field(default_factory=dict)
    """Values of hyperparameters to begin with, by name; those missing begin in the middle of the unconstrained
    scale."""
    scale: float = 1.0
    """Standard deviation of the perturbations to begin with, on the unconstrained scale."""
    train_steps: int = 5
    """Training steps in one turn."""
    val_steps: int = 1
    """Validation steps, on hyperparameters and scales, in one turn."""
    warm_up: float = 5
    """Epochs before the first validation step."""
    hyper_optimizer: str = "rmsprop"
    """Optimizer of hyperparameters and perturbation scales: one of the inner optimizers, with torch's defaults."""
    hyper_lr: float = 1e-2
    """Learning rate of `hyper_optimizer`, which moves hyperparameters and perturbation scales."""
    entropy_weight: float = 1e-3
    """Weight of the perturbations' entropy in validation steps: how much a wide perturbation is worth."""
    linearised_validation: bool = False
    """Whether validation steps linearise the prediction in the response, too."""
    val_batch_size: int | None = None
    """Validation examples in a step; None is the problem's batch size."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise InputError(f"unknown variant {self.variant!r}: choose one of {', '.join(VARIANTS)}")
        if get_optimizer(self.hyper_optimizer).validated is not None:
            raise InputError(
                f"hyper_optimizer {self.hyper_optimizer!r} moves an average of weights: choose another one"
            )
        for name, least in (("train_steps", 1), ("val_steps", 0), ("val_batch_size", 1)):
            value = getattr(self, name)
            if name == "val_batch_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}: it must be a whole number of at least {least}")
        for name in ("warm_up", "hyper_lr", "entropy_weight"):
            value = getattr(self, name)
            if not (_is_finite(value) and value >= 0):
                raise InputError(f"{name} is {value!r}: it must be a finite number of at least 0")
        if not (_is_finite(self.scale) and self.scale > 0):
            raise InputError(f"scale is {self.scale!r}: it must be a finite number above 0")
        for name, value in self.initial.items():
            if not _is_finite(value):
                raise InputError(f"hyperparameter {name!r} begins at {value!r}: it must be one finite number")


class Incumbent(NamedTuple):
    """The best weights that a run has had so far, and the hyperparameters that belong to them."""

    step: int
    """Number of training steps that led to the weights."""
    val_loss: float
    """Mean validation loss of the weights over the whole validation split."""
    values: dict[str, float]
    """Values of the hyperparameters that belong to the weights, by name."""
    weights: dict[str, Any]
    """The weights, as a state dict of the plain model."""
    score: float
    """What the weights were chosen by: the problem's objective, turned so that less is better."""


def check_tuned(loop: InnerLoop, tuned: Collection[TunedHyperparameter]) -> None:
    """Refuse hyperparameters that a self-tuning network of this inner loop cannot tune.

    Raises:
        InputError: nothing uses one of them, it is the optimizer's, its range is more than its regulariser takes, or
            the loss has parameters.
    """
    problem = loop.problem
    if loop.validated:
        raise InputError(
            "a self-tuning network has no average of weights to judge: leave ema out, and take an optimizer that "
            "trains the weights it judges"
        )
    known = {**problem.regulariser_hyperparameters, **problem.train_loss_hyperparameters}
    for definition in tuned:
        name = definition.name
        if name in loop.optimizer.hyperparameters:
            raise InputError(
                f"{name!r} is the optimizer's, and no part of the training loss that weights respond to: fix it, tune "
                "it outside, or use a regulariser such as WeightDecay in its place"
            )
        if name not in known and name not in problem.model_hyperparameters:
            raise InputError(
                f"nothing uses the hyperparameter {name!r}: the problem's regularisers and train loss have "
                f"{', '.join(known) or 'none'}{did_you_mean(name, known)}"
            )
        strength = problem.regulariser_hyperparameters.get(name)
        if strength is not None and not strength.lower <= definition.lower <= definition.largest <= strength.upper:
            raise InputError(
                f"hyperparameter {name!r} is searched from {definition.lower:g} to {definition.largest:g}: its "
                f"regulariser takes {strength.lower:g} to {strength.upper:g}"
            )
    loop.values.check_names({definition.name: None for definition in tuned})
    of_groups = next((name for name in loop.values.fixed_names if split_group(name)[1]), None)
    if of_groups is not None:
        raise InputError(
            f"{of_groups!r} is a value of a parameter group: a self-tuning network, whose responses are trained beside "
            "its weights, has one for all; leave it out, or use another method"
        )
    if loop.loss_parameters:
        raise InputError(
            f"the loss has parameters of its own ({', '.join(loop.loss_parameters)}), which a self-tuning network does "
            "not train: move them into the model"
        )


@contextmanager
def unlike_batches(loop: InnerLoop) -> Iterator[int]:
    """For the body, training batches are as large as nothing else in model and data, so that no other dimension passes
    for the examples; as large as ever where there is no such size. Enter `loop.running()` around it."""
    shapes = [leaf.shape[1:] for leaf in tree_leaves(loop.batches.of_step(0)) if isinstance(leaf, Tensor)]
    taken = {size for shape in (*shapes, *(p.shape for p in loop.model.parameters())) for size in shape}
    sizes = range(3, len(loop.batches.split("train")) + 1, 2)
    size = next((size for size in sizes if size not in taken), loop.problem.batch_size)
    with loop.trained_on(loop.problem.replace(batch_size=size, accumulate=1)):
        yield size


class SelfTuningRun:
    """One training run whose regularisation is tuned on the way.

    Every number is a function of the inner loop's seed and the step: a run that is loaded from `state_dict` continues
    bit for bit on a CPU.

    Args:
        loop: what is trained; enter `loop.running()` around `advance` and `judge`.
        tuned: what is tuned; one draw serves a minibatch where the problem knows no value for each example, and where
            a layer's input has not the examples along its first dimension (graphs, packed sequences, several views).
        settings: how.

    Raises:
        InputError: something cannot be tuned, or begins outside its range; no layer of the model responds.
    """

    def __init__(self, loop: InnerLoop, tuned: Collection[TunedHyperparameter], settings: SelfTuningSettings) -> None:
        check_tuned(loop, tuned)
        self.loop, self.settings, self.variant = loop, settings, VARIANTS[settings.variant]
        shared = loop.problem.per_minibatch_hyperparameters
        tuned = [replace(each, per_example=each.per_example and each.name not in shared) for each in tuned]
        # half precision is too coarse for what moves by small steps
        options: dict[str, Any] = {"dtype": torch.promote_types(loop.dtype, torch.float32), "device": loop.device}
        self.tuned = TunedHyperparameters(tuned, initial=settings.initial, scale=settings.scale, **options)
        self.network = self_tuning(loop.model, len(self.tuned), self._used_elsewhere())
        self.why_one_for_all = None if self.tuned.one_for_all else self._why_one_for_all()
        """Why one perturbation serves all examples of a batch though nobody has said so: one line, or None."""
        if self.why_one_for_all is not None:
            tuned = [replace(each, per_example=False) for each in tuned]
            self.tuned = TunedHyperparameters(tuned, initial=settings.initial, scale=settings.scale, **options)
        self._general = self.network.general_parameters()
        self._responses = self.network.response_parameters()
        self._weights = [_as_views(self._general.values()), _as_views(self._responses.values())]
        self._slots = [initial_slots(loop.optimizer, flat) for flat in self._weights]
        self._counts = [(0,) * len(each) for each in (self._general, self._responses)]
        self._hyper_optimizer = get_optimizer(settings.hyper_optimizer)
        unconstrained = torch.cat([self.tuned.unconstrained, self.tuned.log_scales]).detach()
        self._hyper_slots = initial_slots(self._hyper_optimizer, unconstrained)
        # values at every step: those that are tuned where they are, so that no step waits for them
        self._path = torch.empty(loop.steps, len(self.tuned), dtype=torch.float64, device=loop.device)
        self._fixed_path = torch.empty(loop.steps, len(loop.values.fixed_names), dtype=torch.float64)
        self.position = 0
        """Number of training steps taken."""
        self.val_steps = 0
        """Number of validation steps taken."""
        self.incumbent: Incumbent | None = None
        self.cost = Cost()

    def verify(self) -> None:
        """Try the network out on a batch; nothing of the run changes. Enter `loop.running()` around it.

        Raises:
            InputError: what is reported would not be what is trained, or a derivative not that of what is trained.
        """
        batch, problem = self.loop.batches.of_step(0), self.loop.problem
        inputs = self.tuned.of_layers(self._random_inputs())
        predict = partial(self._predict, batch)

        def predict_and_judge(model: nn.Module) -> Any:
            output = predict(model)
            return output, as_mean(problem.loss(output, problem.target(batch)))

        of_one = inputs.reshape(-1, len(self.tuned))[0]
        with self.loop.replaying:
            refuse_unlike_reported(self.network, self.loop.model, predict_and_judge, of_one)
            refuse_gradients_lost(self.network, predict_and_judge, inputs)
            if self.variant.linearised:
                refuse_inexact_linearisation(self.network.train(), predict, inputs)
            if self.settings.linearised_validation:
                refuse_inexact_linearisation(self.network.eval(), predict, inputs)

    def _random_inputs(self) -> Tensor:
        shape = self.loop.problem.batch_length(0), len(self.tuned)
        return torch.randn(shape, dtype=self.network.dtype, device=self.loop.device)

    def _predict(self, batch: Batch, model: nn.Module) -> Any:
        inner = model.model if isinstance(model, SelfTuningNetwork) else model
        return self.loop.problem.predict(inner, copy.deepcopy(batch))  # a model may write to its inputs

    def _why_one_for_all(self) -> str | None:
        with self.loop.running(), self.loop.replaying, unlike_batches(self.loop):
            predict = partial(self._predict, self.loop.batches.of_step(0))
            return why_one_for_all(self.network.train(), predict, self._random_inputs())

    @property
    def done(self) -> bool:
        """Whether all training steps have been taken."""
        return self.position == self.loop.steps

    @property
    def values(self) -> dict[str, float]:
        """Values of the hyperparameters at present, by name."""
        values = self.tuned.values()
        # together, since each number asked of a GPU waits for it
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))

    @property
    def scales(self) -> dict[str, float]:
        """Standard deviations of the hyperparameters' perturbations at present, by name, on the unconstrained scale."""
        return dict(zip(self.tuned.definitions, self.tuned.log_scales.detach().exp().tolist(), strict=True))

    @property
    def history(self) -> dict[str, tuple[float, ...]]:
        """Values of all hyperparameters, fixed ones too, at every training step so far: what a plain training run
        replays."""
        taken = self._whole_path().T.tolist()
        names = (*self.tuned.definitions, *self.loop.values.fixed_names)
        return {name: tuple(values) for name, values in zip(names, taken, strict=True)}

    def advance(self, steps: int) -> None:
        """Take training steps, as many as are left at the most, and the validation steps that fall between them."""
        settings, first = self.settings, round(self.settings.warm_up * self.loop.problem.steps_per_epoch)
        upcoming = range(self.position, min(self.position + steps, self.loop.steps))
        self.loop.batches.expect(upcoming)
        for _ in upcoming:
            self._train()
            since = self.position - first
            if since > 0 and since % settings.train_steps == 0:
                for _ in range(settings.val_steps):
                    self._validate()

    def judge(self) -> Evaluation:
        """Evaluate the present weights on the validation split, and keep them if they are the best so far."""
        state = self.state
        evaluation = self.loop.evaluate(state)
        self.cost += self.loop.costs.evaluation("val")
        score = self.loop.problem.criterion.score(evaluation)
        best = None if self.incumbent is None else self.incumbent.score
        if best is None or score < best or (isnan(best) and not isnan(score)):
            self.incumbent = Incumbent(self.position, evaluation.loss, self.values, self._plain_state_dict(), score)
        return evaluation

    @property
    def state(self) -> State:
        """The plain model's weights at the present hyperparameters, as the inner loop has them."""
        with torch.no_grad():
            params = self.loop.flatten(self.network.parameters_at(self._present_inputs()))
        buffers = {name: buffer.clone() for name, buffer in self.network.model.named_buffers()}
        return State(params, (), buffers)

    def state_dict(self) -> dict[str, Any]:
        """The run's state, of tensors and plain values."""
        return {
            "position": self.position,
            "val_steps": self.val_steps,
            "weights": [flat.clone() for flat in self._weights],
            "slots": list(self._slots),
            "counts": list(self._counts),
            "buffers": {name: buffer.clone() for name, buffer in self.network.model.named_buffers()},
            "tuned": (self.tuned.unconstrained.detach().clone(), self.tuned.log_scales.detach().clone()),
            "hyper_slots": self._hyper_slots,
            "path": self._whole_path(),
            "incumbent": None if self.incumbent is None else tuple(self.incumbent),
            "cost": dict(vars(self.cost)),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of the same run."""
        self.position, self.val_steps = saved["position"], saved["val_steps"]
        with torch.no_grad():
            for flat, value in zip(self._weights, saved["weights"], strict=True):
                flat.copy_(value)
            load_buffers(self.network.model, saved["buffers"])
            self.tuned.unconstrained.copy_(saved["tuned"][0])
            self.tuned.log_scales.copy_(saved["tuned"][1])
        self._slots = [tuple(slots) for slots in on_device(saved["slots"], self.loop.device)]
        self._counts = [tuple(counts) for counts in saved["counts"]]
        self._hyper_slots = tuple(on_device(saved["hyper_slots"], self.loop.device))
        self._path[: self.position] = saved["path"][:, : len(self.tuned)]
        self._fixed_path[: self.position] = saved["path"][:, len(self.tuned) :]
        incumbent = on_device(saved["incumbent"], self.loop.device)
        self.incumbent = None if incumbent is None else Incumbent(*incumbent)
        self.cost = Cost(**saved["cost"])

    def _whole_path(self) -> Tensor:
        """Values at every step so far, tuned ones before fixed ones: float64 on the CPU, shape [position, n]."""
        tuned, fixed = self._path[: self.position], self._fixed_path[: self.position]
        return torch.cat([tuned.cpu(), fixed], 1)

    def _used_elsewhere(self) -> tuple[str, ...]:
        """Layers that cannot respond, since the model uses their weights in other places."""
        with self.loop.running(), self.loop.replaying:
            batch = self.loop.batches.of_step(0)
            self.loop.seed_model(0)
            model, problem = self.loop.model, self.loop.problem
            return used_elsewhere(model, responding_layers(model), lambda copied: problem.predict(copied, batch))

    def _train(self) -> None:
        loop, step = self.loop, self.position
        fixed = loop.values.fixed_at(step)
        self._path[step] = torch.stack([value.detach() for value in self.tuned.values().values()])
        self._fixed_path[step] = torch.tensor(list(fixed.values()), dtype=torch.float64)
        self.network.train()
        count = loop.problem.batches_in(step)
        gradients = _mean_gradients([self._training_gradients(fixed, step, number) for number in range(count)])
        # weight decay pulls weights to zero, not their responses
        undecayed = {"weight_decay": 0.0} if "weight_decay" in loop.optimizer.hyperparameters else {}
        for index, (parameters, found, h) in enumerate(
            ((self._general, gradients[0], {}), (self._responses, gradients[1], undecayed))
        ):
            gradient = torch.cat([found.get(name, torch.zeros_like(p)).reshape(-1) for name, p in parameters.items()])
            without = {position for position, name in enumerate(parameters) if name not in found}
            blocks, shapes = step_blocks(self._counts[index], without), [p.shape for p in parameters.values()]
            with torch.no_grad():
                weights, self._slots[index] = loop.update(
                    self._weights[index], gradient, self._slots[index], h, step, blocks, shapes
                )
                self._weights[index].copy_(weights)
            self._counts[index] = counted(self._counts[index], without)
        self.position += 1
        gradients_spent = GRADIENTS_PER["delta_stn_step" if self.variant.linearised else "stn_step"]
        self.cost += Cost(
            steps=1,
            examples=loop.problem.step_length(step),
            gradients=gradients_spent,
            hypergradients=gradients_spent - GRADIENTS_PER["step"],
        )

    def _training_gradients(self, fixed: Mapping[str, float], step: int, number: int) -> tuple[_ByName, _ByName]:
        """Gradients of the training loss of one of a step's batches, by general and by response parameters; the
        network's buffers go on."""
        loop = self.loop
        batch, drawn = loop.batches.of_step(step, number), loop.batches.draw(step, number)
        perturbations = self._perturbations(_TRAINING_PERTURBATION, drawn, loop.problem.batch_length(step, number))
        loop.seed_model(step, number)
        with loop.replaying:
            return training_gradients(
                self.network,
                self.tuned,
                self.variant,
                loop.objective,
                batch,
                perturbations,
                fixed,
                forward=loop.problem.predict,
                target=loop.problem.target,
            )

    def _validate(self) -> None:
        loop, settings = self.loop, self.settings
        size = min(settings.val_batch_size or loop.problem.batch_size, len(loop.batches.split("val")))
        self.network.eval()
        loop.seed_model(-1 - self.val_steps)
        batch = loop.batches.of_validation(self.val_steps, size)
        with loop.replaying:
            _, *gradients = validation_gradients(
                self.network,
                self.tuned,
                self.variant,
                lambda output, target: as_mean(loop.problem.loss(output, target)),
                batch,
                self._perturbations(_VALIDATION_PERTURBATION, self.val_steps, size),
                entropy_weight=settings.entropy_weight,
                linearised=settings.linearised_validation,
                forward=loop.problem.predict,
                target=loop.problem.target,
            )
        with torch.no_grad():
            before = (torch.cat([self.tuned.unconstrained, self.tuned.log_scales]), *self._hyper_slots)
            h = {**self._hyper_optimizer.hyperparameters, "lr": settings.hyper_lr}
            moved, slots = self._hyper_optimizer.update(before[0], torch.cat(gradients), before[1:], h, self.val_steps)
            # where training diverged, nothing is known of the hyperparameters
            after = [torch.where(new.isfinite(), new, old) for new, old in zip((moved, *slots), before, strict=True)]
            self._hyper_slots = tuple(after[1:])
            unconstrained, log_scales = after[0].chunk(2)
            self.tuned.unconstrained.copy_(unconstrained)
            # scales and their squares stay what the weights' type can hold
            limit = log(torch.finfo(self.loop.dtype).max) / 2
            self.tuned.log_scales.copy_(log_scales.clamp(-limit, limit))
        self.val_steps += 1
        spent = size / loop.problem.examples_per_step * GRADIENTS_PER["self_tuning_val_step"]
        self.cost += Cost(gradients=spent, hypergradients=spent)

    def _perturbations(self, stream: int, number: int, examples: int) -> Tensor:
        generator = torch.Generator().manual_seed(fold_seed(self.loop.settings.seed, stream, number))
        return self.tuned.perturbations(examples, generator)

    def _present_inputs(self) -> Tensor:
        perturbations = torch.zeros_like(self.tuned.unconstrained)
        return response_inputs(self.network, self.tuned, self.variant, perturbations).detach()

    def _plain_state_dict(self) -> dict[str, Any]:
        state = self.network.general_state_dict(self._present_inputs())
        return {name: _copied(value) for name, value in state.items()}


_ByName = dict[str, Tensor]


def _mean_gradients(batches: Sequence[tuple[_ByName, _ByName]]) -> list[_ByName]:
    """Mean of the gradients over a step's batches, for each kind of parameters; parameters without one in any batch are
    left out."""
    means: list[_ByName] = []
    for found in zip(*batches, strict=True):
        total: _ByName = {}
        for gradients in found:
            total |= {name: total[name] + g if name in total else g for name, g in gradients.items()}
        means.append(total if len(found) == 1 else {name: g / len(found) for name, g in total.items()})
    return means


def _copied(value: Any) -> Any:
    """A copy of an entry of a state dict, which may be a module's extra state and no tensor."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def _as_views(parameters: Collection[torch.nn.Parameter]) -> Tensor:
    """One vector that parameters become views of, so that an optimizer writes to all of them at once."""
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for p, chunk in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = chunk.view(p.shape)
    return flat
