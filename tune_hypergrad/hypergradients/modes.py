"""The ways to a hypergradient: what each costs and keeps, and the cheapest of those that can be taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, isinf
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from tune_hypergrad.budget import GRADIENTS_PER
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.carrying import way_to_carry
from tune_hypergrad.hypergradients.forward import COLUMNS_AT_ONCE, ForwardRun
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.keeping import Room, least_memory, memory_for_one, plan_stretch
from tune_hypergrad.hypergradients.loop_costs import adjoint_gradients
from tune_hypergrad.hypergradients.memory import mebibytes
from tune_hypergrad.hypergradients.reverse import ReverseRun, checkpoint_interval
from tune_hypergrad.hypergradients.run import HypergradientRun
from tune_hypergrad.hypergradients.verification import refusal_of

AUTO = "auto"
"""In place of a mode's name: the cheapest that can be taken."""


@dataclass(frozen=True)
class Work:
    """The size of a run, by which modes are chosen."""

    windows: tuple[int, ...]
    """Number of windows of every hyperparameter."""
    steps: int
    """Inner steps T."""
    state_bytes: int
    """Size of one inner state."""
    horizon: int | None = None
    """Steps of a segment; None is T."""
    adjoint_step: float = GRADIENTS_PER["adjoint_step"]
    """Gradient evaluations that going back over a step takes."""
    may_be_rejected: bool = False
    """Whether the run may turn out not to be worth its hypergradient."""
    graph_bytes: float = inf
    """Size of one step's graph beside its state; infinite: none is kept."""
    memory: float = inf
    """Bytes that may be kept."""
    states_offloaded: int = 0
    """States that may be kept outside that memory."""
    parts: int = 1
    """Runs among which forward mode's columns are divided, this one of them."""

    @classmethod
    def of(
        cls,
        loop: InnerLoop,
        values: Mapping[str, Tensor],
        horizon: int | None,
        *,
        may_be_rejected: bool = False,
        graph_bytes: float = inf,
        memory: float = inf,
        offload: float = 0,
    ) -> Work:
        """That of a run of this loop; `offload` is how many bytes of states may be kept outside its memory."""
        windows, state = tuple(len(v) for v in values.values()), state_bytes(loop)
        offloaded = int(offload // state)
        found = cls(windows, loop.steps, state, horizon, inf, may_be_rejected, graph_bytes, memory, offloaded)
        return replace(found, adjoint_step=adjoint_gradients(lean=loop.problem.accumulate > 1 and found.room.lean))

    @property
    def room(self) -> Room:
        """The memory as reverse mode uses it."""
        least = least_memory(self.steps, self.state_bytes) - self.states_offloaded * self.state_bytes
        return Room(
            max(self.memory, least),
            self.state_bytes,
            self.graph_bytes + self.state_bytes,
            states_offloaded=self.states_offloaded,
        )


class Mode(ABC):
    """A way to a hypergradient; entered in `MODES`, it can be asked for by name, and chosen."""

    name: ClassVar[str]
    derivatives: ClassVar[str]
    """Which derivatives of a step it is made of, "forward" or "reverse": a problem may lack either."""
    exact: ClassVar[bool] = True
    """Whether it gives the derivative itself, to rounding; "auto" takes no other mode, however cheap."""
    rejects_early: ClassVar[bool]
    """Whether a rejected run costs no more than its training."""

    @abstractmethod
    def gradients(self, work: Work) -> float:
        """What an inner step costs on average, in gradient evaluations."""

    @abstractmethod
    def kept_bytes(self, work: Work) -> int:
        """What is kept beside the present state."""

    @abstractmethod
    def begin(self, loop: InnerLoop, values: Mapping[str, Tensor], **arguments: Any) -> HypergradientRun:
        """A run; arguments as for `HypergradientRun`."""


class Forward(Mode):
    """Tangents of the state, carried along with it: `ForwardRun`."""

    name, derivatives, rejects_early = "forward", "forward", False

    def gradients(self, work: Work) -> float:
        # a window of N is carried from its opening on: (N + 1) / 2 columns on average
        columns = sum((count + 1) / 2 for count in work.windows) / work.parts
        carried = 1 - 1 / (work.horizon or work.steps)  # a segment's first step has no Hessian product
        return GRADIENTS_PER["step"] + GRADIENTS_PER["hessian_column"] * columns * carried

    def kept_bytes(self, work: Work) -> int:
        return -(-sum(work.windows) // work.parts) * work.state_bytes

    def begin(
        self, loop: InnerLoop, values: Mapping[str, Tensor], *, max_memory: float | None = None, **arguments: Any
    ) -> ForwardRun:
        """A run; with `max_memory`, bytes beside what a step with one column takes, as many columns at once as fit."""
        run = ForwardRun(loop, dict(values), **arguments)
        columns = len(run.columns)
        room = None if max_memory is None else max_memory - columns * state_bytes(loop)
        found = way_to_carry(loop, values, horizon=arguments.get("horizon"))
        run.in_turn, run.columns_at_once = found.in_turn, found.columns_at_once(columns, COLUMNS_AT_ONCE, room)
        # a step that cannot be run again for its adjoint cannot be run once for every few columns either
        several = not found.in_turn and columns > run.columns_at_once
        if several and refusal_of(loop, values, "reverse", check=False) is not None:
            run.columns_at_once = columns
        return run


class Reverse(Mode):
    """Back through all steps, by kept graphs or from kept states, with no step trained more than once again:
    `ReverseRun`."""

    name, derivatives, rejects_early = "reverse", "reverse", True

    def gradients(self, work: Work) -> float:
        kept = 0 if isinf(work.graph_bytes) else work.steps - plan_stretch(work.steps, work.room).graphs_from
        saved = work.adjoint_step - GRADIENTS_PER["kept_adjoint_step"]
        return GRADIENTS_PER["step"] + work.adjoint_step - saved * kept / work.steps

    def kept_bytes(self, work: Work) -> int:
        needed = min(
            work.steps * work.state_bytes,
            memory_for_one(work.steps, work.state_bytes, work.graph_bytes + work.state_bytes),
        )
        return max(0, needed - work.states_offloaded * work.state_bytes)

    def begin(self, loop: InnerLoop, values: Mapping[str, Tensor], **arguments: Any) -> ReverseRun:
        return ReverseRun(loop, dict(values), keep_all=True, **arguments)


class CheckpointedReverse(Reverse):
    """The same from a number of kept states that is about the root of T at the least, between which steps are trained
    again up to twice."""

    name = "checkpointed_reverse"

    def gradients(self, work: Work) -> float:
        return super().gradients(work) + GRADIENTS_PER["step"]

    def kept_bytes(self, work: Work) -> int:
        return max(0, 2 * checkpoint_interval(work.steps) - work.states_offloaded) * work.state_bytes

    def begin(self, loop: InnerLoop, values: Mapping[str, Tensor], **arguments: Any) -> ReverseRun:
        return ReverseRun(loop, dict(values), keep_all=False, **arguments)


TOGETHER = (Reverse.name, CheckpointedReverse.name)
"""Those by which the runs of several seeds can take their steps at once."""

MODES: dict[str, Mode] = {mode.name: mode for mode in (Forward(), Reverse(), CheckpointedReverse())}
"""By name. Where modes cost the same, the first of them is taken."""


class Choice(NamedTuple):
    """A mode and why it was taken."""

    mode: Mode
    reason: str


def mode_named(name: str) -> Mode | None:
    """The mode of that name; None for "auto".

    Raises:
        InputError: there is none.
    """
    if name != AUTO and name not in MODES:
        raise InputError(f"unknown differentiation {name!r}: choose one of {', '.join((AUTO, *MODES))}")
    return MODES.get(name)


def cheapest(work: Work, free_bytes: float = inf, refusals: Mapping[str, str] | None = None) -> Choice:
    """The cheapest mode whose memory fits; where none does, the one that keeps least.

    Args:
        work: the size of the run.
        free_bytes: memory that may be used.
        refusals: why forward or reverse derivatives cannot be taken; not both.
    """
    refusals = refusals or {}
    able = [mode for mode in MODES.values() if mode.exact and mode.derivatives not in refusals]
    early = [mode for mode in able if mode.rejects_early] if work.may_be_rejected else []
    candidates = early or able
    fitting = [mode for mode in candidates if mode.kept_bytes(work) <= free_bytes]
    best = min(fitting or candidates, key=lambda mode: mode.gradients(work) if fitting else mode.kept_bytes(work))
    if refusals:
        return Choice(best, "; ".join(dict.fromkeys(refusals.values())))
    if early:
        return Choice(best, "a rejected run is not gone back through")
    costs = ", ".join(f"{mode.name} {mode.gradients(work):.1f}" for mode in candidates)
    too_large = [mode for mode in candidates if mode not in fitting]
    spaces = ", ".join(f"{mebibytes(mode.kept_bytes(work))} of {mode.name}" for mode in too_large)
    memory = f"{spaces} do not fit" if spaces else "all fit"
    return Choice(best, f"gradients a step: {costs}; {memory} {mebibytes(free_bytes)}")


def cheapest_right(loop: InnerLoop, values: Mapping[str, Tensor], work: Work, *, check: bool) -> Choice:
    """The cheapest mode that has right derivatives of a problem.

    Args:
        loop: the problem, and how it is trained.
        values: hyperparameters by flat name.
        work: the size of the run, and the memory that it may take.
        check: compare what is chosen with plain training.

    Raises:
        InputError: none has.
    """
    refusals: dict[str, str] = {}
    while any(mode.derivatives not in refusals for mode in MODES.values()):
        choice = cheapest(work, work.memory, refusals)
        refusal = refusal_of(loop, values, choice.mode.derivatives, check=check)
        if refusal is None:
            return choice
        refusals[choice.mode.derivatives] = refusal
    raise InputError("; ".join(dict.fromkeys(refusals.values())))


def state_bytes(loop: InnerLoop) -> int:
    """Size of one inner state: weights, optimizer slots and buffers; states share what stays frozen."""
    state = loop.initial_state()
    return sum(tensor.nbytes for tensor in (state.params, *state.slots, *loop.reported(state.buffers).values()))
