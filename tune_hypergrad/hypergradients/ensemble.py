"""Hypergradients of several seeds: their mean, from runs that train and go back together where that pays.

The validation loss of one training run is a draw: with another seed, the same hyperparameters give another one. What a
search wants is the derivative of its expectation, which the mean over S seeds estimates with 1 / S of the variance
(Micaelli & Storkey 2021 average over seeds likewise). Runs of a small model take their steps at once, under
`torch.func.vmap`; others take turns. Either way every run is what it is by itself, which is tried out once per problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import inf, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tune_hypergrad.budget import Cost
from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.hypergradients.conversions import StepMode
from tune_hypergrad.hypergradients.double_precision import in_double_precision
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop, mean_of, members_differentiable
from tune_hypergrad.hypergradients.evaluation import Evaluation
from tune_hypergrad.hypergradients.findings import recall
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.keeping import Room
from tune_hypergrad.hypergradients.replays import NotReplayedError
from tune_hypergrad.hypergradients.reverse import ReverseRun
from tune_hypergrad.hypergradients.run import HypergradientResult, HypergradientRun, begun_instead
from tune_hypergrad.hypergradients.state import Buffers, Hyperparameters, State
from tune_hypergrad.hypergradients.step_graph import adjoint_step
from tune_hypergrad.hypergradients.verification import EXAMPLES

_SUBJECT = "together"
WORTHWHILE_FLOPS = 100e6
"""Floating-point operations of one run's training step on a CPU up to which the steps of several are taken at once.

