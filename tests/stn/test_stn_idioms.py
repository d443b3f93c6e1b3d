"""What people write in a model's forward: exact under every variant, or refused in one line that says what to do.

Exact is what plain backpropagation makes of weights that are written out for each example, in a second way of writing
the same model where the first would not go through `functional_call`.
"""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tune_hypergrad.errors import InputError
from tune_hypergrad.objective import Objective
from tune_hypergrad.regularisers import DropConnect
from tune_hypergrad.stn import (
    VARIANTS,
    TunedHyperparameter,
    TunedHyperparameters,
    self_tuning,
    training_gradients,
    validation_gradients,
)
from tune_hypergrad.stn.steps import linearising
from tune_hypergrad.stn.verification import refuse_gradients_lost, refuse_inexact_linearisation, refuse_unlike_reported

F64 = torch.float64
EXAMPLES, N = 5, 2
LAYERS = ("first", "second", "last")


class Net(nn.Module):
    """Three layers; between the first and the last is what `middle` makes of itself and the first one's output."""

    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(*shape, dtype=F64) for shape in ((3, 4), (4, 4), (4, 2)))
        self.middle = middle

    def forward(self, x):
        return self.last(self.middle(self, torch.tanh(self.first(x))))


class Square(torch.autograd.Function):
    """Without a forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class DifferentiableSquare(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_forward(x)
        return Square.forward(ctx, x)

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


class SquareWithoutGraph(DifferentiableSquare):
    """Its forward-mode derivative is right, but constant."""

    @staticmethod
    def jvp(ctx, tangent):
        return DifferentiableSquare.jvp(ctx, tangent).detach()


class Reversed(torch.autograd.Function):
    """The identity, with its gradient's sign changed."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def without_gradient(net, h):
    with torch.no_grad():
        other = torch.tanh(net.second(h))
    return h + other


def watched(net, h):
    with torch.no_grad():
        net.seen = net.second(h).mean()
    return torch.tanh(net.second(h))


def straight_through(net, h):
    h = torch.tanh(net.second(h))
    return h + ((4 * h).round() / 4 - h).detach()


def with_energy_gradient(net, h):
    """The gradient of an energy, which is part of the model's output."""
    energy = torch.tanh(net.second(h)).sum()
    return torch.autograd.grad(energy, h, create_graph=True)[0]


def written_in_place(net, h):
    other = net.second(h)
    other.mul_(2).sin_()
    other[:, 0] = h[:, 0]
    return other


def with_hooked_tensor(net, h):
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient / 2)
    return torch.tanh(net.second(h))


EXACT = {
    "called": lambda net, h: torch.tanh(net.second(h)),
    "called twice": lambda net, h: torch.tanh(net.second(torch.tanh(net.second(h)))),
    "not called": lambda net, h: h,
    "a way past": lambda net, h: h + torch.tanh(net.second(h)),
    "detached": lambda net, h: h.detach() + torch.tanh(net.second(h)),
    "detached data": lambda net, h: h.data * torch.tanh(net.second(h)),
    "detached for numpy": lambda net, h: torch.from_numpy(h.detach().numpy()) * torch.tanh(net.second(h)),
    "detached number": lambda net, h: torch.tanh(net.second(h)) * h[:, :1].detach().exp(),
    "straight through": straight_through,
    "watched without gradient": watched,
    "in place": written_in_place,
    "autograd function": lambda net, h: DifferentiableSquare.apply(net.second(h)),
    "einsum": lambda net, h: torch.einsum("bi,bi,bj->bj", h, net.second(h), h),
    "vmap": lambda net, h: torch.vmap(torch.outer)(h, net.second(h)).sum(1),
    "attention": lambda net, h: F.scaled_dot_product_attention(h[:, None], net.second(h)[:, None], h[:, None])[:, 0],
    "ends of a loop": lambda net, h: [h := torch.tanh(net.second(h)) for _ in range(3)][-1],
}
"""Ways of writing a model that every variant takes."""

