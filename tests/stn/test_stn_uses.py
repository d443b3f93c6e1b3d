"""Weights that a model uses elsewhere than in their layer's own forward: found, and left without a response."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from self_tuning import TUNED, advanced, loaded_and_judged, make_run, regularised_problem
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from tune_hypergrad.errors import InputError
from tune_hypergrad.regularisers import WeightDecay
from tune_hypergrad.stn import VARIANTS, register, responding_layers, self_tuning, used_elsewhere
from tune_hypergrad.stn.layers import RULES, SelfTuningLinear

N = 2


class Net(nn.Module):
    """Three layers; how they are put together is for `use` to say: from itself and the first layer's output."""

    def __init__(self, use):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.use = use

    def forward(self, x):
        return self.last(torch.tanh(self.use(self, torch.tanh(self.first(x)))))


class Product(torch.autograd.Function):
    """`x @ w.T` as a function of one's own."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient @ w, gradient.t() @ x


def of_doubled_weight(net, h):
    doubled = {name: 2 * p for name, p in net.second.named_parameters()}
    return torch.func.functional_call(net.second, doubled, (h,))


ELSEWHERE = {
    "functional": lambda net, h: F.linear(h, net.second.weight),
    "by name": lambda net, h: F.linear(input=h, weight=net.second.weight),
    "bias only": lambda net, h: h + net.second.bias,
    "operator": lambda net, h: h @ net.second.weight,
    "property": lambda net, h: h @ net.second.weight.T,
    "method": lambda net, h: h.mm(net.second.weight.t()),
    "right operand": lambda net, h: (net.second.weight @ h.t()).t(),
    "item": lambda net, h: h * net.second.weight[0],
    "in a list": lambda net, h: torch.cat([h, net.second.weight]).cumsum(0)[: len(h)],
    "number": lambda net, h: h * net.second.weight.norm().item(),
    "without gradient": lambda net, h: F.linear(h, net.second.weight.detach()),
    "data": lambda net, h: F.linear(h, net.second.weight.data),
    "normalised": lambda net, h: F.linear(h, F.normalize(net.second.weight)),
    "beside the layer": lambda net, h: net.second(h) + F.linear(h, net.second.weight),
    "penalty": lambda net, h: net.second(h) * sum(p.square().sum() for p in net.second.parameters()),
    "einsum": lambda net, h: torch.einsum("bi,oi->bo", h, net.second.weight),
    "autograd function": lambda net, h: Product.apply(h, net.second.weight),
    "functional call": of_doubled_weight,
    "checkpointed": lambda net, h: checkpoint(F.linear, h, net.second.weight, use_reentrant=False),
    "vmap": lambda net, h: torch.vmap(lambda row: net.second.weight @ row)(h),
    "class's forward": lambda net, h: nn.Linear.forward(net.second, h),
    "written to": lambda net, h: (net.second.weight.data.clamp_(-0.1, 0.1), net.second(h))[1],
    "training only": lambda net, h: F.linear(h, net.second.weight) if net.training else net.second(h),
    "evaluation only": lambda net, h: net.second(h) if net.training else F.linear(h, net.second.weight),
}

WITHIN = {
    "called": lambda net, h: net.second(h),
    "forward": lambda net, h: net.second.forward(h),
    "twice": lambda net, h: net.second(torch.tanh(net.second(h))),
    "not at all": lambda net, h: h,
    "checkpointed": lambda net, h: checkpoint(net.second, h, use_reentrant=False),
    "shape": lambda net, h: net.second(h) * net.second.weight.shape[0] / len(net.second.weight) / net.last.weight.dim(),
    "kind": lambda net, h: net.second(h.to(net.second.weight.dtype).to(net.second.weight.device)),
    "as another": lambda net, h: net.second(h.type_as(net.second.weight).to(net.last.weight)[: h.shape[0]]),
    "new tensors": lambda net, h: (
        net.second(h) + next(net.parameters()).new_zeros(4) + torch.zeros_like(net.second.bias)
    ),
    "questions": lambda net, h: net.second(h if net.second.weight.requires_grad and net.second.bias is not None else 0),
    "text": lambda net, h: (f"{net.second.weight}", net.second(h))[1],
}


def elsewhere(model, *inputs):
    return used_elsewhere(model, responding_layers(model), lambda model: model(*inputs))


@pytest.mark.parametrize("use", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.parametrize("training", [True, False])
def test_uses_elsewhere_are_found(use, training):
    model = Net(use).train(training)
    assert elsewhere(model, torch.randn(4, 3)) == ("second",)


@pytest.mark.parametrize("use", WITHIN.values(), ids=WITHIN)
def test_uses_in_the_layers_own_forward_and_of_shapes_are_none(use):
    assert elsewhere(Net(use), torch.randn(4, 3)) == ()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.hidden, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        self.out.weight = self.words.weight

    def forward(self, x):
        h = self.hidden(self.words(x))
        return self.out(h) + F.linear(h, self.words.weight)


class Attention(nn.Module):
    def __init__(self, own_output):
        super().__init__()
        self.attention, self.hidden = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)
        self.own_output = own_output

    def forward(self, x):
        mixed, _ = self.attention(x, x, x)
        return self.hidden(mixed) if self.own_output else F.linear(self.hidden(mixed), self.attention.out_proj.weight)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        state = next(self.parameters()).new_zeros(1, len(x), 4)
        return self.out(self.lstm(x, (state, state))[0])


def alias():
    model = Net(lambda net, h: F.linear(h, net.alias))
    model.alias = model.second.weight
    return model


def parametrised():
    model = Net(lambda net, h: F.linear(h, net.second.weight))
    parametrize.register_parametrization(model.second, "weight", nn.Tanh())
    return model


def compiled():
    return torch.compile(Net(ELSEWHERE["functional"]), backend="aot_eager")


ENCODER = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)


@pytest.mark.parametrize(
    ("make", "inputs", "found", "without_rule"),
    [
        (Tied, torch.randint(9, (4, 5)), ("words", "out"), ("words", "out")),
        (lambda: Attention(True), torch.randn(4, 5, 4), (), ()),
        # its child's weight is the attention's to use
        (lambda: Attention(False), torch.randn(4, 5, 4), ("attention",), ("attention", "attention.out_proj")),
        (Recurrent, torch.randn(4, 5, 4), (), ()),
        (lambda: ENCODER, torch.randn(4, 5, 4), (), ()),
        (alias, torch.randn(4, 3), ("second",), ("Net", "second")),
        # has no rule in the first place
        (parametrised, torch.randn(4, 3), (), ("second", "second.parametrizations.weight")),
        (compiled, torch.randn(4, 3), ("_orig_mod.second",), ("_orig_mod.second",)),
    ],
)
def test_layers_with_shared_weights_and_parts(make, inputs, found, without_rule):
    model = make()
    assert elsewhere(model, inputs) == found
    assert self_tuning(model, N, found).without_rule == without_rule


def test_a_rule_of_ones_own_is_watched_as_well():
    class OwnLinear(nn.Linear):
        pass

    @register(OwnLinear)
    class SelfTuningOwnLinear(SelfTuningLinear, OwnLinear):
        pass

    try:
        model = Net(ELSEWHERE["functional"])
        model.second = OwnLinear(4, 4)
        assert elsewhere(model, torch.randn(4, 3)) == ("second",)
    finally:
        del RULES[OwnLinear]


def test_the_model_stays_as_it_was():
    model = nn.Sequential(Net(ELSEWHERE["written to"]), nn.BatchNorm1d(4))
    model[0].second.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert elsewhere(model, torch.randn(4, 3)) == ("0.second",)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, True, False, True, True]
    assert "forward" not in vars(model[0].second)


def test_modules_that_stay_in_evaluation_mode_are_tried_in_it():
    model = Net(lambda net, h: F.linear(h, net.second.weight) if net.last.training else net.second(h))
    model.last.eval()
    assert elsewhere(model, torch.randn(4, 3)) == ()
    model.last.train()
    assert elsewhere(model, torch.randn(4, 3)) == ("second",)


# ---------------------------------------------------------------------------------------------------------------------
# conversion and runs


def test_layers_that_are_named_do_not_respond():
    model = Net(WITHIN["called"])
    network = self_tuning(model, N, ("second",))
    assert network.without_rule == ("second",)
    assert {name.split(".")[0] for name in network.response_parameters()} == {"first", "last"}
    assert network.general_parameters().keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (
            ("first", "second", "last"),
            "no layer responds, since the model uses weights of first, second, last elsewhere",
        ),
        (("secnd",), "no layer 'secnd' responds: first, second, last can; did you mean 'second'"),
    ],
)
def test_names_that_leave_nothing_or_are_unknown_are_refused(names, part):
    with pytest.raises(InputError, match=part) as error:
        self_tuning(Net(WITHIN["called"]), N, names)
    assert "\n" not in str(error.value)


class Reused(nn.Module):
    """Images to three classes; one weight is also used transposed, where its layer does not see it."""

    def __init__(self):
        super().__init__()
        self.flatten, self.hidden, self.out = nn.Flatten(), nn.Linear(36, 8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        h = torch.tanh(self.hidden(self.flatten(x)))
        back = torch.tanh(h @ self.hidden.weight)
        return self.out(self.dropout(torch.tanh(self.hidden(back))))


def reused():
    return regularised_problem(model=lambda: Reused().double())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_network_that_a_run_reports_is_the_one_that_it_trains(variant):
    problem = reused()
    run = advanced(make_run(problem, 10, variant=variant))
    assert run.network.without_rule == ("hidden",)
    assert all(p.abs().max() > 1e-4 for name, p in run.network.response_parameters().items() if "scale" in name)
    with run.loop.running():
        loss = run.judge().loss
    assert loaded_and_judged(problem, run.incumbent.weights).loss == loss
    x, target = problem.val.tensors
    inputs = torch.zeros(len(run.tuned)) if variant != "stn" else run.tuned.unconstrained.detach()
    with torch.no_grad(), run.network.perturbation.set_to(inputs.double()):
        perturbed = F.cross_entropy(run.network.eval()(x), target)
    assert float(perturbed) == pytest.approx(loss, rel=1e-12)


def test_looking_for_uses_leaves_no_trace():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run = make_run(reused())
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert run.cost.gradients == 0 and run.loop.model.training


class Penalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(36, 3)

    def forward(self, x):
        return self.fc(x.flatten(1)) * sum(p.square().sum() for p in self.parameters())


def test_a_run_without_a_layer_that_can_respond_is_refused():
    problem = regularised_problem(model=lambda: Penalised().double(), regularisers=[WeightDecay()])
    with pytest.raises(InputError, match="no layer responds, since the model uses weights of fc elsewhere") as error:
        make_run(problem, tuned=(TUNED[1],))
    assert "\n" not in str(error.value)