A small step costs what it takes to launch its operations, which several runs share; in a large one arithmetic does,
which torch does not do faster for several networks than for one: `vmap`'s grouped convolutions take a tenth longer, and
convolutions by unfolding and matrix products more than those. `benchmarks/ensemble_cost.py` shows where it pays."""
WORTHWHILE_FLOPS_ON_DEVICES = 20e9
"""The same on a GPU, whose launches hide far more arithmetic: an estimate, not yet measured."""
_PROBED_STEPS = 2
_TOLERANCE, _COARSE_TOLERANCE = 1e-6, 1e-3
"""Relative errors up to which two computations of one thing in double precision, and in another, are the same."""


class NotTogetherError(InputError):
    """The runs of an ensemble cannot take their steps at once."""


class EnsembleRun(ReverseRun):
    """S runs at once by reverse mode; arguments as for `ReverseRun`.

    `hypergradients` are the mean over the runs, `by_step` has those of each, of shape [S, T]. The mean of the final
    validation losses decides whether the ensemble is rejected, and with it every run: one that diverges does that.
    """

    loop: EnsembleLoop

    def __init__(
        self,
        loop: EnsembleLoop,
        hyperparameters: Hyperparameters,
        *,
        horizon: int | None = None,
        val_examples: int | None = None,
        reject_above: float = inf,
        keep_all: bool = True,
        room: Room | None = None,
        by_graph: bool = False,
    ) -> None:
        super().__init__(
            loop,
            hyperparameters,
            horizon=horizon,
            val_examples=val_examples,
            reject_above=reject_above,
            keep_all=keep_all,
            room=room,
            by_graph=by_graph,
        )
        self._mode = members_differentiable
        self._of_members, self.by_step = (
            {name: values.repeat(len(loop.seeds), 1) for name, values in single.items()}
            for single in (self.hypergradients, self.by_step)
        )
        self._finals: list[Evaluation] = []

    @property
    def plain(self) -> bool:
        return False  # fused kernels have no rules for vmap

    def _advance_one(self) -> None:
        try:
            super()._advance_one()
        except NotReplayedError as error:
            raise NotTogetherError(str(error)) from error
        except InputError:
            raise
        except Exception as error:
            raise NotTogetherError(in_one_line(error)) from error

    def _add(self, step: int, by_hyperparameters: dict[str, Tensor]) -> None:
        self._add_to(self._of_members, step, by_hyperparameters)
        self.hypergradients = {name: windows.mean(0) for name, windows in self._of_members.items()}

    def _forget_hypergradients(self) -> None:
        super()._forget_hypergradients()
        self._of_members = {name: torch.full_like(windows, nan) for name, windows in self._of_members.items()}

    def _evaluate_at_end(self, state: State, end: int) -> Evaluation:
        evaluations = self.loop.evaluate_members(state, gradient=True, examples=self.val_examples, draw=end)
        if end == self.loop.steps:
            self._finals = evaluations
        return mean_of(evaluations)

    def _evaluate_whole(self, state: State) -> Evaluation:
        self._finals = self.loop.evaluate_members(state)
        return mean_of(self._finals)

    def _evaluate_final(self, state: State, evaluation: Evaluation) -> None:
        super()._evaluate_final(state, evaluation)
        self._finals = [Evaluation(final.loss, final.metrics) for final in self._finals]

    def result(self) -> HypergradientResult:
        assert self.done
        loop, count = self.loop, len(self.loop.seeds)
        states = [loop.of_member(self.state, number) for number in range(count)]
        cost = Cost(**{name: type(spent)(spent / count) for name, spent in vars(self.cost).items()})
        members = tuple(
            HypergradientResult(
                hypergradients={name: windows[number].clone() for name, windows in self._of_members.items()},
                val_loss=final.loss,
                metrics=final.metrics,
                params=member.unflatten(member.judged_weights(state)),
                buffers=member.reported(state.buffers),
                differentiation=self.differentiation,
                reason=self.reason,
                cost=cost,
            )
            for number, (member, final, state) in enumerate(zip(loop.members, self._finals, states, strict=True))
        )
        return mean_result(members, self.differentiation, self.reason, self.cost)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "together": True,
            "of_members": {name: windows.clone() for name, windows in self._of_members.items()},
            "finals": [tuple(final) for final in self._finals],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self._of_members = self._own_copies(saved["of_members"])
        self._finals = [Evaluation(*final) for final in saved["finals"]]


class RunsInTurn(HypergradientRun):
    """The runs of an ensemble, one after another: where they go back, all train before the first one does.

    So at half its length, an ensemble's `state` is the trained one however its runs go.

    Args:
        loop: the ensemble's.
        hyperparameters: values by name, each of shape [N].
        begin: makes the run of one inner loop; all of them are of one mode.
        reason: why they do not go together.
        reject_above: the mean of the final validation losses above which all are rejected, as in `EnsembleRun`.
    """

    loop: EnsembleLoop

    def __init__(
        self,
        loop: EnsembleLoop,
        hyperparameters: Hyperparameters,
        begin: Callable[[InnerLoop], HypergradientRun],
        reason: str,
        *,
        reject_above: float = inf,
    ) -> None:
        super().__init__(loop, hyperparameters, horizon=None, val_examples=None, reject_above=reject_above)
        self._begin, self._runs = begin, [begin(loop.members[0])]
        self.differentiation = self._runs[0].differentiation
        self.reason = f"one run after another: {reason}"
        self._earlier = Cost()  # before these runs

    @property
    def length(self) -> int:
        return self._runs[0].length * len(self.loop.seeds)

    def _advance_one(self) -> None:
        run = self._next()
        if run.position == self.loop.steps and isinstance(run, ReverseRun) and self.final is None:
            self._judge()
        before = run.position
        run.advance(1)
        self.position += run.position - before - 1  # those that a rejected run leaves out
        if len(self._runs) == len(self.loop.seeds) and run.position in (self.loop.steps, run.length):
            self.state = self.loop.together([run.state for run in self._runs])
        if self.position + 1 == self.length:
            self._finish()

    def _next(self) -> HypergradientRun:
        """The run whose turn it is."""
        for number, member in enumerate(self.loop.members):
            if number == len(self._runs):
                self._runs.append(self._begin(member))
            if self._runs[number].position < self.loop.steps:
                return self._runs[number]
        return next(run for run in self._runs if not run.done)

    def _judge(self) -> None:
        """Find the mean of the final validation losses; above the limit, nothing is to be had from any of the runs."""
        for run in self._runs:
            if isinstance(run, ReverseRun):
                run.assess()
        self.final = mean_of([run.final for run in self._runs if run.final is not None])
        if self.rejected:
            for run in self._runs:
                run.reject()

    def _finish(self) -> None:
        if self.final is None:
            self._judge()
        self.hypergradients = mean_hypergradients([run.result() for run in self._runs])

    @property
    def by_step(self) -> dict[str, Tensor]:
        """Of reverse mode, each step's own derivatives as those of `EnsembleRun`: by hyperparameter, shape [S, T]."""
        runs = [run for run in self._runs if isinstance(run, ReverseRun)]
        if not runs:
            raise AttributeError("forward mode has no derivatives by single steps: differentiate by reverse mode")
        found = {name: values.new_zeros(len(self.loop.seeds), len(values)) for name, values in runs[0].by_step.items()}
        for name, rows in found.items():
            for row, run in zip(rows, runs, strict=False):  # those that have not begun have not gone back either
                row.copy_(run.by_step[name])
        return found

    @property
    def cost(self) -> Cost:
        """What the runs have spent."""
        return sum((run.cost for run in self._runs), self._earlier)

    @cost.setter
    def cost(self, cost: Cost) -> None:
        runs = getattr(self, "_runs", [])
        self._earlier = cost - sum((run.cost for run in runs), Cost())

    def result(self) -> HypergradientResult:
        assert self.done
        members = tuple(run.result() for run in self._runs)
        return mean_result(members, self.differentiation, self.reason, self.cost)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "together": False, "runs": [run.state_dict() for run in self._runs]}

    def let_go(self) -> None:
        for run in self._runs:
            run.let_go()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        while len(self._runs) < len(saved["runs"]):
            self._runs.append(self._begin(self.loop.members[len(self._runs)]))
        for run, of_run in zip(self._runs, saved["runs"], strict=True):
            run.load_state_dict(of_run)
        super().load_state_dict(saved)
        if self.rejected:
            for run in self._runs:
                run.reject()


