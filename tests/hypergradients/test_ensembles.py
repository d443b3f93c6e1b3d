"""Ensembles: every seed's run is the one that it is by itself, together or in turn, and results are their means."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_problems import ARCHITECTURES, Values, assert_close, data, double, make_problem, max_pool_relu, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import InnerLoop, Optimizer, TrainingSettings, hypergradient, hypergradient_run
from tune_hypergrad.hypergradients import ensemble as ensembles
from tune_hypergrad.hypergradients.check import finite_differences
from tune_hypergrad.hypergradients.ensemble import EnsembleRun, RunsInTurn, advance_together
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.optimizers import sgd
from tune_hypergrad.hypergradients.run import HypergradientResult
from tune_hypergrad.problem import Problem
from tune_hypergrad.regularisers import DropConnect, Dropout, InputNoise, InputScaling, Mixup

SEEDS = (3, 5, 8)
VALUES: Values = {"lr": double(0.1, 0.2, 0.15), "momentum": double(0.8), "weight_decay": double(0.01, 0.02)}
CURVES: Values = {
    "lr/cosine/peak": double(0.3),
    "lr/cosine/warm_up": double(0.25),
    "lr/cosine/floor": double(0.1),
    "momentum/knots": double(0.5, 0.8, 0.7),
    "weight_decay": double(0.01, 0.02),
}
TOGETHER, IN_TURN = "runs at once", "one run after another"


def alone(problem: Problem, values: Values = VALUES, seed: int = 0, steps: int = 5, **arguments: Any) -> Any:
    arguments = {"differentiation": "reverse", "check": False, **arguments}
    return hypergradient(problem, values, steps=steps, seed=seed, **arguments)


def together(problem: Problem, values: Values = VALUES, steps: int = 5, **arguments: Any) -> HypergradientResult:
    arguments = {"differentiation": "reverse", "check": False, **arguments}
    return hypergradient(problem, values, steps=steps, seed=SEEDS, **arguments)


def assert_members_are_runs(problem: Problem, values: Values = VALUES, how: str = TOGETHER, **arguments: Any) -> None:
    """Each member is its own run to rounding, and the result the mean of them."""
    tolerance = arguments.pop("tolerance", 1e-12)
    result = together(problem, values, **arguments)
    assert how in result.reason
    runs = [alone(problem, values, seed, **arguments) for seed in SEEDS]
    assert len({run.val_loss for run in runs}) == len(SEEDS)  # else the comparison would show nothing
    for member, run in zip(result.members, runs, strict=True):
        assert_close(member.hypergradients, run.hypergradients, tolerance)
        assert member.val_loss == pytest.approx(run.val_loss, rel=tolerance)
        for of_member, of_run in (member.params, run.params), (member.buffers, run.buffers):
            assert of_member.keys() == of_run.keys()
            for name, tensor in of_run.items():
                torch.testing.assert_close(of_member[name], tensor, rtol=tolerance, atol=tolerance)
    assert_means(result, runs)


def assert_means(result: HypergradientResult, runs: list[HypergradientResult]) -> None:
    expected = {
        name: torch.stack([run.hypergradients[name] for run in runs]).mean(0) for name in runs[0].hypergradients
    }
    assert_close(result.hypergradients, expected, 1e-12)
    losses = torch.tensor([run.val_loss for run in runs], dtype=torch.float64)
    assert result.val_loss == pytest.approx(float(losses.mean()))
    assert result.metrics["loss_std"] == pytest.approx(float(losses.std()))
    assert vars(result.cost) == pytest.approx(vars(sum((run.cost for run in runs[1:]), runs[0].cost)))
    for member, run in zip(result.members, runs, strict=True):
        assert vars(member.cost) == pytest.approx(vars(run.cost))


def dropout_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Dropout2d(0.4), nn.Flatten(), nn.Linear(96, 3))


class Noisy(nn.Module):
    """Draws in several ways, one of them on inputs that are the same for all seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        if self.training:
            y = y + 0.1 * torch.randn_like(y) * torch.rand(6, dtype=y.dtype) + torch.empty_like(y).uniform_(0, 0.1)
            y = y * torch.bernoulli(torch.sigmoid(y.detach())) + 0.1 * torch.randint(3, (6,))
        return self.last(y[torch.randperm(len(y))] + y if self.training else y)


