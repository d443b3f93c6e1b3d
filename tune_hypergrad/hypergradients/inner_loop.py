"""The inner loop: one training run as a pure function of its state, its hyperparameters and (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from tune_hypergrad.batches import Batch
from tune_hypergrad.errors import InputError
from tune_hypergrad.groups import find_groups, ungrouped
from tune_hypergrad.hypergradients.autocast import UnderAutocast, autocast_dtype
from tune_hypergrad.hypergradients.channels_last import ChannelsLast
from tune_hypergrad.hypergradients.evaluation import Evaluation, Evaluator
from tune_hypergrad.hypergradients.heap import kept_heap
from tune_hypergrad.hypergradients.loop_batches import INITIALISATION, MODEL_STREAM, VALIDATION, LoopBatches
from tune_hypergrad.hypergradients.loop_costs import LoopCosts
from tune_hypergrad.hypergradients.loop_values import EMA, LoopValues
from tune_hypergrad.hypergradients.optimizers import (
    Optimizer,
    Slots,
    Update,
    get_optimizer,
    guarded_sqrt,
    initial_slots,
)
from tune_hypergrad.hypergradients.partial_update import Block, counted, step_blocks, update_blocks, update_each
from tune_hypergrad.hypergradients.state import Buffers, Hyperparameters, State
from tune_hypergrad.hypergradients.substitution import DataWrites
from tune_hypergrad.hypergradients.supported import (
    gradient_hooks,
    once_differentiable,
    refuse_unsupported,
    twice_differentiable,
)
from tune_hypergrad.hypergradients.tensor_cores import tf32
from tune_hypergrad.modules import parts_in_evaluation, set_training
from tune_hypergrad.objective import Prediction
from tune_hypergrad.problem import Problem
from tune_hypergrad.randomness import fold_seed, preserved_generators, seed_everything, seeded_generators

if TYPE_CHECKING:
    from tune_hypergrad.hypergradients.captured_steps import CapturedSteps

T = TypeVar("T")


class Training(NamedTuple):
    """What a training step is made of, before the optimizer's update."""

    loss: Tensor
    """The training loss, shape []."""
    gradient: Tensor
    """Gradient of the training loss by the weights, shape [P]: zeros for parameters that have none."""
    without_gradient: frozenset[int]
    """Positions of the trainable parameters that have no gradient."""
    buffers: Buffers
    """The buffers after the forward pass."""


class Passed(NamedTuple):
    """What there is after the forward pass of a training step's batch: the buffers, and the place that the pass ran
    in."""

    buffers: Callable[[], Buffers]
    """Gives the buffers after the forward pass."""
    within: Callable[[Callable[[], Any]], Any]
    """Gives what a body does where the pass ran, weights and regularisers in place: for derivatives taken later on."""


