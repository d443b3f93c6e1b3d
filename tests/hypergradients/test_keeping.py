"""What reverse mode keeps for its way back: the plan, the memory, and the same hypergradient whatever it is."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import lru_cache
from math import inf
from typing import Any
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from engine_problems import assert_close, data, differentiate, double, make_loop, make_problem, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tune_hypergrad.budget import GRADIENTS_PER
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import InnerLoop, hypergradient, hypergradient_run
from tune_hypergrad.hypergradients import graph_size as graph_size_module
from tune_hypergrad.hypergradients import memory as memory_module
from tune_hypergrad.hypergradients.check import check_problem, finite_differences
from tune_hypergrad.hypergradients.ensemble import EnsembleRun
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop, members_differentiable
from tune_hypergrad.hypergradients.graph_size import graph_size
from tune_hypergrad.hypergradients.inner_loop import TrainingSettings
from tune_hypergrad.hypergradients.keeping import (
    Room,
    Stretch,
    least_memory,
    memory_for_one,
    plan_stretch,
    steps_again,
)
from tune_hypergrad.hypergradients.memory import allocated, as_bytes
from tune_hypergrad.hypergradients.modes import MODES, Work, cheapest, state_bytes
from tune_hypergrad.hypergradients.normalisation import _Normalised
from tune_hypergrad.hypergradients.plain_training import differences, plain_val_loss
from tune_hypergrad.hypergradients.reverse import ReverseRun
from tune_hypergrad.hypergradients.step_graph import differentiable, step_graph
from tune_hypergrad.hypergradients.stop_gradient import ForwardStops
from tune_hypergrad.problem import Problem
from tune_hypergrad.trainables.inner_run import InnerRunSettings

STATE, GRAPH = 1, 10
VALUES = {"lr": double(0.05, 0.1, 0.08), "momentum": double(0.5, 0.7)}


class TestPlan:
    @pytest.mark.parametrize(
        ("steps", "memory", "expected"),
        [
            (1, 0, Stretch((), 0)),
            (5, 50, Stretch((), 0)),  # all graphs
            (5, 49, Stretch((1,), 1)),  # four of them, and a state before
            (9, 42, Stretch((4, 5), 5)),
            (4, 3, Stretch((1, 2, 3), 3)),  # states alone, and the graph of the step at work
        ],
    )
    def test_what_is_kept(self, steps: int, memory: int, expected: Stretch) -> None:
        assert plan_stretch(steps, Room(memory, STATE, GRAPH)) == expected

    @pytest.mark.parametrize(
        ("steps", "room", "again"),
        [
            (400, Room(4000, 1, 10), 0),
            (400, Room(399, 1), 399),  # every state: each but the last step once
            (400, Room(40, 1), 758),  # about twice the root
            (400, Room(2000, 1, 10), 201),  # half of the graphs, and a state: the other half once
        ],
    )
    def test_how_many_steps_are_trained_again(self, steps: int, room: Room, again: int) -> None:
        assert steps_again(steps, room) == again

    @given(
        steps=st.integers(1, 25),
        state=st.integers(0, 4),
        graph=st.one_of(st.just(inf), st.integers(4, 15)),
        spare=st.integers(0, 80),
    )
    @settings(max_examples=300, deadline=None)
    def test_never_above_the_memory_and_every_step_once(self, steps: int, state: int, graph: float, spare: int) -> None:
        room = Room(least_memory(steps, state) + spare, state, graph)
        kept: set[int] = set()
        graphs: set[int] = set()
        most = trained = 0

        def train(begin: int, end: int) -> None:
            nonlocal most, trained
            stretch = plan_stretch(end - begin, room, sum(0 < each < end for each in kept))
            for step in range(begin, end):
                trained += 1
                if step - begin in stretch.states:
                    kept.add(step)
                if step - begin >= stretch.graphs_from:
                    graphs.add(step)
            of_graphs = 0 if len(graphs) == 1 else len(graphs) * graph  # that of the step at work does not count
            most = max(most, len(kept) * state + of_graphs)

        train(0, steps)
        for step in reversed(range(steps)):
            kept.discard(step + 1)
            if step not in graphs:
                train(max((each for each in kept if each <= step), default=0), step + 1)
            graphs.remove(step)
        assert not graphs and most <= room.memory
        assert trained == steps + steps_again(steps, room)
        fewest = least_again(steps, room)
        assert fewest <= trained - steps <= (fewest if graph == inf else 1.2 * fewest + 1)

    @pytest.mark.parametrize("steps", [1, 2, 5, 100, 400])
    def test_memory_with_which_no_step_is_trained_twice_again(self, steps: int) -> None:
        for graph in (inf, 10.0, 3.0):
            room = Room(memory_for_one(steps, 1, graph), 1, graph)
            assert steps_again(steps, room) < steps
        assert memory_for_one(400, 1, 10) < 130 < memory_for_one(400, 1, inf) == 400

    def test_of_endless_memory_all(self) -> None:
        assert plan_stretch(9, Room(inf, STATE, GRAPH)) == Stretch((), 0)
        assert plan_stretch(4, Room(inf, STATE)) == Stretch((1, 2, 3), 3)
        work = Work(windows=(1,), steps=100, state_bytes=1000, graph_bytes=10**4)
        assert MODES["reverse"].gradients(work) == pytest.approx(2.5)

    def test_the_least_grows_with_the_root(self) -> None:
        assert [least_memory(steps, 3) for steps in (1, 100, 10_000)] == [0, 39, 420]


def least_again(steps: int, room: Room) -> float:
    """The fewest steps to train again, by trying everything."""
    most = room.memory // room.state if room.state else steps

    @lru_cache(None)
    def of(steps: int, held: int) -> float:
        if steps <= room.graphs(held):
            return 0
        if held >= most:
            return inf
        return min(part + of(part, held) + of(steps - part, held + 1) for part in range(1, steps))

    return of(steps, 0)


class Deferring(nn.Module):
    """Runs its middle again in backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layers[0](x))
        return self.layers[2](checkpoint(self._middle, x, use_reentrant=False))

    def _middle(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layers[1](x))