class Stopped(Noisy):
    """Stop-gradients, of activations and of weights."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        with torch.no_grad():
            size = y.norm(dim=1, keepdim=True) + 1
        shift = self.last.weight.detach().sum() * y.sum(1, keepdim=True)
        return self.last(y / size) + shift * torch.arange(3) + y[:, :3].detach() * y[:, 3:]


class Averaging(Noisy):
    """Buffers that training moves: one assigned anew, and differentiated; one in place; one that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x)) * self.scale
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
            self.calls += 1
        return self.last(y - self.mean)


class Unused(Noisy):
    """Two layers get no gradient, one of them in the first steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class PythonDraws(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))) * (2.0 if random.random() < 0.5 else 1.0)


class Branching(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.last(y) if y.sum() > 0 else self.last(2 * y)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(0.3 * torch.randn(4, 6, dtype=torch.complex128)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x.to(torch.complex128) @ self.first).abs())


def instance_norm() -> nn.Module:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.SiLU(), nn.Flatten(), nn.Linear(64, 3))


def batch_norm_in_evaluation() -> nn.Module:
    model = ARCHITECTURES["batch_norm"][0]()
    model[1].running_mean.normal_()
    model[1].eval()
    return model


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True)
    return nn.Sequential(nn.Embedding(7, 4), layer, nn.Flatten(), nn.Linear(16, 3))


MODELS: dict[str, tuple[Any, str]] = {
    **{name: ARCHITECTURES[name] for name in ("mlp", "conv", "batch_norm", "dropout", "layer_norm", "group_norm")},
    **{name: ARCHITECTURES[name] for name in ("tied_weights", "dot_product_attention", "frozen", "two_inputs")},
    "max_pool": (max_pool_relu, "images"),
    "instance_norm": (instance_norm, "images"),
    "batch norm in evaluation": (batch_norm_in_evaluation, "features"),
    "transformer": (transformer, "tokens"),
    "dropout of channels": (dropout_cnn, "images"),
    "draws": (Noisy, "features"),
    "stop-gradients": (Stopped, "features"),
    "buffers": (Averaging, "features"),
    "unused parameters": (Unused, "features"),
}


@pytest.mark.parametrize("model", MODELS)
def test_members_of_every_model_are_their_own_runs(model: str) -> None:
    assert_members_are_runs(make_problem(*MODELS[model]))


@pytest.mark.parametrize(
    ("optimizer", "values"),
    [
        ("nesterov", VALUES),
        ("adam", {"lr": double(0.03, 0.05, 0.02), "beta1": double(0.8, 0.6), "eps": double(1e-3)}),
        ("adamw", {"lr": double(0.03, 0.05), "beta2": double(0.9), "weight_decay": double(0.1, 0.3, 0.2)}),
        ("rmsprop", {"lr": double(0.01, 0.02), "alpha": double(0.9, 0.8), "momentum": double(0.5, 0.3)}),
    ],
)
@pytest.mark.parametrize("model", ["mlp", "unused parameters"])
def test_every_optimizer(optimizer: str, values: Values, model: str) -> None:
    # a larger eps than torch's, which lets rounding of small gradients grow
    fixed = {} if "eps" in values or optimizer == "nesterov" else {"eps": 1e-3}
    assert_members_are_runs(make_problem(*MODELS[model]), values, optimizer=optimizer, fixed=fixed, tolerance=1e-10)


def test_an_optimizer_of_ones_own_that_is_not_elementwise() -> None:
    def normalised(params: Tensor, gradient: Tensor, slots: Any, h: Any, step: int) -> Any:
        return sgd(params, gradient / gradient.norm(), slots, h, step)

    optimizer = Optimizer("normalised", normalised, ("velocity",), {"lr": 0.1, "momentum": 0.0, "dampening": 0.0})
    optimizer = optimizer._replace(hyperparameters={**optimizer.hyperparameters, "weight_decay": 0.0})
    assert_members_are_runs(make_problem(), optimizer=optimizer)


def smoothed(output: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(output, target, label_smoothing=label_smoothing)


def penalised(output: Tensor, target: Tensor, *, l2: float, params: Any = None) -> Tensor:
    return F.cross_entropy(output, target) + l2 * sum(p.square().sum() for p in params.values())


@pytest.mark.parametrize(
    ("train_loss", "values"),
    [(smoothed, {"label_smoothing": double(0.1, 0.2, 0.05)}), (penalised, {"l2": double(0.1, 0.2)})],
)
def test_hyperparameters_of_the_loss(train_loss: Any, values: Values) -> None:
    assert_members_are_runs(make_problem("dropout", train_loss=train_loss), {**VALUES, **values})


class Scaled(nn.Module):
    """A loss that is trained as well, and weighs classes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss(output * self.scale, target)