def mean_hypergradients(results: Sequence[HypergradientResult]) -> Hyperparameters:
    """Means over the runs, by name, each of shape [N]."""
    return {
        name: torch.stack([result.hypergradients[name] for result in results]).mean(0)
        for name in results[0].hypergradients
    }


def mean_result(
    members: tuple[HypergradientResult, ...], differentiation: str, reason: str, cost: Cost
) -> HypergradientResult:
    """The mean of several runs' results."""
    mean = mean_of([Evaluation(member.val_loss, member.metrics) for member in members])
    return HypergradientResult(
        hypergradients=mean_hypergradients(members),
        val_loss=mean.loss,
        metrics=mean.metrics,
        params=members[0].params,
        buffers=members[0].buffers,
        differentiation=differentiation,
        reason=reason,
        cost=cost,
        members=members,
    )


def advance_together(run: EnsembleRun, units: int, begin: Callable[[], HypergradientRun]) -> HypergradientRun:
    """Advance an ensemble; where its runs turn out not to go together, they begin anew, one after another.

    Args:
        run: what to advance.
        units: by how much.
        begin: makes the other run.
    """
    try:
        run.advance(units)
        return run
    except NotTogetherError as error:
        remember_apart(run.loop, run.hyperparameters, str(error))
    return begun_instead(run, begin)  # when the error has let go of what the failed step had made


class Togetherness(NamedTuple):
    """What has been found out of taking the steps of several runs at once."""

    refusal: str | None
    """Why they would not be what the runs by themselves are."""
    flops: float
    """Floating-point operations of one run's training step."""


def why_in_turn(loop: EnsembleLoop, hyperparameters: Hyperparameters, *, worthwhile: bool = True) -> str | None:
    """Why the runs of an ensemble have to go one after another: one line, or None.

    Args:
        loop: the ensemble's.
        hyperparameters: what is tuned, values by name.
        worthwhile: whether they are to go together only where that is faster.
    """
    found = _found(loop, hyperparameters)
    if found.refusal is not None:
        return found.refusal
    limit = WORTHWHILE_FLOPS if loop.device.type == "cpu" else WORTHWHILE_FLOPS_ON_DEVICES
    if worthwhile and found.flops > limit:
        return f"a training step of {found.flops / 1e6:,.0f} MFLOP does not become cheaper beside others'"
    return None


def arithmetic(loop: EnsembleLoop, hyperparameters: Hyperparameters) -> float:
    """Floating-point operations of one run's training step: those of products and convolutions."""
    return _found(loop, hyperparameters).flops


def _found(loop: EnsembleLoop, hyperparameters: Hyperparameters) -> Togetherness:
    return recall(loop, hyperparameters, _SUBJECT, lambda: _try_out(loop, hyperparameters))


