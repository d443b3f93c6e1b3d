"""Inner runs replay to the same bits, can be saved anywhere, and leave global state alone."""

from __future__ import annotations

import copy
import gc
import io
import random
import subprocess
import sys
import weakref
from math import inf, isqrt
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_problems import MODES, assert_close, data, differentiate, double, make_loop, make_problem
from torch import Tensor, nn
from torch.utils.data import Dataset

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import InnerLoop, hypergradient_run
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.hypergradient import advance
from tune_hypergrad.hypergradients.keeping import Room
from tune_hypergrad.hypergradients.modes import Work, cheapest
from tune_hypergrad.hypergradients.replays import NotReplayedError
from tune_hypergrad.hypergradients.reverse import ReverseRun
from tune_hypergrad.hypergradients.run import HypergradientResult, HypergradientRun
from tune_hypergrad.outer import Descent, OnlineRun
from tune_hypergrad.space import Range

VALUES = {"lr": double(0.05, 0.02, 0.03), "beta1": double(0.8, 0.9)}


class Examples(Dataset[Any]):
    """Pairs one by one, with noise from every global generator where `augment` is set."""

    def __init__(self, tensors: tuple[Tensor, ...], augment: bool = False) -> None:
        self.tensors, self.augment = tensors, augment

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, position: int) -> tuple[Tensor, ...]:
        x, y = (tensor[position] for tensor in self.tensors)
        if self.augment:
            x = x + 0.3 * torch.randn(4) + 0.3 * random.random() + 0.3 * np.random.rand()
        return x, y