NOT_LINEARISED = {
    "no_grad": (without_gradient, "the responses of first, second are not what a linearised prediction takes them for"),
    "energy": (with_energy_gradient, "the responses of second are not what a linearised prediction takes them for"),
    "hook": (with_hooked_tensor, "the responses of first are not what a linearised prediction takes them for"),
    "function": (lambda net, h: Square.apply(net.second(h)), "the model has no forward-mode derivative, which"),
    "reversal": (lambda net, h: Reversed.apply(net.second(h)), "the model has no forward-mode derivative, which"),
    "constant derivative": (
        lambda net, h: SquareWithoutGraph.apply(net.second(h)),
        "the responses of first, second are not what a linearised prediction takes them for",
    ),
    "nested": (
        lambda net, h: torch.func.jvp(torch.tanh, (net.second(h),), (h,))[1],
        "(RuntimeError: Nested forward mode AD is not supported",
    ),
}
"""Ways that the variants without linearisation take, with what is said under the other."""


def squared(output, target):
    return (output - target).square().mean()


def settings(network, per_example=True):
    """Hyperparameters, random responses, a batch and perturbations."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in network.response_parameters().values():
            p.normal_(std=0.5)
    definitions = [TunedHyperparameter(name, 0, 1, per_example=per_example) for name in ("a", "b")]
    tuned = TunedHyperparameters(definitions, initial={"a": 0.3}, scale=0.4, dtype=F64)
    batch = torch.randn(EXAMPLES, 3, dtype=F64), torch.randn(EXAMPLES, 2, dtype=F64)
    return tuned, batch, tuned.perturbations(EXAMPLES, torch.Generator().manual_seed(2)).detach()


def written_out(network, h):
    """The weights at hyperparameters h, W0 + diag(Q h) W1, for the layers that respond."""
    weights = {}
    for name in LAYERS:
        layer = network.model.get_submodule(name)
        weights |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
        if hasattr(layer, "response"):
            of = layer.response
            weights[f"{name}.weight"] = layer.weight + torch.diag(of.weight_scale @ h) @ of.weight
            weights[f"{name}.bias"] = layer.bias + torch.diag(of.bias_scale @ h) @ of.bias
    return weights


def along(model, base, changes, x):
    """The derivative of the model's output along changes of its weights, by backpropagation alone."""
    base = {name: p.detach().requires_grad_() for name, p in base.items()}
    output = functional_call(copy.deepcopy(model), base, (x,))
    cotangent = torch.zeros_like(output, requires_grad=True)
    by_weights = torch.autograd.grad(output, list(base.values()), cotangent, create_graph=True, allow_unused=True)
    used = zip(by_weights, changes.values(), strict=True)
    product = sum((gradient * change).sum() for gradient, change in used if gradient is not None)
    return output.detach() + torch.autograd.grad(product, cotangent, create_graph=True)[0]


def expected_training_gradients(network, model, method, inputs, batch):
    """By general weights and by responses, of one example at a time."""
    general, responses = network.general_parameters(), network.response_parameters()
    x, target = batch
    rows = [(written_out(network, h), row[None]) for h, row in zip(inputs, x, strict=True)]
    if method.linearised:
        base = {name: general[name].detach() for name in rows[0][0]}
        plain = squared(functional_call(copy.deepcopy(model), dict(general), (x,)), target)
        by_general = torch.autograd.grad(plain, list(general.values()), allow_unused=True)
        changes = [({name: w - base[name] for name, w in at.items()}, row) for at, row in rows]
        output = torch.cat([along(model, base, change, row) for change, row in changes])
        joint = squared(output, target)
    else:
        joint = squared(torch.cat([functional_call(copy.deepcopy(model), at, (row,)) for at, row in rows]), target)
        by_general = torch.autograd.grad(joint, list(general.values()), retain_graph=True, allow_unused=True)
    return by_general, torch.autograd.grad(joint, list(responses.values()), allow_unused=True)


def found_training_gradients(network, method, tuned, batch, perturbations, loss=squared, regularisers=()):
    objective = Objective(lambda output, target, weights, values: loss(output, target), regularisers, network.model)
    return training_gradients(network.train(), tuned, method, objective, batch, perturbations)