def remember_apart(loop: EnsembleLoop, hyperparameters: Hyperparameters, refusal: str) -> None:
    """Let the runs go one after another from now on, after what a run has found out."""
    recall(loop, hyperparameters, _SUBJECT, lambda: Togetherness(refusal, 0.0), anew=True)


def _try_out(loop: EnsembleLoop, hyperparameters: Hyperparameters) -> Togetherness:
    """Compare two runs together with each by itself, on small batches and with plain SGD, in double precision."""
    problem, settings = loop.source.independent(), loop.settings
    small = problem.replace(batch_size=min(EXAMPLES, problem.batch_size))
    # an adaptive optimizer's first steps divide by gradients that rounding alone makes differ from zero
    settings = replace(settings, steps=min(settings.steps, _PROBED_STEPS), optimizer="sgd")
    refusal, flops = "", 0.0
    for tried, tolerance in (in_double_precision(small), _TOLERANCE), (small, _COARSE_TOLERANCE):
        try:
            trial = _Trial(EnsembleLoop(tried, settings, loop.seeds[:2]), hyperparameters)
            refusal, flops = trial.difference(tolerance), trial.flops
            break
        except Exception as error:
            refusal = in_one_line(error)
    return Togetherness(refusal or None, flops * problem.batch_size / small.batch_size)


class _Trial:
    """A few steps there and back of runs together, and of each by itself."""

    def __init__(self, loop: EnsembleLoop, hyperparameters: Hyperparameters) -> None:
        self._loop = loop
        self._values = {name: loop.values.placed(name, values) for name, values in hyperparameters.items()}
        self.flops = 0.0
        """Of a training step of one run."""

    def difference(self, tolerance: float) -> str:
        """What differs by more than this relative error, in words; empty where nothing does."""
        loop = self._loop
        with loop.running():
            adjoint, of_buffers = self._cotangents()
            together = list(self._steps(loop, adjoint, of_buffers, differentiable=members_differentiable))
            for number, member in enumerate(loop.members):
                own = tuple(part[number] for part in adjoint), {name: part[number] for name, part in of_buffers.items()}
                alone = self._steps(member, *own)
                for of_all, of_one in zip(together, alone, strict=True):
                    for what, value in of_one.items():
                        if not _agree(of_all[what][number], value, tolerance):
                            return f"the {what} of two runs together is not that of each by itself"
        return ""

    def _cotangents(self) -> tuple[tuple[Tensor, ...], Buffers]:
        state, generator = self._loop.initial_state(), torch.Generator().manual_seed(0)

        def drawn(like: Tensor) -> Tensor:
            return torch.randn(like.shape, dtype=like.dtype, generator=generator).to(like.device)

        floating = {name: buffer for name, buffer in state.buffers.items() if buffer.is_floating_point()}
        return tuple(map(drawn, (state.params, *state.slots))), {name: drawn(each) for name, each in floating.items()}

    def _steps(
        self,
        loop: InnerLoop,
        adjoint: tuple[Tensor, ...],
        of_buffers: Buffers,
        differentiable: StepMode | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """What each step gives there, and its adjoint."""
        state = loop.initial_state()
        for step in range(loop.steps):
            h = {name: v.detach() for name, v in loop.scalars(self._values, step).items()}
            counter = FlopCounterMode(display=False)
            with nullcontext() if loop is self._loop else counter:
                after, loss = loop.take_step(state, h, step)
            self.flops = max(self.flops, float(counter.get_total_flops()))
            leaves = {name: value.requires_grad_() for name, value in h.items()}
            own = {name: of_buffers[name] for name in loop.differentiated(state.buffers) if name in of_buffers}
            pulled = adjoint_step(loop, state, leaves, step, adjoint, own, mode=differentiable)
            yield {
                "training loss": loss,
                "training loss of the adjoint step": pulled.loss,
                "training gradient": pulled.gradient,
                **{f"buffer {name!r}": buffer for name, buffer in after.buffers.items()},
                "adjoint of the weights": pulled.adjoint[0],
                **{f"adjoint of {name!r}": value for name, value in pulled.buffer_adjoint.items()},
                **{f"derivative by {name!r}": value for name, value in pulled.by_hyperparameters.items()},
            }
            state = after


def _agree(value: Tensor, other: Tensor, tolerance: float) -> bool:
    value, other = value.double(), other.double()
    finite = other[other.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(value, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
