"""The inner loops of several seeds as one: all take their steps at once, under `torch.func.vmap`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from tune_hypergrad.batches import Batch
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.evaluation import Evaluation
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, Passed, TrainingSettings, as_real
from tune_hypergrad.hypergradients.loop_batches import MODEL_STREAM, LoopBatches
from tune_hypergrad.hypergradients.loop_costs import LoopCosts
from tune_hypergrad.hypergradients.member_draws import MemberDraws
from tune_hypergrad.hypergradients.normalisation import batch_norm, instance_norm
from tune_hypergrad.hypergradients.optimizers import Slots, is_built_in
from tune_hypergrad.hypergradients.partial_update import Block
from tune_hypergrad.hypergradients.state import Buffers, State
from tune_hypergrad.hypergradients.stop_gradient import DifferentiableStops, may_have_history
from tune_hypergrad.hypergradients.substitution import Substitutes
from tune_hypergrad.problem import Problem
from tune_hypergrad.randomness import fold_seed, seed_everything
from tune_hypergrad.reading import Task

T = TypeVar("T")

LOSS_SPREAD = "loss_std"
"""How the members' standard deviation of the loss is called among an evaluation's metrics."""
_COMMON_SEED = 0
_FIRST_DRAWS = random.Random(_COMMON_SEED).random(), np.random.RandomState(_COMMON_SEED).random_sample()
"""What Python's and NumPy's generators give first after that seed."""


class EnsembleBatches(LoopBatches):
    """The batches of several runs, which all read the same data.

    Args:
        problem: whose data they are.
        steps: inner steps of every run, T.
        seed: of what is evaluated in common.
        members: the runs' own batches.
    """

    def __init__(self, problem: Problem, steps: int, seed: int, members: Sequence[LoopBatches]) -> None:
        super().__init__(problem, steps, seed, members[0].device, members[0].dtype, data=members[0])
        self._members = members

    def of_step(self, step: int, number: int = 0, *, again: bool = False) -> Batch:
        """The runs' training batches `number` of `step`: leaves of shape [S, b, ...]."""
        split = self.split("train")
        if split.tensors is None:
            found = self._training_data.get(self.draw(step, number), again=again)
            batches = [self.cast(batch) for batch in found]
            return tree_map(lambda *leaves: torch.stack(leaves), *batches)
        chosen = [member.indices(step, number) for member in self._members]
        if isinstance(chosen[0], slice):
            return tree_map(lambda tensor: tensor.expand(len(chosen), *tensor.shape), split.tensors)
        return split.batch(torch.stack(chosen))  # type: ignore[arg-type]

    def tasks(self, draw: int) -> Sequence[Task]:
        return [task for member in self._members for task in member.tasks(draw)]


