"""Hypergradients are exact: against finite differences, a hand-derived recursion, and each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_problems import MODES, TOKENS, Values, assert_close, differentiate, double, make_loop, make_problem, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import OPTIMIZERS, InnerLoop, hypergradient, hypergradient_run
from tune_hypergrad.hypergradients.check import finite_differences
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.modes import MODES as BY_NAME
from tune_hypergrad.hypergradients.modes import Reverse, Work, cheapest, state_bytes

# every hyperparameter of every optimizer, with different numbers of windows; 5 steps, so most divide unevenly
TUNED: dict[str, Values] = {
    "sgd": {
        "lr": double(0.1, 0.3, 0.2),
        "momentum": double(0.9, 0.6),
        "dampening": double(0.1, 0.2, 0.05, 0.3),
        "weight_decay": double(0.02),
    },
    "nesterov": {
        "lr": double(0.1, 0.3, 0.2, 0.1),
        "momentum": double(0.8, 0.6, 0.7),
        "dampening": double(0.1),
        "weight_decay": double(0.02, 0.1),
    },
    "adam": {
        "lr": double(0.03, 0.05, 0.02),
        "beta1": double(0.8, 0.6),
        "beta2": double(0.95, 0.9, 0.8, 0.9, 0.7),
        "eps": double(1e-3, 2e-3),
        "weight_decay": double(0.02),
    },
    "adamw": {
        "lr": double(0.03, 0.05),
        "beta1": double(0.8, 0.6, 0.7),
        "beta2": double(0.9),
        "eps": double(1e-3, 2e-3, 1e-3, 3e-3),
        "weight_decay": double(0.1, 0.3, 0.2),
    },
    "rmsprop": {
        "lr": double(0.01, 0.02, 0.03, 0.01),
        "alpha": double(0.9, 0.8),
        "eps": double(1e-3, 2e-3, 3e-3),
        "momentum": double(0.5, 0.3),
        "weight_decay": double(0.05),
    },
    "lion": {"lr": double(0.03, 0.05), "weight_decay": double(0.1, 0.3, 0.2)},
    "schedule_free_adamw": {
        "lr": double(0.03, 0.05),
        "beta1": double(0.8, 0.6, 0.7),
        "beta2": double(0.9, 0.8),
        "eps": double(1e-3, 2e-3, 1e-3, 3e-3),
        "weight_decay": double(0.1, 0.3, 0.2),
    },
    "adafactor": {
        "lr": double(0.03, 0.05),
        "beta2_decay": double(-0.8, -0.5, -0.6),
        "eps2": double(2.0, 1e-3),
        "d": double(0.3, 0.2),
        "weight_decay": double(0.1, 0.3, 0.2),
    },
}
NOTHING_TO_SEE = {"lion": {"beta1", "beta2"}}
"""Hyperparameters that only act through a sign, whose derivative is 0."""


def full_batch(factory: Any = mlp, **fields: Any) -> Any:
    return make_problem(factory, batch_size=12, **fields)


class TestAgainstFiniteDifferences:
    def test_every_hyperparameter_is_covered(self) -> None:
        assert {name: {*values, *NOTHING_TO_SEE.get(name, ())} for name, values in TUNED.items()} == {
            name: set(optimizer.hyperparameters) for name, optimizer in OPTIMIZERS.items()
        }

    @pytest.mark.parametrize("optimizer", TUNED)
    def test_optimizers(self, optimizer: str) -> None:
        loop = make_loop(optimizer=optimizer)
        expected = finite_differences(loop, TUNED[optimizer])
        results = {mode: differentiate(loop, TUNED[optimizer], mode) for mode in MODES}
        for result in results.values():
            assert_close(result.hypergradients, expected, 1e-5)
            assert_close(result.hypergradients, results["forward"].hypergradients, 1e-9)
            assert result.val_loss == pytest.approx(results["forward"].val_loss, rel=1e-12)

    @pytest.mark.parametrize("horizon", [2, 3])
    @pytest.mark.parametrize("optimizer", TUNED)
    def test_modes_agree_on_truncated_hypergradients(self, optimizer: str, horizon: int) -> None:
        loop = make_loop(optimizer=optimizer)
        forward, *others = (differentiate(loop, TUNED[optimizer], mode, horizon=horizon) for mode in MODES)
        for other in others:
            assert_close(other.hypergradients, forward.hypergradients, 1e-9)

    @pytest.mark.parametrize(
        ("optimizer", "torch_class", "options"),
        [
            ("sgd", torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.05}),
            ("nesterov", torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.05, "nesterov": True}),
            ("adam", torch.optim.Adam, {"eps": 1e-3, "weight_decay": 0.05}),
            ("adamw", torch.optim.AdamW, {"eps": 1e-3, "weight_decay": 0.05}),
            ("rmsprop", torch.optim.RMSprop, {"eps": 1e-3, "alpha": 0.9, "momentum": 0.5, "weight_decay": 0.05}),
        ],
    )
    def test_plain_torch_training(self, optimizer: str, torch_class: Any, options: dict[str, Any]) -> None:
        """Differences of a training loop that is torch's own, with none of the engine's code."""
        problem, steps, epsilon = full_batch(), 6, 1e-6
        fixed = {name: value for name, value in options.items() if name not in ("weight_decay", "nesterov")}
        loop = make_loop(problem, steps, optimizer, fixed=fixed)
        (x, y), (x_val, y_val) = problem.train.tensors, problem.val.tensors
        values = {"lr": [0.05, 0.1], "weight_decay": [0.05, 0.02, 0.04]}

        def val_loss(values: dict[str, list[float]]) -> float:
            model = copy.deepcopy(loop.model)
            theirs = torch_class(model.parameters(), lr=0.1, **options)
            for step in range(steps):
                for name, windows in values.items():
                    theirs.param_groups[0][name] = windows[len(windows) * step // steps]
                theirs.zero_grad()
                F.cross_entropy(model(x), y).backward()
                theirs.step()
            return float(F.cross_entropy(model(x_val), y_val).detach())

        expected: Values = {}
        for name, windows in values.items():
            expected[name] = torch.zeros(len(windows), dtype=torch.float64)
            for window in range(len(windows)):
                losses = [
                    val_loss({**values, name: [v + shift * (w == window) for w, v in enumerate(windows)]})
                    for shift in (epsilon, -epsilon)
                ]
                expected[name][window] = (losses[0] - losses[1]) / (2 * epsilon)
        for mode in MODES:
            result = differentiate(loop, {name: double(*windows) for name, windows in values.items()}, mode)
            assert result.val_loss == pytest.approx(val_loss(values), rel=1e-10)
            assert_close(result.hypergradients, expected, 1e-5)

    def test_what_acts_through_a_sign_has_a_derivative_of_zero(self) -> None:
        loop, values = make_loop(optimizer="lion"), {"beta1": double(0.9), "beta2": double(0.95)}
        for mode in MODES:
            assert differentiate(loop, values, mode).hypergradients == values.fromkeys(values, double(0.0))

    @pytest.mark.parametrize("mode", MODES)
    def test_clipped_gradients(self, mode: str) -> None:
        loop = make_loop(clip_gradient=0.05)
        values = {"lr": double(0.3, 0.5), "momentum": double(0.5, 0.7, 0.6)}
        unclipped = differentiate(make_loop(), values, mode)
        result = differentiate(loop, values, mode)
        assert result.val_loss != unclipped.val_loss
        assert_close(result.hypergradients, finite_differences(loop, values), 1e-5)

    @pytest.mark.parametrize("mode", MODES)
    def test_train_loss_linear_in_the_weights(self, mode: str) -> None:
        """No curvature at all: nothing to differentiate twice."""

        def true_class(output: Tensor, target: Tensor, *, scale: float = 1.0) -> Tensor:
            return -scale * output.gather(1, target[:, None]).mean()

        loop = make_loop(make_problem(lambda: nn.Linear(4, 3), train_loss=true_class))
        values = {"lr": double(0.1, 0.2), "scale": double(1.0, 0.5, 0.7)}
        assert_close(differentiate(loop, values, mode).hypergradients, finite_differences(loop, values), 1e-5)


def smoothed(output: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
    log_probabilities = output.log_softmax(1)
    uniform = -log_probabilities.mean()
    return (1 - smoothing) * F.nll_loss(log_probabilities, target) + smoothing * uniform


def penalised(output: Tensor, target: Tensor, *, l2_first: float, l2_last: float = 0.1, params: Any = None) -> Tensor:
    names = list(params)
    return (
        F.cross_entropy(output, target)
        + l2_first * params[names[0]].square().sum()
        + l2_last * params[names[-2]].square().sum()
    )


def weighted(output: Tensor, target: Tensor, *, rare: float = 1.0, temperature: float = 1.0) -> Tensor:
    losses = F.cross_entropy(output / temperature, target, reduction="none")
    return torch.where(target == 0, rare * losses, losses).mean()


class TestTrainLossHyperparameters:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    @pytest.mark.parametrize(
        ("train_loss", "values"),
        [
            (smoothed, {"smoothing": double(0.1, 0.2, 0.05)}),
            (penalised, {"l2_first": double(0.01, 0.03), "l2_last": double(0.02)}),
            (weighted, {"rare": double(2.0, 0.5), "temperature": double(1.0, 1.5, 0.7)}),
        ],
        ids=["label smoothing", "L2 per layer", "loss weight"],
    )
    def test_finite_differences(self, train_loss: Any, values: Values, optimizer: str, mode: str) -> None:
        fixed = {"eps": 1e-3} if optimizer == "adam" else {"momentum": 0.5}
        loop = make_loop(make_problem(train_loss=train_loss), optimizer=optimizer, fixed=fixed)
        values = {**values, "lr": double(0.1, 0.05)}
        assert_close(differentiate(loop, values, mode).hypergradients, finite_differences(loop, values), 1e-5)

    @pytest.mark.parametrize("mode", MODES)
    def test_greedy_sees_the_train_loss_too(self, mode: str) -> None:
        loop = make_loop(make_problem(train_loss=smoothed), steps=4)
        values = {"smoothing": double(0.1, 0.2, 0.3, 0.4)}
        result = differentiate(loop, values, mode, horizon=1)
        assert_close(result.hypergradients, segment_differences(loop, values, horizon=1), 1e-5)

    def test_the_validation_loss_does_not_see_them(self) -> None:
        problem = make_problem(train_loss=smoothed)
        loop = make_loop(problem, steps=1)
        result = differentiate(loop, {"lr": double(1e-12), "smoothing": double(0.9)})
        with torch.no_grad():
            output = loop.model.eval()(problem.val.tensors[0])
        assert result.val_loss == pytest.approx(float(F.cross_entropy(output, problem.val.tensors[1])))


class TestAgainstTheSgdRecursion:
    """Micaelli & Storkey 2021, Equation 4: tangents of SGD by hand, with an explicit Hessian."""

    @pytest.mark.parametrize("mode", MODES)
    def test_momentum_and_weight_decay(self, mode: str) -> None:
        problem, steps = full_batch(), 7
        loop = make_loop(problem, steps)
        values = {
            "lr": double(0.3, 0.1, 0.2),
            "momentum": double(0.9, 0.5),
            "weight_decay": double(0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07),
        }
        assert_close(differentiate(loop, values, mode).hypergradients, self.recursion(loop, values), 1e-9)

    @staticmethod
    def recursion(loop: InnerLoop, values: Values) -> Values:
        problem, model = loop.problem, loop.model
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

        def loss(w: Tensor, split: Any) -> Tensor:
            chunks = w.split([shape.numel() for shape in shapes.values()])
            named = {name: chunk.view(shape) for (name, shape), chunk in zip(shapes.items(), chunks, strict=True)}
            return F.cross_entropy(functional_call(model, named, split.tensors[0]), split.tensors[1])

        gradient = torch.func.grad(loss)
        w = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        v = torch.zeros_like(w)
        columns = [(name, window) for name in values for window in range(len(values[name]))]
        z = {column: torch.zeros_like(w) for column in columns}
        c = {column: torch.zeros_like(w) for column in columns}
        for step in range(loop.steps):
            active = {name: len(windows) * step // loop.steps for name, windows in values.items()}
            a, b, x = (values[name][active[name]] for name in ("lr", "momentum", "weight_decay"))
            h = hessian(loss)(w, problem.train)
            v_previous, v = v, b * v + gradient(w, problem.train) + x * w
            for column in columns:
                d = e = torch.zeros_like(w)
                if column[1] == active[column[0]]:
                    if column[0] == "lr":
                        d = -v
                    elif column[0] == "momentum":
                        d, e = -a * v_previous, v_previous
                    else:
                        d, e = -a * w, w
                z_old, hz = z[column], h @ z[column]
                z[column] = (1 - a * x) * z_old - a * hz - a * b * c[column] + d
                c[column] = b * c[column] + hz + x * z_old + e
            w = w - a * v
        val_gradient = gradient(w, problem.val)
        return {
            name: torch.stack([val_gradient @ z[name, window] for window in range(len(windows))])
            for name, windows in values.items()
        }


def segment_differences(loop: InnerLoop, values: Values, horizon: int, epsilon: float = 1e-6) -> Values:
    """Finite differences within every segment by itself: the state that it begins with is held constant."""
    differences = {name: torch.zeros_like(windows) for name, windows in values.items()}
    with loop.running():
        start = loop.initial_state()
        for begin in range(0, loop.steps, horizon):
            end = min(begin + horizon, loop.steps)

            def run(values: Values, start: Any = start, steps: range = range(begin, end)) -> Any:
                state = start
                for step in steps:
                    state = loop.step(state, loop.scalars(values, step), step)
                return state

            for name, windows in values.items():
                for window in range(len(windows)):
                    losses = []
                    for shift in (epsilon, -epsilon):
                        moved = windows.clone()
                        moved[window] += shift
                        losses.append(loop.evaluate(run({**values, name: moved})).loss)
                    differences[name][window] += (losses[0] - losses[1]) / (2 * epsilon)
            start = run(values)
    return differences


class TestHorizons:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("horizon", [2, 3, 4, 6])
    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    def test_truncated_is_a_sum_over_segments(self, optimizer: str, horizon: int, mode: str) -> None:
        fixed = {"eps": 1e-3} if optimizer == "adam" else {"momentum": 0.7}
        loop = make_loop(steps=7, optimizer=optimizer, fixed=fixed)
        values = {"lr": double(0.1, 0.2, 0.05), "weight_decay": double(0.1, 0.05)}
        expected = segment_differences(loop, values, horizon)
        assert_close(differentiate(loop, values, mode, horizon=horizon).hypergradients, expected, 1e-5)

    @pytest.mark.parametrize("mode", MODES)
    def test_greedy_is_the_one_step_formula(self, mode: str) -> None:
        """-g_val(w') . v for the learning rate, -a g_val(w') . v_previous for the momentum."""
        problem, steps = full_batch(), 4
        loop = make_loop(problem, steps)
        values = {"lr": double(0.3, 0.2, 0.1, 0.4), "momentum": double(0.9, 0.5)}
        model = copy.deepcopy(loop.model)

        def gradient(split: Any) -> Tensor:
            loss = F.cross_entropy(model(split.tensors[0]), split.tensors[1])
            return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])

        expected = {name: torch.zeros_like(windows) for name, windows in values.items()}
        v = torch.zeros(loop.size, dtype=torch.float64)
        for step in range(steps):
            lr, momentum = values["lr"][step], values["momentum"][step // 2]
            v_previous, v = v, momentum * v + gradient(problem.train)
            w = nn.utils.parameters_to_vector(model.parameters()) - lr * v
            nn.utils.vector_to_parameters(w.detach(), model.parameters())
            val_gradient = gradient(problem.val)
            expected["lr"][step] += -(val_gradient @ v)
            expected["momentum"][step // 2] += -lr * (val_gradient @ v_previous)
        assert_close(differentiate(loop, values, mode, horizon=1).hypergradients, expected, 1e-10)

    def test_whole_run_is_the_default(self) -> None:
        values = {"lr": double(0.1, 0.2)}
        assert_close(
            differentiate(make_loop(), values, horizon=5).hypergradients,
            differentiate(make_loop(), values).hypergradients,
            0.0,
        )

    @pytest.mark.parametrize("horizon", [1, 2, None])
    def test_sampled_validation_examples(self, horizon: int | None) -> None:
        """Modes draw the same examples; the validation loss is still that of the whole split."""
        values = {"lr": double(0.1, 0.2, 0.05)}
        results = [differentiate(make_loop(), values, mode, horizon=horizon, val_examples=3) for mode in MODES]
        whole = differentiate(make_loop(), values, horizon=horizon)
        for result in results:
            assert_close(result.hypergradients, results[0].hypergradients, 1e-9)
            assert result.val_loss == pytest.approx(whole.val_loss, rel=1e-12)
        assert not torch.allclose(results[0].hypergradients["lr"], whole.hypergradients["lr"])


class TestWindows:
    @given(steps=st.integers(1, 60), share=st.floats(0, 1))
    def test_step_t_uses_element_floor_of_n_t_over_t(self, steps: int, share: float) -> None:
        count = 1 + round(share * (steps - 1))
        loop = make_loop(steps=steps)
        used = [int(loop.scalars({"lr": torch.arange(count)}, step)["lr"]) for step in range(steps)]
        assert used == [(count * step) // steps for step in range(steps)]
        lengths = [used.count(window) for window in range(count)]
        assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1

    @settings(max_examples=15, deadline=None)
    @given(data=st.data(), steps=st.integers(1, 8), mode=st.sampled_from(MODES))
    def test_a_window_gets_the_sum_of_its_steps(self, data: st.DataObject, steps: int, mode: str) -> None:
        count = data.draw(st.integers(1, steps))
        horizon = data.draw(st.integers(1, steps))
        loop = make_loop(steps=steps, fixed={"momentum": 0.5})
        windows = torch.linspace(0.1, 0.3, count, dtype=torch.float64)
        window_of = torch.tensor([count * step // steps for step in range(steps)])
        by_step = differentiate(loop, {"lr": windows[window_of]}, horizon=horizon).hypergradients["lr"]
        expected = torch.zeros_like(windows).index_add(0, window_of, by_step)
        actual = differentiate(loop, {"lr": windows}, mode, horizon=horizon).hypergradients["lr"]
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("columns_at_once", [1, 2, 3, 16])
    def test_columns_may_be_carried_in_chunks(self, columns_at_once: int) -> None:
        values = {"lr": double(0.1, 0.2, 0.3, 0.1, 0.2), "momentum": double(0.5, 0.7, 0.6)}
        loop = make_loop(make_problem("dropout"))
        run = ForwardRun(loop, values, columns_at_once=columns_at_once)
        with loop.running():
            run.advance(run.length)
        assert_close(run.result().hypergradients, differentiate(loop, values, "reverse").hypergradients, 1e-9)


class TestClippedHessianProducts:
    values = {"lr": double(0.1, 0.2), "momentum": double(0.5, 0.7)}  # noqa: RUF012

    def test_a_huge_limit_changes_nothing(self) -> None:
        clipped = differentiate(make_loop(), self.values, clip_hessian_product=1e9)
        assert_close(clipped.hypergradients, differentiate(make_loop(), self.values).hypergradients, 0.0)

    def test_a_small_limit_changes_hypergradients_but_not_the_weights(self) -> None:
        clipped = differentiate(make_loop(), self.values, clip_hessian_product=1e-3)
        exact = differentiate(make_loop(), self.values)
        assert clipped.val_loss == exact.val_loss
        assert not torch.allclose(clipped.hypergradients["lr"], exact.hypergradients["lr"])

    def test_a_vanishing_limit_leaves_the_update_alone(self) -> None:
        """Without curvature, SGD's weights move by -v for each unit of learning rate."""
        loop = make_loop(full_batch(), steps=3)
        result = differentiate(loop, {"lr": double(0.2)}, clip_hessian_product=1e-30)
        with loop.running():
            state, travelled = loop.initial_state(), 0
            for step in range(3):
                gradient = loop.training(state, {}, step).gradient
                travelled = travelled - gradient
                state = loop.step(state, {"lr": 0.2}, step)
            val_gradient = loop.evaluate(state, gradient=True).gradient
        assert float(result.hypergradients["lr"]) == pytest.approx(float(val_gradient @ travelled), rel=1e-10)

    def test_auto_takes_forward(self) -> None:
        run = hypergradient_run(make_loop(), self.values, clip_hessian_product=1.0)
        assert run.differentiation == "forward" and "forward mode only" in run.reason

    @pytest.mark.parametrize("mode", ["reverse", "checkpointed_reverse"])
    def test_reverse_is_refused(self, mode: str) -> None:
        with pytest.raises(InputError, match=r"forward mode only: drop it, or use forward$"):
            hypergradient_run(make_loop(), self.values, differentiation=mode, clip_hessian_product=1.0)


