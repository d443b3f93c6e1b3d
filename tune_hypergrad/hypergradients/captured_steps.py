"""Training steps and adjoint steps of an inner loop as recordings, where they can be such: tried out once per problem.

A step is a function of the state, the hyperparameters' values in force, the number of steps taken and its batches, all
of which are tensors here, and of what the device's generator gives, which is seeded before a replay. A step that
depends on anything else, such as a number that a model counts up, is not the recorded one: so some steps are run both
ways first. The first step of a run, in which optimizers may do as they do in no other, is never recorded.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tune_hypergrad.batches import Batch
from tune_hypergrad.curves import Curve
from tune_hypergrad.errors import in_one_line
from tune_hypergrad.hypergradients.capture import RECORDERS, Form, Recorder, Recording, form_of
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.findings import recall
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, TrainingSettings
from tune_hypergrad.hypergradients.loop_batches import LoopBatches
from tune_hypergrad.hypergradients.loop_values import LoopValues
from tune_hypergrad.hypergradients.optimizers import Slots
from tune_hypergrad.hypergradients.partial_update import Block
from tune_hypergrad.hypergradients.state import Buffers, Hyperparameters, State
from tune_hypergrad.hypergradients.step_graph import Pulled, adjoint_step
from tune_hypergrad.problem import Problem

WORTHWHILE_STEPS = 100
"""Length of a run from which on recording, which takes some ten of them, can pay."""
_RECORDINGS = 2
"""Forms of a step that are recorded: whole batches, and the smaller last one of a pass."""
_TOLERANCE = 1e-3
"""Difference between a replayed step and the same without recording, over the largest element, up to which they are the
same on a device that adds up in another order at every call."""
_SHRUNK, _MOVED = 0.7, 0.01
"""Factor of hyperparameters' values, and distance of weights, from one step that is tried out to the next."""


class NotRecordableError(Exception):
    """A step does what a replay of it would not do again."""


class Arguments(NamedTuple):
    """What a training step depends on."""

    params: Tensor
    slots: tuple[Tensor, ...]
    buffers: Buffers
    h: dict[str, Tensor]
    """The tuned hyperparameters' values in force."""
    fixed: dict[str, Tensor]
    """Those of fixed hyperparameters that are not the same at every step."""
    taken: Tensor
    """Number of steps that the parameters have taken before, 0-dim."""
    batches: tuple[Batch, ...]
    adjoint: tuple[Tensor, ...] = ()
    """Of an adjoint step: that of weights and slots after it."""
    buffer_adjoint: Buffers = {}  # noqa: RUF012 (never written to)


class _Trained(NamedTuple):
    """What a recorded training step gives."""

    params: Tensor
    slots: tuple[Tensor, ...]
    buffers: Buffers
    loss: Tensor


class _BatchesAt(LoopBatches):
    """Those of one step that have been read; else a loop's own."""

    def __init__(self, batches: LoopBatches, read: Sequence[Batch]) -> None:
        vars(self).update(vars(batches))
        self._read = read

    def of_step(self, step: int, number: int = 0, *, again: bool = False) -> Batch:
        found = self._read[number]
        # of several, each is asked for twice, and a model may overwrite its input
        return tree_map_only(Tensor, torch.clone, found) if len(self._read) > 1 else found


class _ValuesAt(LoopValues):
    """A loop's hyperparameters, of which some have other values at every step: tensors that are given."""

    def __init__(self, values: LoopValues, fixed: Mapping[str, Tensor]) -> None:
        vars(self).update(vars(values))
        self._present = fixed

    def fixed_at(self, step: int) -> dict[str, Any]:
        constants = {
            name: values[0]
            for name, values in self._fixed_values.items()
            if name not in self._present and not isinstance(values, Curve)
        }
        return {**constants, **self._present}


class _LoopAt(InnerLoop):
    """An inner loop at one step, with batches that have been read."""

    def __init__(self, loop: InnerLoop, read: Sequence[Batch]) -> None:
        vars(self).update(vars(loop))
        self.captured = None
        self.batches = _BatchesAt(loop.batches, read)


class _RecordedLoop(_LoopAt):
    """The same with nothing in it that differs from step to step and is no tensor; generators have been seeded."""

    def __init__(self, loop: InnerLoop, arguments: Arguments) -> None:
        super().__init__(loop, arguments.batches)
        self.values = _ValuesAt(loop.values, arguments.fixed)
        self._taken = arguments.taken
        self.state = State(arguments.params, arguments.slots, arguments.buffers, (0,) * len(self._names))
        """Before the step, of parameters that count alike."""
        self.stepping: tuple[int, ...] = ()
        """Positions of the parameters that the step moves: known when it has been taken."""

    def seed_model(self, step: int, number: int = 0) -> None:
        pass

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
        assert blocks is not None
        self.stepping = tuple(member for block in blocks for member in block.members)
        own = [block._replace(taken=self._taken) for block in blocks]
        return super().update(params, gradient, slots, h, step, own, shapes)


