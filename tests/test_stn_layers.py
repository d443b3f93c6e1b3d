"""Converted layers: the plain layer without perturbation, one setting of the weights for each example with one."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from tune_hypergrad.errors import InputError
from tune_hypergrad.stn import register, self_tuning
from tune_hypergrad.stn.layers import RULES, SelfTuningLinear

N = 3
EXAMPLES = 4

LAYERS = {
    "Linear": (nn.Linear(5, 6), (EXAMPLES, 5)),
    "Linear without bias": (nn.Linear(5, 6, bias=False), (EXAMPLES, 5)),
    "Linear on sequences": (nn.Linear(5, 6), (EXAMPLES, 7, 5)),
    "Conv1d": (nn.Conv1d(4, 6, 3, padding=1), (EXAMPLES, 4, 8)),
    "Conv2d": (nn.Conv2d(4, 6, 3, stride=2), (EXAMPLES, 4, 8, 8)),
    "Conv2d, groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (EXAMPLES, 4, 8, 8)),
    "Conv2d, circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (EXAMPLES, 4, 8, 8)),
    "Conv3d": (nn.Conv3d(2, 3, 2), (EXAMPLES, 2, 4, 4, 4)),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (EXAMPLES, 4, 5)),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 6, 3, groups=2, output_padding=1, stride=2), (EXAMPLES, 4, 5, 5)),
    "ConvTranspose3d": (nn.ConvTranspose3d(2, 3, 2), (EXAMPLES, 2, 3, 3, 3)),
    "BatchNorm1d": (nn.BatchNorm1d(5), (EXAMPLES, 5)),
    "BatchNorm2d": (nn.BatchNorm2d(5), (EXAMPLES, 5, 3, 3)),
    "BatchNorm3d": (nn.BatchNorm3d(2), (EXAMPLES, 2, 3, 3, 3)),
    "BatchNorm, cumulative": (nn.BatchNorm2d(5, momentum=None), (EXAMPLES, 5, 3, 3)),
    "BatchNorm without statistics": (nn.BatchNorm2d(5, track_running_stats=False), (EXAMPLES, 5, 3, 3)),
    "GroupNorm": (nn.GroupNorm(2, 6), (EXAMPLES, 6, 3, 3)),
    "LayerNorm": (nn.LayerNorm(5), (EXAMPLES, 7, 5)),
    "LayerNorm without bias": (nn.LayerNorm((3, 5), bias=False), (EXAMPLES, 2, 3, 5)),
    "Embedding": (nn.Embedding(9, 5, padding_idx=0), (EXAMPLES, 7)),
}


def make(kind, dtype=torch.float64, responding=True):
    """A layer, its conversion with a random response, and an input."""
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    layer = copy.deepcopy(layer).to(dtype)
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randint(9, shape) if isinstance(layer, nn.Embedding) else torch.randn(shape, dtype=dtype)
    network = self_tuning(layer, N)
    if responding:
        for p in network.response_parameters().values():
            nn.init.normal_(p)
    return layer, network, x


def test_every_rule_is_tested():
    here = {layer for layer, rule in RULES.items() if rule.__module__ == SelfTuningLinear.__module__}
    assert {type(layer) for layer, _ in LAYERS.values()} == here


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_without_perturbation_it_is_the_plain_layer(kind, training, dtype):
    layer, network, x = make(kind, dtype)
    layer.train(training), network.train(training)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    buffers = copy.deepcopy(dict(layer.named_buffers()))
    expected = layer(x)
    by_layer = torch.autograd.grad(expected.sin().sum(), list(layer.parameters()))
    for inputs in (None, torch.zeros(N, dtype=dtype), torch.zeros(EXAMPLES, N, dtype=dtype)):
        network.model.load_state_dict({**network.model.state_dict(), **buffers})
        with network.perturbation.set_to(inputs):
            output = network(x)
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
        found = torch.autograd.grad(output.sin().sum(), list(network.general_parameters().values()))
        for one, other in zip(found, by_layer, strict=True):
            torch.testing.assert_close(one, other, rtol=20 * tolerance, atol=20 * tolerance)
        for name, buffer in layer.named_buffers():
            torch.testing.assert_close(dict(network.model.named_buffers())[name], buffer)


@pytest.mark.parametrize("kind", LAYERS)
def test_each_example_sees_the_weights_at_its_own_hyperparameters(kind):
    layer, network, x = make(kind)
    layer.eval(), network.eval()
    inputs = torch.randn(EXAMPLES, N, dtype=torch.float64)
    with network.perturbation.set_to(inputs):
        output = network(x)
    for example in range(EXAMPLES):
        at = network.parameters_at(inputs[example])
        assert any(not torch.equal(at[name], p) for name, p in layer.named_parameters())
        torch.testing.assert_close(output[[example]], functional_call(layer, at, x)[[example]])
        with network.perturbation.set_to(inputs[example]):
            torch.testing.assert_close(network(x)[[example]], output[[example]])
        layer_there = copy.deepcopy(layer)
        layer_there.load_state_dict(network.general_state_dict(inputs[example]))
        torch.testing.assert_close(layer_there(x)[[example]], output[[example]])


class Small(nn.Module):
    """Convolution, normalisation, pooling and two linear layers; its forward looks at its layers' attributes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.ModuleDict({"a": nn.Linear(4 * 9, 6), "b": nn.Linear(6, 3)})

    def forward(self, x):
        x = F.avg_pool2d(F.gelu(self.norm(self.conv(x))), 2).flatten(1)
        assert x.shape[1] == self.head["a"].in_features == self.head["a"].weight.shape[1]
        return self.head["b"](torch.tanh(self.head["a"](x)))