class EnsembleLoop(InnerLoop):
    """One problem, one optimizer and S seeds, whose runs take every step at once.

    A state holds all of them: weights and slots have shape [S, P], buffers [S, ...], and hyperparameters in force [S],
    so that each run has derivatives of its own. Every run is the one that an `InnerLoop` of its seed has, to rounding:
    it has the same initial weights, order of examples, augmentation and dropout.

    Args:
        problem: what is trained.
        settings: of every run; its seed is not used.
        seeds: of the runs, all different.

    Raises:
        InputError: as `InnerLoop`, or there are fewer than two seeds, or two are the same.
    """

    def __init__(self, problem: Problem, settings: TrainingSettings, seeds: Sequence[int]) -> None:
        check_seeds(seeds)
        super().__init__(problem, replace(settings, seed=seeds[0]))
        self.seeds = tuple(seeds)
        self.members = tuple(InnerLoop(problem, replace(settings, seed=seed), data=self.batches) for seed in seeds)
        """The runs' own inner loops."""
        for member in self.members:
            member.moving = self.moving  # one set, to which either adds
        own = [member.batches for member in self.members]
        self.batches = EnsembleBatches(self.problem, settings.steps, seeds[0], own)
        self.costs = LoopCosts(self.batches, len(seeds))
        self._draws = MemberDraws(len(seeds), self.device)
        self._index = torch.arange(len(seeds), device=self.device)

    @contextmanager
    def running(self, *, plain: bool = False) -> Iterator[None]:
        """As for one run; the members' own methods may be called as well."""
        with super().running(plain=plain):
            before = [member.replaying for member in self.members]
            for member in self.members:
                member.replaying = self.replaying
            try:
                yield
            finally:
                for member, own in zip(self.members, before, strict=True):
                    member.replaying = own

    def of_member(self, state: State, member: int) -> State:
        """The state of one run."""
        buffers = {name: buffer[member] for name, buffer in state.buffers.items()}
        return State(state.params[member], tuple(slot[member] for slot in state.slots), buffers, state.counts)

    def initial_state(self) -> State:
        return self.together([member.initial_state() for member in self.members])

    def together(self, states: Sequence[State]) -> State:
        """States of the runs, in their order and after as many steps each, as one."""
        return State(
            torch.stack([state.params for state in states]),
            tuple(torch.stack(slots) for slots in zip(*(state.slots for state in states), strict=True)),
            {name: torch.stack([state.buffers[name] for state in states]) for name in states[0].buffers},
            states[0].counts,
        )

    def scalars(self, hyperparameters: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The tuned hyperparameters' values in force at `step`, each of shape [S]."""
        common = super().scalars(hyperparameters, step)
        return {name: value.repeat(len(self.seeds)) for name, value in common.items()}

    def seed_model(self, step: int, number: int = 0) -> None:
        """Seed the generators of every run for what batch `number` of a training step draws."""
        self._draws.seed([fold_seed(seed, MODEL_STREAM, self.batches.draw(step, number)) for seed in self.seeds])
        seed_everything(_COMMON_SEED)

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
        """What `body` makes of a training step's losses, shape [S], and of what there is after its pass.

        Args:
            named: the trainable parameters by name, [S, ...].
            buffers: buffers and frozen parameters by name, [S, ...]; they may be overwritten.
            h: the tuned hyperparameters' values in force, each of shape [S].
            batch: the training batches, of leaves [S, b, ...].
            step: which one.
            body: takes the derivatives; weights and regularisers are no longer in place.
            number: which of the step's batches they are; with the step, it seeds what is drawn.
            mode: what to run the losses in; made of the tensors that the step may overwrite.

        Raises:
            RuntimeError: the step does something that cannot be done for all runs at once.
        """

        def of_member(index: Tensor, named: Any, buffers: Any, h: Any, batch: Any) -> Any:
            with self._draws.under(index):
                return InnerLoop.at_training_loss(
                    self, named, buffers, h, batch, step, _loss_and_buffers, number=number, mode=mode
                )

        # autograd records what vmap makes of it, so that backward passes are as cheap as those of one large model
        losses, after = vmap(of_member, randomness="error")(self._index, dict(named), dict(buffers), dict(h), batch)
        _refuse_common_draws()
        present = {name: buffers[name] if _is_same(after[name], buffers[name]) else after[name] for name in buffers}
        return body(losses, Passed(lambda: present, lambda body: body()))

    def _gradients(
        self, loss: Tensor, named: Mapping[str, Tensor], *, create_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        # no run's loss depends on another's weights
        return super()._gradients(loss.sum(), named, create_graph=create_graph)

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
        """The optimizer's update of every run: `params`, `gradient` and the slots have shape [S, P], `h` [S]."""
        whole = blocks is None or (len(blocks) == 1 and len(blocks[0].members) == len(self._sizes))
        if whole and is_built_in(self.optimizer) and not self.optimizer.by_parameter:  # these are made elementwise
            columns = {name: value[:, None] for name, value in h.items()}
            return super().update(params, gradient, slots, columns, step, blocks, shapes)

        def of_member(params: Tensor, gradient: Tensor, slots: Slots, h: dict[str, Any]) -> tuple[Tensor, Slots]:
            return InnerLoop.update(self, params, gradient, slots, h, step, blocks, shapes)

        return vmap(of_member)(params, gradient, slots, dict(h))

    def evaluate(
        self, state: State, which: str = "val", *, gradient: bool = False, examples: int | None = None, draw: int = 0
    ) -> Evaluation:
        """The runs' mean figures, with the spread of their losses as `loss_std`; gradients by run, [S, ...]."""
        return mean_of(self.evaluate_members(state, which, gradient=gradient, examples=examples, draw=draw))

    def evaluate_members(
        self, state: State, which: str = "val", *, gradient: bool = False, examples: int | None = None, draw: int = 0
    ) -> list[Evaluation]:
        """What every run's own inner loop finds, one after another."""
        return [
            member.evaluate(self.of_member(state, number), which, gradient=gradient, examples=examples, draw=draw)
            for number, member in enumerate(self.members)
        ]

    def unflatten(self, params: Tensor) -> dict[str, Tensor]:
        """The flat weights [S, P] by parameter name, each [S, ...]: views, but for complex ones."""
        named = {}
        for name, chunk, shape in zip(self._names, params.split(self._sizes, 1), self._shapes, strict=True):
            part = chunk.view(len(params), *shape)
            named[name] = torch.view_as_complex(part.clone()) if name in self._complex else part
        return named

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Undo `unflatten`: shape [S, P]; other names are left out."""
        parts = [as_real(params[name]) for name in self._names]
        return torch.cat([part.reshape(len(part), -1) for part in parts], 1)


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse what are not several different seeds.

    Raises:
        InputError: they are not.
    """
    if any(isinstance(seed, bool) or not isinstance(seed, Integral) for seed in seeds):
        raise InputError(f"the seeds are {list(seeds)!r}: they must be whole numbers")
    if len(seeds) < 2:
        raise InputError(f"an ensemble has at least 2 seeds, not {len(seeds)}: give more, or one seed as a number")
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if list(seeds).count(seed) > 1)
        raise InputError(f"seed {twice} is in the ensemble more than once, which only repeats its run: give others")


def mean_of(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Mean figures of several runs, the standard deviation of their losses as `loss_std`, and their gradients."""
    # by torch, which takes infinite losses without a word
    losses = torch.tensor([evaluation.loss for evaluation in evaluations], dtype=torch.float64)
    figures = torch.tensor([list(evaluation.metrics.values()) for evaluation in evaluations], dtype=torch.float64)
    metrics = dict(zip(evaluations[0].metrics, figures.mean(0).tolist(), strict=True))
    metrics[LOSS_SPREAD] = float(losses.std())
    gradients = [evaluation.gradient for evaluation in evaluations]
    of_buffers = [evaluation.buffer_gradients for evaluation in evaluations]
    return Evaluation(
        float(losses.mean()),
        metrics,
        None if gradients[0] is None else torch.stack(gradients),  # type: ignore[arg-type]
        None
        if of_buffers[0] is None
        else {name: torch.stack([own[name] for own in of_buffers if own is not None]) for name in of_buffers[0]},
    )


# torch's convolutions have rules for vmap, those that take their place in the adjoint of a single run have not
_SUBSTITUTES: Substitutes = {F.batch_norm: batch_norm, F.instance_norm: instance_norm}


def members_differentiable(state: Iterable[Tensor]) -> DifferentiableStops:
    """What a training step of all runs is in whose gradients are differentiated; `state` is what it may overwrite."""
    return DifferentiableStops(state, _SUBSTITUTES, may_have_history)  # under `vmap`


def _loss_and_buffers(loss: Tensor, passed: Passed) -> tuple[Tensor, Buffers]:
    return loss, passed.buffers()


def _is_same(after: Tensor, before: Tensor) -> bool:
    """Whether what comes out of `vmap` is what went in, overwritten or not."""
    return after.data_ptr() == before.data_ptr() and after.stride() == before.stride() and after.dtype == before.dtype


def _refuse_common_draws() -> None:
    """Refuse a step that has drawn from Python's or NumPy's generators, which are one for all runs."""
    if (random.random(), np.random.random()) != _FIRST_DRAWS:
        raise RuntimeError("a training step draws from Python's or NumPy's generators")
