"""The steps of self-tuning networks, against finite differences and objectives that are written out."""

import math

import pytest
import torch
from ray import tune
from torch import nn

from tune_hypergrad.errors import InputError
from tune_hypergrad.objective import Objective
from tune_hypergrad.stn import (
    VARIANTS,
    TunedHyperparameter,
    TunedHyperparameters,
    self_tuning,
    training_gradients,
    tuned_hyperparameters,
    validation_gradients,
)
from tune_hypergrad.stn.steps import response_inputs

F64 = torch.float64


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
    objective = Objective(weighted, (), network.model)
    by_general, by_responses = training_gradients(network, tuned, method, objective, batch, perturbations)
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


def test_centred_inputs_are_the_perturbations_however_far_the_hyperparameters_are():
    network, _, _, method = small("delta-stn")
    tuned = TunedHyperparameters([TunedHyperparameter("a", -math.inf, math.inf)], initial={"a": 1e6}, scale=1e-3)
    perturbations = tuned.perturbations(6, torch.Generator().manual_seed(0))
    inputs = response_inputs(network, tuned, method, perturbations)
    assert inputs.dtype == F64 and torch.equal(inputs, perturbations.double())
    for gradient in torch.autograd.grad(inputs.sum(), (tuned.unconstrained, perturbations)):
        assert (gradient.sum() == 6).all()


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


@pytest.mark.parametrize(("lower", "upper"), [(1.0, 0.5), (0.5, 0.5), (math.nan, 1.0), (0.0, math.nan)])
def test_a_range_without_room_is_refused(lower, upper):
    with pytest.raises(InputError, match=r"'a' has the range \[.*\], which leaves no room: .* lower < upper$"):
        TunedHyperparameter("a", lower, upper)


@pytest.mark.parametrize(
    ("space", "options", "part"),
    [
        ({"a": tune.uniform(1, 0)}, {}, r"'a' has the range \[1.*, 0.*\], which leaves no room"),
        ({"a": tune.loguniform(0.1, 0.01)}, {}, r"'a' has the range \[0.1, 0.01\], which leaves no room"),
        ({"a": 0.5}, {"per_minibatch": ["a"]}, "per_minibatch has 'a', which is not tuned: nothing is$"),
        ({"a": tune.choice([1, 2])}, {}, "'a' cannot be tuned"),
        ({"a": tune.quniform(0, 1, 0.1)}, {}, "'a' cannot be tuned"),
        ({"a": {"0": tune.uniform(0, 1)}}, {}, "'a' cannot be tuned"),
        ({"a": tune.uniform(0, 1)}, {"per_minibatch": ["b"]}, "per_minibatch has 'b'"),
    ],
)
def test_what_a_self_tuning_network_cannot_tune(space, options, part):
    with pytest.raises(InputError, match=part):
        tuned_hyperparameters(space, **options)


def test_a_regulariser_may_be_called_like_a_hyperparameter_of_another_optimizer():
    (alpha,), _ = tuned_hyperparameters({"alpha": tune.loguniform(1e-5, 1e-1)})
    assert (alpha.name, alpha.lower, alpha.upper, alpha.log) == ("alpha", 1e-5, 1e-1, True)


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
