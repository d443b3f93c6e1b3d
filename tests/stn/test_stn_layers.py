"""Converted layers: the plain layer without perturbation, one setting of the weights for each example with one."""

import copy
import inspect

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from tune_hypergrad.errors import InputError
from tune_hypergrad.stn import register, self_tuning
from tune_hypergrad.stn.layers import RULES, SelfTuningLinear

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:
    Conv1D = None

N = 3
EXAMPLES = 4


class OwnLinear(nn.Linear):
    """Has the forward of its base."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.calls = 0


class OwnBatchNorm2d(nn.BatchNorm2d):
    """Likewise."""


LAYERS = {
    "Linear": (nn.Linear(5, 6), (EXAMPLES, 5)),
    "Linear without bias": (nn.Linear(5, 6, bias=False), (EXAMPLES, 5)),
    "Linear on sequences": (nn.Linear(5, 6), (EXAMPLES, 7, 5)),
    "Bilinear": (nn.Bilinear(5, 2, 6), ((EXAMPLES, 5), (EXAMPLES, 2))),
    "Bilinear on sequences": (nn.Bilinear(5, 2, 6, bias=False), ((EXAMPLES, 7, 5), (EXAMPLES, 7, 2))),
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
    "RMSNorm": (nn.RMSNorm(5), (EXAMPLES, 7, 5)),
    "RMSNorm over two dimensions": (nn.RMSNorm((3, 5)), (EXAMPLES, 2, 3, 5)),
    "InstanceNorm1d": (nn.InstanceNorm1d(5, affine=True), (EXAMPLES, 5, 3)),
    "InstanceNorm2d, statistics": (nn.InstanceNorm2d(5, affine=True, track_running_stats=True), (EXAMPLES, 5, 3, 3)),
    "InstanceNorm3d": (nn.InstanceNorm3d(2, affine=True), (EXAMPLES, 2, 3, 3, 3)),
    "PReLU": (nn.PReLU(), (EXAMPLES, 5)),
    "PReLU by channel": (nn.PReLU(5), (EXAMPLES, 5, 3)),
    "PReLU of numbers": (nn.PReLU(), (EXAMPLES,)),
    "Embedding": (nn.Embedding(9, 5, padding_idx=0), (EXAMPLES, 7)),
    "own Linear": (OwnLinear(5, 6), (EXAMPLES, 5)),
    "own BatchNorm2d": (OwnBatchNorm2d(5), (EXAMPLES, 5, 3, 3)),
}
if Conv1D is not None:
    LAYERS["Conv1D of transformers"] = Conv1D(6, 5), (EXAMPLES, 7, 5)


def make(kind, dtype=torch.float64, responding=True):
    """A layer, its conversion with a random response, and an input."""
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    layer = copy.deepcopy(layer).to(dtype)
    for p in layer.parameters():
        nn.init.normal_(p)
    if isinstance(layer, nn.Embedding):
        x = torch.randint(9, shape)
    elif isinstance(layer, nn.Bilinear):
        x = tuple(torch.randn(each, dtype=dtype) for each in shape)
    else:
        x = torch.randn(shape, dtype=dtype)
    network = self_tuning(layer, N)
    if responding:
        for p in network.response_parameters().values():
            nn.init.normal_(p)
    return layer, network, x


def run(model, x):
    return model(*x) if isinstance(x, tuple) else model(x)


def test_every_rule_is_tested():
    here = {layer for layer, rule in RULES.items() if rule.__module__ == SelfTuningLinear.__module__}
    assert {type(layer) for layer, _ in LAYERS.values()} - {OwnLinear, OwnBatchNorm2d, Conv1D} == here


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_without_perturbation_it_is_the_plain_layer(kind, training, dtype):
    layer, network, x = make(kind, dtype)
    layer.train(training), network.train(training)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    buffers = copy.deepcopy(dict(layer.named_buffers()))
    expected = run(layer, x)
    by_layer = torch.autograd.grad(expected.sin().sum(), list(layer.parameters()))
    for inputs in (None, torch.zeros(N, dtype=dtype), torch.zeros(EXAMPLES, N, dtype=dtype)):
        network.model.load_state_dict({**network.model.state_dict(), **buffers})
        with network.perturbation.set_to(inputs):
            output = run(network, x)
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
        output = run(network, x)
    for example in range(EXAMPLES):
        at = network.parameters_at(inputs[example])
        assert any(not torch.equal(at[name], p) for name, p in layer.named_parameters())
        torch.testing.assert_close(output[[example]], functional_call(layer, at, x)[[example]])
        with network.perturbation.set_to(inputs[example]):
            torch.testing.assert_close(run(network, x)[[example]], output[[example]])
        layer_there = copy.deepcopy(layer)
        layer_there.load_state_dict(network.general_state_dict(inputs[example]))
        torch.testing.assert_close(run(layer_there, x)[[example]], output[[example]])


@pytest.mark.parametrize("kind", LAYERS)
def test_parameters_can_be_multiplied_with_their_responses(kind):
    layer, network, x = make(kind)
    layer.eval(), network.eval()
    inputs = torch.randn(N, dtype=torch.float64)
    at = network.parameters_at(inputs)
    assert network.model.responses.keys() == at.keys() == dict(layer.named_parameters()).keys()
    for name, parameter in layer.named_parameters():
        mask = (torch.rand_like(parameter) < 0.5).double()
        with network.perturbation.set_to(inputs):
            output = network.call(lambda model: run(model, x), {name: mask})
        torch.testing.assert_close(output, functional_call(layer, {**at, name: at[name] * mask}, x))


@pytest.mark.parametrize("kind", LAYERS)
def test_inputs_by_keyword(kind):
    layer, network, x = make(kind)
    names = list(inspect.signature(layer.forward).parameters)
    by_name = dict(zip(names, x if isinstance(x, tuple) else (x,), strict=False))
    torch.testing.assert_close(network.model(**by_name), run(layer, x))


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_transposed_convolutions_take_the_size_of_their_output(kind):
    plain = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[kind](2, 3, 3, stride=2).double()
    network = self_tuning(plain, N)
    for p in network.response_parameters().values():
        nn.init.normal_(p)
    x, inputs, size = torch.randn(EXAMPLES, 2, *[3] * kind).double(), torch.randn(N).double(), [8] * kind
    at = network.parameters_at(inputs)
    with network.perturbation.set_to(inputs):
        by_keyword, by_place = network.model(x, output_size=size), network.model(x, size)
    assert torch.equal(by_keyword, by_place) and list(by_keyword.shape[2:]) == size
    torch.testing.assert_close(by_keyword, functional_call(plain, at, x, {"output_size": size}))


NO_EXAMPLES = {
    "positions": (nn.Embedding(9, 5), torch.arange(7)),
    "examples and times in one": (nn.Linear(5, 6), torch.zeros(EXAMPLES * 7, 5)),
    "times first": (nn.Linear(5, 6), torch.zeros(7, EXAMPLES, 5)),
    "images and times in one": (nn.Conv2d(1, 2, 3), torch.zeros(EXAMPLES * 7, 1, 8, 8)),
    "transposed": (nn.ConvTranspose1d(1, 2, 3), torch.zeros(EXAMPLES * 7, 1, 8)),
    "normalised": (nn.BatchNorm1d(5), torch.zeros(EXAMPLES * 7, 5)),
    "positions, normalised": (nn.LayerNorm(5), torch.zeros(7, 5)),
}


@pytest.mark.parametrize("linearised", [True, False])
@pytest.mark.parametrize("kind", NO_EXAMPLES)
def test_what_has_no_examples_to_respond_by_is_refused(kind, linearised):
    layer, x = NO_EXAMPLES[kind]
    network, inputs = self_tuning(layer, N), torch.zeros(EXAMPLES, N)
    with network.perturbation.set_to(inputs[0]):
        assert network(x).shape == layer(x).shape
    perturbed = network.perturbation.set_to(inputs, linearised=linearised)
    message = r"perturbation is of 4 examples, .* along dimension 0, .* positions as arange\(t\).expand\(b, t\)"
    with forward_ad.dual_level(), perturbed, pytest.raises(InputError, match=message) as caught:
        network(x)
    assert "\n" not in str(caught.value)


ONE_FOR_ALL = ["Linear on sequences", "Conv2d", "ConvTranspose1d", "GroupNorm", "LayerNorm without bias", "Embedding"]


@pytest.mark.parametrize("linearised", [True, False])
@pytest.mark.parametrize("kind", ONE_FOR_ALL)
def test_one_input_for_all_examples(kind, linearised):
    _, network, x = make(kind)
    inputs = torch.randn(EXAMPLES, N, dtype=torch.float64)
    outputs = []
    for one in (x[:1], x[:1].expand_as(x)):
        with forward_ad.dual_level(), network.perturbation.set_to(inputs, linearised=linearised):
            outputs.append(forward_ad.unpack_dual(network(one)))
    torch.testing.assert_close(*(output.primal for output in outputs))
    if linearised:
        torch.testing.assert_close(*(output.tangent for output in outputs))
    assert len(outputs[0].primal) == EXAMPLES


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("each", [True, False])
def test_a_linearised_response_is_the_derivative(kind, each):
    _, network, x = make(kind)
    network.eval()
    inputs = torch.randn(EXAMPLES, N, dtype=torch.float64)[() if each else 0]

    def along(step):
        with network.perturbation.set_to(step * inputs):
            return run(network, x)

    with forward_ad.dual_level(), network.perturbation.set_to(inputs, linearised=True):
        value, tangent = forward_ad.unpack_dual(run(network, x))
    torch.testing.assert_close(value, run(network, x))
    step = 1e-5
    torch.testing.assert_close(tangent, (along(step) - along(-step)) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["Bilinear", "InstanceNorm1d", "InstanceNorm2d, statistics", "RMSNorm", "PReLU"])
def test_a_linearised_response_carries_the_tangents_of_inputs(kind):
    _, network, x = make(kind)
    inputs = torch.randn(EXAMPLES, N, dtype=torch.float64)
    x = x if isinstance(x, tuple) else (x,)
    changes = [torch.randn_like(each) for each in x]

    def along(step):
        with network.perturbation.set_to(step * inputs):
            return network(*(each + step * change for each, change in zip(x, changes, strict=True)))

    with forward_ad.dual_level(), network.perturbation.set_to(inputs, linearised=True):
        duals = [forward_ad.make_dual(each, change) for each, change in zip(x, changes, strict=True)]
        tangent = forward_ad.unpack_dual(network(*duals)).tangent
    step = 1e-6
    torch.testing.assert_close(tangent, (along(step) - along(-step)) / (2 * step), rtol=1e-5, atol=1e-7)


def test_parametrised_layers_do_not_respond():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    nn.utils.parametrizations.orthogonal(model[0])
    network = self_tuning(model, N)
    assert {name.split(".")[0] for name in network.response_parameters()} == {"2"}
    assert network.without_rule == ("0", "0.parametrizations.weight")
    x = torch.randn(EXAMPLES, 3)
    with network.perturbation.set_to(torch.zeros(EXAMPLES, N)):
        torch.testing.assert_close(network(x), model(x))


def test_padding_does_not_respond():
    network = self_tuning(nn.Embedding.from_pretrained(torch.randn(9, 5), freeze=False, padding_idx=0), N)
    words = torch.tensor([[0, 3, 0]]).expand(EXAMPLES, 3)
    with network.perturbation.set_to(torch.randn(EXAMPLES, N)):
        output = network(words)
    scale = network.model.response.weight_scale
    (gradient,) = torch.autograd.grad((output * torch.randn_like(output)).sum(), scale)
    assert gradient[3].all() and not gradient[[0, 1, 2, 4, 5, 6, 7, 8]].any()


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


@pytest.mark.parametrize("shared", [("weight", "bias"), ("bias",)])
def test_biases_that_are_shared_share_their_responses(shared):
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    for name in shared:
        setattr(model[2], name, getattr(model[0], name))
    network = self_tuning(model, N)
    assert len(network.response_parameters()) == 8 - 2 * len(shared)
    for p in network.response_parameters().values():
        nn.init.normal_(p)
    inputs, x = torch.randn(N).double(), torch.randn(EXAMPLES, 5).double()
    with network.perturbation.set_to(inputs):
        output = network(x)
    torch.testing.assert_close(functional_call(model, network.parameters_at(inputs), x), output)
    model.load_state_dict(network.general_state_dict(inputs))
    torch.testing.assert_close(model(x), output)


class OtherLinear(nn.Linear):
    """Has a forward of its own, and so no rule."""

    def forward(self, input):
        return super().forward(input)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (nn.Conv2d(3, 3, 2), nn.ConvTranspose2d(3, 3, 2), "its outputs in one are not its outputs in the other"),
        (nn.Conv1d(3, 4, 2), nn.ConvTranspose1d(4, 3, 2), "its outputs in one are not its outputs in the other"),
        (nn.Linear(3, 4), OtherLinear(3, 4), "responds in the first only: .* register a rule for OtherLinear"),
    ],
)
def test_a_weight_whose_response_cannot_be_shared_is_refused(first, second, message):
    second.weight = first.weight
    with pytest.raises(InputError, match=f"'0' and '1' share 'weight', .*{message}") as caught:
        self_tuning(nn.Sequential(first, second), N)
    assert "\n" not in str(caught.value)
    first.weight.requires_grad_(False)
    assert self_tuning(nn.Sequential(first, second, nn.Linear(1, 1)), N).without_rule == ("0", "1")


def test_transposed_convolutions_can_share_a_weight():
    model = nn.Sequential(nn.ConvTranspose1d(3, 3, 2), nn.ConvTranspose1d(3, 3, 2)).double()
    model[1].weight = model[0].weight
    network = self_tuning(model, N)
    for p in network.response_parameters().values():
        nn.init.normal_(p)
    inputs, x = torch.randn(N).double(), torch.randn(EXAMPLES, 3, 4).double()
    with network.perturbation.set_to(inputs):
        output = network(x)
    torch.testing.assert_close(functional_call(model, network.parameters_at(inputs), x), output)


def test_a_module_may_be_called_response():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.response = nn.Linear(5, 5)
            self.again, self.norm = self.response, nn.BatchNorm1d(5)

        def forward(self, x):
            return self.norm(self.response(self.again(x)))

    model = Net().double().eval()
    network = self_tuning(model, N).eval()
    assert network.general_parameters().keys() == dict(model.named_parameters()).keys()
    assert network.general_state_dict().keys() == model.state_dict().keys()
    assert len(network.response_parameters()) == 8
    for p in network.response_parameters().values():
        nn.init.normal_(p)
    inputs, x = torch.randn(N).double(), torch.randn(EXAMPLES, 5).double()
    with network.perturbation.set_to(inputs):
        output = network(x)
    model.load_state_dict(network.general_state_dict(inputs))
    torch.testing.assert_close(model(x), output)


def test_layers_without_a_rule_are_named_and_rules_can_be_added():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.factor * x

    class MyLinear(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

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


@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "GroupNorm", "LayerNorm"])
def test_normalisation_under_autocast_keeps_the_plain_layers_type(kind):
    layer, network, x = make(kind, torch.float32)
    for inputs in (None, torch.randn(N), torch.randn(EXAMPLES, N)):
        with torch.autocast("cpu", dtype=torch.bfloat16), network.perturbation.set_to(inputs):
            assert network(x.bfloat16()).dtype == layer(x.bfloat16()).dtype


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
