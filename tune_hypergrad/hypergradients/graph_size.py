"""How much memory the graph of a training step takes, and whether it can be kept: tried out once per problem.

A graph has all tensors that going back takes, unless the model leaves computations to backward passes, as activation
checkpointing does. These see the model as it then is. Parameters and buffers are brought back for them; attributes that
a pass sets, such as one mask for all layers, would be those of a later pass. So a graph is kept while another step and
an evaluation are run, and has to give what one that was not kept gives.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tune_hypergrad.hypergradients.attributes import OF_EVERY_MODULE
from tune_hypergrad.hypergradients.conversions import StepMode
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.findings import recall
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, Training, TrainingSettings
from tune_hypergrad.hypergradients.lasting import LastingMode
from tune_hypergrad.hypergradients.memory import allocated
from tune_hypergrad.hypergradients.state import Hyperparameters, State
from tune_hypergrad.hypergradients.step_graph import (
    Pulled,
    StepGraph,
    adjoint_step,
    differentiable,
    pull_back,
    step_graph,
)
from tune_hypergrad.problem import Problem

_MOVED = 0.01
"""How far the weights of the other step are from the initial ones."""


class GraphSize(NamedTuple):
    """What is known of a training step's graph."""

    size: float
    """Bytes that it takes beside the state that it begins at; infinite where none can be kept."""
    same: bool
    """Whether the training gradient is that of a step without a graph, to the bit; on a GPU, where no two are, yes."""
    moving: frozenset[str] = frozenset()
    """Names of the buffers that a step changes."""


def graph_size(loop: InnerLoop, hyperparameters: Mapping[str, Tensor]) -> GraphSize:
    """That of an inner loop's steps; of an ensemble, of all runs' together. The loop then knows what moves.

    Args:
        loop: whose.
        hyperparameters: what is tuned, values by name.
    """
    found = recall(loop, hyperparameters, "graph", lambda: try_graph(loop.source, loop.settings, dict(hyperparameters)))
    if isfinite(found.size):
        loop.moving |= found.moving
        loop.knows_moving = True
    runs = len(loop.seeds) if isinstance(loop, EnsembleLoop) else 1
    return found._replace(size=runs * found.size)


def try_graph(
    problem: Problem,
    settings: TrainingSettings,
    hyperparameters: Hyperparameters,
    within: AbstractContextManager[Any] | None = None,
) -> GraphSize:
    """That of one run of a problem, found out anew; `within` is what to run the steps in."""
    # a loop of its own, whose model may be left with what it keeps between calls
    own = InnerLoop(problem.independent(), replace(settings, steps=max(2, settings.steps)))
    values = {name: own.values.placed(name, v) for name, v in hyperparameters.items()}
    with own.running(), within or nullcontext():
        try:
            return _Trial(own, values).outcome()
        except Exception:  # what fails, a trial of the mode tells
            return GraphSize(inf, True)