class BeginsLate(nn.Module):
    """A running mean of its activations, from the third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        output = self.layers(x)
        if self.training:
            self.calls += 1
            if self.calls > 2:
                self.mean.mul_(0.5).add_(0.5 * output.detach().mean(0))
        return output - 0.3 * self.mean


def silu() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3))


def penalised(output: Tensor, target: Tensor, *, l2: float = 0.0, params: Any = None) -> Tensor:
    return F.cross_entropy(output, target) + l2 * sum(p.square().sum() for p in params.values())


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp": make_problem,
    "conv": lambda: make_problem("conv"),
    "batch_norm": lambda: make_problem("batch_norm"),
    "dropout": lambda: make_problem("dropout"),
    "lstm": lambda: make_problem("lstm"),
    "silu": lambda: make_problem(silu),
    "deferring": lambda: make_problem(Deferring),
    "begins late": lambda: make_problem(BeginsLate),
    "accumulated": lambda: make_problem(batch_size=2, accumulate=2),
    "penalised": lambda: make_problem(train_loss=penalised),
}


def memories(loop: InnerLoop, values: Any) -> dict[str, int]:
    """Such as are enough for all graphs, for two, for the states alone, and for no more than has to be."""
    state, graph, steps = state_bytes(loop), graph_size(loop, values).size, loop.steps
    return {
        "all graphs": int(2 * steps * (state + graph)),
        "two graphs": int(2.8 * (state + graph) + 2 * state),  # what small ones are counted at varies
        "states": steps * state,
        "least": least_memory(steps, state),
    }


class TestSameHypergradient:
    @pytest.mark.parametrize("horizon", [None, 4])
    @pytest.mark.parametrize("name", PROBLEMS)
    def test_whatever_is_kept(self, name: str, horizon: int | None) -> None:
        problem = PROBLEMS[name]()
        values = {**VALUES, "l2": double(0.1, 0.05)} if name == "penalised" else VALUES
        found = {}
        for what, memory in memories(make_loop(problem, 9, "sgd"), values).items():
            loop = make_loop(problem, 9, "sgd")
            found[what] = differentiate(loop, values, "reverse", horizon=horizon, max_memory=memory)
        first = found["all graphs"]
        for other in found.values():
            assert other.val_loss == first.val_loss
            for hyperparameter, value in first.hypergradients.items():
                # to the bit, unless a remade step's buffers have come to move since
                torch.testing.assert_close(other.hypergradients[hyperparameter], value, rtol=1e-12, atol=1e-15)
        gradients = [result.cost.gradients for result in found.values()]
        assert gradients == sorted(gradients) and gradients[0] < gradients[-1]

    @pytest.mark.parametrize("name", ["mlp", "batch_norm", "dropout", "deferring", "accumulated"])
    def test_to_the_bit(self, name: str) -> None:
        problem = PROBLEMS[name]()
        loop = make_loop(problem, 9, "adam")
        values = {"lr": double(0.01, 0.02), "beta1": double(0.8)}
        first, *others = (
            differentiate(make_loop(problem, 9, "adam"), values, "reverse", max_memory=memory)
            for memory in memories(loop, values).values()
        )
        for other in others:
            for hyperparameter, value in first.hypergradients.items():
                assert torch.equal(other.hypergradients[hyperparameter], value)

    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    @pytest.mark.parametrize("name", ["conv", "batch_norm", "dropout", "silu", "deferring", "accumulated"])
    def test_kept_graphs_against_differences_of_a_plain_loop(self, name: str, optimizer: str) -> None:
        """One of `torch.optim` and `loss.backward()`."""
        problem = PROBLEMS[name]()
        loop = make_loop(problem, 6, optimizer, fixed={"eps": 1e-3} if optimizer == "adam" else {})
        values = {"lr": double(0.03, 0.05)}
        result = differentiate(loop, values, "reverse", max_memory="1GiB")
        assert result.cost.gradients == pytest.approx(6 * 2.5 + 6 / loop.problem.examples_per_step)  # all are kept
        with loop.running():
            batches = [
                [loop.batches.of_step(step, number) for number in range(problem.batches_in(step))] for step in range(6)
            ]

            def loss(values: Any) -> float:
                return plain_val_loss(problem, loop, values, batches, torch.enable_grad())

            expected = double(*(differences(loss, values, "lr", element, 1e-6) for element in range(2)))
        assert_close(result.hypergradients, {"lr": expected}, 1e-5)

    def test_of_runs_at_once(self) -> None:
        problem = make_problem("dropout")
        alone = [differentiate(make_loop(problem, 7, seed=seed), VALUES, "reverse") for seed in (0, 1)]
        mean = {name: sum(each.hypergradients[name] for each in alone) / 2 for name in VALUES}
        for memory in ("1GiB", None, 2 * 4 * state_bytes(make_loop(problem, 7))):
            loop = EnsembleLoop(problem, TrainingSettings(7), (0, 1))
            run = hypergradient_run(loop, VALUES, differentiation="reverse", together=True, max_memory=memory)
            assert isinstance(run, EnsembleRun)
            with loop.running():
                run.advance(run.length)
            assert_close(run.result().hypergradients, mean, 1e-10)

    def test_in_turn_runs_share_the_memory(self) -> None:
        loop = EnsembleLoop(make_problem(), TrainingSettings(7), (0, 1))
        run = hypergradient_run(loop, VALUES, differentiation="reverse", together=False, max_memory=2_000_000)
        assert run._runs[0]._room.memory == 1_000_000  # type: ignore[attr-defined]

    def test_a_run_that_was_saved_has_no_graphs_and_goes_on(self) -> None:
        problem = make_problem("batch_norm")
        whole = differentiate(make_loop(problem, 9), VALUES, "reverse", max_memory="1GiB")
        run = hypergradient_run(make_loop(problem, 9), VALUES, differentiation="reverse", max_memory="1GiB")
        with run.loop.running():
            run.advance(12)
        other = hypergradient_run(make_loop(problem, 9), VALUES, differentiation="reverse", max_memory="1GiB")
        saved = run.state_dict()
        assert len(saved["kept"]) <= 4
        other.load_state_dict(saved)
        with other.loop.running():
            other.advance(other.length)
        for name, value in whole.hypergradients.items():
            assert torch.equal(other.result().hypergradients[name], value)
        assert other.cost.gradients > whole.cost.gradients


class TestKeptGraphs:
    class Counting(nn.Module):
        """Counts the training steps that it is called in."""

        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += self.training
            return self.layers(x)

    @pytest.mark.parametrize("room", ["two graphs", "no graph"])
    def test_a_gradient_more_is_charged_where_batches_come_one_at_a_time(self, room: str) -> None:
        """A step of two batches whose graphs have room beside each other is remade as one of a single batch is."""
        problem = make_problem(self.Counting, batch_size=2, accumulate=2)
        loop, steps = make_loop(problem, 9), 9
        state, graph = state_bytes(loop), graph_size(loop, VALUES).size
        memory = int(2.5 * (state + graph)) if room == "two graphs" else 9 * state
        work = Work.of(loop, VALUES, None, graph_bytes=graph, memory=memory if room == "two graphs" else 0.9 * graph)
        one, two = GRADIENTS_PER["adjoint_step"], GRADIENTS_PER["adjoint_step"] + GRADIENTS_PER["step"]
        assert work.adjoint_step == (one if room == "two graphs" else two)
        run = ReverseRun(loop, VALUES, room=Room(memory, state, graph + state if room == "two graphs" else inf))
        with loop.running():
            self.Counting.calls = 0
            run.advance(run.length)
        spent = run.cost.gradients - loop.costs.evaluation("val", gradient=True).gradients
        adjoint = run.cost.hypergradients - loop.costs.evaluation("val", gradient=True).gradients
        if room == "no graph":
            assert adjoint == pytest.approx(two * steps)
        else:
            kept = GRADIENTS_PER["kept_adjoint_step"]
            made_again = (adjoint - kept * steps) / (one - kept)
            assert made_again == pytest.approx(round(made_again)) and 0 < made_again < steps
            assert spent - adjoint == run.cost.steps
            assert self.Counting.calls == 2 * (run.cost.steps + round(made_again))

    @pytest.mark.parametrize("memory", ["1GiB", 1200])
    def test_a_kept_step_is_not_run_again(self, memory: Any) -> None:
        loop = make_loop(make_problem(self.Counting), 9)
        run = hypergradient_run(loop, VALUES, differentiation="reverse", max_memory=1 << 30)
        room = run._room if memory == "1GiB" else Room(8 * state_bytes(loop), state_bytes(loop))  # type: ignore[attr-defined]
        run = ReverseRun(loop, VALUES, room=room)
        with loop.running():
            loop.training(loop.initial_state(), {}, 0)  # what moves is known
            self.Counting.calls = 0
            run.advance(run.length)
        assert self.Counting.calls == (9 if memory == "1GiB" else 9 + 9)

    def test_no_more_than_there_is_room_for(self) -> None:
        problem = make_problem(lambda: nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 3)), batch_size=12)
        loop = make_loop(problem, 40)
        size = state_bytes(loop) + graph_size(loop, VALUES).size
        limit = int(10.5 * size)
        run = hypergradient_run(loop, VALUES, differentiation="reverse", max_memory=limit)
        with loop.running():
            before = allocated(loop.device)
            most, graphs = 0, 0
            while not run.done:
                run.advance(1)
                most = max(most, (allocated(loop.device) or 0) - (before or 0))
                graphs = max(graphs, len(run._graphs))  # type: ignore[attr-defined]
        assert graphs in (8, 9, 10)
        assert 0.7 * limit < most <= limit + size  # and the step at work

    @pytest.mark.parametrize(
        ("optimizer", "batches", "kept"), [("sgd", 1, True), ("adam", 1, False), ("sgd", 2, False)]
    )
    def test_updates_graphs_that_take_next_to_no_memory_are_kept_too(
        self, optimizer: str, batches: int, kept: bool
    ) -> None:
        """Plain SGD saves nothing that is not in the states anyway, Adam several vectors a step; of several batches, it
        would be their mean gradient."""
        wide = lambda: nn.Sequential(nn.Linear(4, 3000), nn.Tanh(), nn.Linear(3000, 3))  # noqa: E731
        problem = make_problem(wide, batch_size=12 // batches, accumulate=batches)
        values = {"lr": double(0.1, 0.2)}

        def found(keeps_updates: bool | None) -> Any:
            run = hypergradient_run(make_loop(problem, 6, optimizer), values, differentiation="reverse")
            run._keeps_updates = keeps_updates  # type: ignore[attr-defined]
            with run.loop.running():
                run.advance(6)
                if keeps_updates is None:
                    graphs = run._graphs.values()  # type: ignore[attr-defined]
                    assert len(graphs) == 6 and all((graph.update is not None) == kept for graph in graphs)
                run.advance(6)
            return run.result()

        either = found(None)
        for keeps_updates in (False, True) if batches == 1 else (False,):
            other = found(keeps_updates)
            assert other.val_loss == either.val_loss and other.cost == either.cost
            assert torch.equal(other.hypergradients["lr"], either.hypergradients["lr"])

    def test_graphs_that_are_larger_than_was_planned_with(self) -> None:
        """As of longer texts in later batches: fewer are kept."""
        loop = make_loop(make_problem(batch_size=12), 9)
        state, graph = state_bytes(loop), graph_size(loop, VALUES).size
        planned = graph / 3 + state
        run = ReverseRun(loop, VALUES, room=Room(9 * planned, state, planned))
        with loop.running():
            run.advance(9)
            assert 1 < len(run._graphs) < 9
            assert max(run._graphs) == 8  # the last ones
            run.advance(9)
        found, whole = run.result(), differentiate(make_loop(make_problem(batch_size=12), 9), VALUES, "reverse")
        assert found.cost.gradients > whole.cost.gradients
        for name, value in whole.hypergradients.items():
            assert torch.equal(found.hypergradients[name], value)

    @pytest.mark.parametrize("factor", [4, 100])
    def test_much_larger_graphs_take_a_training_more_that_is_charged(self, factor: int) -> None:
        steps, problem = 30, make_problem(self.Counting, train=data(examples=256), batch_size=64)
        loop = make_loop(problem, steps)
        state, graph = state_bytes(loop), graph_size(loop, VALUES).size
        planned = graph / factor + state
        run = ReverseRun(loop, VALUES, room=Room(steps * planned, state, planned))
        with loop.running():
            self.Counting.calls = 0
            run.advance(run.length)
        adjoint = run.cost.hypergradients - loop.costs.evaluation("val", gradient=True).gradients
        kept, remade = GRADIENTS_PER["kept_adjoint_step"], GRADIENTS_PER["adjoint_step"]
        made_again = (adjoint - kept * steps) / (remade - kept)
        assert self.Counting.calls == pytest.approx(run.cost.steps + made_again)
        assert self.Counting.calls <= 3 * steps
        whole = differentiate(make_loop(problem, steps), VALUES, "reverse")
        for name, value in whole.hypergradients.items():
            assert torch.equal(run.result().hypergradients[name], value)

    def test_what_is_not_kept_does_not_wait_for_garbage_collection(self) -> None:
        """A graph with moving statistics refers to the state that its step was made to overwrite."""
        loop = make_loop(make_problem("batch_norm"), 9)
        state, h = loop.initial_state(), {name: value[0].requires_grad_() for name, value in VALUES.items()}
        with loop.running():
            loop.training(state, {name: value.detach() for name, value in h.items()}, 0)
            gc.collect()
            gc.disable()
            try:
                for mode in (differentiable, members_differentiable):
                    graph = step_graph(loop, state, h, 0, mode=mode)
                    alive = ref(graph.batches[0].after["1.running_mean"])
                    assert alive() is not None
                    del graph
                    assert alive() is None
                stops = ForwardStops([state.params.clone()], {})
                entered = ref(stops)
                del stops
                assert entered() is None
            finally:
                gc.enable()

    def test_a_rejected_run_lets_go_of_them(self) -> None:
        run = hypergradient_run(make_loop(), VALUES, differentiation="reverse", reject_above=0.0)
        with run.loop.running():
            run.advance(run.loop.steps)
            assert run._graphs  # type: ignore[attr-defined]
            run.advance(run.length)
        assert run.rejected and not run._graphs and not run._kept  # type: ignore[attr-defined]

    def test_plain_training_keeps_nothing(self) -> None:
        run = hypergradient_run(make_loop(), VALUES, reject_above=-inf)
        with run.loop.running():
            run.advance(run.loop.steps)
        assert not run._graphs and not run._kept  # type: ignore[attr-defined]

    def test_where_a_graph_changes_the_gradient_by_rounding_all_steps_have_one(self) -> None:
        loop = make_loop(make_problem(silu, dtype=torch.float32), 9)
        values = {"lr": torch.tensor([0.5])}
        if graph_size(loop, values).same:
            pytest.skip("this version of torch computes the same either way")
        run = hypergradient_run(loop, values, differentiation="reverse")
        assert run._by_graph  # type: ignore[attr-defined]

    def test_also_behind_a_last_layer_of_zeros(self) -> None:
        """Whose first gradient is 0 with a graph and without."""

        def zero_last() -> nn.Module:
            model = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 3))
            for parameter in model[-1].parameters():
                nn.init.zeros_(parameter)
            return model

        problem, values = make_problem(zero_last, dtype=torch.float32), {"lr": torch.tensor([1.0])}
        loop = make_loop(problem, 60)
        assert (
            graph_size(loop, values).same == graph_size(make_loop(make_problem(silu, dtype=torch.float32)), values).same
        )
        size = state_bytes(loop) + graph_size(loop, values).size
        found = [
            differentiate(make_loop(problem, 60), values, "reverse", max_memory=int(memory))
            for memory in (120 * size, 15 * size, 60 * state_bytes(loop))
        ]
        for other in found[1:]:
            assert torch.equal(other.hypergradients["lr"], found[0].hypergradients["lr"])


class TestGraphSize:
    def test_what_a_graph_holds(self) -> None:
        """Two hidden activations' worth and more, but neither weights nor data."""
        width = 3000
        problem = make_problem(
            lambda: nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)), batch_size=12
        )
        loop = make_loop(problem)
        found = graph_size(loop, VALUES)
        weights, activation = 8 * loop.size, 8 * 12 * width
        assert found.same and weights + activation < found.size < weights + 8 * activation

    def test_it_is_found_out_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = make_problem()
        first = graph_size(make_loop(problem), VALUES)
        monkeypatch.setattr(graph_size_module, "step_graph", lambda *args: pytest.fail("measured again"))
        assert graph_size(make_loop(problem), VALUES) == first
        ensemble = EnsembleLoop(problem, TrainingSettings(5), (0, 1, 2))
        assert graph_size(ensemble, VALUES).size == 3 * first.size

    def test_glibc_is_looked_up_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = allocated(torch.device("cpu"))
        if before is None:
            pytest.skip("another allocator")
        monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("looked up again"))
        held = torch.empty(1 << 24, dtype=torch.uint8)
        assert (allocated(torch.device("cpu")) or 0) - before >= held.nbytes

    def test_where_nobody_says_none_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graph_size_module, "allocated", lambda device: None)
        run = hypergradient_run(make_loop(steps=9), VALUES, differentiation="reverse")
        with run.loop.running():
            run.advance(9)
        assert not run._graphs  # type: ignore[attr-defined]
        assert len(run._kept) == 9  # type: ignore[attr-defined]