def assert_exact(network, model, variant):
    """Against the same model, or another way of writing it."""
    method, (tuned, batch, perturbations) = VARIANTS[variant], settings(network)
    inputs = perturbations + (0 if method.centred else tuned.unconstrained.detach())
    expected = expected_training_gradients(network, model, method, inputs, batch)
    found = found_training_gradients(network, method, tuned, batch, perturbations)
    parameters = network.general_parameters(), network.response_parameters()
    for names, gradients, others in zip(parameters, found, expected, strict=True):
        assert set(gradients) == {name for name, other in zip(names, others, strict=True) if other is not None}
        for name, other in zip(names, others, strict=True):
            if other is not None:
                torch.testing.assert_close(gradients[name], other, rtol=1e-9, atol=1e-12)


def verify(network, model, variant):
    _, (x, target), perturbations = settings(network)

    def predict(each):
        return each(x.clone())

    def predict_and_judge(each):
        output = predict(each)
        return output, squared(output, target)

    refuse_unlike_reported(network, model, predict_and_judge, perturbations[0])
    refuse_gradients_lost(network, predict_and_judge, perturbations)
    if VARIANTS[variant].linearised:
        for training in (True, False):
            refuse_inexact_linearisation(network.train(training), predict, perturbations)


# ---------------------------------------------------------------------------------------------------------------------
# what is exact


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("middle", EXACT.values(), ids=EXACT)
def test_exact_under_every_variant(middle, variant):
    model = Net(middle)
    network = self_tuning(model, N)
    verify(network, model, variant)
    assert_exact(network, model, variant)


@pytest.mark.parametrize("variant", ["stn", "centered-stn"])
@pytest.mark.parametrize("middle", [middle for middle, _ in NOT_LINEARISED.values()], ids=NOT_LINEARISED)
def test_exact_where_nothing_is_linearised(middle, variant):
    model = Net(middle)
    network = self_tuning(model, N)
    verify(network, model, variant)
    assert_exact(network, model, variant)


@pytest.mark.parametrize(("middle", "words"), NOT_LINEARISED.values(), ids=NOT_LINEARISED)
def test_what_cannot_be_linearised_is_refused_with_culprit_and_remedy(middle, words):
    model = Net(middle)
    with pytest.raises(InputError) as error:
        verify(self_tuning(model, N), model, "delta-stn")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert "or choose the variant stn or centered-stn" in str(error.value)


def test_a_module_without_forward_mode_derivative_is_named():
    class Squared(nn.Module):
        def forward(self, x):
            return Square.apply(x)

    model = nn.Sequential(Net(EXACT["called"]), nn.Sequential(Squared()))
    words = r"^module '1.0' has no forward-mode derivative.*NotImplementedError: You must implement the jvp"
    with pytest.raises(InputError, match=words):
        verify(self_tuning(model, N), model, "delta-stn")
    tuned, batch, perturbations = settings(network := self_tuning(model, N))
    with pytest.raises(InputError, match=words):
        found_training_gradients(network, VARIANTS["delta-stn"], tuned, batch, perturbations)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_functional_use_is_exact_once_its_layer_does_not_respond(variant):
    model = Net(lambda net, h: torch.tanh(net.second(h)) + h @ net.second.weight.T)
    with pytest.raises(InputError, match=r"^the responses of second are not those of the plain model's weights"):
        verify(self_tuning(model, N), model, variant)
    network = self_tuning(model, N, ("second",))
    verify(network, model, variant)
    assert_exact(network, model, variant)


# ---------------------------------------------------------------------------------------------------------------------
# the reported network


def by_type(net, h):
    return torch.tanh(net.second(h)) if type(net.second) is nn.Linear else h


def without_gradient_in_evaluation(net, h):
    with torch.set_grad_enabled(net.training):
        other = torch.tanh(net.second(h))
    return h + other