@dataclass(frozen=True)
class TrainingSettings:
    """What defines an inner loop besides its problem and its hyperparameters' values."""

    steps: int
    """Inner steps in one run, T."""
    optimizer: str | Optimizer = "sgd"
    """Inner optimizer, by name (`OPTIMIZERS` lists them) or an `Optimizer` of one's own."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters without a derivative, each a number, windows of numbers, or a curve as a trial's config has it;
    parts of a curve that is tuned otherwise by flat name. Hyperparameters that are neither tuned nor fixed take the
    optimizer's and the loss's defaults."""
    seed: int = 0
    """Seeds the initial weights, the order of examples, augmentation and dropout."""
    clip_gradient: float | None = None
    """Clamp every element of the training gradient to +- this value; part of the step, and differentiated as such."""
    device: str | None = None
    """Device to train on; None leaves the model where its factory puts it."""
    clip_norm: float | None = None
    """Scale the training gradient down to this norm over all weights where it is longer, as
    `torch.nn.utils.clip_grad_norm_`: by min(1, clip_norm / (norm + 1e-6)), differentiated as part of the step."""
    ema: float | None = None
    """Judge an exponential moving average of the weights: average <- ema average + (1 - ema) weights after every step,
    begun at the initial weights. It is the default of a hyperparameter of that name, which can be tuned."""
    autocast: str | None = None
    """Type that the model's forward pass is computed in, in training and evaluation: "bfloat16", as under
    `torch.autocast`, with weights, gradients and optimizer state in the model's own type; None is that type."""
    capture: bool = False
    """On a GPU, replay training steps and adjoint steps as CUDA graphs where they are the same when replayed; elsewhere
    nothing is replayed."""
    channels_last: bool = False
    """Give the model images (inputs of four or five dimensions) with their channels last in memory: the same shapes and
    numbers, to rounding, by kernels that are often faster."""
    tf32: bool | None = None
    """Whether float32 matrix products and convolutions may run on a GPU's TF32 tensor cores; None leaves torch's own
    switches as they are. On a CPU nothing changes."""

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"steps is {self.steps!r}: an inner run needs a whole number of at least 1")
        object.__setattr__(self, "fixed", ungrouped(self.fixed))
        for name in ("clip_gradient", "clip_norm"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise InputError(f"{name} is {limit!r}: give a positive number, or None for no clipping")
        if self.autocast is not None:
            autocast_dtype(self.autocast)
        if self.ema is not None and not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema!r}: give the average's decay, at least 0 and below 1, or None")
        if self.clip_gradient is not None and self.clip_norm is not None:
            raise InputError(
                f"clip_gradient is {self.clip_gradient!r} and clip_norm {self.clip_norm!r}: set one of them, to clip "
                "elements or the norm"
            )