def test_complex_weights() -> None:
    assert_members_are_runs(make_problem().replace(model=lambda: Complex().double()))


def test_a_loss_that_is_a_module() -> None:
    assert_members_are_runs(make_problem(loss=Scaled()))


def test_single_precision_over_many_steps() -> None:
    problem = make_problem("conv", dtype=torch.float32)
    values = {"lr": torch.tensor([0.05, 0.02]), "momentum": torch.tensor([0.5])}
    result = together(problem, values, steps=40)
    assert TOGETHER in result.reason
    for seed, member in zip(SEEDS, result.members, strict=True):
        single = alone(problem, values, seed, steps=40)
        assert_close(member.hypergradients, single.hypergradients, 1e-3)
        assert member.val_loss == pytest.approx(single.val_loss, rel=1e-4)


@pytest.mark.parametrize(
    ("regularisers", "fixed"),
    [
        ((Dropout(),), {"dropout": 0.3}),
        ((InputNoise(), InputScaling()), {"input_noise": 0.3, "input_scaling": [0.1, 0.2]}),
        ((Mixup(classes=3),), {"mixup": 0.4}),
        ((DropConnect(parameters="*.weight"),), {"weight_drop": 0.2}),
    ],
)
def test_regularisers_draw_for_every_seed(regularisers: Any, fixed: dict[str, Any]) -> None:
    assert_members_are_runs(make_problem("dropout", regularisers=regularisers), fixed=fixed)


def test_a_regulariser_that_is_tuned() -> None:
    problem = make_problem("dropout", regularisers=(InputNoise(),))
    assert_members_are_runs(problem, {**VALUES, "input_noise": double(0.1, 0.3)})


@pytest.mark.parametrize(
    "arguments",
    [
        {"clip_gradient": 0.05},
        {"horizon": 1},
        {"horizon": 2},
        {"val_examples": 3},
        {"steps": 1},
        {"differentiation": "checkpointed_reverse", "steps": 7},
    ],
    ids=str,
)
def test_ways_to_train_and_differentiate(arguments: dict[str, Any]) -> None:
    steps = arguments.get("steps", 5)
    values = VALUES if steps > 1 else {"lr": double(0.1), "weight_decay": double(0.01)}
    assert_members_are_runs(make_problem("batch_norm"), values, **arguments)


def test_full_batches() -> None:
    assert_members_are_runs(make_problem(batch_size=12))


@pytest.mark.parametrize(
    "arguments", [{}, {"horizon": 2}, {"differentiation": "checkpointed_reverse"}, {"optimizer": "nesterov"}], ids=str
)
def test_curves(arguments: dict[str, Any]) -> None:
    assert_members_are_runs(make_problem("dropout"), CURVES, **arguments)


@pytest.mark.parametrize("model", [Branching, PythonDraws])
def test_curves_of_runs_in_turn(model: Callable[[], nn.Module]) -> None:
    assert_members_are_runs(make_problem(model), CURVES, how=IN_TURN)


def test_curves_by_forward_mode() -> None:
    assert_members_are_runs(make_problem(), CURVES, how="forward mode has no other way", differentiation="forward")


