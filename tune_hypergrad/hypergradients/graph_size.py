"""How much memory the graph of a training step takes: tried out on the first step, once per problem."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.memory import allocated
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.hypergradients.step_graph import step_graph
from tune_hypergrad.hypergradients.verification import recall


class GraphSize(NamedTuple):
    """What is known of a training step's graph."""

    size: float
    """Bytes that it takes beside the state that it begins at; infinite where there is none."""
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
    found = recall(loop, hyperparameters, "graph", lambda: _measured(loop, dict(hyperparameters)))
    if isfinite(found.size):
        loop.moving |= found.moving
        loop.knows_moving = True
    runs = len(loop.seeds) if isinstance(loop, EnsembleLoop) else 1
    return found._replace(size=runs * found.size)


def _measured(loop: InnerLoop, hyperparameters: Hyperparameters) -> GraphSize:
    # of a loop of its own, whose model may be left with what it keeps between calls
    own = InnerLoop(loop.source.independent(), loop.settings)
    values = {name: own.values.placed(name, v) for name, v in hyperparameters.items()}
    with own.running():
        state, h = own.initial_state(), own.scalars(values, 0)
        leaves = {name: value.detach().requires_grad_() for name, value in h.items()}
        try:
            plain = own.training(state, h, 0)
            with _without_collections():
                before = allocated(own.device)
                graph = step_graph(own, state, leaves, 0)
                after = allocated(own.device)
            training = graph.training
        except Exception:  # what fails, a trial of the mode tells
            return GraphSize(inf, True)
    same = torch.equal(plain.loss, training.loss) and torch.equal(plain.gradient, training.gradient)
    size = inf if before is None or after is None else float(max(after - before, training.gradient.nbytes))
    return GraphSize(size, same or own.device.type != "cpu", frozenset(own.moving))


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