def random_problem(**fields: Any) -> Any:
    """BatchNorm and dropout on randomly augmented examples."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))

    return make_problem(model, train=Examples(data(), augment=True), **fields)


def assert_same_bits(a: HypergradientResult, b: HypergradientResult) -> None:
    assert a.val_loss == b.val_loss and a.metrics == b.metrics
    for first, second in ((a.hypergradients, b.hypergradients), (a.params, b.params), (a.buffers, b.buffers)):
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), name


class TestReplay:
    @pytest.mark.parametrize("mode", MODES)
    def test_a_seed_fixes_every_bit(self, mode: str) -> None:
        problem = random_problem()
        first = differentiate(make_loop(problem, optimizer="adam", seed=3), VALUES, mode)
        torch.rand(5), np.random.rand(5), random.random()
        again = differentiate(make_loop(problem, optimizer="adam", seed=3), VALUES, mode)
        other = differentiate(make_loop(problem, optimizer="adam", seed=4), VALUES, mode)
        assert_same_bits(first, again)
        assert first.val_loss != other.val_loss

    def test_modes_see_the_same_augmentation_and_dropout(self) -> None:
        problem = random_problem()
        forward, *others = (differentiate(make_loop(problem), {"lr": double(0.1, 0.2)}, mode) for mode in MODES)
        for other in others:
            assert_close(other.hypergradients, forward.hypergradients, 1e-9)

    def test_weights_order_and_augmentation_each_follow_the_seed(self) -> None:
        first, second = make_loop(seed=0), make_loop(seed=1)
        assert not torch.equal(first.initial_state().params, second.initial_state().params)
        assert not torch.equal(first.batches.of_step(0)[0], second.batches.of_step(0)[0])
        augmented = make_loop(make_problem(train=Examples(data(), augment=True), batch_size=12))
        assert torch.equal(augmented.batches.of_step(0)[0], augmented.batches.of_step(0)[0])
        assert not torch.equal(augmented.batches.of_step(0)[0], augmented.batches.of_step(1)[0])

    @pytest.mark.parametrize("mode", MODES)
    def test_global_generators_are_left_as_found(self, mode: str) -> None:
        def draw() -> tuple[float, float, float]:
            return float(torch.rand(1)), float(np.random.rand()), random.random()

        def seed() -> None:
            torch.manual_seed(0), np.random.seed(0), random.seed(0)

        seed()
        expected = draw()
        seed()
        differentiate(make_loop(random_problem()), {"lr": double(0.1)}, mode, val_examples=3)
        assert draw() == expected

    def test_generators_are_given_back_after_an_exception(self) -> None:
        state = torch.get_rng_state()
        with pytest.raises(ZeroDivisionError), make_loop().running():
            torch.manual_seed(99)
            raise ZeroDivisionError
        assert torch.equal(torch.get_rng_state(), state)

    def test_tensors_and_a_dataset_agree(self) -> None:
        results = [
            differentiate(make_loop(make_problem(train=train)), {"lr": double(0.1, 0.2)})
            for train in (data(), Examples(data()), torch.utils.data.TensorDataset(*data()))
        ]
        for result in results[1:]:
            assert_same_bits(result, results[0])


class TestBatches:
    @pytest.mark.parametrize("train", [data(), Examples(data())], ids=["tensors", "dataset"])
    def test_the_splits_length_means_full_batch(self, train: Any) -> None:
        loop = make_loop(make_problem(train=train, batch_size=12))
        for step in range(3):
            assert torch.equal(loop.batches.of_step(step)[0], data()[0])

    def test_an_epoch_takes_every_example_once(self) -> None:
        loop = make_loop(make_problem(batch_size=4))
        epochs = [torch.cat([loop.batches.of_step(3 * epoch + step)[0] for step in range(3)]) for epoch in range(2)]
        for epoch in epochs:
            assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, data()[0].tolist()))
        assert not torch.equal(*epochs)

    def test_an_incomplete_last_batch_is_dropped(self) -> None:
        loop = make_loop(make_problem(batch_size=5))
        assert [len(loop.batches.of_step(step)[0]) for step in range(5)] == [5] * 5

    def test_evaluation_does_not_depend_on_its_batch_size(self) -> None:
        losses, gradients = [], []
        for size in (1, 4, 6, 1000):
            loop = make_loop(make_problem(eval_batch_size=size))
            with loop.running():
                evaluation = loop.evaluate(loop.initial_state(), gradient=True)
            losses.append(evaluation.loss)
            gradients.append(evaluation.gradient)
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)
        for gradient in gradients:
            torch.testing.assert_close(gradient, gradients[0], rtol=1e-12, atol=1e-14)

    def test_metrics_are_means_over_the_split(self) -> None:
        def accuracy(output: Tensor, target: Tensor) -> Tensor:
            return (output.argmax(1) == target).double().mean()

        loop = make_loop(make_problem(metrics={"accuracy": accuracy}, eval_batch_size=4))
        result = differentiate(loop, {"lr": double(0.3)})
        x, y = data(examples=6, seed=1)
        output = torch.func.functional_call(loop.model, result.params, x)
        assert result.metrics["accuracy"] == pytest.approx(float(accuracy(output, y)))
        assert result.val_loss == pytest.approx(float(F.cross_entropy(output, y)))

    def test_a_missing_split_is_refused(self) -> None:
        loop = make_loop()
        with pytest.raises(InputError, match="the problem has no test split"):
            loop.evaluate(loop.initial_state(), "test")


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


class TestSaving:
    steps = 6

    def loop(self, problem: Any) -> InnerLoop:
        return make_loop(problem, self.steps, "adam")

    @pytest.mark.parametrize("horizon", [None, 2])
    @pytest.mark.parametrize("mode", MODES)
    def test_at_every_position(self, mode: str, horizon: int | None) -> None:
        problem = random_problem()
        whole = differentiate(self.loop(problem), VALUES, mode, horizon=horizon)
        run = hypergradient_run(self.loop(problem), VALUES, differentiation=mode, horizon=horizon)
        for position in range(run.length + 1):
            assert run.position == position
            saved = run.state_dict()
            other = {name: torch.full_like(value, 0.5) for name, value in VALUES.items()}
            resumed = hypergradient_run(self.loop(problem), other, differentiation=mode, horizon=horizon)
            resumed.load_state_dict(through_a_file(saved))
            with resumed.loop.running():
                assert resumed.advance(run.length) == run.length - position
            assert resumed.done
            assert_same_bits(resumed.result(), whole)
            # neither going on nor resuming changes what was saved
            before = through_a_file(saved)
            resumed.load_state_dict(saved)
            with resumed.loop.running():
                resumed.advance(run.length)
            with run.loop.running():
                run.advance(1)
            assert_same_state(saved, before)
        assert run.done
        assert_same_bits(run.result(), whole)

    @pytest.mark.parametrize("mode", MODES)
    def test_cost_goes_on_adding_up(self, mode: str) -> None:
        problem = random_problem()
        whole = differentiate(self.loop(problem), VALUES, mode)
        run = hypergradient_run(self.loop(problem), VALUES, differentiation=mode)
        with run.loop.running():
            run.advance(3)
            assert 0 < run.cost.gradients < whole.cost.gradients
            resumed = hypergradient_run(self.loop(problem), VALUES, differentiation=mode)
            resumed.load_state_dict(through_a_file(run.state_dict()))
            resumed.advance(resumed.length)
        assert resumed.cost.gradients >= whole.cost.gradients
        assert resumed.cost.examples == 4 * resumed.cost.steps

    @pytest.mark.parametrize(("horizon", "steps"), [(1, 6), (2, 6), (4, 6)])
    def test_online_runs(self, horizon: int, steps: int) -> None:
        problem = random_problem()

        def online() -> OnlineRun:
            ranges = {"lr": Range(1, 1e-4, 1.0, scale="log"), "beta1": Range(1, 0.0, 0.99)}
            initial = {"lr": double(0.02), "beta1": double(0.7)}
            descent = Descent(ranges, initial=initial, update="adam", default_step=0.05)
            return OnlineRun(make_loop(problem, steps, "adam"), descent, horizon=horizon, val_examples=4)

        def finish(run: OnlineRun) -> tuple[Any, HypergradientResult]:
            with run.loop.running():
                run.advance(steps)
            return (run.history, run.descent.state_dict(), run.last_hypergradients), run.run.result()

        expected_path, expected = finish(online())
        assert len(set(expected_path[0]["lr"])) == -(-steps // horizon)
        run = online()
        for position in range(steps + 1):
            saved = run.state_dict()
            before = through_a_file(saved)
            for state in (through_a_file(saved), saved):
                resumed = online()
                resumed.load_state_dict(state)
                path, result = finish(resumed)
                assert_same_bits(result, expected)
                assert_same_state(path, expected_path)
            assert_same_state(saved, before)
            with run.loop.running():
                assert run.advance(1) == int(position < steps)


def assert_same_state(a: Any, b: Any) -> None:
    """Nested containers equal to the bit."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert_same_state(list(a.values()), list(b.values()))
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for first, second in zip(a, b, strict=True):
            assert_same_state(first, second)
    else:
        assert a == b


