"""Converted attention: torch's layer without perturbation, one setting of the weights for each example with one."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call

from tune_hypergrad.errors import InputError
from tune_hypergrad.stn import self_tuning

N = 2
EXAMPLES, QUERIES, KEYS, WIDTH, HEADS = 3, 4, 5, 6, 2

CAUSAL = torch.ones(QUERIES, QUERIES).triu(1).bool()
PADDING = torch.arange(KEYS) >= torch.tensor([[5], [3], [4]])
MASK = torch.ones(QUERIES, KEYS).triu(3).bool()
BY_HEAD = torch.linspace(-2, 2, EXAMPLES * HEADS * QUERIES * KEYS).reshape(-1, QUERIES, KEYS)
LAYERS = {
    "packed": {},
    "packed, batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "separate": {"kdim": 3, "vdim": 2},
    "separate without bias, batch first": {"kdim": 3, "bias": False, "batch_first": True},
}
CALLS = {
    "self-attention": {"need_weights": False},
    "cross-attention": {},
    "causal self-attention": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "mask for each head": {"attn_mask": BY_HEAD, "need_weights": False},
    "padding, weights of each head": {"key_padding_mask": PADDING, "average_attn_weights": False},
    "padding and mask": {"key_padding_mask": PADDING, "attn_mask": MASK},
    "padding and mask, without weights": {"key_padding_mask": PADDING, "attn_mask": MASK, "need_weights": False},
}

by_layer = pytest.mark.parametrize("kind", LAYERS)
by_call = pytest.mark.parametrize("call", CALLS)
by_weights = pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}])


def make(kind, call="cross-attention", dtype=torch.float64):
    """A layer, its conversion with a random response, its arguments and keywords."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, HEADS, **LAYERS[kind], dtype=dtype)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    network = self_tuning(layer, N)
    for p in network.response_parameters().values():
        nn.init.normal_(p, std=0.5)
    own = "self" in call
    keys = QUERIES if own else KEYS
    if own and layer.kdim == WIDTH == layer.vdim:
        args = [torch.randn(QUERIES, EXAMPLES, WIDTH, dtype=dtype)] * 3
    else:
        shapes = [(QUERIES, WIDTH), (keys, layer.kdim), (keys, layer.vdim)]
        args = [torch.randn(length, EXAMPLES, width, dtype=dtype) for length, width in shapes]
    if layer.batch_first:
        batched = {id(x): x.transpose(0, 1) for x in args}
        args = [batched[id(x)] for x in args]
    keywords = {
        name: x.to(dtype) if name == "attn_mask" and x.is_floating_point() else x for name, x in CALLS[call].items()
    }
    return layer, network, tuple(args), keywords


def flat(output):
    """Both parts of an output, if there are two."""
    return [t for t in output if t is not None]


def total(output):
    return sum(t.sin().sum() for t in flat(output))


def example_dims(layer, output):
    """Along which dimension of each of `flat(output)` examples stand."""
    return [0 if layer.batch_first else 1, 0][: len(flat(output))]


