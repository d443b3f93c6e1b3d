"""Converted recurrent layers: torch's without perturbation, one setting of the weights for each example with one."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from tune_hypergrad.errors import InputError
from tune_hypergrad.stn import self_tuning

N = 2
EXAMPLES, TIME, FEATURES, HIDDEN = 3, 4, 3, 4

LAYERS = {
    "LSTM": nn.LSTM(FEATURES, HIDDEN),
    "LSTM, deep, both ways, batch first": nn.LSTM(FEATURES, HIDDEN, 2, bidirectional=True, batch_first=True),
    "LSTM without bias": nn.LSTM(FEATURES, HIDDEN, bias=False),
    "LSTM with projection": nn.LSTM(FEATURES, HIDDEN, 2, proj_size=2, bidirectional=True),
    "GRU": nn.GRU(FEATURES, HIDDEN),
    "GRU, deep, both ways, batch first": nn.GRU(FEATURES, HIDDEN, 2, bidirectional=True, batch_first=True),
    "GRU without bias": nn.GRU(FEATURES, HIDDEN, 2, bias=False),
    "RNN": nn.RNN(FEATURES, HIDDEN),
    "RNN, deep, both ways, batch first": nn.RNN(FEATURES, HIDDEN, 2, bidirectional=True, batch_first=True),
    "RNN of ReLUs": nn.RNN(FEATURES, HIDDEN, nonlinearity="relu", bias=False),
    "RNNCell": nn.RNNCell(FEATURES, HIDDEN),
    "RNNCell of ReLUs": nn.RNNCell(FEATURES, HIDDEN, nonlinearity="relu"),
    "LSTMCell": nn.LSTMCell(FEATURES, HIDDEN),
    "LSTMCell without bias": nn.LSTMCell(FEATURES, HIDDEN, bias=False),
    "GRUCell": nn.GRUCell(FEATURES, HIDDEN),
}

by_kind = pytest.mark.parametrize("kind", LAYERS)
by_state = pytest.mark.parametrize("with_state", [False, True])


def make(kind, dtype=torch.float64, with_state=False):
    """A layer, its conversion with a random response, and its inputs."""
    torch.manual_seed(0)
    layer = copy.deepcopy(LAYERS[kind]).to(dtype)
    network = self_tuning(layer, N)
    for p in network.response_parameters().values():
        nn.init.normal_(p, std=0.5)
    if isinstance(layer, nn.RNNCellBase):
        x, states = torch.randn(EXAMPLES, FEATURES), [torch.randn(EXAMPLES, HIDDEN) for _ in range(2)]
    else:
        x = torch.randn(EXAMPLES, TIME, FEATURES) if layer.batch_first else torch.randn(TIME, EXAMPLES, FEATURES)
        count = layer.num_layers * (1 + layer.bidirectional)
        states = [torch.randn(count, EXAMPLES, size) for size in (layer.proj_size or HIDDEN, HIDDEN)]
    states = [state.to(dtype) for state in states]
    hx = tuple(states) if "LSTM" in kind else states[0]
    return layer, network, (x.to(dtype), hx) if with_state else (x.to(dtype),)


def flat(output):
    """All tensors of an output."""
    return [output] if isinstance(output, torch.Tensor) else [t for part in output for t in flat(part)]


def total(output):
    return sum(t.sin().sum() for t in flat(output))


def example_dims(layer, output):
    """Along which dimension of each of `flat(output)` examples stand."""
    if isinstance(layer, nn.RNNCellBase):
        return [0] * len(flat(output))
    return [0 if layer.batch_first else 1] + [1] * (len(flat(output)) - 1)


def only(layer, args, example):
    """The arguments of one example alone."""

    def of(t, dim):
        return t.narrow(dim, example, 1)

    cell = isinstance(layer, nn.RNNCellBase)
    x = of(args[0], 0 if cell or layer.batch_first else 1)
    if len(args) == 1:
        return (x,)
    dim = 0 if cell else 1
    return x, tuple(of(t, dim) for t in args[1]) if isinstance(args[1], tuple) else of(args[1], dim)


@by_state
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@by_kind
def test_without_perturbation_it_is_torchs_layer(kind, dtype, with_state):
    layer, network, args = make(kind, dtype, with_state)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    args = (args[0].requires_grad_(), *args[1:])
    expected = layer(*args)
    by_layer = torch.autograd.grad(total(expected), [args[0], *layer.parameters()])
    general = list(network.general_parameters().values())
    zero = torch.zeros(EXAMPLES, N, dtype=dtype)
    outputs = [network(*args)]
    for inputs in (zero[0], zero):
        with network.perturbation.set_to(inputs):
            outputs.append(network(*args))
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
        found = torch.autograd.grad(total(output), [args[0], *general])
        torch.testing.assert_close(found, by_layer, rtol=20 * tolerance, atol=20 * tolerance)


@by_state
@by_kind
def test_each_example_sees_the_weights_at_its_own_hyperparameters(kind, with_state):
    layer, network, args = make(kind, with_state=with_state)
    inputs = torch.randn(EXAMPLES, N, dtype=torch.float64)
    with network.perturbation.set_to(inputs):
        output = network(*args)
    for example in range(EXAMPLES):
        alone = only(layer, args, example)
        at = network.parameters_at(inputs[example])
        assert at.keys() == dict(layer.named_parameters()).keys()
        assert not any(torch.equal(at[name], p) for name, p in layer.named_parameters())
        mine = [t.narrow(dim, example, 1) for t, dim in zip(flat(output), example_dims(layer, output), strict=True)]
        torch.testing.assert_close(mine, flat(functional_call(layer, at, alone)))
        with network.perturbation.set_to(inputs[example]):
            torch.testing.assert_close(flat(network(*alone)), mine)
        there = copy.deepcopy(layer)
        there.load_state_dict(network.general_state_dict(inputs[example]))
        torch.testing.assert_close(flat(there(*alone)), mine)


@by_state
@by_kind
def test_the_linearised_response_is_the_derivative_by_the_weights(kind, with_state):
    layer, network, args = make(kind, with_state=with_state)
    inputs = torch.randn(N, dtype=torch.float64)
    with forward_ad.dual_level(), network.perturbation.set_to(inputs.expand(EXAMPLES, N), linearised=True):
        values, tangents = zip(*(forward_ad.unpack_dual(t) for t in flat(network(*args))), strict=True)
    general = {name: p.detach() for name, p in layer.named_parameters()}
    direction = {name: p - general[name] for name, p in network.parameters_at(inputs).items()}

    def plain(parameters):
        return flat(functional_call(layer, parameters, args))

    expected, by_jvp = torch.func.jvp(plain, (general,), (direction,))
    torch.testing.assert_close(list(values), expected)
    torch.testing.assert_close(list(tangents), by_jvp)
    # and so are its gradients by the response's parameters
    parameters = list(network.response_parameters().values())
    found = torch.autograd.grad(total(tangents), parameters)
    torch.testing.assert_close(found, torch.autograd.grad(total(by_jvp), parameters))


@by_kind
def test_forward_mode_derivatives_in_single_precision(kind):
    layer, network, args = make(kind, torch.float32)
    tangent = torch.randn_like(args[0])
    _, found = torch.func.jvp(lambda x: flat(network(x)), args, (tangent,))
    double = copy.deepcopy(layer).double()
    _, expected = torch.func.jvp(lambda x: flat(double(x)), (args[0].double(),), (tangent.double(),))
    torch.testing.assert_close(found, [t.float() for t in expected], rtol=1e-4, atol=1e-5)


@by_kind
def test_weights_can_be_replaced_with_their_responses(kind):
    layer, network, args = make(kind)
    inputs = torch.randn(N, dtype=torch.float64)
    at = network.parameters_at(inputs)
    assert network.model.responses.keys() == at.keys()
    for own, parameter in layer.named_parameters():
        mask = (torch.rand_like(parameter) < 0.5).double()
        with network.perturbation.set_to(inputs):
            output = network.call(lambda model: model(*args), {own: mask})
        torch.testing.assert_close(output, functional_call(layer, {**at, own: at[own] * mask}, args))
        output = network.call(lambda model: model(*args), {own: mask})
        torch.testing.assert_close(output, functional_call(layer, {own: parameter * mask}, args))
    torch.testing.assert_close(copy.deepcopy(network)(*args), layer(*args))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_dropout_between_layers_is_torchs(kind):
    layer = kind(FEATURES, HIDDEN, 3, dropout=0.5, dtype=torch.float64)
    network, x = self_tuning(layer, N), torch.randn(TIME, EXAMPLES, FEATURES, dtype=torch.float64)
    outputs = {}
    for training in (True, False):
        layer.train(training), network.train(training)
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        with network.perturbation.set_to(torch.zeros(N, dtype=torch.float64)):
            outputs[training] = network(x)
        torch.testing.assert_close(outputs[training], expected)
    assert not torch.allclose(outputs[True][0], outputs[False][0])


@by_kind
def test_evaluation_and_state_dict_are_the_plain_layers(kind):
    layer, network, args = make(kind)
    layer.eval(), network.eval()
    assert network.without_rule == ()
    state = network.general_state_dict()
    assert state.keys() == layer.state_dict().keys()
    there = copy.deepcopy(layer)
    for p in there.parameters():
        nn.init.zeros_(p)
    there.load_state_dict(state)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(flat(network(*args)), flat(there(*args)), strict=True))


def test_shared_weights_share_their_responses():
    model = nn.ModuleList([nn.GRUCell(FEATURES, HIDDEN), nn.GRUCell(FEATURES, HIDDEN)])
    model[1].weight_hh, model[1].bias_hh = model[0].weight_hh, model[0].bias_hh
    first, second = self_tuning(model, N).model
    assert first.weight_hh is second.weight_hh and first.weight_ih is not second.weight_ih
    for name, parameter in first.response["hh"].named_parameters():
        assert parameter is second.response["hh"].get_parameter(name)
    for name, parameter in first.response["ih"].named_parameters():
        assert parameter is not second.response["ih"].get_parameter(name)


@pytest.mark.parametrize(
    ("kind", "x", "message"),
    [
        ("LSTM", pack_sequence([torch.zeros(2, FEATURES)]), "on a PackedSequence: pass a padded tensor"),
        ("GRU", torch.zeros(TIME, FEATURES), r"takes a batch, a tensor with 3 dimensions, not one of shape \(4, 3\)"),
        ("LSTM", torch.zeros(EXAMPLES, 5, FEATURES), "perturbation is of 3 examples, .* has 5 along dimension 1"),
        ("LSTM, deep, both ways, batch first", torch.zeros(5, 3, FEATURES), "has 5 along dimension 0"),
        ("GRUCell", torch.zeros(FEATURES), "takes a batch, a tensor with 2 dimensions"),
        ("LSTMCell", torch.zeros(5, FEATURES), "perturbation is of 3 examples, .* has 5 along dimension 0"),
    ],
)
def test_what_has_no_examples_to_respond_by_is_refused(kind, x, message):
    _, network, _ = make(kind, torch.float32)
    with network.perturbation.set_to(torch.zeros(EXAMPLES, N)), pytest.raises(InputError, match=message) as caught:
        network(x)
    assert "\n" not in str(caught.value)


@by_state
@pytest.mark.parametrize("sorted_already", [False, True])
@pytest.mark.parametrize("kind", [kind for kind, layer in LAYERS.items() if isinstance(layer, nn.RNNBase)])
def test_one_perturbation_on_packed_sequences(kind, sorted_already, with_state):
    layer, network, args = make(kind, with_state=with_state)
    lengths = [4, 3, 2] if sorted_already else [2, 4, 3]
    torch.manual_seed(1)
    sequences = [torch.randn(length, FEATURES, dtype=torch.float64) for length in lengths]
    args = pack_sequence(sequences, enforce_sorted=sorted_already), *args[1:]
    torch.testing.assert_close(network(*args)[0].data, layer(*args)[0].data)
    inputs = torch.randn(N, dtype=torch.float64)
    with network.perturbation.set_to(inputs):
        output = network(*args)
    expected = functional_call(layer, network.parameters_at(inputs), args)
    assert isinstance(output[0], PackedSequence)
    torch.testing.assert_close(flat(output[0].data), flat(expected[0].data))
    torch.testing.assert_close(flat(output[1]), flat(expected[1]))
    assert torch.equal(output[0].batch_sizes, expected[0].batch_sizes)
    with forward_ad.dual_level(), network.perturbation.set_to(inputs, linearised=True):
        tangent = forward_ad.unpack_dual(network(*args)[0].data).tangent
    step, ends = 1e-5, []
    for sign in (1, -1):
        with network.perturbation.set_to(sign * step * inputs):
            ends.append(network(*args)[0].data)
    torch.testing.assert_close(tangent, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)