def detached_in_evaluation(net, h):
    return torch.tanh(net.second(h if net.training else h.detach()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("middle", "layers"), [(without_gradient_in_evaluation, "first, second"), (detached_in_evaluation, "first")]
)
def test_gradients_that_evaluation_alone_stops_are_refused(middle, layers, variant):
    model = Net(middle)
    with pytest.raises(
        InputError, match=f"^the responses of {layers} have no gradient, or a part of it, in eval"
    ) as error:
        verify(self_tuning(model, N), model, variant)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("linearised", [True, False])
def test_validation_without_any_gradient_is_refused(linearised):
    class Evaluated(Net):
        def forward(self, x):
            with torch.set_grad_enabled(self.training):
                return super().forward(x)

    network = self_tuning(Evaluated(EXACT["called"]), N).eval()
    tuned, batch, _ = settings(network)
    perturbations = tuned.perturbations(EXAMPLES, torch.Generator().manual_seed(2))
    with pytest.raises(InputError, match=r"^the validation loss has no derivative by the hyperparameters: let a layer"):
        method, given = VARIANTS["delta-stn"], {"entropy_weight": 0.1, "linearised": linearised}
        validation_gradients(network, tuned, method, squared, batch, perturbations, **given)


@torch.jit.script
def scripted_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.t()


@pytest.mark.parametrize(
    ("middle", "layers"),
    [
        (by_type, "first, second, last"),
        (lambda net, h: torch.tanh(net.second(h)) * len(list(net.parameters())), "first, second, last"),
        (lambda net, h: torch.tanh(scripted_product(h, net.second.weight)), "second"),
    ],
)
def test_models_that_are_another_once_converted_are_refused(middle, layers):
    model = Net(middle)
    with pytest.raises(InputError, match=f"^the responses of {layers} are not those of the plain model's") as error:
        verify(self_tuning(model, N), model, "stn")
    assert "\n" not in str(error.value)


def test_a_model_that_gives_something_else_each_time_passes():
    generator = torch.Generator()
    model = Net(lambda net, h: torch.tanh(net.second(h)) * torch.rand((), generator=generator, dtype=F64))
    verify(self_tuning(model, N), model, "stn")


def test_verification_tells_rounding_from_difference():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = Net(EXACT["called"]).to(dtype)
        network, x = self_tuning(model, N), torch.randn(EXAMPLES, 3, dtype=dtype)
        inputs = torch.randn(EXAMPLES, N, dtype=dtype)
        refuse_unlike_reported(network, model, lambda each: each(x), inputs[0])  # noqa: B023 (called at once)
        refuse_inexact_linearisation(network, lambda each: each(x), inputs)  # noqa: B023
    model = Net(EXACT["called"]).float()
    network, x, inputs = self_tuning(model, N), torch.randn(EXAMPLES, 3), torch.randn(EXAMPLES, N)

    def in_half(each):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return each(x).float()

    refuse_unlike_reported(network, model, in_half, inputs[0])
    refuse_inexact_linearisation(network, in_half, inputs)


def test_verification_looks_past_infinite_elements():
    """Logits of what cannot be are minus infinity, with any weights."""
    model = Net(lambda net, h: h @ net.second.weight)
    network, x, inputs = self_tuning(model, N), torch.randn(EXAMPLES, 3, dtype=F64), torch.randn(N, dtype=F64)

    def masked(each):
        return torch.cat([each(x), torch.full((EXAMPLES, 1), -torch.inf, dtype=F64)], 1)

    with pytest.raises(InputError, match="the responses of second are not those"):
        refuse_unlike_reported(network, model, masked, inputs)
    refuse_unlike_reported(self_tuning(model, N, ("second",)), model, masked, inputs)


def test_embeddings_that_change_their_weight_or_its_gradient_do_not_respond():
    for kind in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        model = nn.Sequential(nn.Embedding(9, 4, **kind), nn.Linear(4, 4))
        assert self_tuning(model, N).without_rule == ("0",)


# ---------------------------------------------------------------------------------------------------------------------
# work that is deferred until gradients are taken


def checkpointed(net, h):
    return torch.tanh(checkpoint(lambda x: net.second(torch.tanh(net.second(x))), h, use_reentrant=False))


def not_checkpointed(net, h):
    return torch.tanh(net.second(torch.tanh(net.second(h))))


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointed_training_is_that_of_the_model_without(variant):
    model = Net(checkpointed)
    network = self_tuning(model, N)
    verify(network, model, variant)
    assert_exact(network, Net(not_checkpointed), variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linearised", [True, False])
def test_checkpointed_validation_is_that_of_the_model_without(variant, linearised):
    found = []
    for middle in (checkpointed, not_checkpointed):
        network = self_tuning(Net(middle), N).eval()
        tuned, batch, _ = settings(network)
        perturbations = tuned.perturbations(EXAMPLES, torch.Generator().manual_seed(2))
        given = {"entropy_weight": 0.1, "linearised": linearised}
        found.append(validation_gradients(network, tuned, VARIANTS[variant], squared, batch, perturbations, **given))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointed_parts_run_again_with_dropped_weights(variant):
    """They would otherwise be run again with all of the weight, of which torch knows nothing."""
    found = []
    for middle in (checkpointed, not_checkpointed):
        network = self_tuning(Net(middle), N)
        tuned, batch, perturbations = settings(network, per_example=False)
        torch.manual_seed(3)
        drop = DropConnect("a", "second.weight")
        found.append(
            found_training_gradients(network, VARIANTS[variant], tuned, batch, perturbations, regularisers=[drop])
        )
        assert isinstance(network.model.second.weight, nn.Parameter)
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointed_batch_norm_counts_a_batch_once(variant):
    def net(keep):
        model = Net(lambda net, h: keep(net.norm, net.second(h)))
        model.norm = nn.BatchNorm1d(4, dtype=F64)
        return self_tuning(model, N)

    networks = net(lambda norm, h: checkpoint(norm, h, use_reentrant=False)), net(lambda norm, h: norm(h))
    found = []
    for network in networks:
        tuned, batch, perturbations = settings(network)
        found.append(found_training_gradients(network, VARIANTS[variant], tuned, batch, perturbations))
        found[-1] += (dict(network.model.named_buffers()),)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert found[0][2]["norm.num_batches_tracked"] == 1


def test_what_is_saved_for_gradients_of_a_linearised_prediction_has_no_tangents():
    """Else, backpropagation would carry tangents along that nobody asks for."""
    network = self_tuning(Net(EXACT["called"]), N)
    _, (x, _), perturbations = settings(network)
    responses = {id(p) for p in network.response_parameters().values()}
    saved = []

    def leads_to_responses(node):
        further = [leads_to_responses(each) for each, _ in node.next_functions if each is not None]
        if not any(further):
            return id(getattr(node, "variable", None)) in responses
        saved.extend(getattr(node, name) for name in dir(node) if name.startswith("_saved_"))
        return True

    with linearising(network, perturbations):
        assert leads_to_responses(forward_ad.unpack_dual(network(x)).tangent.grad_fn)
        tensors = [each for each in saved if isinstance(each, torch.Tensor)]
        assert len(tensors) > 10
        assert all(forward_ad.unpack_dual(each).tangent is None for each in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# models that return their loss


def total(output):
    return output.square().mean()


LOSSES = {
    "loss": (total, lambda output, target: output),
    "loss of one element": (lambda output: total(output)[None], lambda output, target: output.sum()),
    "loss in a dict": (lambda output: {"loss": total(output)}, lambda output, target: output["loss"]),
    "loss beside": (
        lambda output: (output, total(output)),
        lambda output, target: squared(output[0], target) + 0.1 * output[1],
    ),
}


class Whole(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.net, self.what = Net(EXACT["called"]), what

    def forward(self, x):
        return self.what(self.net(x))


@pytest.mark.parametrize(("what", "loss"), LOSSES.values(), ids=LOSSES)
def test_a_loss_is_not_linearised_in_a_predictions_place(what, loss):
    network = self_tuning(Whole(what), N)
    tuned, batch, perturbations = settings(network)
    said = r"the model gives a loss itself, of shape \[1?\].*: return predictions and give Problem a loss, or choose"
    with pytest.raises(InputError, match=said) as error:
        found_training_gradients(network, VARIANTS["delta-stn"], tuned, batch, perturbations, loss)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=said):
        method, given = VARIANTS["stn"], {"entropy_weight": 0.1, "linearised": True}
        validation_gradients(network, tuned, method, loss, batch, perturbations, **given)
    for variant in ("stn", "centered-stn"):
        gradients = found_training_gradients(network, VARIANTS[variant], tuned, batch, perturbations, loss)
        other = self_tuning(Whole(lambda output: output), N)
        settings(other)

        def outside(output, target, what=what, loss=loss):
            return loss(what(output), target)

        expected = found_training_gradients(other, VARIANTS[variant], tuned, batch, perturbations, outside)
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("what", [lambda output: (output, total(output)), lambda output: (output, torch.ones(()))])
def test_a_loss_that_nothing_takes_does_no_harm(what):
    found = []
    for net, loss in (
        (Whole(what), lambda output, target: squared(output[0], target)),
        (Whole(lambda output: output), squared),
    ):
        network = self_tuning(net, N)
        tuned, batch, perturbations = settings(network)
        found.append(found_training_gradients(network, VARIANTS["delta-stn"], tuned, batch, perturbations, loss))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_a_prediction_of_one_number_for_one_example_is_a_prediction():
    network = self_tuning(nn.Sequential(nn.Linear(3, 1, dtype=F64), nn.Flatten(0)), N)
    tuned, (x, _), perturbations = settings(network)
    batch = x[:1], torch.zeros(1, dtype=F64)
    assert all(found_training_gradients(network, VARIANTS["delta-stn"], tuned, batch, perturbations[:1]))


# ---------------------------------------------------------------------------------------------------------------------
# modes and buffers


def test_modules_left_in_evaluation_mode_stay_there():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)))
    model[1].eval()
    model[2].training = False
    for network in (self_tuning(model, N), copy.deepcopy(self_tuning(model, N))):
        for training in (True, False, True):
            network.train(training)
            modes = [module.training for module in network.model]
            assert modes == [training, False, False]
            assert [module.training for module in network.model[2]] == [training, training]
    network = self_tuning(model.eval(), N).train()
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_frozen_batch_norm_is_trained_by_its_running_statistics(variant):
    def frozen(net):
        net.norm = nn.BatchNorm1d(4, affine=False, dtype=F64).eval()
        net.norm.running_mean += 1
        return net

    model = frozen(Net(lambda net, h: net.norm(net.second(h))))
    network = self_tuning(model, N)
    before = copy.deepcopy(dict(network.model.named_buffers()))
    verify(network, model, variant)
    assert_exact(network, model, variant)
    torch.testing.assert_close(dict(network.model.named_buffers()), before, rtol=0, atol=0)