class TestChoiceOfMode:
    @pytest.mark.parametrize(
        ("work", "free", "mode", "said"),
        [
            (Work((1,), 100, 1), 10**9, "forward", "all fit"),
            (Work((7, 1, 1), 100, 1000), 10**6, "reverse", "all fit"),
            (Work((7, 1, 1), 100, 1000), 10**5 - 1, "checkpointed_reverse", "of reverse do not fit"),
            (Work((1, 2), 100, 1), 1000, "reverse", "all fit"),
            # where nothing fits, what keeps least
            (Work((1, 2), 100, 1000), 1, "forward", "of reverse, 19.5 KiB of checkpointed_reverse do not fit"),
            (Work((50, 50), 100, 1000), 1, "checkpointed_reverse", "do not fit"),
            # greedy, whatever the columns
            (Work((100, 100), 100, 1, horizon=1), 10**9, "forward", "all fit"),
            (Work((100, 100), 100, 10**6, horizon=1), 10**8, "reverse", "of forward do not fit"),
            (Work((1,), 100, 1, may_be_rejected=True), 10**9, "reverse", "a rejected run is not gone back through"),
            (Work((1,), 100, 10**6, may_be_rejected=True), 10**8 - 1, "checkpointed_reverse", "a rejected run"),
        ],
    )
    def test_the_cheapest_that_fits(self, work: Work, free: float, mode: str, said: str) -> None:
        choice = cheapest(work, free)
        assert choice.mode is BY_NAME[mode] and said in choice.reason

    def test_what_is_not_the_derivative_is_not_taken_however_cheap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Estimate(type(BY_NAME["reverse"])):
            name, exact = "estimate", False

            def gradients(self, work: Work) -> float:
                return 0.1

        monkeypatch.setitem(BY_NAME, "estimate", Estimate())
        assert cheapest(Work((7, 1, 1), 100, 1000), 10**6).mode.name == "reverse"
        monkeypatch.setattr(Estimate, "exact", True)
        assert cheapest(Work((7, 1, 1), 100, 1000), 10**6).mode.name == "estimate"

    @pytest.mark.parametrize(
        ("lacking", "free", "mode"),
        [("reverse", 1, "forward"), ("forward", 10**9, "reverse"), ("forward", 1, "checkpointed_reverse")],
    )
    def test_the_cheapest_of_those_that_a_problem_has(self, lacking: str, free: float, mode: str) -> None:
        choice = cheapest(Work((50,), 100, 1000), free, {lacking: "is not there"})
        assert choice.mode is BY_NAME[mode] and choice.reason == "is not there"

    def test_another_mode_is_a_class_and_an_entry(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class FromTheMiddle(Reverse):
            """Cheap, and not used to do it: back through the last half alone."""

            name = "from_the_middle"

            def gradients(self, work: Work) -> float:
                return super().gradients(work) / 2

            def begin(self, loop: InnerLoop, values: Values, **arguments: Any) -> Any:
                return super().begin(loop, values, **{**arguments, "horizon": loop.steps // 2})

        monkeypatch.setitem(BY_NAME, "from_the_middle", FromTheMiddle())
        values = {"lr": double(0.1, 0.2, 0.1, 0.2, 0.1, 0.2)}
        chosen = hypergradient(make_problem(), values, steps=6, check=False)
        asked = hypergradient(make_problem(), values, steps=6, check=False, differentiation="from_the_middle")
        truncated = differentiate(make_loop(steps=6), values, "reverse", horizon=3)
        assert "from_the_middle" in chosen.reason and asked.reason == "asked for"
        for found in (chosen, asked):
            assert found.differentiation == "from_the_middle"  # by which a run is restored
            assert_close(found.hypergradients, truncated.hypergradients, 1e-12)
        both = hypergradient(
            make_problem(), values, steps=6, seed=[0, 1], check=False, differentiation="from_the_middle"
        )
        assert both.reason.endswith("from_the_middle mode has no other way")
        assert_close(both.members[0].hypergradients, truncated.hypergradients, 1e-12)

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_state_bytes(self, optimizer: str) -> None:
        loop = make_loop(make_problem("batch_norm"), optimizer=optimizer)
        buffers = (6 + 6) * 8 + 8
        assert state_bytes(loop) == loop.size * 8 * (1 + len(loop.optimizer.slots)) + buffers

    def test_auto_agrees_with_what_it_could_have_taken(self) -> None:
        values = {"lr": double(0.1, 0.2, 0.1, 0.2, 0.1), "momentum": double(0.5, 0.6, 0.7)}
        automatic = hypergradient(make_problem(), values, steps=5)
        assert automatic.differentiation == "reverse"
        assert_close(automatic.hypergradients, differentiate(make_loop(), values, "forward").hypergradients, 1e-9)


class TestDivergence:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("optimizer", ["sgd", "nesterov"])
    def test_a_run_that_diverges_says_so_without_an_exception(self, optimizer: str, mode: str) -> None:
        problem = make_problem(lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)))
        values = {"lr": double(1e6, 1e6), "weight_decay": double(0.1)}
        result = differentiate(make_loop(problem, 30, optimizer), values, mode)
        assert not torch.tensor(result.val_loss).isfinite()
        for gradient in result.hypergradients.values():
            assert gradient.isnan().all()

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
    def test_weights_that_never_get_a_gradient(self, optimizer: str, mode: str) -> None:
        """Rows of an embedding that no example looks up keep a zero second moment."""
        problem = make_problem(lambda: nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 3)), TOKENS)
        loop = make_loop(problem, optimizer=optimizer)
        values = {"lr": double(0.05, 0.02), "weight_decay": double(0.0)}
        result = differentiate(loop, values, mode)
        assert all(gradient.isfinite().all() for gradient in result.hypergradients.values())
        expected = finite_differences(loop, values, 1e-7)["lr"]
        assert_close({"lr": result.hypergradients["lr"]}, {"lr": expected}, 1e-4)