class _Trial:
    """The first step and its graph, which is kept while another step is taken."""

    def __init__(self, loop: InnerLoop, values: Hyperparameters) -> None:
        self._loop, self._values, self._deferred = loop, values, _Deferred()
        self._generator = torch.Generator().manual_seed(0)

    def outcome(self) -> GraphSize:
        loop, state = self._loop, self._loop.initial_state()
        plain = loop.training(state, self._leaves(0), 0)
        moving = frozenset(loop.moving)
        graph, first = self._measured(state, 0, mode=self._mode)
        training, held = graph.training, _attributes(loop.modules)
        others, second = self._at_other_weights(state)
        # gradients that are 0 at the initial weights, behind a last layer of zeros, are the same either way
        same = _is_same(plain, training) and _is_same(*others)
        same = same or loop.device.type != "cpu"
        if first is None or second is None:
            return GraphSize(inf, same, moving)
        cotangents = [self._drawn(tensor) for tensor in (state.params, *state.slots)]
        of_buffers = {name: self._drawn(buffer) for name, buffer in graph.batches[-1].moved.items()}
        with self._deferred.noted():
            kept = pull_back(loop, graph, 0, tuple(cotangents), of_buffers)
        if self._deferred.seen and not _are_same(held, _attributes(loop.modules)):
            return GraphSize(inf, same, moving)
        anew = adjoint_step(loop, state, self._leaves(0), 0, tuple(cotangents), of_buffers)
        size = float(max(min(first, second), training.gradient.nbytes))  # the first has what is made once for all
        return GraphSize(size if _agree(kept, anew, loop.device) else inf, same, moving)

    def _measured(self, state: State, step: int, mode: StepMode | None = None) -> tuple[StepGraph, int | None]:
        """A step's graph, and bytes that it takes, where somebody says."""
        with _without_collections():
            before = allocated(self._loop.device)
            graph = step_graph(self._loop, state, self._leaves(step), step, mode=mode)
            after = allocated(self._loop.device)
        return graph, None if before is None or after is None else after - before

    def _at_other_weights(self, state: State) -> tuple[tuple[Training, Training], int | None]:
        """Another training step, from other weights, without a graph and with one, and the bytes of that; and an
        evaluation."""
        loop = self._loop
        moved = state._replace(params=state.params + _MOVED * self._drawn(state.params))
        plain = loop.training(moved, self._leaves(1), 1)
        graph, size = self._measured(moved, 1)
        loop.evaluate(moved, gradient=True, examples=loop.problem.eval_batch_size)
        return (plain, graph.training), size

    def _leaves(self, step: int) -> dict[str, Tensor]:
        of_step = self._loop.scalars(self._values, step)
        return {name: value.detach().requires_grad_() for name, value in of_step.items()}

    def _drawn(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=like.dtype, generator=self._generator).to(like.device)

    @contextmanager
    def _mode(self, state: Iterable[Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._deferred)
            stack.enter_context(differentiable(state))
            yield


class _Deferred(LastingMode):
    """Tells whether backward passes run more than what was recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = self._notes = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """For the body, note it."""
        self._notes = True
        try:
            yield
        finally:
            self._notes = False

    def handle(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._notes and torch._C._current_graph_task_id() >= 0:
            self.seen = True
        return function(*args, **kwargs)


def _is_same(plain: Training, training: Training) -> bool:
    return torch.equal(plain.loss, training.loss) and torch.equal(plain.gradient, training.gradient)


def _attributes(modules: Iterable[nn.Module]) -> dict[tuple[int, str], list[tuple[Any, int]]]:
    """What modules hold besides parameters, buffers and modules, with how often tensors have been written to."""
    return {
        (number, name): [(leaf, leaf._version if isinstance(leaf, Tensor) else 0) for leaf in tree_leaves(value)]
        for number, module in enumerate(modules)
        for name, value in vars(module).items()
        if name not in OF_EVERY_MODULE
    }


def _are_same(
    held: dict[tuple[int, str], list[tuple[Any, int]]], now: dict[tuple[int, str], list[tuple[Any, int]]]
) -> bool:
    """Whether these are the same objects, in no other state as far as can be seen."""
    return held.keys() == now.keys() and all(
        len(leaves) == len(now[key])
        and all(a is b and version == other for (a, version), (b, other) in zip(leaves, now[key], strict=True))
        for key, leaves in held.items()
    )


def _agree(kept: Pulled, anew: Pulled, device: torch.device) -> bool:
    """Whether two ways back over a step are the same to rounding; what is not finite is not."""

    def agree(value: Tensor, other: Tensor) -> bool:
        tolerance = 1e3 * torch.finfo(other.dtype).eps if device.type == "cpu" else 1e-3
        return torch.allclose(value, other, rtol=0.0, atol=tolerance * float(other.abs().max()))

    pairs = [
        (kept.loss, anew.loss),
        *zip(kept.adjoint, anew.adjoint, strict=True),
        *((value, anew.buffer_adjoint[name]) for name, value in kept.buffer_adjoint.items()),
        *((value, anew.by_hyperparameters[name]) for name, value in kept.by_hyperparameters.items()),
    ]
    return all(agree(value, other) for value, other in pairs if other.numel())


@contextmanager
def _without_collections() -> Iterator[None]:
    """For the body, no garbage is collected, whose memory would be taken for its own."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