def counted(net, h):
    net.calls += 1
    net.mean = 0.9 * net.mean + 0.1 * h.mean(0)  # with its graph, as torch itself lets it
    return torch.tanh(net.norm(net.second(h))) + net.mean


def counting():
    model = Net(counted)
    model.norm = nn.BatchNorm1d(4, affine=False, dtype=F64)
    model.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    model.register_buffer("mean", torch.zeros(4, dtype=F64))
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_buffers_are_those_of_one_pass_in_each_training_step(variant):
    network, plain = self_tuning(counting(), N), counting().train()
    tuned, batch, perturbations = settings(network)
    method = VARIANTS[variant]
    inputs = torch.zeros_like(perturbations) if method.linearised else perturbations
    if not method.centred:
        inputs = inputs + tuned.unconstrained.detach()
    for step in (1, 2, 3):
        if not method.linearised:  # what the network sees, by the layers' own responses
            with network.perturbation.set_to(inputs):
                hidden = torch.tanh(network.model.first(batch[0]))
                plain.norm(network.model.second(hidden))
                plain.mean = (0.9 * plain.mean + 0.1 * hidden.mean(0)).detach()
        else:
            plain.load_state_dict({**network.general_state_dict(), **dict(plain.named_buffers())})
            plain(batch[0])
        found_training_gradients(network, method, tuned, batch, perturbations)
        buffers = dict(network.model.named_buffers())
        assert buffers["calls"] == step == buffers["norm.num_batches_tracked"]
        assert not any(buffer.requires_grad for buffer in buffers.values())
        for name in ("mean", "norm.running_mean", "norm.running_var"):
            torch.testing.assert_close(buffers[name], plain.get_buffer(name), rtol=1e-12, atol=1e-14)
        plain.mean = plain.mean.detach()


@pytest.mark.parametrize("linearised", [True, False])
def test_validation_leaves_buffers_alone(linearised):
    network = self_tuning(counting(), N)
    tuned, batch, _ = settings(network)
    before = copy.deepcopy(dict(network.model.named_buffers()))
    for module in (network.eval(), network.train()):
        perturbations = tuned.perturbations(EXAMPLES, torch.Generator().manual_seed(2))
        given = {"entropy_weight": 0.1, "linearised": linearised}
        validation_gradients(module, tuned, VARIANTS["delta-stn"], squared, batch, perturbations, **given)
        torch.testing.assert_close(dict(network.model.named_buffers()), before, rtol=0, atol=0)