def small():
    torch.manual_seed(1)
    model = Small().double()
    network = self_tuning(model, N)
    for p in network.response_parameters().values():
        nn.init.normal_(p, std=0.3)
    return model, network, torch.randn(EXAMPLES, 1, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_the_linearised_response_is_the_derivative_by_the_weights(training):
    _, network, x = small()
    network.train(training)
    inputs = torch.randn(EXAMPLES, N, dtype=torch.float64)

    def along(step):
        with network.perturbation.set_to(step * inputs):
            return network(x)

    with forward_ad.dual_level(), network.perturbation.set_to(inputs, linearised=True):
        value, tangent = forward_ad.unpack_dual(network(x))
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for layer in network.modules():  # torch.func refuses to update running statistics, of plain layers too
        if training and isinstance(layer, nn.BatchNorm2d):
            layer.track_running_stats, layer.running_mean = False, None
            layer.running_var = layer.num_batches_tracked = None
    expected, by_jvp = torch.func.jvp(along, (zero,), (one,))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(tangent, by_jvp)
    step = 1e-5
    torch.testing.assert_close(tangent, (along(step) - along(-step)) / (2 * step), rtol=1e-6, atol=1e-8)
    # and so are its gradients by the response's parameters
    weights = torch.randn_like(tangent)
    parameters = list(network.response_parameters().values())
    found = torch.autograd.grad((tangent * weights).sum(), parameters, allow_unused=True)
    other = torch.autograd.grad((by_jvp * weights).sum(), parameters, allow_unused=True)
    for a, b in zip(found, other, strict=True):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)


def test_linearised_steps_leave_running_statistics_alone():
    _, network, x = small()
    before = copy.deepcopy(network.general_state_dict())
    with forward_ad.dual_level(), network.perturbation.set_to(torch.zeros(N).double(), linearised=True):
        network(x)
    assert all(torch.equal(before[name], value) for name, value in network.general_state_dict().items())


def test_the_model_is_copied_and_stays_itself():
    model, network, x = small()
    assert type(model.conv) is nn.Conv2d and isinstance(network.model.conv, nn.Conv2d)
    assert network.without_rule == ()
    assert network.general_state_dict().keys() == model.state_dict().keys()
    model.load_state_dict(network.general_state_dict())
    torch.testing.assert_close(model.eval()(x), network.eval()(x))
    again = copy.deepcopy(network)
    with network.perturbation.set_to(torch.ones(N).double()):
        torch.testing.assert_close(again(x), model(x))  # a copy has a perturbation of its own
        assert not torch.allclose(network(x), model(x))


def test_weights_that_are_shared_stay_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(7, 5), nn.Linear(5, 7)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(torch.tanh(self.embed(x)))

    model = Tied().double()
    network = self_tuning(model, N)
    assert len(network.general_parameters()) == 2 and len(network.response_parameters()) == 4
    for p in network.response_parameters().values():
        nn.init.normal_(p)
    inputs, x = torch.randn(N).double(), torch.randint(7, (EXAMPLES, 3))
    with network.perturbation.set_to(inputs):
        output = network(x)
    model.load_state_dict(network.general_state_dict(inputs))
    assert model.out.weight is model.embed.weight
    torch.testing.assert_close(model(x), output)


def test_layers_without_a_rule_are_named_and_rules_can_be_added():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.factor * x

    class MyLinear(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 3), Scale(), MyLinear(3, 2), nn.LayerNorm(2, elementwise_affine=False))
    assert self_tuning(model, N).without_rule == ("1", "2")
    try:

        @register(MyLinear)
        class SelfTuningMyLinear(SelfTuningLinear):
            pass

        converted = self_tuning(model, N)
        assert converted.without_rule == ("1",) and type(converted.model[2]) is SelfTuningMyLinear
    finally:
        RULES.pop(MyLinear, None)
    with pytest.raises(InputError, match="no layer whose weights can respond"):
        self_tuning(nn.Sequential(Scale(), nn.ReLU()), N)


def small_cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.LayerNorm(144), nn.Linear(144, 10)
    )


def test_autocast():
    network = self_tuning(small_cnn(), 2)
    for p in network.response_parameters().values():
        nn.init.normal_(p, std=0.1)
    x, inputs = torch.randn(EXAMPLES, 1, 8, 8), torch.randn(EXAMPLES, 2)

    def outputs():
        with network.perturbation.set_to(inputs):
            perturbed = network(x)
        with forward_ad.dual_level(), network.perturbation.set_to(inputs, linearised=True):
            tangent = forward_ad.unpack_dual(network(x)).tangent
        return perturbed, tangent

    exact = outputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = outputs()
    assert low[0].dtype == torch.bfloat16
    for one, other in zip(exact, low, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=0.05, atol=0.05)


def test_compiled_networks_see_the_perturbation_of_the_moment():
    network = self_tuning(small_cnn(), 2)
    for p in network.response_parameters().values():
        nn.init.normal_(p, std=0.1)
    compiled = torch.compile(network, backend="aot_eager")
    x = torch.randn(EXAMPLES, 1, 8, 8)
    plain = compiled(x)
    torch.testing.assert_close(plain, network(x))
    for _ in range(2):
        with network.perturbation.set_to(torch.randn(EXAMPLES, 2)):
            perturbed = compiled(x)
            torch.testing.assert_close(perturbed, network(x))
        assert (perturbed - plain).abs().max() > 0.01
    torch.testing.assert_close(compiled(x), plain)


def test_frozen_layers_do_not_respond():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    network = self_tuning(model, N)
    assert {name.split(".")[0] for name in network.response_parameters()} == {"2"}
    assert network.without_rule == ("1",)  # the first is frozen as a whole
    with pytest.raises(InputError, match="no layer whose weights can respond"):
        self_tuning(nn.Linear(3, 2).requires_grad_(False), N)
