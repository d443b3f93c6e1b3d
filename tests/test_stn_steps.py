"""The steps of self-tuning networks, against problems whose best response is known in closed form."""

import math

import pytest
import torch
from ray import tune
from scipy.optimize import minimize_scalar
from torch import nn

from tune_hypergrad.errors import InputError
from tune_hypergrad.stn import (
    VARIANTS,
    TunedHyperparameter,
    TunedHyperparameters,
    self_tuning,
    training_gradients,
    tuned_hyperparameters,
    validation_gradients,
)

F64 = torch.float64
FEATURES = 10


class Ridge:
    """Linear regression with penalty exp(l) / 2 ||w||^2 on noisy data, and what is best, in closed form."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=F64)

        weights, scales = normal(FEATURES), torch.linspace(0.3, 1.5, FEATURES, dtype=F64)

        def examples(count):
            x = normal(count, FEATURES) * scales
            return x, x @ weights + 3 * normal(count)

        self.train, self.val = examples(30), examples(200)
        best = minimize_scalar(self.outer_loss, bounds=(-8, 4), method="bounded", options={"xatol": 1e-9})
        self.optimum = best.x

    def best_response(self, log_l2):
        x, y = self.train
        return torch.linalg.solve(
            x.T @ x / len(x) + math.exp(log_l2) * torch.eye(FEATURES, dtype=F64), x.T @ y / len(x)
        )

    def best_response_jacobian(self, log_l2, step=1e-5):
        return (self.best_response(log_l2 + step) - self.best_response(log_l2 - step)) / (2 * step)

    def outer_loss(self, log_l2):
        x, y = self.val
        return float(self.loss(x @ self.best_response(log_l2), y))

    @staticmethod
    def loss(output, target):
        return (output.squeeze(-1) - target).square().mean() / 2

    def train_loss(self, output, target, params, values):
        return self.loss(output, target) + values["log_l2"].exp() / 2 * params()["weight"].square().sum()


def self_tuned(ridge, variant, start, response_lr, steps=4000):
    """Alternate steps; returns the network and where the hyperparameter was after every step."""
    torch.manual_seed(1)
    model = nn.Linear(FEATURES, 1, bias=False, dtype=F64)
    nn.init.normal_(model.weight, std=0.1)
    network = self_tuning(model, 1)
    free = TunedHyperparameter("log_l2", -math.inf, math.inf, per_example=False)
    tuned = TunedHyperparameters([free], initial={"log_l2": start}, scale=0.2, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    general, responses = network.general_parameters(), network.response_parameters()
    optimizers = [
        torch.optim.SGD(general.values(), lr=0.1),
        torch.optim.SGD(responses.values(), lr=response_lr),
        torch.optim.Adam([tuned.unconstrained], lr=0.01),
    ]
    path = []
    for step in range(steps):
        if step == steps - 1000:  # less noise at the end
            optimizers[1].param_groups[0]["lr"] = response_lr / 10
        by_general, by_responses = training_gradients(
            network, tuned, variant, ridge.train_loss, ridge.train, tuned.perturbations(30, generator)
        )
        for parameters, gradients in ((general, by_general), (responses, by_responses)):
            for name, parameter in parameters.items():
                parameter.grad = gradients[name]
        _, by_hyperparameters, _ = validation_gradients(
            network, tuned, variant, ridge.loss, ridge.val, tuned.perturbations(200, generator), entropy_weight=0.0
        )
        tuned.unconstrained.grad = by_hyperparameters if step >= 200 else torch.zeros(1, dtype=F64)
        for optimizer in optimizers:
            optimizer.step()
        path.append(tuned.unconstrained.item())
    return network, path


@pytest.fixture(scope="module")
def ridge():
    return Ridge()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "start", "response_lr"),
    [("delta-stn", -3.0, 1.0), ("delta-stn", 1.5, 1.0), ("centered-stn", -3.0, 1.0), ("stn", -3.0, 0.1)],
)
def test_ridge_regression_reaches_the_bilevel_optimum(ridge, name, start, response_lr):
    network, path = self_tuned(ridge, VARIANTS[name], start, response_lr)
    reached = sum(path[-1000:]) / 1000
    assert math.exp(reached) == pytest.approx(math.exp(ridge.optimum), rel=0.02)
    if name == "delta-stn":
        response = network.model.response
        jacobian = (response.weight_scale * response.weight).squeeze(0)
        exact = ridge.best_response_jacobian(path[-1])
        assert (jacobian - exact).norm() < 0.05 * exact.norm()
        weights = network.general_parameters()["weight"].squeeze(0)
        assert (weights - ridge.best_response(path[-1])).norm() < 0.02 * weights.norm()


def small(variant, per_example=True):
    torch.manual_seed(0)
    network = self_tuning(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), 2)
    for p in network.response_parameters().values():
        nn.init.normal_(p, std=0.5)
    definitions = [
        TunedHyperparameter("a", 0, 1, per_example=per_example),
        TunedHyperparameter("b", 1e-3, 1, log=True, per_example=False),
    ]
    tuned = TunedHyperparameters(definitions, initial={"a": 0.3}, scale=0.4, dtype=F64)
    batch = torch.randn(6, 3, dtype=F64), torch.randn(6, 2, dtype=F64)
    return network, tuned, batch, VARIANTS[variant]


def squared(output, target):
    return (output - target).square().mean()


def weighted(output, target, params, values):
    per_example = (output - target).square().mean(1) * (1 + values["a"])
    return per_example.mean() + values["b"] * sum(p.square().sum() for p in params().values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linearised", [True, False])
def test_validation_gradients_against_finite_differences(variant, linearised):
    network, tuned, batch, method = small(variant)
    network.eval()
    noise = torch.randn(6, 2, dtype=F64)

    def objective(u, log_scales):
        """The objective with the response's inputs written out: u moves, but a centred response's origin stays."""
        inputs = u + noise * log_scales.exp() - (tuned.unconstrained.detach() if method.centred else 0)
        if linearised:
            step = 1e-6
            with torch.no_grad(), network.perturbation.set_to(step * inputs):
                up = network(batch[0])
            with torch.no_grad(), network.perturbation.set_to(-step * inputs):
                down = network(batch[0])
            output = network(batch[0]) + (up - down) / (2 * step)
        else:
            with network.perturbation.set_to(inputs):
                output = network(batch[0])
        return float((squared(output, batch[1]) - 0.1 * log_scales.sum()).detach())

    perturbations = noise * tuned.log_scales.exp()
    value, by_u, by_scales = validation_gradients(
        network, tuned, method, squared, batch, perturbations, entropy_weight=0.1, linearised=linearised
    )
    u, log_scales = tuned.unconstrained.detach(), tuned.log_scales.detach()
    assert float(value - 0.1 * log_scales.sum()) == pytest.approx(objective(u, log_scales), rel=1e-6)
    for found, of in ((by_u, 0), (by_scales, 1)):
        for index in range(2):
            ends = []
            for sign in (1, -1):
                moved = [u.clone(), log_scales.clone()]
                moved[of][index] += sign * 1e-3
                ends.append(objective(*moved))
            assert float(found[index]) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_gradients_are_of_each_methods_objective(variant):
    network, tuned, batch, method = small(variant)
    perturbations = tuned.perturbations(6, torch.Generator().manual_seed(2)).detach()
    by_general, by_responses = training_gradients(network, tuned, method, weighted, batch, perturbations)
    u = tuned.unconstrained.detach()
    origin = torch.zeros_like(u) if method.centred else u
    inputs, shared = origin + perturbations, origin + perturbations[0] * torch.tensor([0.0, 1.0])
    values = {name: value.detach() for name, value in tuned.values(perturbations).items()}
    now = {name: value.detach() for name, value in tuned.values().items()}
    general, responses = network.general_parameters(), network.response_parameters()

    def rows(at):
        """The prediction, example by example with the weights written out."""
        return torch.stack([torch.func.functional_call(network.model, w, x) for w, x in zip(at, batch[0], strict=True)])

    at = [network.parameters_at(row) for row in inputs]
    if method.linearised:
        plain = weighted(network(batch[0]), batch[1], lambda: general, now)
        expected_general = torch.autograd.grad(plain, list(general.values()))
        base = {name: p.detach() for name, p in general.items()}
        changes = [{name: w[name] - general[name].detach() for name in w} for w in at]
        output = torch.stack(
            [
                torch.func.jvp(lambda w, x=x: torch.func.functional_call(network.model, w, x), (base,), (change,))[1]
                for x, change in zip(batch[0], changes, strict=True)
            ]
        )
        output = output + network(batch[0]).detach()
    else:
        output = rows(at)
    joint = weighted(output, batch[1], lambda: network.parameters_at(shared), values)
    if not method.linearised:
        expected_general = torch.autograd.grad(joint, list(general.values()), retain_graph=True)
    expected_responses = torch.autograd.grad(joint, list(responses.values()), allow_unused=True)
    for found, expected in ((by_general, expected_general), (by_responses, expected_responses)):
        for gradient, other in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)


def test_values_and_their_scale_are_each_others_inverse():
    cases = [
        (TunedHyperparameter("a", 0.0, 0.95), 0.2),
        (TunedHyperparameter("b", 1e-6, 10.0, log=True), 3e-3),
        (TunedHyperparameter("c", 0.0, math.inf), 1.5),
        (TunedHyperparameter("d", -math.inf, 2.0), -3.0),
        (TunedHyperparameter("e", -math.inf, math.inf), -3.0),
        (TunedHyperparameter("f", 2, 25, whole=True), 7),
    ]
    for definition, value in cases:
        u = definition.unconstrained(value)
        assert float(definition.value(torch.tensor(u, dtype=F64))) == pytest.approx(value, rel=1e-12)
        far = definition.value(torch.tensor([-1e4, 1e4], dtype=F64))
        assert definition.lower <= far[0] < far[1] <= definition.upper
    whole = cases[-1][0].value(torch.linspace(-50, 50, 9999))
    assert sorted(set(whole.tolist())) == list(range(2, 25))


def test_perturbations_have_the_tuned_scale_and_one_draw_where_told():
    definitions = [TunedHyperparameter("a", 0, 1), TunedHyperparameter("b", 0, 1, per_example=False)]
    tuned = TunedHyperparameters(definitions, scale=0.5)
    draws = tuned.perturbations(20000, torch.Generator().manual_seed(0))
    assert float(draws[:, 0].detach().std()) == pytest.approx(0.5, rel=0.03) and len(set(draws[:, 1].tolist())) == 1
    values = tuned.values(draws)
    assert values["a"].shape == (20000,) and values["b"].shape == ()
    assert tuned.shared(draws)[0] == 0 and tuned.shared(draws)[1] == draws[0, 1]


@pytest.mark.parametrize(
    ("space", "options", "part"),
    [
        ({"lr": tune.uniform(0, 1)}, {}, "'lr' is the optimizer's"),
        ({"a": tune.choice([1, 2])}, {}, "'a' cannot be tuned"),
        ({"a": tune.quniform(0, 1, 0.1)}, {}, "'a' cannot be tuned"),
        ({"a": {"0": tune.uniform(0, 1)}}, {}, "'a' cannot be tuned"),
        ({"a": tune.uniform(0, 1)}, {"per_minibatch": ["b"]}, "per_minibatch has 'b'"),
    ],
)
def test_what_a_self_tuning_network_cannot_tune(space, options, part):
    with pytest.raises(InputError, match=part):
        tuned_hyperparameters(space, **options)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"initial": {"a": 1.5}}, "'a' begins at 1.5"),
        ({"initial": {"a": 0}}, "'a' begins at 0"),
        ({"initial": {"c": 0.5}}, "initial has 'c'"),
        ({"scale": 0}, "scale is 0"),
        ({"scale": 1e-60}, "scale is 1e-60"),
        ({"scale": math.inf}, "scale is inf"),
    ],
)
def test_where_tuning_cannot_begin(options, part):
    definitions, constants = tuned_hyperparameters({"a": tune.uniform(0, 1), "k": tune.randint(0, 6), "n": 3})
    assert constants == {"n": 3} and definitions[1].whole
    TunedHyperparameters(definitions, initial={"a": 0.5, "k": 0})
    with pytest.raises(InputError, match=part):
        TunedHyperparameters(definitions, **options)
    with pytest.raises(InputError, match="nothing to tune"):
        TunedHyperparameters([])