class MaskOfTheStep(nn.Module):
    """One dropout mask for a whole pass, held as an attribute and read by a middle that runs again in backward
    passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mask = torch.bernoulli(torch.full((6,), 0.6, dtype=x.dtype)) / 0.6
        return self.layers[2](checkpoint(self._middle, torch.tanh(self.layers[0](x)), use_reentrant=False))

    def _middle(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layers[1](x))
        return x * self.mask if self.training else x


class ContextOfThePass(nn.Module):
    """The same of something that the input gives, in evaluations too."""

    def __init__(self, *, by_example: bool) -> None:
        super().__init__()
        self.by_example = by_example
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        self.context = x.mean(1, keepdim=True) if self.by_example else x.mean()
        return self.layers[2](checkpoint(self._middle, torch.tanh(self.layers[0](x)), use_reentrant=False))

    def _middle(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layers[1](x) * (1 + self.context))


class MaskInPlace(MaskOfTheStep):
    """The mask is written over, so that the attribute is the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mask.bernoulli_(0.6)
        return self.layers[2](checkpoint(self._middle, torch.tanh(self.layers[0](x)), use_reentrant=False))


class Noting(nn.Module):
    """Holds what it has computed, which nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layers(x)
        return self.last


class TestDeferredWork:
    """A graph whose backward pass reads what a later pass has overwritten is not kept."""

    @pytest.mark.parametrize(("memory", "check"), [(None, True), (None, False), (5000, False)])
    @pytest.mark.parametrize(
        "factory",
        [
            MaskOfTheStep,
            MaskInPlace,
            lambda: ContextOfThePass(by_example=True),
            lambda: ContextOfThePass(by_example=False),
        ],
        ids=["mask", "mask in place", "context by example", "context"],
    )
    def test_attributes_of_a_pass(self, factory: Any, memory: Any, check: bool) -> None:
        problem = make_problem(factory)
        expected = finite_differences(make_loop(problem, 9), VALUES)
        for horizon in (None, 4):
            loop = make_loop(problem, 9)
            found = differentiate(loop, VALUES, "reverse", check=check, max_memory=memory, horizon=horizon)
            assert graph_size(loop, VALUES).size == inf
            if horizon is None:
                assert_close(found.hypergradients, expected, 1e-5)
            else:
                one = make_loop(problem, 9)
                whole = ReverseRun(one, VALUES, horizon=horizon, room=Room(10 * state_bytes(one), state_bytes(one)))
                with one.running():
                    whole.advance(whole.length)
                assert_close(found.hypergradients, whole.hypergradients, 1e-12)

    @pytest.mark.parametrize("factory", [Deferring, Noting])
    def test_what_is_kept_all_the_same(self, factory: Any) -> None:
        """Work that depends on nothing that changes, and attributes that no deferred work reads."""
        assert graph_size(make_loop(make_problem(factory), 9), VALUES).size < inf

    def test_a_check_goes_back_by_kept_graphs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What neither the trial of a graph nor the comparison of packed tensors sees, that with differences does."""
        found = check_problem(make_problem(Deferring), VALUES, modes=("reverse",))
        assert found.ok and not found.refusals
        monkeypatch.setattr(graph_size_module, "_are_same", lambda *states: True)
        monkeypatch.setattr(graph_size_module, "_agree", lambda *ways: True)
        monkeypatch.setattr("tune_hypergrad.hypergradients.packing._is_same", lambda *samples: True)
        found = check_problem(make_problem(MaskOfTheStep), {"lr": double(0.05), "momentum": double(0.5)})
        assert "reverse" in found.refusals


