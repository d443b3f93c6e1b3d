"""Steps that are replayed are those that would have been taken; what cannot be replayed is not, and says why."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine_problems import assert_close, differentiate, double, make_problem
from recorded import Recorder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from tune_hypergrad import Problem, hypergradient
from tune_hypergrad.hypergradients import OPTIMIZERS, InnerLoop, Optimizer, hypergradient_run
from tune_hypergrad.hypergradients.capture import RECORDERS, Recording, form_of
from tune_hypergrad.hypergradients.captured_steps import CapturedSteps, try_capture
from tune_hypergrad.hypergradients.inner_loop import TrainingSettings
from tune_hypergrad.hypergradients.run import HypergradientResult
from tune_hypergrad.regularisers import Crop, Cutout, Dropout, WeightDecay

# without biases whose gradient is 0: of its rounding Adam makes steps as large as any
STEPS = 9
DRAWS = torch.Generator().manual_seed(0)
IMAGES, CLASSES = torch.randn(40, 1, 8, 8, generator=DRAWS, dtype=torch.float64), torch.arange(40) % 3
TOKENS, NEXT = torch.randint(11, (40, 6), generator=DRAWS), torch.randint(11, (40, 6), generator=DRAWS)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True, bias=False)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens))).transpose(1, 2)


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3)),
        nn.Linear(36, 3),
    ).double()


def images(model: Any = convolutional, **more: Any) -> Problem:
    split = IMAGES, CLASSES
    return Problem(model, **{"train": split, "val": split, "loss": F.cross_entropy, "batch_size": 8, **more})


def tokens(**more: Any) -> Problem:
    split = TOKENS, NEXT
    return Problem(lambda: Transformer().double(), split, split, loss=F.cross_entropy, batch_size=8, **more)


def smoothed(output: Tensor, target: Tensor, *, smoothing: float = 0.1) -> Tensor:
    return F.cross_entropy(output, target, label_smoothing=smoothing)


PROBLEMS = {"images": images, "tokens": tokens}
LR = {"lr": double(0.05, 0.02, 0.03)}


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU, operations are recorded as a GPU's launches would be."""
    monkeypatch.setitem(RECORDERS, "cpu", Recorder)
    monkeypatch.setattr("tune_hypergrad.hypergradients.captured_steps.WORTHWHILE_STEPS", 1)
    yield


def both(
    problem: Problem, values: dict[str, Tensor], steps: int = STEPS, **more: Any
) -> tuple[HypergradientResult, HypergradientResult]:
    """A hypergradient with steps that are replayed, and without."""
    differentiation = more.pop("differentiation", "reverse")
    results = []
    for capture in (True, False):
        settings = TrainingSettings(steps, capture=capture, **more)
        results.append(differentiate(InnerLoop(problem, settings), values, differentiation))
    return results[0], results[1]


def assert_replayed(found: HypergradientResult, eager: HypergradientResult, tolerance: float = 1e-12) -> None:
    assert found.reason.endswith("steps are captured") and "captured" not in eager.reason
    assert found.val_loss == pytest.approx(eager.val_loss, rel=tolerance)
    assert_close(found.hypergradients, eager.hypergradients, tolerance)
    assert_close(found.params, eager.params, tolerance)


def why_not(problem: Problem, values: dict[str, Tensor] = LR, **more: Any) -> str:
    """What is said of a problem whose steps are not replayed, with the right hypergradient all the same."""
    found, eager = both(problem, values, **more)
    assert_close(found.hypergradients, eager.hypergradients, 1e-12)
    assert "steps are not captured: " in found.reason
    return found.reason.split("steps are not captured: ")[1]