class TestOnline:
    def test_hypergradient_descent_by_the_one_step_formula(self) -> None:
        """lr <- lr + s g_val(w') . v with plain gradient descent on the learning rate."""
        problem, steps, step_size = make_problem(batch_size=12), 5, 0.3
        loop = make_loop(problem, steps, fixed={"momentum": 0.5})
        descent = Descent(
            {"lr": Range(1, 0.0, 10.0)}, initial={"lr": double(0.1)}, step_sizes={"lr": step_size}, update="sgd"
        )
        run = OnlineRun(loop, descent)
        model = copy.deepcopy(loop.model)

        def gradient(split: Any) -> Tensor:
            loss = F.cross_entropy(model(split.tensors[0]), split.tensors[1])
            return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])

        lr, v, expected = 0.1, torch.zeros(loop.size, dtype=torch.float64), []
        for _ in range(steps):
            expected.append(lr)
            v = 0.5 * v + gradient(problem.train)
            w = nn.utils.parameters_to_vector(model.parameters()) - lr * v
            nn.utils.vector_to_parameters(w.detach(), model.parameters())
            lr += step_size * float(gradient(problem.val) @ v)
        with loop.running():
            assert run.advance(2) == 2 and run.advance(100) == 3
        assert run.history["lr"] == pytest.approx(expected, rel=1e-10)
        assert float(run.descent.values["lr"]) == pytest.approx(lr, rel=1e-10)

    def test_several_windows_are_refused(self) -> None:
        descent = Descent({"lr": Range(3, 0.0, 1.0)})
        with pytest.raises(InputError, match="'lr' has 3 windows: online descent makes its own schedule"):
            OnlineRun(make_loop(), descent)


class TestMemory:
    @pytest.mark.parametrize("steps", [1, 2, 5, 16, 17, 50])
    def test_states_kept_grow_with_the_root_of_steps(self, steps: int) -> None:
        peak = self.peak(steps, keep_all=False)
        assert peak <= 2 * (isqrt(steps) + 1) + 2
        assert self.peak(steps, keep_all=True) == steps

    @staticmethod
    def peak(steps: int, keep_all: bool) -> int:
        run = ReverseRun(make_loop(steps=steps), {"lr": double(0.1)}, keep_all=keep_all)
        peak = 0
        with run.loop.running():
            while not run.done:
                run.advance(1)
                peak = max(peak, len(run._kept))
                assert len(run.state_dict()["kept"]) <= isqrt(steps) + 2
        return peak

    def test_recomputed_steps_are_charged(self) -> None:
        kept, recomputed = (
            differentiate(make_loop(steps=16), {"lr": double(0.1)}, mode)
            for mode in ("reverse", "checkpointed_reverse")
        )
        assert kept.cost.steps == 16
        assert 16 < recomputed.cost.steps <= 32


