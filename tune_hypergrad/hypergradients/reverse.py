"""Reverse mode: train once, then carry the adjoint of the state back through every step.

A step is gone back through by the graph of its training gradient. The graphs of the last steps are kept from the way
there as far as memory goes; all others are made anew, from states that were kept (`keeping` says which). Where steps
are replayed (`captured_steps`), all are made anew. Either way it is the same step, and the cost does not depend on how
many hyperparameters there are. The numbers of a curve get the
steps' own derivatives by the curve's Jacobian, transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, isqrt, nan
from typing import Any

import torch
from torch import Tensor

from tune_hypergrad.curves import base_names, split_name, window_at
from tune_hypergrad.hypergradients.conversions import StepMode
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, Training
from tune_hypergrad.hypergradients.keeping import Room, Stretch, plan_stretch
from tune_hypergrad.hypergradients.kept_states import KeptStates
from tune_hypergrad.hypergradients.memory import allocated
from tune_hypergrad.hypergradients.replays import refuse_another_step
from tune_hypergrad.hypergradients.run import HypergradientRun
from tune_hypergrad.hypergradients.state import Buffers, Hyperparameters, State, on_device, state_on
from tune_hypergrad.hypergradients.step_graph import (
    Pulled,
    StepGraph,
    adjoint_step,
    differentiable,
    pull_back,
    step_graph,
    take_with_graph,
)

_MISCOUNTED = 1 << 12
"""Bytes by which two counts of what one graph takes may differ: of blocks that an allocator has used before."""
_MOST_BETWEEN, _SHARES = 16, 32
"""Steps of which one graph is measured, at the most, and in how many parts at the least the memory for graphs is filled
between two measurements: glibc takes a tenth of a millisecond to say what it has given."""
_LITTLE = 0.02
"""What the graph of an update may take to be kept, as a part of what the graph of its gradient is planned with."""
_COMPARED_TOGETHER = 64
"""Steps between two comparisons on a device that has to be waited for."""


def checkpoint_interval(steps: int) -> int:
    """Steps between kept states where not all are kept: the square root of the number of steps, rounded up."""
    return isqrt(steps - 1) + 1


def states_only(steps: int, *, all_of_them: bool) -> Room:
    """Room for every state of a run, or for about twice the root of their number, and for no graphs."""
    return Room(steps if all_of_them else 2 * checkpoint_interval(steps), 1)


class ReverseRun(HypergradientRun):
    """A hypergradient by reverse mode: T units of training, then T units of going back.

    Args:
        keep_all: without `room`, keep every state (O(T) memory), or about 2 sqrt(T) of them at up to one more gradient
            a step.
        room: memory for states and graphs.
        by_graph: train every step by way of its graph, whose gradient differs from that without one by rounding, which
            in the course of some steps may make another run.
    """

    def __init__(
        self,
        loop: InnerLoop,
        hyperparameters: Hyperparameters,
        *,
        horizon: int | None = None,
        val_examples: int | None = None,
        reject_above: float = inf,
        keep_all: bool = True,
        room: Room | None = None,
        by_graph: bool = False,
    ) -> None:
        super().__init__(loop, hyperparameters, horizon=horizon, val_examples=val_examples, reject_above=reject_above)
        self.differentiation = "reverse" if keep_all else "checkpointed_reverse"
        self._room = states_only(loop.steps, all_of_them=keep_all) if room is None else room
        self._by_graph = by_graph
        self._whole = self._without_last(plan_stretch(loop.steps, self._room), loop.steps)
        self._kept = KeptStates(self._room.states_offloaded)
        self._graphs: dict[int, StepGraph] = {}
        self._sizes: dict[int, float] = {}  # of these graphs, by step
        self._held = 0.0  # bytes of all of them
        self._size = self._room.graph  # of the last one that was measured
        self._between = max(1, min(_MOST_BETWEEN, self._room.graphs(0) // _SHARES))  # steps of which one is measured
        self._keeps_updates: bool | None = None  # with them; None: not known yet
        self._again: set[int] = set()  # steps whose graphs were made on the way back
        self._losses: list[Tensor] = []  # of the steps on the way there
        self._trained_on = loop.device.type  # on which these were taken
        self._replayed: list[tuple[int, Tensor, Tensor]] = []  # steps with their losses then and now
        self._mode: StepMode = differentiable
        self.by_step: dict[str, Tensor] = {
            name: torch.zeros(loop.steps, device=loop.device, dtype=loop.dtype)
            for name in base_names(self.hyperparameters)
        }
        """By hyperparameter, each step's own derivative, shape [T]: by the value that the step was taken with. Those of
        steps that the run has not gone back through are 0; a window's hypergradient is the sum over its steps."""
        self._adjoint: tuple[Tensor, ...] = ()
        self._buffer_adjoint: Buffers = {}

    @property
    def length(self) -> int:
        return 2 * self.loop.steps

    def _advance_one(self) -> None:
        steps = self.loop.steps
        if self.position < steps:
            self._train_one(self.position)
        else:
            self._go_back_one(2 * steps - 1 - self.position)

    def _train_one(self, step: int) -> None:
        self.cost += self.loop.costs.step(step)
        if self.reject_above > -inf:
            self.state, loss = self._train(self.state, step, self._whole, step)
        else:
            self.state, loss = self.loop.take_step(self.state, self.loop.scalars(self.hyperparameters, step), step)
        self._losses.append(loss)

    def _train(self, state: State, step: int, stretch: Stretch, number: int) -> tuple[State, Tensor]:
        """Take a step that is the number-th of a stretch, and keep of it what there is to keep."""
        loop, keeps_graph = self.loop, number >= stretch.graphs_from and not self._goes_back_anew(step)
        if number == 0 or number in stretch.states:
            self._kept[step] = state
        h = self._leaves(step)
        if (keeps_graph or (self._by_graph and loop.captured is None)) and loop.knows_moving:
            is_measured = keeps_graph and step % self._between == 0
            before = allocated(loop.device) if is_measured else None
            graph = step_graph(loop, state, h, step, again=not keeps_graph, mode=self._mode)
            if is_measured:
                taken = (allocated(loop.device) or 0) - (before or 0)
                self._size = max(self._room.graph, taken - _MISCOUNTED + self._room.state)
            if graph.changed <= loop.moving:
                training = graph.training
                if not keeps_graph:
                    return loop.stepped(state, training, h, step), training.loss
                after, graph = self._take(graph, training, step)
                self._keep(step, graph)
                return after, training.loss
            # what has begun to change has to be known before there is a graph of it
        if number >= stretch.graphs_from:
            self._kept[step] = state
        return loop.take_step(state, {name: value.detach() for name, value in h.items()}, step, again=True)

    def _take(self, graph: StepGraph, training: Training, step: int) -> tuple[State, StepGraph]:
        """The state after the step of a graph that is kept, and the graph, with that of the update where it takes next
        to no memory: then it is not made again on the way back."""
        loop = self.loop
        if self._keeps_updates is False or len(graph.batches) > 1:  # whose mean gradient would be kept with it
            return loop.stepped(graph.state, training, graph.h, step), graph
        before = allocated(loop.device) if self._keeps_updates is None else None
        after, whole = take_with_graph(loop, graph, training, step)
        if self._keeps_updates is None:
            taken = (
                (allocated(loop.device) or 0)
                - (before or 0)
                - sum(each.nbytes for each in (after.params, *after.slots))
            )
            self._keeps_updates = before is not None and taken <= _LITTLE * self._room.graph
        return after, whole if self._keeps_updates else graph

    def _without_last(self, stretch: Stretch, steps: int) -> Stretch:
        """A stretch of so many steps after which something else is run before they are gone back through. Where no
        graph is kept, a pass through the model may spoil the last one's: its state is kept instead."""
        return stretch if isfinite(self._room.graph) else stretch._replace(graphs_from=steps)

    def _keep(self, step: int, graph: StepGraph) -> None:
        """Keep a graph; where graphs are larger than was planned with, the states of some steps before in place of
        theirs."""
        room = self._room
        self._graphs[step], self._sizes[step] = graph, self._size
        self._held += self._size
        states = self._kept.in_memory(step) * room.state
        while len(self._graphs) > 1 and states + self._held > room.memory:
            first = min(self._graphs)
            self._kept[first] = self._take_out(first).state
            states += room.state
            if first in self._again:  # it would have been charged with the way back
                self._again.remove(first)
                self.cost += self.loop.costs.step(first)

    def _take_out(self, step: int) -> StepGraph:
        """A graph that is kept no longer."""
        self._held -= self._sizes.pop(step)
        return self._graphs.pop(step)

    def _is_lean(self, step: int) -> bool:
        """Whether only one of the step's batches has room for its graph at a time."""
        return self.loop.problem.batches_in(step) > 1 and self._room.lean

    def _goes_back_anew(self, step: int) -> bool:
        """Whether a step is gone back through by a graph that is made for it, however much memory there is."""
        return self.loop.captured is not None or self._is_lean(step)

    def _leaves(self, step: int) -> dict[str, Tensor]:
        of_step = self.loop.scalars(self.hyperparameters, step)
        return {name: value.detach().requires_grad_() for name, value in of_step.items()}

    def assess(self) -> None:
        """Find the final validation loss of a run that has trained, with what it goes back from."""
        loop = self.loop
        if self.final is not None:
            return
        if self.reject_above > -inf:
            self._begin_segment(loop.steps)
        else:
            self.final = self._evaluate_whole(self.state)
            self.cost += loop.costs.evaluation("val")

    def _begin_segment(self, end: int) -> None:
        """Take the adjoint of the validation loss at the end of a segment."""
        evaluation = self._segment_gradient(self._state_before(end), end)
        assert evaluation.gradient is not None and evaluation.buffer_gradients is not None
        gradient = evaluation.gradient
        self._adjoint = tuple(
            gradient if position == self.loop.validated else torch.zeros_like(gradient)
            for position in range(1 + len(self.loop.slots))
        )
        self._buffer_adjoint = evaluation.buffer_gradients

    def _go_back_one(self, step: int) -> None:
        """Carry the adjoint from after `step` to before it."""
        loop, end = self.loop, step + 1
        if end == loop.steps:
            self.assess()
            if self.rejected:
                self._give_up()
                return
        elif end % self.horizon == 0:
            self._begin_segment(end)
        self._kept.discard(end)
        pulled = self._pull_back(step)
        if loop.device.type == "cpu" or len(self._replayed) >= _COMPARED_TOGETHER or step == 0:
            self._refuse_another_run()
        self._adjoint, self._buffer_adjoint = pulled.adjoint, pulled.buffer_adjoint
        self._add(step, pulled.by_hyperparameters)

    def _pull_back(self, step: int) -> Pulled:
        """Go back through a step, by its graph if it was kept."""
        lean = self._is_lean(step)
        if not self._goes_back_anew(step) and step not in self._graphs:
            self._train_again(step + 1)
        kept = step in self._graphs and step not in self._again
        self.cost += self.loop.costs.adjoint_step(kept=kept, lean=lean)
        graph = self._take_out(step) if step in self._graphs else None
        self._again.discard(step)
        if graph is not None:
            state, pulled = graph.state, pull_back(self.loop, graph, step, self._adjoint, self._buffer_adjoint)
        else:
            state = self._kept[step] if step in self._kept else self._train_again(step + 1, short=True)
            pulled = self._pull_back_anew(state, step)
            self._replayed.append((step, self._losses[step], pulled.loss))
        if step % self.horizon == 0:  # the next segment's end
            self._kept[step] = state
        return pulled

    def _pull_back_anew(self, state: State, step: int) -> Pulled:
        """Go back through a step from the state before it."""
        loop, h = self.loop, self._leaves(step)
        if loop.captured is not None:
            return loop.captured.adjoint_step(loop, state, h, step, self._adjoint, self._buffer_adjoint)
        return adjoint_step(loop, state, h, step, self._adjoint, self._buffer_adjoint, mode=self._mode)

    def _add(self, step: int, by_hyperparameters: dict[str, Tensor]) -> None:
        """Add what a step gives the hyperparameters."""
        self._add_to(self.hypergradients, step, by_hyperparameters)

    def _add_to(self, hypergradients: Hyperparameters, step: int, by_hyperparameters: dict[str, Tensor]) -> None:
        """Note a step's own derivatives, each of shape [...], and add them up into hypergradients of shape [..., N]."""
        for name, value in by_hyperparameters.items():
            self.by_step[name][..., step] = value
            if name in hypergradients:
                windows = hypergradients[name]
                windows[..., window_at(step, self.loop.steps, windows.shape[-1])] += value
        if step == 0:
            for name, jacobian in self._jacobians().items():
                each = self.by_step[split_name(name)[0]]
                hypergradients[name] = each @ jacobian.to(each)

    def _forget_hypergradients(self) -> None:
        super()._forget_hypergradients()
        self.by_step = {name: torch.full_like(v, nan) for name, v in self.by_step.items()}

    def _refuse_another_run(self) -> None:
        replayed, self._replayed = self._replayed, []
        if not replayed:
            return
        steps, first, again = zip(*replayed, strict=True)
        elsewhere = self._trained_on != self.loop.device.type
        refuse_another_step(steps, torch.stack(first), torch.stack(again), elsewhere=elsewhere)

    def _give_up(self) -> None:
        """Do not go back through the run, which diverged or is rejected."""
        self.let_go()
        self._forget_hypergradients()
        self.position = self.length - 1

    def reject(self) -> None:
        super().reject()
        self._kept.clear()

    def let_go(self) -> None:
        super().let_go()
        self._kept.clear()
        self._graphs, self._sizes, self._held, self._again = {}, {}, 0.0, set()

    def _state_before(self, step: int) -> State:
        """The state before `step`: kept, or trained again."""
        if step == self.loop.steps:
            return self.state
        return self._kept[step] if step in self._kept else self._train_again(step, at_once=False)

    def _train_again(self, end: int, *, short: bool = False, at_once: bool = True) -> State:
        """Train up to `end` from the last state that was kept, and keep graphs of the last steps; gives the state
        there. `short`: without the last step, which is not kept; `at_once`: the last step is gone back through next."""
        begin = max((kept for kept in self._kept if kept < end), default=0)
        state = self._kept[begin] if begin in self._kept else self.loop.initial_state()
        stretch = plan_stretch(end - begin, self._room, held=sum(0 < kept < end for kept in self._kept))
        stretch = stretch if at_once else self._without_last(stretch, end - begin)
        steps = range(begin, end - short)
        self.loop.batches.expect(steps)
        for step in steps:
            state, loss = self._train(state, step, stretch, step - begin)
            if step in self._graphs:
                self._again.add(step)
                self._replayed.append((step, self._losses[step], loss))
            else:
                self.cost += self.loop.costs.step(step)
        return state

    def state_dict(self) -> dict[str, Any]:
        if self._replayed:
            self._refuse_another_run()
        # about sqrt(T) states and no graph: the rest is trained again on demand, to the same bits
        steps = spread(sorted({*self._graphs, *self._kept}), checkpoint_interval(self.loop.steps))
        states = {step: self._kept.saved(step) if step in self._kept else self._graphs[step].state for step in steps}
        losses = torch.stack(self._losses) if self._losses else torch.zeros(0)
        return {
            **super().state_dict(),
            "kept": {step: tuple(state) for step, state in states.items()},
            "by_step": {name: values.clone() for name, values in self.by_step.items()},
            "losses": losses,
            "trained_on": self._trained_on,
            "adjoint": self._adjoint,
            "buffer_adjoint": dict(self._buffer_adjoint),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        device = self.loop.device
        self.let_go()
        # what no step changes is there once
        buffers = {id(buffer): self.state.buffers[name] for name, buffer in State(*saved["state"]).buffers.items()}
        for step, state in saved["kept"].items():  # one by one: where there is room for few, the others are put away
            self._kept[step] = state_on(device, state, buffers)
        self._trained_on = saved.get("trained_on", device.type)
        self.by_step = self._own_copies(saved["by_step"])
        self._losses = list(saved["losses"].to(device))
        self._adjoint = tuple(on_device(saved["adjoint"], device))
        self._buffer_adjoint = on_device(dict(saved["buffer_adjoint"]), device)


def spread(steps: Sequence[int], interval: int) -> list[int]:
    """The first of some steps, upwards, and those at least an interval after the one before."""
    chosen: list[int] = []
    for step in steps:
        if not chosen or step - chosen[-1] >= interval:
            chosen.append(step)
    return chosen