class TestMaxMemory:
    @pytest.mark.parametrize(
        ("given", "bytes_"),
        [
            (1000, 1000),
            (1.5e3, 1500),
            ("12", 12),
            ("2KiB", 2048),
            ("1.5 MB", 1_500_000),
            ("2GiB", 2 << 30),
            (0, 0),
            ("300kB", 300_000),
            ("1tb", 10**12),
        ],
    )
    def test_how_it_is_given(self, given: Any, bytes_: int) -> None:
        assert as_bytes(given) == bytes_

    @pytest.mark.parametrize("given", ["", "much", "5 apples", -1, inf, True, "GiB", [3]])
    def test_what_is_no_memory(self, given: Any) -> None:
        with pytest.raises(InputError, match=r"max_memory is .*: give a number of bytes, or such as '500MB' or '2GiB'"):
            as_bytes(given)
        with pytest.raises(InputError, match="max_memory"):
            InnerRunSettings(steps=5, max_memory=given)

    def test_too_little_is_refused(self) -> None:
        problem = make_problem()
        needed = least_memory(9, state_bytes(make_loop(problem)))
        for mode in ("reverse", "checkpointed_reverse"):
            with pytest.raises(
                InputError, match=f"{mode} mode keeps [0-9.]+ KiB at the least for 9 steps; give it that"
            ):
                differentiate(make_loop(problem, 9), VALUES, mode, max_memory=needed - 1)
            differentiate(make_loop(problem, 9), VALUES, mode, max_memory=needed)
        with pytest.raises(InputError, match="forward mode keeps"):
            differentiate(make_loop(problem, 9), VALUES, "forward", max_memory=100)

    def test_auto_keeps_to_it(self) -> None:
        problem, values = make_problem(), {"lr": double(0.1), "momentum": double(0.5)}
        state = state_bytes(make_loop(problem))
        taken = {}
        for memory in (1 << 30, 6 * state, 5 * state):
            found = hypergradient(problem, values, steps=16, max_memory=memory, check=False)
            taken[memory] = found.differentiation, found.cost.gradients
        assert taken[1 << 30][0] == "reverse"
        assert taken[6 * state][0] == taken[5 * state][0] == "forward"  # two tangents

    def test_graphs_make_reverse_mode_cheaper(self) -> None:
        work = dict(windows=(1, 1), steps=100, state_bytes=1000)
        assert cheapest(Work(**work), 10**6).mode.name == "forward"
        assert cheapest(Work(**work, graph_bytes=10**4, memory=2 * 10**6), 2 * 10**6).mode.name == "reverse"
        few = Work(**work, graph_bytes=10**4, memory=10**5)
        assert cheapest(few, 10**5).mode.name == "forward"
        # without room for all states, but for one training more
        assert cheapest(Work((7, 1), 100, 1000, graph_bytes=2000, memory=5 * 10**4), 5 * 10**4).mode.name == "reverse"

    def test_it_is_a_setting_of_trainables(self) -> None:
        made = InnerRunSettings(steps=9, max_memory="1MiB")
        run = made.make_run(made.make_loop(make_problem()), VALUES, "reverse")
        assert run._room.memory == 1 << 20  # type: ignore[attr-defined]