class CapturedSteps:
    """The steps of one inner loop, replayed where they have been recorded.

    Args:
        loop: whose; where and how it trains stays as it is.
        recorder: of the loop's device.
        warns: whether to warn where a step cannot be recorded.
    """

    def __init__(self, loop: InnerLoop, recorder: Recorder, *, warns: bool = True) -> None:
        self.reason: str | None = None
        """Why steps are no longer recorded, or None."""
        self._recorder, self._warns = recorder, warns
        self._recordings: dict[str, list[tuple[Form, Recording]]] = {"training": [], "adjoint": []}
        self._seen: dict[str, list[Form]] = {"training": [], "adjoint": []}
        self._fixed = loop.values.fixed_by_step()
        # whose powers are as exact as those of Python's numbers
        options: dict[str, Any] = {"dtype": torch.float64, "device": loop.device}
        self._counts = torch.arange(loop.steps + 1, **options)

    def take_step(
        self, loop: InnerLoop, state: State, h: Mapping[str, Tensor], step: int, *, again: bool = False
    ) -> tuple[State, Tensor]:
        """`loop.take_step`."""
        taken = self._taken(loop, state)
        if taken is None:
            return loop.take_eager_step(state, h, step, again=again)
        arguments = self._arguments(loop, state, h, step, taken, again=again)
        recording = self._recording("training", loop, arguments, step)
        if recording is not None:
            loop.seed_model(step)
            found, stepping = recording(arguments)
            if all(state.counts[position] for position in stepping):
                counts = tuple(count + (position in stepping) for position, count in enumerate(state.counts))
                return State(found.params, found.slots, found.buffers, counts), found.loss
        return _LoopAt(loop, arguments.batches).take_eager_step(state, h, step)

    def adjoint_step(
        self,
        loop: InnerLoop,
        state: State,
        h: Mapping[str, Tensor],
        step: int,
        adjoint: tuple[Tensor, ...],
        buffer_adjoint: Buffers,
    ) -> Pulled:
        """`adjoint_step` of `step_graph`."""
        taken = self._taken(loop, state)
        if taken is None:
            return adjoint_step(loop, state, _leaves(h), step, adjoint, buffer_adjoint)
        arguments = self._arguments(loop, state, h, step, taken)
        arguments = arguments._replace(adjoint=adjoint, buffer_adjoint=buffer_adjoint)
        recording = self._recording("adjoint", loop, arguments, step)
        if recording is not None:
            loop.seed_model(step)
            pulled, stepping = recording(arguments)
            if all(state.counts[position] for position in stepping):
                return pulled  # type: ignore[no-any-return]
        return adjoint_step(_LoopAt(loop, arguments.batches), state, _leaves(h), step, adjoint, buffer_adjoint)

    def has_recorded(self, kind: str) -> bool:
        """Whether there is a recording of a training step, or of an adjoint step."""
        return bool(self._recordings[kind])

    def _taken(self, loop: InnerLoop, state: State) -> int | None:
        """The number of steps that parameters have taken, one for all that have taken any; None where a step is not to
        be replayed."""
        taken = {count for count in state.counts if count}
        return taken.pop() if self.reason is None and len(taken) == 1 and loop.knows_moving else None

    def _arguments(
        self, loop: InnerLoop, state: State, h: Mapping[str, Tensor], step: int, taken: int, *, again: bool = False
    ) -> Arguments:
        numbers = range(loop.problem.batches_in(step))
        return Arguments(
            state.params,
            state.slots,
            state.buffers,
            dict(h),
            {name: values[step] for name, values in self._fixed.items()},
            self._counts[taken],
            tuple(loop.batches.of_step(step, number, again=again) for number in numbers),
        )

    def _recording(self, kind: str, loop: InnerLoop, arguments: Arguments, step: int) -> Recording | None:
        """The recording of a step, made when a step of the same form comes for the second time."""
        form = form_of(arguments)
        if form is None:
            return None
        recordings = self._recordings[kind]
        found = next((recording for known, recording in recordings if known == form), None)
        if found is not None or len(recordings) == _RECORDINGS:
            return found
        if form not in self._seen[kind]:
            self._seen[kind] = [*self._seen[kind][-1:], form]
            return None
        try:
            found = _record(kind, loop, arguments, step, self._recorder)
        except NotRecordableError as error:
            self.reason = str(error)
        except Exception as error:
            self.reason = in_one_line(error)
        if found is None:
            if self._warns:
                warnings.warn(f"steps are no longer captured: {self.reason}", stacklevel=2)
            return None
        recordings.append((form, found))
        return found