def test_a_curves_mean_has_the_finite_differences_of_single_runs() -> None:
    problem = make_problem("dropout")
    of_seeds = [finite_differences(InnerLoop(problem, TrainingSettings(5, seed=seed)), CURVES) for seed in SEEDS]
    mean = {name: torch.stack([each[name] for each in of_seeds]).mean(0) for name in CURVES}
    assert_close(together(problem, CURVES, check=True).hypergradients, mean, 1e-5)


def test_nested_hyperparameters_have_nested_hypergradients_of_every_seed() -> None:
    problem, knots = make_problem("dropout"), double(0.1, 0.3, 0.2)
    nested = together(problem, {"lr": {"knots": knots}, "momentum": {"one_minus": double(0.2)}})  # type: ignore[dict-item]
    flat = together(problem, {"lr/knots": knots, "momentum": double(0.8)})
    for one, other in zip((nested, *nested.members), (flat, *flat.members), strict=True):
        assert_close({"lr": one.hypergradients["lr"]["knots"]}, {"lr": other.hypergradients["lr/knots"]}, 1e-12)
        by_rest = one.hypergradients["momentum"]["one_minus"]
        assert_close({"momentum": -by_rest}, {"momentum": other.hypergradients["momentum"]}, 1e-12)


@pytest.mark.parametrize("values", [VALUES, CURVES], ids=["windows", "curves"])
@pytest.mark.parametrize("at_once", [True, False])
def test_every_runs_derivatives_by_single_steps(at_once: bool, values: Values) -> None:
    run = ensemble_run(at_once, values)
    assert set(run.by_step) == {"lr", "momentum", "weight_decay"}
    assert all(steps.shape == (len(SEEDS), 5) for steps in run.by_step.values())
    for number, member in enumerate(run.loop.members):
        single = hypergradient_run(member, values, differentiation="reverse")
        with member.running():
            single.advance(single.length)
        own = {name: steps[number] for name, steps in run.by_step.items()}
        assert_close(own, single.by_step, 1e-12)
    mean = run.by_step["weight_decay"].mean(0)
    windows = torch.stack([mean[:3].sum(), mean[3:].sum()])
    assert_close({"weight_decay": run.hypergradients["weight_decay"]}, {"weight_decay": windows}, 1e-12)


def test_halfway_no_step_has_a_derivative_and_forward_mode_has_none_by_step() -> None:
    for at_once in (True, False):
        loop = EnsembleLoop(make_problem(), TrainingSettings(5), SEEDS)
        run: Any = hypergradient_run(loop, VALUES, differentiation="reverse", together=at_once)
        with loop.running():
            run.advance(2)
        assert all(torch.equal(steps, torch.zeros_like(steps)) for steps in run.by_step.values())
    with pytest.raises(AttributeError, match="forward mode"):
        _ = ensemble_run(False, differentiation="forward").by_step