def only(layer, args, keywords, example):
    """The arguments and keywords of one example alone."""
    keywords = dict(keywords)
    if "key_padding_mask" in keywords:
        keywords["key_padding_mask"] = keywords["key_padding_mask"][[example]]
    if "attn_mask" in keywords and keywords["attn_mask"].ndim == 3:
        keywords["attn_mask"] = keywords["attn_mask"].unflatten(0, (EXAMPLES, HEADS))[example]
    return tuple(x.narrow(0 if layer.batch_first else 1, example, 1) for x in args), keywords


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@by_call
@by_layer
def test_without_perturbation_it_is_torchs_layer(kind, call, dtype):
    layer, network, args, keywords = make(kind, call, dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    args[0].requires_grad_()
    expected = layer(*args, **keywords)
    wanted = torch.autograd.grad(total(expected), [args[0], *layer.parameters()])
    general = list(network.general_parameters().values())
    zero = torch.zeros(EXAMPLES, N, dtype=dtype)
    outputs = [network.model(*args, **keywords)]
    for inputs in (zero[0], zero):
        with network.perturbation.set_to(inputs):
            outputs.append(network.model(*args, **keywords))
    for output in outputs:
        torch.testing.assert_close(flat(output), flat(expected), rtol=tolerance, atol=tolerance)
        found = torch.autograd.grad(total(output), [args[0], *general])
        torch.testing.assert_close(found, wanted, rtol=20 * tolerance, atol=20 * tolerance)


@by_call
@by_layer
def test_each_example_sees_the_weights_at_its_own_hyperparameters(kind, call):
    layer, network, args, keywords = make(kind, call)
    inputs = torch.randn(EXAMPLES, N, dtype=torch.float64)
    with network.perturbation.set_to(inputs):
        output = network.model(*args, **keywords)
    for example in range(EXAMPLES):
        its_args, its_keywords = only(layer, args, keywords, example)
        at = network.parameters_at(inputs[example])
        assert at.keys() == dict(layer.named_parameters()).keys()
        assert not any(torch.equal(at[name], p) for name, p in layer.named_parameters())
        mine = [t.narrow(dim, example, 1) for t, dim in zip(flat(output), example_dims(layer, output), strict=True)]
        torch.testing.assert_close(mine, flat(functional_call(layer, at, its_args, its_keywords)))
        with network.perturbation.set_to(inputs[example]):
            torch.testing.assert_close(flat(network.model(*its_args, **its_keywords)), mine)
        there = copy.deepcopy(layer)
        there.load_state_dict(network.general_state_dict(inputs[example]))
        torch.testing.assert_close(flat(there(*its_args, **its_keywords)), mine)


@by_weights
@by_layer
def test_the_linearised_response_is_the_derivative_by_the_weights(kind, weights):
    layer, network, args, keywords = make(kind, "padding and mask")
    keywords |= weights
    inputs = torch.randn(N, dtype=torch.float64)
    with forward_ad.dual_level(), network.perturbation.set_to(inputs.expand(EXAMPLES, N), linearised=True):
        output = flat(network.model(*args, **keywords))
        values, tangents = zip(*(forward_ad.unpack_dual(t) for t in output), strict=True)
    general = {name: p.detach() for name, p in layer.named_parameters()}
    direction = {name: p - general[name] for name, p in network.parameters_at(inputs).items()}

    def plain(parameters):
        # without weights torch's own kernel may have no forward-mode derivative
        needed = {**keywords, "need_weights": True}
        return flat(functional_call(layer, parameters, args, needed))[: len(output)]

    expected, by_jvp = torch.func.jvp(plain, (general,), (direction,))
    torch.testing.assert_close(list(values), expected)
    torch.testing.assert_close(list(tangents), by_jvp)
    # and so are its gradients by the response's parameters
    parameters = list(network.response_parameters().values())
    found = torch.autograd.grad(total(tangents), parameters)
    torch.testing.assert_close(found, torch.autograd.grad(total(by_jvp), parameters))


@by_weights
@by_layer
def test_forward_mode_derivatives_without_perturbation(kind, weights):
    layer, network, args, _ = make(kind)
    tangents = tuple(torch.randn_like(x) for x in args)
    _, found = torch.func.jvp(lambda *x: network.model(*x, **weights)[0], args, tangents)
    _, expected = torch.func.jvp(lambda *x: layer(*x)[0], args, tangents)
    torch.testing.assert_close(found, expected)


@by_layer
def test_weights_can_be_replaced_with_their_responses(kind):
    layer, network, args, _ = make(kind)
    inputs = torch.randn(N, dtype=torch.float64)
    at = network.parameters_at(inputs)
    assert network.model.responses.keys() == at.keys()
    for own, parameter in layer.named_parameters():
        mask = (torch.rand_like(parameter) < 0.5).double()
        with network.perturbation.set_to(inputs):
            output = network.call(lambda model: model(*args), {own: mask})
        torch.testing.assert_close(output, functional_call(layer, {**at, own: at[own] * mask}, args))


@by_weights
def test_dropout_is_of_attention_weights(weights):
    layer = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, dtype=torch.float64)
    network, x = self_tuning(layer, N), torch.randn(QUERIES, EXAMPLES, WIDTH, dtype=torch.float64)
    outputs = {}
    for training in (True, False):
        layer.train(training), network.train(training)
        torch.manual_seed(1)
        expected = layer(x, x, x, **weights)
        torch.manual_seed(1)
        with network.perturbation.set_to(torch.zeros(N, dtype=torch.float64)):
            outputs[training] = network.model(x, x, x, **weights)
        torch.testing.assert_close(flat(outputs[training]), flat(expected))
    assert not torch.allclose(outputs[True][0], outputs[False][0])