def assert_refused(message: str, **arguments: Any) -> None:
    given = {"problem": make_problem(), "hyperparameters": {"lr": double(0.1)}, "steps": 4, **arguments}
    with pytest.raises(InputError, match=message) as caught:
        hypergradient(given.pop("problem"), given.pop("hyperparameters"), **given)
    assert "\n" not in str(caught.value)


class TestRefusals:
    def test_unknown_hyperparameter(self) -> None:
        assert_refused(
            "unknown hyperparameter 'beta1': optimizer 'sgd' has lr, momentum, dampening, weight_decay",
            hyperparameters={"beta1": double(0.9)},
        )

    def test_unknown_fixed_hyperparameter(self) -> None:
        assert_refused("unknown hyperparameter 'momentun'", fixed={"momentun": 0.9})

    def test_argument_of_the_model_factory(self) -> None:
        problem = make_problem().replace(model=lambda width=6: nn.Linear(4, 3).double())
        assert_refused(
            "'width' is an argument of the model factory, which no gradient reaches: fix it, or tune it outside",
            problem=problem,
            hyperparameters={"width": double(6.0)},
        )

    def test_tuned_and_fixed(self) -> None:
        assert_refused("'lr' is both tuned and fixed", fixed={"lr": 0.1})

    def test_train_loss_hyperparameter_without_value(self) -> None:
        assert_refused("the train loss needs 'l2_first'", problem=make_problem(train_loss=penalised))

    @pytest.mark.parametrize(
        ("values", "what"),
        [
            (double(*range(5)), r"has shape \[5\]"),
            (double(), r"has shape \[0\]"),
            (torch.ones(2, 2), r"has shape \[2, 2\]"),
            (torch.tensor(0.1), r"has shape \[\]"),
            (0.1, "is a float"),
            ([0.1, 0.2], "is a list"),
        ],
    )
    @pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
    def test_values_that_are_not_one_number_per_window(self, mode: str, values: Any, what: str) -> None:
        expected = f"'lr' {what}: give a 1-d tensor with one element per window, between 1 and steps = 4 of them"
        assert_refused(expected, hyperparameters={"lr": values}, differentiation=mode)

    @pytest.mark.parametrize("horizon", [0, -1, 5, 2.5])
    def test_horizon_out_of_range(self, horizon: Any) -> None:
        assert_refused(f"horizon is {horizon}: it must be a whole number from 1", horizon=horizon)

    @pytest.mark.parametrize("val_examples", [0, -3, 1.5])
    def test_no_validation_examples(self, val_examples: Any) -> None:
        assert_refused(f"val_examples is {val_examples}", val_examples=val_examples)

    @pytest.mark.parametrize("steps", [0, 2.5, True])
    def test_steps(self, steps: Any) -> None:
        assert_refused(f"steps is {steps}", steps=steps)

    @pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
    @pytest.mark.parametrize("which", ["clip_gradient", "clip_hessian_product"])
    def test_clip_limits(self, which: str, clip: float) -> None:
        assert_refused(f"{which} is {clip}", **{which: clip})

    def test_unknown_optimizer_and_mode(self) -> None:
        assert_refused("unknown optimizer 'lamb'", optimizer="lamb")
        assert_refused("unknown differentiation 'backward': choose one of auto, forward", differentiation="backward")