class TestRejected:
    """`reject_above`: a run that is not worth it is not differentiated, and otherwise nothing is changed."""

    steps = 16

    def run_of(self, mode: str, limit: float, problem: Any = None, **arguments: Any) -> HypergradientRun:
        loop = make_loop(problem or random_problem(), self.steps, "adam")
        return hypergradient_run(loop, VALUES, differentiation=mode, reject_above=limit, **arguments)

    def finished(self, run: HypergradientRun) -> HypergradientRun:
        with run.loop.running():
            run.advance(run.length)
        assert run.done
        return run

    @pytest.mark.parametrize("horizon", [None, 3])
    @pytest.mark.parametrize("mode", MODES)
    def test_an_accepted_run_is_the_same_to_the_bit(self, mode: str, horizon: int | None) -> None:
        problem = random_problem()
        free = self.finished(self.run_of(mode, inf, problem, horizon=horizon))
        assert not free.rejected and free.final is not None
        for limit in (free.final.loss, 2 * free.final.loss):  # up to the loss itself
            accepted = self.finished(self.run_of(mode, limit, problem, horizon=horizon))
            assert not accepted.rejected
            assert_same_bits(accepted.result(), free.result())
            assert accepted.cost == free.cost

    @pytest.mark.parametrize("val_examples", [None, 3])
    @pytest.mark.parametrize("horizon", [None, 3])
    @pytest.mark.parametrize("mode", MODES)
    def test_a_rejected_one_has_the_loss_and_no_derivatives(
        self, mode: str, horizon: int | None, val_examples: int | None
    ) -> None:
        problem, arguments = random_problem(), {"horizon": horizon, "val_examples": val_examples}
        free = self.finished(self.run_of(mode, inf, problem, **arguments)).result()
        rejected = self.finished(self.run_of(mode, np.nextafter(free.val_loss, 0), problem, **arguments))
        result = rejected.result()
        assert rejected.rejected and result.val_loss == free.val_loss and result.metrics == free.metrics
        for name, gradient in result.hypergradients.items():
            assert gradient.shape == free.hypergradients[name].shape and bool(gradient.isnan().all())
        for name, trained in result.params.items():
            assert torch.equal(trained, free.params[name])

    @pytest.mark.parametrize("mode", ["reverse", "checkpointed_reverse"])
    def test_it_costs_one_training_and_its_evaluation(self, mode: str) -> None:
        # as many validation examples as two batches: a run's share that gets the smaller the longer it is
        rejected = self.finished(self.run_of(mode, 0.0))
        assert rejected.cost.steps == self.steps and not rejected._kept  # type: ignore[attr-defined]
        evaluation = rejected.loop.costs.evaluation("val", gradient=True).gradients
        assert rejected.cost.gradients == pytest.approx(self.steps + evaluation)
        assert rejected.cost.gradients <= 1.2 * self.steps

    @pytest.mark.parametrize("mode", MODES)
    def test_minus_infinity_is_plain_training(self, mode: str) -> None:
        problem = random_problem()
        free = self.finished(self.run_of(mode, inf, problem)).result()
        run = self.run_of(mode, -inf, problem)
        plain = self.finished(run).result()
        assert run.rejected and plain.val_loss == pytest.approx(free.val_loss, rel=1e-9)
        assert plain.val_loss == free.val_loss or mode == "forward"  # whose tangents are added up in another order
        assert all(bool(gradient.isnan().all()) for gradient in plain.hypergradients.values())
        assert plain.cost.gradients == pytest.approx(self.steps + run.loop.costs.evaluation("val").gradients)
        assert plain.cost.hypergradients == 0

    def test_what_may_be_rejected_is_differentiated_by_reverse_mode(self) -> None:
        """Forward mode, which is cheaper for one number, has paid for all before it knows the loss."""
        values = {"lr": double(0.05)}
        modes = {}
        for limit in (inf, 1e9, 0.0):
            run = hypergradient_run(make_loop(random_problem(), self.steps), values, reject_above=limit)
            modes[limit] = run.differentiation
            assert (run.reason == "a rejected run is not gone back through") == (limit < inf)
        assert modes == {inf: "forward", 1e9: "reverse", 0.0: "reverse"}
        asked = hypergradient_run(make_loop(steps=4), values, differentiation="forward", reject_above=0.0)
        assert asked.differentiation == "forward"
        assert cheapest(Work((1,), 16, 100, may_be_rejected=True), 0).mode.name == "checkpointed_reverse"
        refused = cheapest(Work((1,), 16, 1, may_be_rejected=True), 99, {"reverse": "it cannot"})
        assert (refused.mode.name, refused.reason) == ("forward", "it cannot")

    def test_plain_training_asks_for_no_derivative_of_the_model(self) -> None:
        """What cannot be differentiated twice can still be trained to confirm a schedule."""

        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return 2 * x

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, gradient: Tensor) -> Any:
                return 2 * gradient

        class Model(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return Once.apply(super().forward(x))

        loop = make_loop(make_problem(lambda: Model(4, 3)), 4)
        run = self.finished(hypergradient_run(loop, {"lr": double(0.1)}, reject_above=-inf))
        assert run.final is not None and run.final.loss < 5

    @pytest.mark.parametrize("mode", MODES)
    def test_a_run_that_diverged_is_rejected_without_a_limit(self, mode: str) -> None:
        loop = make_loop(make_problem(batch_size=12), 4, fixed={"weight_decay": 1e200})
        values = {"lr": double(1e200)}
        run = self.finished(hypergradient_run(loop, values, differentiation=mode))
        assert run.rejected and bool(run.hypergradients["lr"].isnan().all())

    @pytest.mark.parametrize("limit", [-inf, 0.0, inf])
    @pytest.mark.parametrize("mode", MODES)
    def test_saved_at_every_position(self, mode: str, limit: float) -> None:
        problem = random_problem()
        whole = self.finished(self.run_of(mode, limit, problem)).result()
        run = self.run_of(mode, limit, problem)
        while True:
            resumed = self.run_of(run.differentiation, limit, problem)
            resumed.load_state_dict(through_a_file(run.state_dict()))
            result = self.finished(resumed).result()
            assert result.val_loss == whole.val_loss and result.hypergradients.keys() == whole.hypergradients.keys()
            for name, gradient in result.hypergradients.items():
                assert torch.equal(gradient.nan_to_num(7.0), whole.hypergradients[name].nan_to_num(7.0))
            if run.done:
                break
            with run.loop.running():
                run.advance(3)

    def test_plain_training_is_resumed_whatever_the_mode_was_that_was_asked_for(self) -> None:
        """Clipped Hessian products are for forward mode only, and plain training has none."""
        problem, clipped = random_problem(), {"clip_hessian_product": 0.1}
        run = self.run_of("auto", -inf, problem, **clipped)
        with run.loop.running():
            run.advance(5)
        resumed = self.run_of(run.differentiation, -inf, problem, **clipped)
        resumed.load_state_dict(through_a_file(run.state_dict()))
        assert self.finished(resumed).result().val_loss == self.finished(run).result().val_loss
        with pytest.raises(InputError, match="defined for forward mode only"):
            self.run_of("reverse", inf, problem, **clipped)


@pytest.mark.parametrize("mode", MODES)
def test_advance_stops_where_told(mode: str) -> None:
    run = hypergradient_run(make_loop(), {"lr": double(0.1)}, differentiation=mode)
    with run.loop.running():
        assert run.advance(2) == 2
        assert run.position == 2 and not run.done
        assert run.advance(1000) == run.length - 2
        assert run.done and run.advance(1) == 0
    assert_same_bits(run.result(), differentiate(make_loop(), {"lr": double(0.1)}, mode))


def test_the_engine_imports_without_ray() -> None:
    code = "import sys, tune_hypergrad.hypergradients; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_loop_and_its_data_go_when_the_last_run_does(mode: str) -> None:
    """Not when garbage is collected: a search makes a loop for every outer step."""
    loop = make_loop()
    run = hypergradient_run(loop, {"lr": double(0.1, 0.2)}, differentiation=mode)
    with loop.running():
        run.advance(run.length)
    run.result()
    left = [weakref.ref(loop), weakref.ref(loop.batches), weakref.ref(run)]
    gc.collect()
    gc.disable()
    try:
        del loop, run
        assert [each() for each in left] == [None, None, None]
    finally:
        gc.enable()


class TakesMemory(ReverseRun):
    """A run whose third step fails with something in memory."""

    held: ClassVar[list[Any]] = []

    def _advance_one(self) -> None:
        if self.position == 2:
            working = torch.ones(1)
            self.held.append(weakref.ref(working))
            raise NotReplayedError("another step")
        super()._advance_one()


def test_a_run_that_begins_instead_has_the_memory_of_the_one_that_cannot_go_on() -> None:
    loop, values = make_loop(make_problem(), 4), {"lr": double(0.1)}
    run = TakesMemory(loop, values, room=Room(1 << 30, 1))
    found: list[Any] = []

    def begin() -> HypergradientRun:
        found.extend((TakesMemory.held[-1](), len(run._kept), run.cost.steps))
        return ForwardRun(loop, values)

    with loop.running():
        assert advance(run, 2, begin) is run and len(run._kept) == 2
        other = advance(run, 2, begin)
    assert found == [None, 0, 2]
    assert isinstance(other, ForwardRun) and other.cost.steps == 2