class Augmented(Dataset[Any]):
    """Examples with noise from the global generators, as data sets of images have."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        features, labels = data()
        return features[index] + 0.1 * torch.randn(4) + 0.1 * random.random(), labels[index]


def test_a_data_set_that_augments_at_random() -> None:
    assert_members_are_runs(make_problem(train=Augmented()))


def test_the_mean_has_the_finite_differences_of_single_runs() -> None:
    problem = make_problem("dropout", train_loss=smoothed)
    values = {**VALUES, "label_smoothing": double(0.1, 0.2)}
    settings = TrainingSettings(steps=5)
    of_seeds = [finite_differences(InnerLoop(problem, TrainingSettings(5, seed=seed)), values) for seed in SEEDS]
    mean = {name: torch.stack([each[name] for each in of_seeds]).mean(0) for name in values}
    assert_close(together(problem, values).hypergradients, mean, 1e-5)
    assert_close(finite_differences(EnsembleLoop(problem, settings, SEEDS), values), mean, 1e-5)


class Hooked(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * torch.tensor(0.5, dtype=gradient.dtype))
        return self.last(y)


class Checkpointed(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(lambda x: torch.tanh(self.first(x)), x, use_reentrant=False))


def cumulative() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("model", "kind", "reason"),
    [
        (PythonDraws, "features", "Python's or NumPy's generators"),
        (Branching, "features", "data-dependent control flow"),
        (Hooked, "features", "the training gradient of two runs together is not that of each by itself"),
        (Checkpointed, "features", "vmap"),
        (cumulative, "features", "item()"),
        (*ARCHITECTURES["lstm"], "lstm"),
        (*ARCHITECTURES["attention"], "random"),
    ],
)
def test_models_that_cannot_go_together_take_turns(model: Callable[[], nn.Module], kind: str, reason: str) -> None:
    problem = make_problem(model, kind)
    result = together(problem)
    assert result.reason.startswith(IN_TURN) and reason in result.reason and "\n" not in result.reason
    runs = [alone(problem, seed=seed) for seed in SEEDS]
    for member, run in zip(result.members, runs, strict=True):
        assert all(torch.equal(member.hypergradients[name], run.hypergradients[name]) for name in VALUES)
        assert member.val_loss == run.val_loss
    assert_means(result, runs)


def test_forward_mode_takes_turns() -> None:
    assert_members_are_runs(make_problem(), how="forward mode has no other way", differentiation="forward")


def test_runs_that_cost_what_they_cost_alone_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem()
    assert TOGETHER in together(problem).reason
    monkeypatch.setattr(ensembles, "WORTHWHILE_FLOPS", 100.0)
    assert "does not become cheaper" in together(problem).reason


class LateBranch(Noisy):
    """Goes a way of its own from the fourth step on, which the steps that are tried out do not see."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            LateBranch.calls += 1
            self.step += 1
        y = torch.tanh(self.first(x))
        late = 4 * 4 * len(SEEDS) < LateBranch.calls
        return self.last(y if not late or bool(y.sum() > 100) else 1.0 * y)


def test_what_turns_out_on_the_way_makes_runs_take_turns() -> None:
    problem = make_problem(LateBranch)
    LateBranch.calls = 0
    result = together(problem, steps=80)
    assert result.reason.startswith(IN_TURN) and "data-dependent control flow" in result.reason
    LateBranch.calls = 0
    runs = [alone(problem, seed=seed, steps=80) for seed in SEEDS]
    for member, run in zip(result.members, runs, strict=True):
        assert_close(member.hypergradients, run.hypergradients, 1e-12)
    assert result.cost.gradients > sum(run.cost.gradients for run in runs)  # what was in vain is charged as well