class TestHeld:
    """Hyperparameters that are given and not differentiated."""

    def test_windows_can_be_held(self) -> None:
        held, momentum = {"lr": double(0.1, 0.2, 0.05)}, {"momentum": double(0.8)}
        expected = hypergradient(make_problem(), {**held, **momentum}, steps=7)
        for lr in ([0.1, 0.2, 0.05], {"0": 0.1, "1": 0.2, "2": 0.05}):
            out = hypergradient(make_problem(), momentum, steps=7, fixed={"lr": lr})
            assert out.val_loss == expected.val_loss
            assert_close(out.hypergradients, {"momentum": expected.hypergradients["momentum"]}, 1e-12)

    def test_a_train_loss_may_not_take_an_optimizers_name(self) -> None:
        def loss(output: Tensor, target: Tensor, *, weight_decay: float = 0.0) -> Tensor:
            return F.cross_entropy(output, target)

        assert_refused("'weight_decay' is a hyperparameter of both", problem=make_problem(train_loss=loss))


def test_small_validation_samples_cost_what_they_are() -> None:
    loop = make_loop(steps=4)
    whole, sample = (
        loop.costs.evaluation("val", None, gradient=True),
        loop.costs.evaluation("val", 10**6, gradient=True),
    )
    assert sample == whole
    assert loop.costs.evaluation("val", 3, gradient=True).gradients == pytest.approx(3 / loop.problem.batch_size)