def _training(loop: InnerLoop, arguments: Arguments, step: int) -> tuple[_Trained, tuple[int, ...]]:
    own = _RecordedLoop(loop, arguments)
    after, loss = own.take_eager_step(own.state, arguments.h, step)
    return _Trained(after.params, after.slots, after.buffers, loss), own.stepping


def _adjoint(loop: InnerLoop, arguments: Arguments, step: int) -> tuple[Pulled, tuple[int, ...]]:
    own = _RecordedLoop(loop, arguments)
    h, adjoint, of_buffers = _leaves(arguments.h), arguments.adjoint, arguments.buffer_adjoint
    return adjoint_step(own, own.state, h, step, adjoint, of_buffers), own.stepping


_KINDS = {"training": _training, "adjoint": _adjoint}
"""Steps that are recorded, by name."""


def _record(kind: str, loop: InnerLoop, arguments: Arguments, step: int, recorder: Recorder) -> Recording:
    """A step's recording.

    Raises:
        Exception: it cannot be recorded, or does what a replay would not do again.
    """
    loop.seed_model(step)
    drawn, on_host, held = _drawn(loop.device), _drawn_on_host(loop.device), _numbers(loop)
    kept: list[Any] = []
    recording = Recording(partial(_run, _KINDS[kind], loop, step), arguments, recorder, kept)
    for name, numbers in _numbers(loop).items():
        if held.get(name) != numbers:
            raise NotRecordableError(f"{name} is another one after a step")
    if on_host != _drawn_on_host(loop.device):
        raise NotRecordableError("a step draws from Python's, NumPy's or the host's generator")
    if len(arguments.batches) > 1 and drawn != _drawn(loop.device):
        raise NotRecordableError("each of a step's batches has random draws of its own")
    # what modules hold would be overwritten if they let go of it
    kept += [leaf for module in loop.modules for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor)]
    return recording


def _run(function: Callable[..., Any], loop: InnerLoop, step: int, arguments: Arguments) -> Any:
    return function(loop, arguments, step)


def _drawn(device: torch.device) -> bytes:
    """The state of a device's generator."""
    state = torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return bytes(state.numpy().tobytes())


def _drawn_on_host(device: torch.device) -> tuple[Any, ...]:
    """The states of the generators that a device's does not stand for."""
    _, keys, position, *gauss = np.random.get_state()
    own = b"" if device.type == "cpu" else _drawn(torch.device("cpu"))
    return random.getstate(), np.asarray(keys).tobytes(), position, *gauss, own


def _numbers(loop: InnerLoop) -> dict[str, list[Any]]:
    """Numbers and texts that a loop's modules hold, by what to call them."""
    return {
        f"{attribute!r} of a {type(module).__name__}, the {number}-th module,": [
            leaf for leaf in tree_leaves(value) if isinstance(leaf, bool | int | float | str)
        ]
        for number, module in enumerate(loop.modules)
        for attribute, value in vars(module).items()
        if attribute != "training"
    }


def _leaves(h: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in h.items()}


def capture_steps(loop: InnerLoop, hyperparameters: Mapping[str, Tensor], *, plain: bool) -> str:
    """Have a loop replay its steps from now on, where they can be recorded.

    Args:
        loop: entered the same way from now on.
        hyperparameters: what is tuned, values by name.
        plain: whether nothing but training losses is differentiated.

    Returns:
        What came of it, in a clause; empty where the device has no recordings, or they are not wanted.
    """
    loop.captured = None
    make = RECORDERS.get(loop.device.type)
    if make is None or not loop.settings.capture or isinstance(loop, EnsembleLoop):
        return ""
    if loop.steps < WORTHWHILE_STEPS:
        return f"steps are not captured: fewer than {WORTHWHILE_STEPS}"
    kinds = ("training",) if plain else ("training", "adjoint")
    values = dict(hyperparameters)
    find = partial(try_capture, loop.source, loop.settings, values, make, kinds)
    reason = recall(loop, values, f"captured {kinds[-1]}", find)
    if reason is not None:
        return f"steps are not captured: {reason}"
    loop.captured = CapturedSteps(loop, make(loop.device))
    return "steps are captured"


def try_capture(
    problem: Problem,
    settings: TrainingSettings,
    hyperparameters: Hyperparameters,
    make: Callable[[torch.device], Recorder],
    kinds: Sequence[str] = ("training", "adjoint"),
) -> str | None:
    """Why steps of a problem cannot be replayed, found out anew; None where they can.

    Args:
        problem: what is trained.
        settings: how.
        hyperparameters: what is tuned, values by name.
        make: makes a recorder for a device.
        kinds: which steps.
    """
    # a loop of its own, whose model may be left with what it keeps between calls
    own = InnerLoop(problem.independent(), replace(settings, steps=max(4, settings.steps)))
    values = {name: own.values.placed(name, v) for name, v in hyperparameters.items()}
    with own.running(plain="adjoint" not in kinds):
        try:
            return _Trial(own, values, CapturedSteps(own, make(own.device), warns=False), kinds).reason()
        except Exception as error:
            return in_one_line(error)