@pytest.mark.parametrize("at_once", [True, False])
def test_with_a_seed_that_diverges_an_ensemble_is_rejected(at_once: bool) -> None:
    class Fragile(nn.Module):
        """Diverges for one of the seeds: its initial weights are so large."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()
            if torch.initial_seed() == unlucky:
                with torch.no_grad():
                    self.layers[0].weight.fill_(torch.inf)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    seeds: list[int] = []
    problem = make_problem(lambda: seeds.append(torch.initial_seed()) or mlp())
    for seed in SEEDS:
        InnerLoop(problem, TrainingSettings(5, seed=seed))
    unlucky = seeds[1]
    problem = make_problem(Fragile)
    run = ensemble_run(at_once, problem=problem)
    result = run.result()
    for number in (0, 2):
        assert result.members[number].val_loss == pytest.approx(alone(problem, seed=SEEDS[number]).val_loss)
    assert not result.members[1].val_loss < float("inf") and not result.val_loss < float("inf")
    assert_rejected(run)


def ensemble_run(at_once: bool, values: Values = VALUES, *, problem: Problem | None = None, **arguments: Any) -> Any:
    """A run of an ensemble, done."""
    loop = EnsembleLoop(problem or make_problem("dropout"), TrainingSettings(5), SEEDS)
    run = hypergradient_run(loop, values, **{"differentiation": "reverse", "together": at_once, **arguments})
    with loop.running():
        assert run.advance(run.length) <= run.length and run.done
    return run


def assert_rejected(run: Any) -> None:
    """It has no hypergradients, and has not gone back."""
    result, loop = run.result(), run.loop
    assert run.rejected and len(result.members) == len(SEEDS)
    for each in (result, *result.members):
        assert all(values.isnan().all() for values in each.hypergradients.values())
    if run.differentiation != "forward":
        assert all(values.isnan().all() for values in run.by_step.values())
        evaluation = loop.costs.evaluation("val", gradient=run.reject_above > -torch.inf)
        assert vars(result.cost) == pytest.approx(vars(sum(map(loop.costs.step, range(loop.steps)), evaluation)))


@pytest.mark.parametrize("differentiation", ["reverse", "forward"])
@pytest.mark.parametrize("at_once", [True, False])
def test_the_mean_loss_decides_whether_an_ensemble_is_rejected(at_once: bool, differentiation: str) -> None:
    arguments = {"differentiation": differentiation, "together": None if at_once else False}
    accepted = ensemble_run(at_once, **arguments)
    result = accepted.result()
    assert max(member.val_loss for member in result.members) > result.val_loss + 1e-3
    just = ensemble_run(at_once, reject_above=result.val_loss + 1e-6, **arguments)
    assert not just.rejected
    assert all(torch.equal(just.result().hypergradients[name], result.hypergradients[name]) for name in VALUES)
    rejected = ensemble_run(at_once, reject_above=result.val_loss - 1e-6, **arguments)
    assert_rejected(rejected)
    assert rejected.result().val_loss == result.val_loss
    assert rejected.result().metrics == result.metrics


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("values", [VALUES, CURVES], ids=["windows", "curves"])
def test_an_ensemble_that_is_rejected_whatever_it_gives_is_plain_training(values: Values, at_once: bool) -> None:
    run = ensemble_run(at_once, values, reject_above=-torch.inf)
    result = run.result()
    assert_rejected(run)
    assert "nothing is differentiated" in result.members[0].reason
    for member, seed in zip(result.members, SEEDS, strict=True):
        single = alone(make_problem("dropout"), values, seed)
        assert member.val_loss == pytest.approx(single.val_loss, rel=1e-12)


def test_plain_training_takes_a_model_that_has_no_right_derivatives() -> None:
    loop = EnsembleLoop(make_problem(Branching), TrainingSettings(5), SEEDS)
    run = hypergradient_run(loop, VALUES, differentiation="forward", reject_above=-torch.inf, check=True)
    with loop.running():
        run.advance(run.length)
    assert isinstance(run, RunsInTurn)
    assert_rejected(run)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("limit", [0.1, -torch.inf])
def test_a_rejected_ensemble_goes_on_from_any_point(limit: float, at_once: bool) -> None:
    straight = ensemble_run(at_once, reject_above=limit)
    problem = make_problem("dropout")

    def begin() -> Any:
        loop = EnsembleLoop(problem, TrainingSettings(5), SEEDS)
        return hypergradient_run(loop, VALUES, differentiation="reverse", together=at_once, reject_above=limit)

    run = begin()
    while not run.done:
        with run.loop.running():
            assert run.advance(1) > 0
        saved, run = run.state_dict(), begin()
        run.load_state_dict(saved)
    assert_rejected(run)
    assert run.result().val_loss == straight.result().val_loss
    assert run.result().cost == straight.result().cost
    assert torch.equal(run.state.params, straight.state.params)


@pytest.mark.parametrize("differentiation", ["reverse", "checkpointed_reverse"])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(("units", "values"), [(1, VALUES), (3, CURVES), (4, VALUES)], ids=["1", "3", "4"])
def test_a_run_goes_on_from_any_point_to_the_same_bits(
    units: int, values: Values, at_once: bool, differentiation: str
) -> None:
    def begin() -> Any:
        loop = EnsembleLoop(make_problem("batch_norm"), TrainingSettings(5), SEEDS)
        return hypergradient_run(loop, values, differentiation=differentiation, together=at_once)

    straight = begin()
    assert isinstance(straight, EnsembleRun if at_once else RunsInTurn)
    with straight.loop.running():
        straight.advance(straight.length)
    run = begin()
    while not run.done:
        with run.loop.running():
            assert run.advance(units) > 0
        saved, run = run.state_dict(), begin()
        assert saved["together"] is at_once
        run.load_state_dict(saved)
    first, second = straight.result(), run.result()
    for one, other in zip((first, *first.members), (second, *second.members), strict=True):
        assert all(torch.equal(one.hypergradients[name], other.hypergradients[name]) for name in values)
        assert one.val_loss == other.val_loss and one.metrics == other.metrics
    assert all(torch.equal(straight.by_step[name], run.by_step[name]) for name in ("lr", "momentum", "weight_decay"))
    assert first.cost.gradients <= second.cost.gradients  # states that were not saved are trained again


@pytest.mark.parametrize("at_once", [True, False])
def test_at_half_its_length_an_ensemble_is_trained(at_once: bool) -> None:
    loop = EnsembleLoop(make_problem("batch_norm"), TrainingSettings(5), SEEDS)
    run = hypergradient_run(loop, VALUES, differentiation="reverse", together=at_once)
    with loop.running():
        run.advance(run.length // 2)
        half = loop.evaluate(run.state)
        spent = run.cost.gradients
        run.advance(run.length)
    result = run.result()
    assert half.loss == result.val_loss and half.metrics == result.metrics
    assert spent == pytest.approx(5 * len(SEEDS))


def test_global_generators_stay_as_they_were() -> None:
    torch.manual_seed(1)
    random.seed(1)
    before = torch.random.get_rng_state(), random.getstate()
    together(make_problem("dropout"))
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == random.getstate()


@pytest.mark.parametrize(
    ("seeds", "message"),
    [((4,), "at least 2 seeds"), ((), "at least 2 seeds"), ((1, 2, 1), "seed 1 is"), ((1, 2.5), "whole numbers")],
)
def test_seeds_that_are_no_ensemble_are_refused(seeds: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hypergradient(make_problem(), VALUES, steps=5, seed=seeds)


def test_runs_that_are_told_to_go_together_and_cannot() -> None:
    loop = EnsembleLoop(make_problem(Branching), TrainingSettings(5), SEEDS)
    with pytest.raises(InputError, match=r"cannot go together: .*control flow"):
        hypergradient_run(loop, VALUES, together=True)
    with pytest.raises(InputError, match="cannot go together: forward mode"):
        hypergradient_run(loop, VALUES, differentiation="forward", together=True)


def test_pieces_of_an_ensemble_fall_back_as_well() -> None:
    loop = EnsembleLoop(make_problem(), TrainingSettings(5), SEEDS)
    run = hypergradient_run(loop, VALUES, together=True)
    assert isinstance(run, EnsembleRun)
    loop._draws.seed = lambda seeds: 1 / 0  # type: ignore[method-assign, assignment]
    with loop.running():
        other = advance_together(run, 2, lambda: hypergradient_run(loop, VALUES))
        other.advance(other.length)
    assert isinstance(other, RunsInTurn) and "ZeroDivisionError" in other.reason
    assert other.done and other.result().members


def test_the_mode_is_chosen_and_checked_as_for_one_seed() -> None:
    result = hypergradient(make_problem(), {"lr": double(0.1)}, steps=4, seed=range(2))
    assert TOGETHER in result.reason  # though for one seed forward mode would be the cheapest
    single = hypergradient(make_problem(), {"lr": double(0.1)}, steps=4, seed=1)
    assert single.differentiation == "forward" and not single.members
    assert_close(result.members[1].hypergradients, single.hypergradients, 1e-10)


def test_a_step_that_has_no_right_adjoint_takes_turns_by_forward_mode() -> None:
    class Counting(Noisy):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return self.last(torch.tanh(self.first(x))) * (1 + 0.1 * self.calls)

    result = hypergradient(make_problem(Counting), VALUES, steps=3, seed=SEEDS, check=False)
    assert result.reason.startswith(IN_TURN) and result.differentiation == "forward"