class TestReplay:
    @pytest.mark.parametrize("kind", PROBLEMS)
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_every_optimizer(self, kind: str, optimizer: str) -> None:
        values = {**LR, "weight_decay": double(0.01, 0.02)}
        if "eps" in OPTIMIZERS[optimizer].hyperparameters and "beta2" in OPTIMIZERS[optimizer].hyperparameters:
            values["beta2"] = double(0.99, 0.98)
        assert_replayed(*both(PROBLEMS[kind](), values, optimizer=optimizer), 1e-11)

    @pytest.mark.parametrize(
        "recipe",
        [{"clip_norm": 0.5}, {"clip_gradient": 0.01}, {"ema": 0.9}],
        ids=["clipped by norm", "clipped", "averaged"],
    )
    def test_a_recipe(self, recipe: dict[str, Any]) -> None:
        assert_replayed(*both(images(), {**LR, "momentum": double(0.5, 0.8)}, **recipe))

    def test_curves(self) -> None:
        curve = {"lr/cosine/peak": double(0.1), "lr/cosine/warm_up": double(0.3), "lr/cosine/floor": double(0.1)}
        assert_replayed(*both(images(), curve))

    @pytest.mark.parametrize("optimizer", ["sgd", "adam", "schedule_free_adamw"])
    def test_fixed_schedules(self, optimizer: str) -> None:
        fixed = {"lr": (0.1, 0.01), "weight_decay": {"linear": {"peak": 0.1, "warm_up": 0.2, "floor": 0.0}}}
        problem = images(train_loss=smoothed)
        assert_replayed(*both(problem, {"smoothing": double(0.1, 0.2)}, optimizer=optimizer, fixed=fixed))

    def test_a_fixed_schedule_of_the_loss(self) -> None:
        assert_replayed(*both(images(train_loss=smoothed), LR, fixed={"smoothing": (0.0, 0.1, 0.3)}))

    def test_groups(self) -> None:
        problem = images(groups={"head": "6.*"})
        assert_replayed(*both(problem, {**LR, "lr/head": double(0.1, 0.01)}, fixed={"weight_decay/head": (0.1, 0.2)}))

    def test_regularisers(self) -> None:
        problem = images(regularisers=[Crop(), Cutout(), Dropout(), WeightDecay("l2")])
        fixed = {"crop_padding": (0.0, 2.0), "cutout_length": 3, "cutout_holes": (1, 2), "dropout": (0.1, 0.4)}
        assert_replayed(*both(problem, {**LR, "l2": double(0.01, 0.1)}, fixed=fixed))

    @pytest.mark.parametrize("horizon", [1, 4])
    def test_horizons(self, horizon: int) -> None:
        found, eager = (
            hypergradient(images(), LR, steps=STEPS, horizon=horizon, differentiation="reverse", capture=capture)
            for capture in (True, False)
        )
        assert_replayed(found, eager)

    def test_few_states(self) -> None:
        assert_replayed(*both(images(), LR, differentiation="checkpointed_reverse"))

    def test_batches_of_a_step_that_draw_nothing(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
        assert_replayed(*both(images(lambda: model.double(), accumulate=2), LR))

    def test_a_parameter_that_never_has_a_gradient(self) -> None:
        class Idle(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.idle = nn.Linear(64, 3), nn.Linear(2, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.used(x.flatten(1))

        assert_replayed(*both(images(lambda: Idle().double()), LR, optimizer="adam"))

    def test_batches_that_are_read(self) -> None:
        class Noisy(Dataset[Any]):
            def __len__(self) -> int:
                return len(IMAGES)

            def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
                return IMAGES[position] + 0.1 * torch.randn(1, 8, 8), CLASSES[position]

        assert_replayed(*both(images(train=Noisy()), LR))

    def test_batches_of_many_shapes(self) -> None:
        """Some of them have no recording."""

        def cut(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            images, classes = (torch.stack(leaves) for leaves in zip(*pairs, strict=True))
            return images[..., : 4 + int(torch.randint(4, ()))], classes

        def model() -> nn.Module:
            return nn.Sequential(nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(36, 3)).double()

        data = TensorDataset(IMAGES, CLASSES)
        assert_replayed(*both(images(model, train=data, val=data, collate_fn=cut), LR, steps=16))

    def test_in_bfloat16(self) -> None:
        """What is replayed is what autocast computes, and points where float64 does."""
        values = {**LR, "momentum": double(0.5, 0.8), "weight_decay": double(0.1)}
        low = images(lambda: convolutional().float()), {name: value.float() for name, value in values.items()}
        found, eager = both(*low, autocast="bfloat16")
        assert_replayed(found, eager, 1e-5)
        exact = differentiate(
            InnerLoop(images(), TrainingSettings(STEPS, capture=True)), values, "reverse"
        ).hypergradients
        pair = [torch.cat([each[name].double() for name in values]) for each in (found.hypergradients, exact)]
        assert F.cosine_similarity(*pair, dim=0) > 0.99
        large = pair[1].abs() > 0.1 * pair[1].abs().max()
        assert torch.equal(pair[0][large].sign(), pair[1][large].sign()) and large.sum() > 1

    def test_plain_training(self) -> None:
        results = []
        for capture in (True, False):
            loop = InnerLoop(images(), TrainingSettings(STEPS, optimizer="adam", capture=capture))
            run = hypergradient_run(loop, LR, reject_above=float("-inf"))
            with loop.running(plain=True):
                run.advance(run.length)
            results.append(run)
            assert run.reason.endswith("steps are captured") == capture
        assert_close(results[0].result().params, results[1].result().params, 1e-12)

    def test_a_run_that_is_saved_and_restored(self) -> None:
        def begun() -> Any:
            return hypergradient_run(
                InnerLoop(images(), TrainingSettings(STEPS, capture=True)), LR, differentiation="reverse"
            )

        whole, first, second = begun(), begun(), begun()
        for run, units in ((whole, whole.length), (first, STEPS + 3)):
            with run.loop.running():
                run.advance(units)
        second.load_state_dict(first.state_dict())
        with second.loop.running():
            second.advance(second.length)
        assert_close(second.result().hypergradients, whole.result().hypergradients, 1e-12)


class TestRecordings:
    def steps(self, problem: Problem, steps: int = STEPS) -> tuple[InnerLoop, CapturedSteps, Recorder]:
        loop = InnerLoop(problem, TrainingSettings(steps, capture=True))
        recorder = Recorder(loop.device)
        loop.captured = CapturedSteps(loop, recorder)
        return loop, loop.captured, recorder

    def test_no_python_runs_in_a_replay(self) -> None:
        calls = 0

        class Noting(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                nonlocal calls
                calls += 1
                return super().forward(x.flatten(1))

        loop, _, recorder = self.steps(images(lambda: Noting(64, 3).double()))
        state, by_step = loop.initial_state(), []
        with loop.running():
            for step in range(STEPS):
                before = calls
                state = loop.step(state, loop.scalars(LR, step), step)
                by_step.append(calls - before)
        # the first, that of the form's first sight, and the recording, which warms up
        assert by_step == [1, 1, 2, 0, 0, 0, 0, 0, 0] and recorder.recorded == 1

    def test_the_smaller_last_batch_has_a_recording_of_its_own(self) -> None:
        problem = images(batch_size=16, drop_last=False)  # 16, 16 and 8
        loop, captured, recorder = self.steps(problem, steps=12)
        run = hypergradient_run(InnerLoop(problem, TrainingSettings(12, capture=True)), LR, differentiation="reverse")
        state = loop.initial_state()
        with loop.running():
            for step in range(12):
                state = loop.step(state, loop.scalars(LR, step), step)
            run.advance(12)
        assert recorder.recorded == 2 and captured.reason is None
        assert torch.allclose(state.params, run.state.params, rtol=1e-12)

    def test_what_fails_later_is_not_tried_again(self) -> None:
        loop, captured, recorder = self.steps(images())

        def failing(function: Any) -> Any:
            raise RuntimeError("no memory")

        recorder.record = failing  # type: ignore[method-assign]
        state, eager = loop.initial_state(), InnerLoop(images(), TrainingSettings(STEPS, capture=True))
        other = eager.initial_state()
        with loop.running(), pytest.warns(UserWarning, match="no memory"):
            for step in range(STEPS):
                state = loop.step(state, loop.scalars(LR, step), step)
        with eager.running():
            for step in range(STEPS):
                other = eager.step(other, eager.scalars(LR, step), step)
        assert captured.reason == "RuntimeError: no memory"
        assert torch.equal(state.params, other.params)

    def test_the_trial_is_made_once_per_problem(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[Recorder] = []
        monkeypatch.setitem(RECORDERS, "cpu", lambda device: made.append(Recorder(device)) or made[-1])
        problem = images()
        for seed in range(3):
            differentiate(InnerLoop(problem, TrainingSettings(STEPS, seed=seed, capture=True)), LR, "reverse")
        assert len(made) == 4

    def test_nothing_is_recorded_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(RECORDERS, "cpu")
        found, _ = both(images(), LR)
        assert "captured" not in found.reason

    def test_short_runs_are_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tune_hypergrad.hypergradients.captured_steps.WORTHWHILE_STEPS", STEPS + 1)
        assert why_not(images()) == "fewer than 10"

    def test_forward_mode_says_nothing(self) -> None:
        assert "captured" not in both(images(), LR, differentiation="forward")[0].reason


class TestRecording:
    def recording(self) -> Recording:
        def function(given: dict[str, Any]) -> dict[str, Any]:
            return {"sum": given["a"] * given["number"] + given["b"], "same": given["a"], "kind": "sum"}

        return Recording(function, {"a": double(1, 2), "b": double(3), "number": 2}, Recorder(torch.device("cpu")))

    def test_values_are_those_of_the_call(self) -> None:
        recording, a = self.recording(), double(5, 6)
        first = recording({"a": a, "b": double(1), "number": 2})
        second = recording({"a": double(0, 1), "b": double(1), "number": 2})
        assert first["sum"].tolist() == [11, 13] and second["sum"].tolist() == [1, 3]
        assert first["same"] is a and a.tolist() == [5, 6] and first["kind"] == "sum"

    def test_forms(self) -> None:
        form = form_of({"a": double(1, 2), "number": 2})
        assert form is not None and form == form_of({"a": double(3, 4), "number": 2})
        for other in (
            {"a": double(1), "number": 2},
            {"a": double(1, 2), "number": 3},
            {"b": double(1, 2), "number": 2},
        ):
            assert form_of(other) != form
        assert form_of({"a": double(1, 2).float(), "number": 2}) != form
        assert form_of({"a": object()}) is None


class Changing(nn.Module):
    """A layer, and something that `change` makes of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.layer(x.flatten(1)))

    def change(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Counting(Changing):
    def change(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return x if self.calls < 10**6 else 2 * x


class DrawingOnHost(Changing):
    def change(self, x: Tensor) -> Tensor:
        return x if not self.training or random.random() < 1 else 2 * x


class DrawingByNumPy(Changing):
    def change(self, x: Tensor) -> Tensor:
        return x if not self.training or np.random.rand() < 1 else 2 * x


class Deciding(Changing):
    def change(self, x: Tensor) -> Tensor:
        return x if x.sum() > -1e9 else 2 * x


class Seeded(Changing):
    """Something out of sight that is another one at every step."""

    def change(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * (torch.initial_seed() % 7)) if self.training else x


def deciding_update(params: Tensor, gradient: Tensor, slots: Any, h: Any, step: int) -> Any:
    return params - (h["lr"] if step < 4 else 0.5 * h["lr"]) * gradient, ()


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            (Counting, "'calls' of a Counting, the 1-th module, is another one after a step"),
            (DrawingOnHost, "a step draws from Python's, NumPy's or the host's generator"),
            (DrawingByNumPy, "a step draws from Python's, NumPy's or the host's generator"),
            (Deciding, "RuntimeError: aten._local_scalar_dense.default waits for the device"),
            (Seeded, "a replay of step 4 differs in the training loss"),
        ],
    )
    def test_a_model(self, model: type[Changing], reason: str) -> None:
        assert why_not(images(lambda: model().double())) == reason

    def test_an_update_that_looks_at_the_step(self) -> None:
        optimizer = Optimizer("deciding", deciding_update, (), {"lr": 0.1})
        assert why_not(images(), optimizer=optimizer).endswith("waits for the device")

    def test_several_batches_with_draws(self) -> None:
        assert why_not(images(accumulate=2)) == "each of a step's batches has random draws of its own"

    def test_a_loss_that_makes_numbers_of_its_schedule(self) -> None:
        def loss(output: Tensor, target: Tensor, *, factor: float = 1.0) -> Tensor:
            return F.cross_entropy(output, target) * float(factor)

        found = why_not(images(train_loss=loss), fixed={"factor": (1.0, 2.0, 3.0)})
        assert found.endswith("waits for the device")

    def test_what_the_adjoint_step_alone_cannot_do(self) -> None:
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return gradient

        class Model(Changing):
            def change(self, x: Tensor) -> Tensor:
                return Once.apply(x)  # type: ignore[no-any-return, no-untyped-call]

        problem, settings = images(lambda: Model().double()), TrainingSettings(STEPS, capture=True)
        assert try_capture(problem, settings, LR, Recorder) is not None
        assert try_capture(problem, settings, LR, Recorder, ("training",)) is None

    def test_batches_that_hold_other_things(self) -> None:
        def collate(pairs: list[tuple[Tensor, Tensor]]) -> Any:
            images, classes = (torch.stack(leaves) for leaves in zip(*pairs, strict=True))
            return images, frozenset("ab"), classes

        data = TensorDataset(IMAGES, CLASSES)
        problem = images(
            train=data,
            val=data,
            collate_fn=collate,
            forward=lambda model, batch: model(batch[0]),
            target=lambda b: b[2],
        )
        assert why_not(problem) == "a batch holds something that is no tensor, number or text"

    def test_an_ensemble(self) -> None:
        result = hypergradient(make_problem(), LR, steps=STEPS, seed=[0, 1], capture=True)
        assert "captured" not in result.reason