class Penalising(nn.Module):
    """Adds the size of the gradient of its output by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(), nn.Linear(6, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.layers(x)
        x = x.clone().requires_grad_()
        output = self.layers(x)
        (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return output + 0.1 * slope.square().sum(1, keepdim=True) * output.new_tensor([1.0, 0.0, -1.0])


class TestBatchNormalisation:
    @pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6), (4, 3, 2, 5)])
    @pytest.mark.parametrize("affine", [True, False])
    def test_second_derivatives(self, shape: tuple[int, ...], affine: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        x, w, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, (3,), (3,)))
        running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

        def output(x: Tensor, *parameters: Tensor) -> Tensor:
            return _Normalised.apply(x, *(parameters or (None, None)), *running, 0.1, 1e-5)[0]

        inputs = [leaf.requires_grad_() for leaf in ((x, w, b) if affine else (x,))]
        assert torch.autograd.gradcheck(output, inputs)
        assert torch.autograd.gradgradcheck(output, inputs)

    def test_a_third_derivative_is_refused(self) -> None:
        """A penalty on the gradient by the input."""
        with pytest.raises(InputError, match=r"batch normalisation has no third derivative here.*use differentiation="):
            differentiate(make_loop(make_problem(Penalising)), VALUES, "reverse")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_step_is_the_plain_one_to_the_bit(self, dtype: torch.dtype) -> None:
        """Running statistics included."""
        problem = make_problem("conv", dtype=dtype)
        values = {"lr": torch.tensor([0.1], dtype=dtype)}
        results = [
            differentiate(make_loop(problem, 7), values, "reverse", max_memory=memory) for memory in ("1GiB", 30_000)
        ]
        loop = make_loop(problem, 7)
        with loop.running():
            plain = loop.run(values)
        for result in results:
            assert torch.equal(loop.flatten(result.params), plain.params)
            for name, buffer in result.buffers.items():
                assert torch.equal(buffer, plain.buffers[name]), name


def test_graphs_are_counted_though_other_threads_free_memory_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([10_000, 10_000 + memory_module._TRIED - 64, 10_000, 10_000])
    monkeypatch.setattr(memory_module, "in_use", lambda: next(found))
    assert memory_module._is_counted.__wrapped__()
    assert not memory_module._is_counted.__wrapped__()  # the heap is another one's


def test_finite_differences_with_few_graphs() -> None:
    """A run long enough to be trained again in stretches, some of them twice."""
    loop = make_loop(make_problem("batch_norm"), 23)
    expected = finite_differences(loop, VALUES)
    state, graph = state_bytes(loop), graph_size(loop, VALUES).size
    for memory in (least_memory(23, state), 3 * (state + graph) + 4 * state):
        found = differentiate(loop, VALUES, "reverse", max_memory=int(memory))
        assert_close(found.hypergradients, expected, 1e-5)
        assert found.cost.gradients > 3 * 23