class _Scope(nn.Module):
    """A model, and the losses that are modules: what functional calls give other tensors to.

    `forward` runs any code: parameters stay swapped in until it is done, derivatives included, so that what a model
    defers to its backward pass (activation checkpointing, saved-tensor hooks) sees the same parameters.
    """

    def __init__(self, model: nn.Module, losses: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.losses = nn.ModuleDict(losses)

    def forward(self, body: Callable[[], T]) -> T:
        return body()

    def names(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors by the names by which users know them: `weight` of the model, `loss.weight` of the loss."""
        return {name.split(".", 1)[1]: tensor for name, tensor in named}

    def places(self) -> dict[str, tuple[str, ...]]:
        """By the names by which users know them, where tensors are within this module: one that is tied, at several
        places."""
        several: dict[int, list[str]] = {}
        every = (*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False))
        for path, tensor in every:
            several.setdefault(id(tensor), []).append(path)
        return {name: tuple(several[id(tensor)]) for name, tensor in self.names(every).items()}

    def path(self, name: str) -> str:
        """The name, within this module, of the tensor that users call `name`."""
        return f"losses.{name}" if name.split(".", 1)[0] in self.losses else f"model.{name}"

    def tensor(self, name: str) -> Tensor:
        """The present parameter or buffer that users call `name`."""
        owner, _, attribute = self.path(name).rpartition(".")
        return getattr(self.get_submodule(owner), attribute)  # type: ignore[no-any-return]


class InnerLoop:
    """A problem, an optimizer and a seed, ready to train.

    Methods are pure functions of their arguments: the modules that the problem's factory made serve as templates for
    functional calls only. Losses that are modules are copied, and trained with the model.

    Args:
        problem: what is trained.
        settings: how.
        data: the batches of another inner loop of the problem, whose data this one reads.

    Raises:
        InputError: the model has a module the engine cannot differentiate, or no trainable parameter.
    """

    def __init__(self, problem: Problem, settings: TrainingSettings, *, data: LoopBatches | None = None) -> None:
        self.source, self.settings = problem, settings
        self.findings: dict[Any, Any] = {}  # of the derivatives, where the problem cannot remember them
        self.optimizer = get_optimizer(settings.optimizer)
        judged = self.optimizer.validated if settings.ema is None else EMA
        if settings.ema is not None and self.optimizer.validated is not None:
            raise InputError(
                f"optimizer {self.optimizer.name!r} averages the weights that are judged itself: leave ema out"
            )
        self.slots = (*self.optimizer.slots, *(() if settings.ema is None else (EMA,)))
        """Names of a state's slots: the optimizer's, and the average of the weights where there is one."""
        self.validated = 0 if judged is None else 1 + self.slots.index(judged)
        """Position in `(params, *slots)` of the weights that evaluations judge."""
        with seeded_generators(fold_seed(settings.seed, INITIALISATION)):
            self.model: nn.Module = problem.model()
        if settings.device is not None:
            self.model.to(settings.device)
        refuse_unsupported(self.model)
        first = next((p for p in self.model.parameters() if p.requires_grad), None)
        if first is None:
            raise InputError("the model has no parameter that requires a gradient: there is nothing to train")
        self.device, self.dtype = first.device, first.dtype.to_real()
        self.problem = problem.with_own_measures(self.device, self.dtype)
        if settings.autocast is not None:
            lower = autocast_dtype(settings.autocast)
            forward = UnderAutocast(self.problem.forward, self.device.type, lower, self.dtype)
            self.problem = self.problem.replace(forward=forward)
        if settings.channels_last:
            self.problem = self.problem.replace(forward=ChannelsLast(self.problem.forward))
        self.in_evaluation = parts_in_evaluation(self.model)
        self.objective = self.problem.training_objective(self.model)
        self._scope = _Scope(self.model, _loss_modules(self.problem, self.model))
        trainable = self._scope.names((n, p.detach()) for n, p in self._scope.named_parameters() if p.requires_grad)
        self._names = tuple(trainable)
        self._places = self._scope.places()
        self._modules = tuple(self._scope.modules())
        self._in_training: dict[bool, list[bool]] = {}  # their flags in training and in evaluation
        self._complex = {name for name, p in trainable.items() if p.is_complex()}
        if self._complex and self.optimizer.by_parameter:
            raise InputError(f"optimizer {self.optimizer.name!r} does not take complex parameters: choose another one")
        self._shapes = [as_real(p).shape for p in trainable.values()]
        self._sizes = [as_real(p).numel() for p in trainable.values()]
        self.groups = find_groups(problem.groups, self.model, trainable)
        self._initial = InnerLoop.flatten(self, trainable)  # not of an ensemble
        frozen = ((n, p.detach()) for n, p in self._scope.named_parameters() if not p.requires_grad)
        self._initial_buffers = self._scope.names([*frozen, *self._scope.named_buffers()])
        self._frozen = {
            name for name in self._initial_buffers if name not in self._scope.names(self._scope.named_buffers())
        }
        self.knows_moving = False
        """Whether a training step has been taken, after which `moving` has what every step changes."""
        set_training(self.model, self.in_evaluation)
        self.moving = _running_statistics(self.model)
        """Names of the buffers and frozen parameters that training has been seen to change."""
        self.batches = LoopBatches(self.problem, settings.steps, settings.seed, self.device, self.dtype, data)
        self.values = LoopValues(
            self.problem,
            self.optimizer,
            self.groups,
            settings.steps,
            settings.fixed,
            settings.ema,
            self.device,
            self.dtype,
        )
        self.costs = LoopCosts(self.batches)
        self.captured: CapturedSteps | None = None
        """Steps that are replayed, where `capture_steps` has found that they can be."""
        self.judged_lines: set[str] = set()
        """Lines of the program that make numbers of tensors, on which no loss was found to depend."""
        self.replaying: AbstractContextManager[Any] = nullcontext()
        """What passes through the model run in, while `running`; not all else, since it sees every call of torch."""
        self._evaluator = Evaluator(self)

    @property
    def steps(self) -> int:
        """Inner steps in one run, T."""
        return self.settings.steps

    @property
    def size(self) -> int:
        """Number of trainable weights, P."""
        return len(self._initial)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of weights of every trainable parameter."""
        return tuple(self._sizes)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules that a training step calls: the model's, and the losses'."""
        return self._modules

    @property
    def loss_parameters(self) -> list[str]:
        """Names of the trainable parameters that losses have."""
        return [name for name in self._names if self._scope.path(name) == f"losses.{name}"]

    @contextmanager
    def running(self, *, plain: bool = False) -> Iterator[None]:
        """Enter before calling the methods below: right kernels, global generators given back afterwards, and workers
        that read data while it lasts.

        Args:
            plain: whether nothing is differentiated but training losses, once, so that fused kernels do. They give the
                same numbers to rounding: what is compared to the bit is entered with the same value.
        """
        kernels, before = once_differentiable if plain else twice_differentiable, self.replaying
        with ExitStack() as stack:
            for context in (preserved_generators(), tf32(self.settings.tf32), kept_heap(), self.batches.opened()):
                stack.enter_context(context)
            self.replaying = stack.enter_context(kernels(self.model))
            try:
                yield
            finally:
                self.replaying = before

    @contextmanager
    def trained_on(self, problem: Problem) -> Iterator[None]:
        """For the body, training steps are those of another problem, with the same model, loss and data."""
        before = self.problem
        self.problem = self.batches.problem = problem
        try:
            yield
        finally:
            self.problem = self.batches.problem = before

    def initial_state(self) -> State:
        """Fresh weights (drawn from the seed), zero optimizer state, fresh buffers, no step taken."""
        own = initial_slots(self.optimizer, self._initial)
        slots = (*own, *(self._initial.clone() for _ in self.slots[len(own) :]))  # an average begins at the weights
        return State(self._initial.clone(), slots, dict(self._initial_buffers), (0,) * len(self._names))

    def scalars(self, hyperparameters: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The tuned hyperparameters' values in force at `step`; see `LoopValues.tuned_at`."""
        return self.values.tuned_at(hyperparameters, step)

    def seed_model(self, step: int, number: int = 0) -> None:
        """Seed the global generators for what batch `number` of a training step draws: dropout, noise, augmentation on
        the device."""
        seed_everything(fold_seed(self.settings.seed, MODEL_STREAM, self.batches.draw(step, number)))

    def within(self, tensors: Mapping[str, Tensor], body: Callable[[], T], *, training: bool) -> T:
        """What `body()` gives while the model, and the losses that are modules, have these tensors.

        Args:
            tensors: parameters and buffers by name; others are the template's.
            body: takes the derivatives as well, since backward passes may need the tensors.
            training: whether modules are in training mode, or in evaluation mode.
        """
        self._set_training(training)
        swapped = {path: tensor for name, tensor in tensors.items() for path in self._places[name]}
        return functional_call(self._scope, swapped, (body,), tie_weights=False)  # type: ignore[no-any-return]

    def _set_training(self, training: bool) -> None:
        """Set modules to training mode, or to evaluation mode, unless they are in it."""
        known = self._in_training.get(training)
        if known is None or [module.training for module in self._modules] != known:
            if training:
                set_training(self._scope, frozenset(f"model.{name}" for name in self.in_evaluation))
            else:
                self._scope.eval()
            self._in_training[training] = [module.training for module in self._modules]

    def at_training_loss(
        self,
        named: Mapping[str, Tensor],
        buffers: Buffers,
        h: Mapping[str, Any],
        batch: Batch,
        step: int,
        body: Callable[[Tensor, Passed], T],
        *,
        number: int = 0,
        mode: Callable[[Iterable[Tensor]], AbstractContextManager[Any]] = lambda state: nullcontext(),
    ) -> T:
        """What `body` makes of the loss of a training step's batch, shape [], and of what there is after its pass.

        Args:
            named: the trainable parameters by name.
            buffers: buffers and frozen parameters by name; they may be overwritten.
            h: the tuned hyperparameters' values in force, 0-dim, by name.
            batch: the training batch.
            step: which one.
            body: takes the derivatives, while weights and regularisers are in place.
            number: which of the step's batches it is; with the step, it seeds what is drawn.
            mode: what to run it all in; made of the tensors that the step may overwrite.
        """
        self.seed_model(step, number)
        values = {**self.values.fixed_at(step), **h}

        def present() -> Buffers:
            return {name: self._scope.tensor(name) for name in buffers}  # modules assign buffers anew

        with self.replaying:
            batch = self.objective.transform(batch, values)
            target = self.problem.target(batch)
            of_model = {name: p for name, p in named.items() if self._scope.path(name) != f"losses.{name}"}
            factors = self.objective.weight_factors(of_model, values)
            used = {**named, **{name: named[name] * factor for name, factor in factors.items()}}

            def at_loss() -> T:
                hooks = gradient_hooks(used.values())
                with self.objective.acting(values) as activations, mode(buffers.values()):
                    prediction = Prediction(self.problem.predict(self.model, batch), activations)
                    loss = self.objective.loss(prediction, target, lambda: of_model, values)
                    _refuse_other_hooks(used, hooks)
                    return body(loss, Passed(present, partial(self._within_step, used, present(), values, mode)))

            return self.within({**buffers, **used}, at_loss, training=True)

    def _within_step(
        self,
        used: Mapping[str, Tensor],
        buffers: Buffers,
        values: Mapping[str, Any],
        mode: Callable[[Iterable[Tensor]], AbstractContextManager[Any]],
        body: Callable[[], T],
    ) -> T:
        """What `body()` gives where a pass of a training step, with these tensors and hyperparameters' values, has
        run."""

        def inside() -> T:
            with self.objective.acting(values), mode(buffers.values()):
                return body()

        with self.replaying:
            return self.within({**buffers, **used}, inside, training=True)

    def training(self, state: State, h: Mapping[str, Any], step: int, *, again: bool = False) -> Training:
        """The gradient of a step's training loss, the mean over its batches; `again`: the step will be taken again."""
        return mean_training(self.trainings(state, h, step, again=again))

    def trainings(self, state: State, h: Mapping[str, Any], step: int, *, again: bool = False) -> Iterator[Training]:
        """The gradients of a step's batches, one by one; each batch begins with the buffers that the one before
        leaves."""
        for number in range(self.problem.batches_in(step)):
            found = self._training_on(state, h, step, number, again=again)
            state = state._replace(buffers=found.buffers)
            yield found

    def _training_on(self, state: State, h: Mapping[str, Any], step: int, number: int, *, again: bool) -> Training:
        """The gradient of the training loss of one of a step's batches."""
        named = {name: p.detach().requires_grad_() for name, p in self.unflatten(state.params).items()}
        buffers = self.copies(state.buffers)

        def differentiate(loss: Tensor, passed: Passed) -> tuple[Any, ...]:
            return loss.detach(), self._gradients(loss, named), passed.buffers()

        with torch.enable_grad(), DataWrites(buffers.values()).noted() as writes:
            versions = versions_of(buffers)
            batch = self.batches.of_step(step, number, again=again)
            loss, found, after = self.at_training_loss(named, buffers, h, batch, step, differentiate, number=number)
        gradient, without = self.joined(named, found)
        traceless = {name for name, buffer in buffers.items() if writes.have_changed(buffer)}
        self._note_moving(traceless | changed(buffers, versions, after), state.buffers, after)
        self.knows_moving = True
        kept = {name: after[name].detach() if name in self.moving else buffer for name, buffer in state.buffers.items()}
        return Training(loss, gradient, without, kept)

    @property
    def stateful(self) -> list[Any]:
        """Objects of the program that a training step or an evaluation calls, and that may keep something."""
        return [*self._modules, self.problem.forward, self.problem.loss, self.problem.train_loss]

    def leaves(self, state: State) -> tuple[dict[str, Tensor], Buffers]:
        """The trainable parameters, and the buffers that are differentiated, by name, as leaves of a graph."""
        named = {name: p.detach().requires_grad_() for name, p in self.unflatten(state.params).items()}
        moved = {name: state.buffers[name].detach().requires_grad_() for name in self.differentiated(state.buffers)}
        return named, moved

    def copies(self, buffers: Buffers) -> Buffers:
        """Copies of buffers, which a pass through the model may overwrite; frozen parameters that it never has are not
        copied."""
        fixed = self._frozen - self.moving if self.knows_moving else set()
        return {name: buffer if name in fixed else buffer.clone() for name, buffer in buffers.items()}

    def note_changes(self, before: Buffers, after: Buffers) -> bool:
        """Add to the moving buffers those that differ and have derivatives; returns whether there were any.

        Args:
            before: some buffers, none of them known to move.
            after: all buffers after a step.
        """
        changed = {
            name for name, buffer in before.items() if has_derivatives(buffer) and not torch.equal(buffer, after[name])
        }
        self.moving |= changed
        return bool(changed)

    def _note_moving(self, changed: set[str], before: Buffers, after: Buffers) -> None:
        """Add to the moving buffers what a training step has changed.

        Raises:
            InputError: the step has overwritten what was taken for constant, and not copied.
        """
        for name in changed:
            if after[name] is before[name]:
                raise InputError(
                    f"the frozen parameter {name!r} stayed as it was in the first step, and was overwritten in a later "
                    "one: register it as a buffer"
                )
        self.moving |= changed

    def joined(self, named: Mapping[str, Tensor], gradients: Sequence[Tensor | None]) -> tuple[Tensor, frozenset[int]]:
        """Gradients of all parameters as one, of shape [P], and the positions of parameters that have none."""
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), gradients, strict=True)]
        without = frozenset(position for position, gradient in enumerate(gradients) if gradient is None)
        return self.flatten(dict(zip(named, filled, strict=True))), without

    def gradient_of(self, loss: Tensor, named: Mapping[str, Tensor]) -> tuple[Tensor, frozenset[int]]:
        """Gradient [P] of a loss by parameters, itself differentiable, and the positions of parameters that have
        none."""
        return self.joined(named, self._gradients(loss, named, create_graph=True))

    def _gradients(
        self, loss: Tensor, named: Mapping[str, Tensor], *, create_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        """Gradients of a training loss by every parameter, None for parameters that have none."""
        return torch.autograd.grad(loss, list(named.values()), create_graph=create_graph, allow_unused=True)

    def update(
        self,
        params: Tensor,
        gradient: Tensor,
        slots: Slots,
        h: Mapping[str, Any],
        step: int,
        blocks: Sequence[Block] | None = None,
        shapes: Sequence[torch.Size] | None = None,
    ) -> tuple[Tensor, Slots]:
        """The optimizer's update, gradient clipping and averaging included.

        Args:
            params: shape [P].
            gradient: shape [P].
            slots: the optimizer's state vectors, each of shape [P].
            h: the tuned hyperparameters' values in force.
            step: the inner step.
            blocks: which parameters step; None: all, for which this is step `step`.
            shapes: the parameters' shapes, where these are not those of the model.
        """
        return self.move(params, self.clipped(gradient), slots, h, step, blocks, shapes)

    def move(
        self,
        params: Tensor,
        gradient: Tensor,
        slots: Slots,
        h: Mapping[str, Any],
        step: int,
        blocks: Sequence[Block] | None = None,
        shapes: Sequence[torch.Size] | None = None,
        rule: Update | None = None,
    ) -> tuple[Tensor, Slots]:
        """`update` by a gradient that has been clipped; `rule` does what the optimizer's own update does."""
        rule = self.optimizer.update if rule is None else rule
        values = {**self.values.of_update, **self.values.fixed_at(step), **h}
        shapes = self._shapes if shapes is None else shapes
        sizes = [shape.numel() for shape in shapes]

        def of_block(params: Tensor, gradient: Tensor, slots: Slots, block: Block) -> tuple[Tensor, Slots]:
            own = self.groups.spread(values, sizes, block.members, params)
            return rule(params, gradient, slots, own, block.taken)

        own = slots[: len(self.optimizer.slots)]
        if blocks is None:
            blocks = [Block(step, tuple(range(len(shapes))))]
        if self.optimizer.by_parameter:
            params, own = update_each(of_block, blocks, shapes, params, gradient, own)
        else:
            params, own = update_blocks(of_block, blocks, sizes, params, gradient, own)
        averages = (values[EMA] * average + (1 - values[EMA]) * params for average in slots[len(own) :])
        return params, (*own, *averages)

    @property
    def clips(self) -> bool:
        """Whether the settings clip gradients."""
        return self.settings.clip_gradient is not None or self.settings.clip_norm is not None

    def clipped(self, gradient: Tensor) -> Tensor:
        """A gradient of shape [..., P] as the settings clip it."""
        limit, norm_limit = self.settings.clip_gradient, self.settings.clip_norm
        if limit is not None:
            return gradient.clamp(-limit, limit)
        if norm_limit is not None:
            norm = guarded_sqrt((gradient**2).sum(-1, keepdim=True))
            return gradient * (norm_limit / (norm + 1e-6)).clamp(max=1)
        return gradient

    def step(self, state: State, h: Mapping[str, Any], step: int) -> State:
        """The state after one plain training step."""
        return self.take_step(state, h, step)[0]

    def take_step(self, state: State, h: Mapping[str, Any], step: int, *, again: bool = False) -> tuple[State, Tensor]:
        """The state after one plain training step, and the step's training loss; `again`: the step will be taken
        again."""
        if self.captured is not None:
            return self.captured.take_step(self, state, h, step, again=again)
        return self.take_eager_step(state, h, step, again=again)

    def take_eager_step(
        self, state: State, h: Mapping[str, Any], step: int, *, again: bool = False
    ) -> tuple[State, Tensor]:
        """`take_step` without a replay."""
        training = self.training(state, h, step, again=again)
        return self.stepped(state, training, h, step), training.loss

    def stepped(self, state: State, training: Training, h: Mapping[str, Any], step: int) -> State:
        """The state after the step that a training gradient makes."""
        blocks = step_blocks(state.counts, training.without_gradient)
        with torch.no_grad():
            params, slots = self.update(state.params, training.gradient, state.slots, h, step, blocks)
        return State(params, slots, training.buffers, counted(state.counts, training.without_gradient))

    def run(self, hyperparameters: Hyperparameters) -> State:
        """A whole training run without any hypergradient."""
        state = self.initial_state()
        self.batches.expect(range(self.steps))
        for step in range(self.steps):
            state = self.step(state, self.scalars(hyperparameters, step), step)
        return state

    def evaluate(
        self, state: State, which: str = "val", *, gradient: bool = False, examples: int | None = None, draw: int = 0
    ) -> Evaluation:
        """Loss and metrics of a split, in evaluation mode; with `gradient`, the loss's by the judged weights as well.

        Args:
            which: "train", "val" or "test".
            examples: how many examples to take, drawn from (seed, `draw`), and these without metrics, which few
                examples may not have; None for the whole split.
        """
        sample, size = self.batches.sample(which, draw, examples), self.problem.eval_batch_size
        total = len(self.batches.split(which)) if sample is None else len(sample)
        ends = [(start, min(start + size, total)) for start in range(0, total, size)]
        batches = [slice(*pair) if sample is None else sample[slice(*pair)] for pair in ends]
        judged = state._replace(params=self.judged_weights(state))
        with self.replaying:
            return self._evaluator.evaluate(judged, which, batches, gradient=gradient, metrics=sample is None)

    def judged_weights(self, state: State) -> Tensor:
        """The weights of a state that evaluations judge, shape [P]: the trained ones, or their average."""
        return (state.params, *state.slots)[self.validated]

    def seed_evaluation(self) -> None:
        """Seed the global generators for what an evaluation draws."""
        seed_everything(fold_seed(self.settings.seed, VALIDATION))

    def unflatten(self, params: Tensor) -> dict[str, Tensor]:
        """The flat weights by parameter name: views, but for complex ones."""
        named = {}
        for name, chunk, shape in zip(self._names, params.split(self._sizes), self._shapes, strict=True):
            part = chunk.view(shape)
            named[name] = torch.view_as_complex(part.clone()) if name in self._complex else part
        return named

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Parameters by name as one vector of shape [P], which undoes `unflatten`; other names are left out."""
        parts = (as_real(params[name]) if name in self._complex else params[name] for name in self._names)
        return torch.cat([part.reshape(-1) for part in parts])

    def reported(self, buffers: Buffers) -> Buffers:
        """The buffers of a state that are reported: the model's own, and frozen parameters that training has
        changed."""
        return {name: buffer for name, buffer in buffers.items() if name not in self._frozen or name in self.moving}

    def differentiated(self, buffers: Buffers) -> list[str]:
        """Names of the buffers that are part of the differentiated state: floating ones that training changes."""
        return [name for name, buffer in buffers.items() if name in self.moving and has_derivatives(buffer)]


def mean_training(parts: Iterable[Training]) -> Training:
    """The mean of the losses and gradients of a step's batches, with the last batch's buffers."""
    several, count = iter(parts), 1
    mean = next(several)
    for part in several:
        count += 1
        mean = Training(
            mean.loss + part.loss,
            mean.gradient + part.gradient,
            mean.without_gradient & part.without_gradient,
            part.buffers,
        )
    return mean if count == 1 else mean._replace(loss=mean.loss / count, gradient=mean.gradient / count)


def _refuse_other_hooks(parameters: Mapping[str, Tensor], hooks: Sequence[int]) -> None:
    """Refuse a pass that has registered gradient hooks on parameters, which had so many before it: a loop's parameters
    keep them from step to step.

    Raises:
        InputError: it has.
    """
    for name, before, now in zip(parameters, hooks, gradient_hooks(parameters.values()), strict=True):
        if now != before:
            raise InputError(
                f"the forward pass registers a gradient hook on parameter {name!r}, which would stay there from step "
                "to step: register it on a tensor that forward makes, such as `weight.view_as(weight)`"
            )


def versions_of(buffers: Buffers) -> dict[str, int]:
    """Number of times that each buffer has been written to, by name."""
    return {name: buffer._version for name, buffer in buffers.items()}


def changed(before: Buffers, versions: Mapping[str, int], after: Buffers) -> set[str]:
    """Names of the buffers that a pass has written to, or put others in place of; `versions` are from before it."""
    return {name for name, buffer in before.items() if after[name] is not buffer or buffer._version != versions[name]}


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, as `torch.optim` takes it."""
    # no view: autograd would need the gradient's place in memory to be even
    return torch.stack([tensor.real, tensor.imag], -1) if tensor.is_complex() else tensor


def has_derivatives(tensor: Tensor) -> bool:
    """Whether a tensor is of a type that derivatives are taken of."""
    return tensor.is_floating_point() or tensor.is_complex()


def _loss_modules(problem: Problem, model: nn.Module) -> dict[str, nn.Module]:
    """Losses that are modules, by the problem's name for them, each once.

    Raises:
        InputError: a part of the model has such a name.
    """
    losses: dict[str, nn.Module] = {}
    for name in ("loss", "train_loss"):
        loss = getattr(problem, name)
        if isinstance(loss, nn.Module) and not any(loss is known for known in losses.values()):
            losses[name] = loss
        elif isinstance(getattr(loss, "__self__", None), nn.Module) and list(loss.__self__.parameters()):
            raise InputError(
                f"{name} is a method of a module that has parameters, which would not be trained: give the module"
            )
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        if name.split(".", 1)[0] in losses:
            raise InputError(f"the model has {name!r}, which is how the parameters of the loss are called: rename it")
    return losses


def _running_statistics(model: nn.Module) -> set[str]:
    """Names of the running statistics that a model in training mode moves."""
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm | _InstanceNorm) and module.track_running_stats and module.training:
            found |= {f"{path}.{name}".lstrip(".") for name in ("running_mean", "running_var")}
    return found