class _Trial:
    """Steps from different states, with different values, taken with recordings and without."""

    def __init__(self, loop: InnerLoop, values: Hyperparameters, captured: CapturedSteps, kinds: Sequence[str]) -> None:
        self._loop, self._values, self._captured, self._kinds = loop, values, captured, kinds
        self._generator = torch.Generator().manual_seed(0)
        self._first, _ = loop.take_eager_step(loop.initial_state(), loop.scalars(values, 0), 0, again=True)

    def reason(self) -> str | None:
        last = self._loop.steps - 1
        # the first is recorded when it comes again
        for place, step in ((0, 1), (0, 1), (1, (1 + last) // 2), (2, last)):
            state = self._moved(place)
            h = {name: value * _SHRUNK**place for name, value in self._loop.scalars(self._values, step).items()}
            for kind in self._kinds:
                arguments = self._cotangents(state) if kind == "adjoint" else ()
                eager, again = (self._eager(kind, state, h, step, *arguments) for _ in range(2))
                found = self._replayed(kind, state, h, step, *arguments)
                if self._captured.reason is not None:
                    return self._captured.reason
                for name, value in eager.items():
                    if not self._is_same(found[name], value, again[name]):
                        return f"a replay of step {step} differs in the {name}"
        has_recorded = all(map(self._captured.has_recorded, self._kinds))
        return None if has_recorded else "a batch holds something that is no tensor, number or text"

    def _moved(self, place: int) -> State:
        """A state of its own for every place."""
        first, factor = self._first, 1 + 0.1 * place
        return State(
            first.params + _MOVED * place * self._drawn(first.params),
            tuple(slot * factor for slot in first.slots),  # which may have a sign
            {
                name: buffer * factor if name in self._loop.differentiated(first.buffers) else buffer
                for name, buffer in first.buffers.items()
            },
            tuple(count + place if count else 0 for count in first.counts),
        )

    def _cotangents(self, state: State) -> tuple[tuple[Tensor, ...], Buffers]:
        of_buffers = {name: self._drawn(state.buffers[name]) for name in self._loop.differentiated(state.buffers)}
        return tuple(self._drawn(tensor) for tensor in (state.params, *state.slots)), of_buffers

    def _drawn(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=like.dtype, generator=self._generator).to(like.device)

    def _eager(self, kind: str, state: State, h: dict[str, Tensor], step: int, *cotangents: Any) -> dict[str, Tensor]:
        if kind == "training":
            return _of_training(*self._loop.take_eager_step(state, h, step, again=True))
        return _of_adjoint(adjoint_step(self._loop, state, _leaves(h), step, *cotangents))

    def _replayed(
        self, kind: str, state: State, h: dict[str, Tensor], step: int, *cotangents: Any
    ) -> dict[str, Tensor]:
        if kind == "training":
            return _of_training(*self._captured.take_step(self._loop, state, h, step, again=True))
        return _of_adjoint(self._captured.adjoint_step(self._loop, state, h, step, *cotangents))

    def _is_same(self, found: Tensor, value: Tensor, again: Tensor) -> bool:
        """Whether a result is what it is without recording; what is not finite is not."""
        if found.shape != value.shape or found.dtype != value.dtype:
            return False
        if not value.is_floating_point():
            return torch.equal(found, value)
        if not value.numel():
            return True
        tolerance = 1e3 * torch.finfo(value.dtype).eps if value.device.type == "cpu" else _TOLERANCE
        allowed = max(tolerance * float(value.abs().max()), 10 * float((again - value).abs().max()))
        return torch.allclose(found, value, rtol=0.0, atol=allowed)


def _of_training(state: State, loss: Tensor) -> dict[str, Tensor]:
    """What a training step gives, by what to call it; numbers of steps included."""
    slots = {f"slot {number}": slot for number, slot in enumerate(state.slots)}
    buffers = {f"buffer {name!r}": buffer for name, buffer in state.buffers.items()}
    return {"training loss": loss, "weights": state.params, **slots, **buffers, "counts": torch.tensor(state.counts)}


def _of_adjoint(pulled: Pulled) -> dict[str, Tensor]:
    """The same of an adjoint step."""
    return {
        "training loss": pulled.loss,
        "training gradient": pulled.gradient,
        **{f"adjoint of state vector {number}": each for number, each in enumerate(pulled.adjoint)},
        **{f"adjoint of {name!r}": each for name, each in pulled.buffer_adjoint.items()},
        **{f"derivative by {name!r}": each for name, each in pulled.by_hyperparameters.items()},
    }