@by_layer
def test_evaluation_and_state_dict_are_the_plain_layers(kind):
    layer, network, args, _ = make(kind)
    layer.eval(), network.eval()
    state = network.general_state_dict()
    assert network.without_rule == () and state.keys() == layer.state_dict().keys()
    there = copy.deepcopy(layer)
    for p in there.parameters():
        nn.init.zeros_(p)
    there.load_state_dict(state)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(network(*args), there(*args), strict=True))


@pytest.mark.parametrize("batch_first", [True, False])
def test_in_a_transformer_layer_it_responds_in_evaluation_too(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=batch_first, dtype=torch.float64).eval()
    network = self_tuning(layer, N).eval()
    assert network.without_rule == ()
    for p in network.response_parameters().values():
        nn.init.normal_(p, std=0.5)
    x, inputs = torch.randn(EXAMPLES, EXAMPLES, WIDTH, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    with torch.no_grad():  # where torch's layer has a kernel of its own
        torch.testing.assert_close(network(x), layer(x))
        with network.perturbation.set_to(inputs):
            output = network(x)
        torch.testing.assert_close(output, functional_call(layer, network.parameters_at(inputs), x))


@pytest.mark.parametrize("frozen", ["in_proj_weight", "out_proj.weight", "out_proj.bias"])
def test_with_a_frozen_projection_it_does_not_respond(frozen):
    model = nn.ModuleList([nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64), nn.Linear(2, 2)])
    model[0].get_parameter(frozen).requires_grad_(False)
    network = self_tuning(model, N)
    assert type(network.model[0]) is nn.MultiheadAttention and "0" in network.without_rule
    assert {name.split(".")[0] for name in network.response_parameters()} == {"1"}


@pytest.mark.parametrize("kind", ["packed", "separate"])
def test_what_is_shared_shares_its_response(kind):
    torch.manual_seed(0)
    layers = [nn.MultiheadAttention(WIDTH, HEADS, **LAYERS[kind], dtype=torch.float64) for _ in range(2)]
    layers[1].in_proj_bias, layers[1].out_proj = layers[0].in_proj_bias, layers[0].out_proj
    network = self_tuning(nn.ModuleList(layers), N)
    for p in network.response_parameters().values():
        nn.init.normal_(p, std=0.5)
    inputs = torch.randn(N, dtype=torch.float64)
    first, second = (layer.parameters_at(inputs) for layer in network.model)
    for name in ("in_proj_bias", "out_proj.weight", "out_proj.bias"):
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], network.model[0].get_parameter(name))


@pytest.mark.parametrize("keywords", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_is_added_to_keys_has_no_rule(keywords):
    model = nn.ModuleList([nn.MultiheadAttention(WIDTH, HEADS, **keywords), nn.Linear(2, 2)])
    network = self_tuning(model, N)
    assert network.without_rule == ("0", "0.out_proj") and type(network.model[0]) is nn.MultiheadAttention


@pytest.mark.parametrize(
    ("kind", "x", "keywords", "message"),
    [
        ("packed", torch.zeros(4, WIDTH), {}, r"takes a batch, a tensor with 3 dimensions, not one of shape \(4, 6\)"),
        ("packed", torch.zeros(3, 5, WIDTH), {}, "perturbation is of 3 examples, .* has 5 along dimension 1"),
        ("packed, batch first", torch.zeros(5, 3, WIDTH), {}, "perturbation is of 3 examples, .* along dimension 0"),
        ("packed", torch.zeros(4, 3, WIDTH), {"is_causal": True}, "is_causal=True without attn_mask"),
        (
            "packed, batch first",
            torch.nested.as_nested_tensor([torch.zeros(2, WIDTH), torch.zeros(3, WIDTH)]),
            {},
            "nested tensors: pass enable_nested_tensor=False",
        ),
    ],
)
def test_what_has_no_examples_to_respond_by_is_refused(kind, x, keywords, message):
    _, network, _, _ = make(kind, dtype=torch.float32)
    with network.perturbation.set_to(torch.zeros(EXAMPLES, N)), pytest.raises(InputError, match=message) as caught:
        network.model(x, x, x, **keywords)
    assert "\n" not in str(caught.value)
