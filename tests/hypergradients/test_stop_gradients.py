"""A stop-gradient ends the way from the loss to the training gradient, and that gradient depends on what is behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from construct_cases.case import between, square
from construct_cases.gradients import Forces, gumbel, hooked, rounded, without_gradient
from construct_cases.losses import focal
from engine_problems import MODES, TOKENS, Values, differentiate, double, make_loop, make_problem
from torch import Tensor
from torch_loops import SGD, assert_exact

from tune_hypergrad import InputError, hypergradient
from tune_hypergrad.hypergradients import InnerLoop, Optimizer, TrainingSettings, hypergradient_run
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.step_graph import adjoint_step

Function = Callable[[Any, Tensor], Tensor]


@torch.no_grad()
def gate(net: Any, h: Tensor) -> Tensor:
    return torch.sigmoid(net.middle(h))


def with_gradient_within(net: Any, h: Tensor) -> Tensor:
    """A block without gradients that has one with gradients, and that another one."""
    with torch.no_grad():
        stopped = torch.sigmoid(net.middle(h))
        with torch.enable_grad():
            passing = h**2
            with torch.set_grad_enabled(False):
                inner = torch.tanh(h + 1)
            passing = passing * inner
        stopped = stopped * inner + passing
    return h * stopped + passing


def straight_through_sign(net: Any, h: Tensor) -> Tensor:
    return h + (torch.sign(net.middle(h)) * h.abs().mean() - h).detach()


def with_scale_of_weights(net: Any, h: Tensor) -> Tensor:
    """Weights rounded to a grid of their own largest."""
    weight = net.middle.weight
    with torch.no_grad():
        step = weight.abs().max() / 4
    return F.linear(h, weight + ((weight / step).round() * step - weight).detach())


def in_place_without_gradient(net: Any, h: Tensor) -> Tensor:
    """A mask that is made in place."""
    with torch.no_grad():
        mask = torch.zeros_like(h)
        mask[:, :3] = h[:, :3]
        mask.mul_(2).add_(h.sigmoid())
    return h * mask


def overwritten_without_gradient(net: Any, h: Tensor) -> Tensor:
    """Values that are scaled, set and averaged with others, while gradients go as if they were not."""
    if not net.training:
        return net.middle(h)
    h = h + 0
    with torch.no_grad():
        h.mul_(0.5 + h.mean().sigmoid())
        h[:, 0] = h[:, 1] ** 2
        h.lerp_(net.middle(h), 0.3)
    return net.middle(h)


def doubled_at_training(net: Any, h: Tensor) -> Tensor:
    h = h + 0
    if net.training:
        with torch.no_grad():
            h.mul_(h.abs() + 0.5)
    return net.middle(h)


@torch.no_grad()
def convolved(net: Any, h: Tensor) -> Tensor:
    return torch.tanh(F.conv1d(h.flip(1).unsqueeze(1), net.middle.weight.unsqueeze(1)).squeeze(2))


@torch.no_grad()
def normalised(net: Any, h: Tensor) -> Tensor:
    return torch.tanh(F.batch_norm(net.middle(h.flip(1)), None, None, net.middle.bias, training=True))


@torch.no_grad()
def soft_gumbel(net: Any, h: Tensor) -> Tensor:
    return F.gumbel_softmax(net.middle(h), 0.7) if net.training else h


def along_examples(net: Any, h: Tensor) -> Tensor:
    return h * F.gumbel_softmax(net.middle(h), 0.7, True, dim=0) if net.training else h


def with_hooks(net: Any, h: Tensor) -> Tensor:
    """Hooks that see, scale and bend gradients."""
    if h.requires_grad:
        h.register_hook(lambda gradient: None)
        h.register_hook(lambda gradient: torch.tanh(3 * gradient) / 2)
    out = net.middle(h)
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient * h.detach().exp())
    return torch.tanh(out)


def ascended(net: Any, h: Tensor) -> Tensor:
    """A step along a gradient that has no graph, as adversarial training takes it."""
    if not net.training:
        return net.middle(h)
    (gradient,) = torch.autograd.grad(torch.tanh(net.middle(h)).square().sum(), h, retain_graph=True)
    return net.middle(h + gradient)


def in_place_activations(net: Any, h: Tensor) -> Tensor:
    """Which their arguments ask for, with and without names."""
    out = net.middle(h)
    if net.training:
        with torch.no_grad():
            F.silu(out, inplace=True)
            F.elu(out, 0.7, True)
            F.dropout(input=out, p=0.3, inplace=True)
            torch._foreach_mul_([out], 0.5)
    return torch.tanh(out)


def assigned_data(net: Any, h: Tensor) -> Tensor:
    """Values that are others, in evaluation, too, while gradients go as if they were not."""
    out = net.middle(h)
    out.data = out.data.sigmoid() * 2
    return torch.tanh(out)


def read_and_overwritten_without_gradient(net: Any, h: Tensor) -> Tensor:
    """What is read is overwritten afterwards, as no graph needs it."""
    with torch.no_grad():
        gate = net.middle(h)
        scale = gate.sigmoid() * gate
        gate.mul_(scale)
    return h * gate


MODELS: dict[str, Function] = {
    "detach": lambda net, h: h * h.detach().tanh(),
    "torch.detach": lambda net, h: h * torch.detach(net.middle(h)),
    "data": lambda net, h: h * h.data.sigmoid(),
    "twice": lambda net, h: h * (h * net.middle(h.detach()).detach()).detach(),
    "detached weight": lambda net, h: torch.tanh(F.linear(h, net.middle.weight.detach(), net.middle.bias)),
    "weight with and without": lambda net, h: net.middle(h) * F.linear(h, net.middle.weight.detach()),
    "normaliser": lambda net, h: h / h.detach().norm(dim=1, keepdim=True),
    "no_grad": without_gradient,
    "no_grad, decorated": lambda net, h: h * gate(net, h),
    "no_grad, nested": with_gradient_within,
    "no_grad, in place": in_place_without_gradient,
    "no_grad, overwritten": overwritten_without_gradient,
    "no_grad, convolution": lambda net, h: h * (1 + convolved(net, h)),
    "no_grad, batch normalisation": lambda net, h: h * (1 + normalised(net, h)),
    "no_grad, gumbel": lambda net, h: h * (1 + soft_gumbel(net, h)),
    "scale of weights": with_scale_of_weights,
    "straight-through rounding": rounded,
    "straight-through sign": straight_through_sign,
    "hard gumbel": gumbel,
    "hard gumbel along another dimension": along_examples,
    "gradient without a graph": ascended,
    "in-place activations": in_place_activations,
    "data assigned": assigned_data,
    "no_grad, read and overwritten": read_and_overwritten_without_gradient,
    "hook that scales": hooked,
    "hooks that see and bend": with_hooks,
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    assert_exact(make_problem(between(MODELS[name], middle=square)))


@pytest.mark.parametrize("inputs", [True, False])
def test_a_backward_pass_of_the_model_s_own_is_refused(inputs: bool) -> None:
    """Which adds to `.grad`, where no derivative follows."""

    def ascended_by_grad(net: Any, h: Tensor) -> Tensor:
        if not net.training:
            return net.middle(h)
        start = h.detach().requires_grad_()
        torch.tanh(net.middle(start)).square().sum().backward(inputs=[start] if inputs else None)
        return net.middle(h + start.grad)

    problem = make_problem(between(ascended_by_grad, middle=square))
    with pytest.raises(InputError, match=r"backward\(\) adds to \.grad has no derivative: use torch\.autograd\.grad"):
        differentiate(make_loop(problem), SGD, "reverse", check=False)


@pytest.mark.parametrize(
    "write",
    [
        lambda h: h.detach()[:, 0].mul_(0.3),
        lambda h: h.data.mul_(0.5),
        lambda h: torch.no_grad()(lambda: h[:, 0].mul_(0.3))(),
    ],
)
def test_writes_that_would_not_reach_the_tensor_are_refused(write: Callable[[Tensor], Tensor]) -> None:
    def written(net: Any, h: Tensor) -> Tensor:
        h = net.middle(h)
        write(h)
        return h

    problem = make_problem(between(written, middle=square))
    with pytest.raises(InputError, match="clone the tensor first"):
        differentiate(make_loop(problem), SGD, "reverse", check=False)


LATE_WRITES: dict[str, Callable[[Tensor], Any]] = {
    "detach": lambda h: h.detach().mul_(0.5),
    "data": lambda h: h.data.mul_(0.5),
    "activation": lambda h: F.relu(h.detach(), inplace=True),
    "list": lambda h: torch._foreach_mul_([h.detach()], 0.5),
    "view": lambda h: h.detach()[:, 0].mul_(0.5),
}


class FromTheThirdStepOn(torch.nn.Module):
    """What a training step does from then on, to the output of a layer."""

    def __init__(self, act: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.middle, self.second, self.act = torch.nn.Linear(4, 6), square(), torch.nn.Linear(6, 3), act
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(torch.tanh(self.first(x)))
        if self.training:
            self.steps += 1
            if int(self.steps) > 2:
                self.act(h)
        return self.second(torch.sin(h))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LATE_WRITES)
def test_late_writes_that_would_not_reach_the_tensor_are_refused(name: str, mode: str) -> None:
    problem = make_problem(lambda: FromTheThirdStepOn(LATE_WRITES[name]))
    with pytest.raises(
        InputError, match=r"clone the tensor first, at test_stop_gradients.py:\d+ .*after the first step"
    ):
        differentiate(make_loop(problem, 5), SGD, mode)


def overwriting(h: Tensor) -> None:
    with torch.no_grad():
        F.relu(h - 0.1, inplace=True)
        F.silu(h, inplace=True)


def test_late_writes() -> None:
    assert_exact(make_problem(lambda: FromTheThirdStepOn(overwriting)))


class Normalised(torch.nn.Module):
    """A weight divided by its largest singular value, whose vectors take a step of power iteration in every pass."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.middle, self.after = square(), after
        self.register_buffer("u", F.normalize(torch.arange(1.0, 7.0, dtype=torch.float64), dim=0))
        self.register_buffer("v", F.normalize(torch.ones(6, dtype=torch.float64), dim=0))

    def forward(self, h: Tensor) -> Tensor:
        weight = self.middle.weight
        if self.training and not self.after:
            self._iterate(weight)
        sigma = self.u.clone() @ weight @ self.v.clone()
        if self.training and self.after:
            self._iterate(weight)
        return torch.tanh(F.linear(h, weight / sigma))

    @torch.no_grad()
    def _iterate(self, weight: Tensor) -> None:
        self.v.copy_(F.normalize(weight.t() @ self.u, dim=0))
        self.u.copy_(F.normalize(weight @ self.v, dim=0))


@pytest.mark.parametrize("after", [False, True])
def test_a_spectral_norm_that_overwrites_what_it_has_read(after: bool) -> None:
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), Normalised(after), torch.nn.Linear(6, 3))

    assert_exact(make_problem(model))


class Padded(torch.nn.Module):
    """An embedding whose padding row is not 0, and gets no gradient."""

    def __init__(self, padding_idx: int, functional: bool) -> None:
        super().__init__()
        self.padding_idx, self.functional = padding_idx, functional
        self.embedding, self.head = torch.nn.Embedding(7, 4, padding_idx=padding_idx), torch.nn.Linear(4, 3)
        torch.nn.init.normal_(self.embedding.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.functional:
            found = F.embedding(tokens, self.embedding.weight, self.padding_idx)
        else:
            found = self.embedding(tokens)
        return self.head(torch.tanh(found).flatten(1, -2).sum(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("padding_idx", "functional"), [(0, False), (-2, False), (-2, True)])
def test_a_padding_row(padding_idx: int, functional: bool) -> None:
    assert_exact(make_problem(lambda: Padded(padding_idx, functional), TOKENS))


def test_an_embedding_by_frequency_is_refused() -> None:
    def model() -> torch.nn.Module:
        padded = Padded(0, functional=False)
        padded.forward = lambda tokens: padded.head(  # type: ignore[method-assign]
            F.embedding(tokens, padded.embedding.weight, scale_grad_by_freq=True).sum(1)
        )
        return padded

    for mode in MODES:
        with pytest.raises(InputError, match="scale_grad_by_freq has no second derivative: leave it out"):
            differentiate(make_loop(make_problem(model, TOKENS)), SGD, mode, check=False)


WRITES_IN_EVALUATION: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda h: h.mul_(h.sigmoid()),
    "activation": lambda h: F.silu(h, inplace=True),
    "by its data": lambda h: h.data.mul_(2),
    "assigned": lambda h: setattr(h, "data", h.data * 0.5),
    "detached": lambda h: h.detach()[:, :3].mul_(0.3),
    "part": lambda h: h[:, :3].mul_(0.4),
    "list": lambda h: torch._foreach_mul_([h], 0.5),
    "read before": lambda h: h.copy_(h**2),
    "read in part": lambda h: h[:, 0].copy_(h[:, 1] ** 2),
}


def written_in_evaluation(write: Callable[[Tensor], Any]) -> Function:
    def function(net: Any, h: Tensor) -> Tensor:
        h = net.middle(h)
        if not net.training:
            with torch.no_grad():
                write(h)
        return torch.tanh(h)

    return function


@pytest.mark.parametrize("name", WRITES_IN_EVALUATION)
def test_writes_in_evaluation(name: str) -> None:
    assert_exact(make_problem(between(written_in_evaluation(WRITES_IN_EVALUATION[name]), middle=square)))


def test_writes_in_evaluation_to_what_a_gradient_needs_are_refused_with_their_line() -> None:
    def overwritten(net: Any, h: Tensor) -> Tensor:
        h = net.middle(h)
        return h if net.training else h.mul_(h.sigmoid() * h)

    pattern = r"gradient of the validation loss fails .* at test_stop_gradients\.py:\d+ .*; .* clone first"
    with pytest.raises(InputError, match=pattern):
        differentiate(make_loop(make_problem(between(overwritten, middle=square))), SGD, "reverse", check=False)


class RowOfStatistics(torch.nn.Module):
    """Statistics of which a part is written to, by way of a view of a view."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = square()
        self.register_buffer("statistics", torch.ones(2, 6, dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        out = self.middle(h) * self.statistics[0].clone()
        if self.training:
            with torch.no_grad():
                self.statistics[0][1:].mul_(0.5).add_(h.var(0)[1:] * 0.5)
        return out


def test_a_part_of_a_buffer() -> None:
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(4, 6), torch.nn.Tanh(), RowOfStatistics(), torch.nn.Linear(6, 3)
        ).double()

    assert_exact(make_problem(model), modes=("reverse",))


def test_several_seeds_overwrite_at_once() -> None:
    problem = make_problem(between(doubled_at_training, middle=square))
    run = hypergradient_run(EnsembleLoop(problem, TrainingSettings(4), [0, 1]), SGD, together=True)
    with run.loop.running():
        run.advance(run.length)
    alone = [differentiate(InnerLoop(problem, TrainingSettings(4, seed=seed)), SGD, "reverse") for seed in (0, 1)]
    for name, value in run.result().hypergradients.items():
        mean = sum(each.hypergradients[name] for each in alone) / 2
        assert torch.allclose(value, mean, rtol=1e-9, atol=0)


def self_distilled(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) + F.mse_loss(output.tanh(), output.detach().roll(1, 0))


def weighted(output: Tensor, target: Tensor, *, a: Any = 1.0) -> Tensor:
    """The tuned number itself is detached: training depends on it all the same."""
    return torch.as_tensor(a).detach() * F.cross_entropy(output, target)


@pytest.mark.parametrize(
    ("train_loss", "values"),
    [(focal, SGD), (self_distilled, SGD), (weighted, {"a": double(0.5, 2.0), "lr": double(0.2)})],
    ids=["focal", "self-distilled", "tuned number"],
)
def test_losses(train_loss: Callable[..., Tensor], values: Values) -> None:
    assert_exact(make_problem(train_loss=train_loss), values)


@pytest.mark.parametrize("optimizer", ["adamw", "nesterov"])
def test_other_optimizers(optimizer: str) -> None:
    fixed = {"eps": 1e-3} if optimizer == "adamw" else {"momentum": 0.6}
    values = {"lr": double(0.05, 0.1), "weight_decay": double(0.1)}
    problem = make_problem(between(MODELS["detached weight"], middle=square))
    assert_exact(problem, values, optimizer=optimizer, fixed=fixed)


def without_first(h: Tensor) -> Tensor:
    """The same, but for an example of zeros, whose norm has no derivative."""
    return torch.cat([0 * h[:1], h[1:]])


def by_norm(net: Any, h: Tensor) -> Tensor:
    h = without_first(h)
    return h / (h.detach().norm(dim=1, keepdim=True) + 0.1)


def by_root(net: Any, h: Tensor) -> Tensor:
    h = without_first(h)
    return h / (h.detach().square().sum(1, keepdim=True).sqrt() + 0.1)


def by_masked(net: Any, h: Tensor) -> Tensor:
    """A softmax over some, by infinities, less their largest."""
    scores = net.middle(h).masked_fill(torch.eye(6, dtype=torch.bool)[: len(h)], -torch.inf)
    return h * (scores - scores.detach().amax(1, keepdim=True)).exp()


@pytest.mark.parametrize("function", [by_norm, by_masked])
def test_zeros_and_infinities(function: Function) -> None:
    assert_exact(make_problem(between(function, middle=square)))


@pytest.mark.parametrize("function", [by_norm, by_root, by_masked])
def test_behind_a_stop_zero_times_infinity_does_not_happen(function: Function) -> None:
    """Zeros would be multiplied by the infinite derivative of a root; there has to be nothing to multiply."""
    loop = make_loop(make_problem(between(function, middle=square)))
    state, h = loop.initial_state(), {name: value[0] for name, value in SGD.items()}
    with loop.running():
        plain = loop.training(state, h, 0).gradient
        leaves = {name: value.clone().requires_grad_() for name, value in h.items()}
        pulled = adjoint_step(loop, state, leaves, 0, (plain, *(torch.zeros_like(slot) for slot in state.slots)), {})
        gradient, _, _ = ForwardRun(loop, SGD).at_first_step()
    assert plain.isfinite().all() and plain.norm() > 0
    for found in (pulled.gradient, gradient):
        torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("straight-through sign", "scale of weights")])
def test_the_gradient_of_a_validation_loss_passes(name: str) -> None:
    """It is no part of a step: what stands behind a stop moves the loss."""
    loop = make_loop(make_problem(between(MODELS[name], middle=square)))
    state = loop.initial_state()
    direction = torch.randn(loop.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(shift: float) -> float:
        return loop.evaluate(state._replace(params=state.params + shift * direction)).loss

    with loop.running():
        slope = float(loop.evaluate(state, gradient=True).gradient @ direction)
        assert slope == pytest.approx((loss(1e-6) - loss(-1e-6)) / 2e-6, rel=1e-6)


def doubled_without_gradient(net: Any, h: Tensor) -> Tensor:
    """Overwrites a part of what has a history, where torch records nothing."""
    h = h.clone()
    with torch.no_grad():
        h[:, 2:].mul_(2)
    return net.middle(h)


@pytest.mark.parametrize("function", [doubled_without_gradient])
def test_what_only_forward_mode_can(function: Function) -> None:
    problem = make_problem(between(function, middle=square))
    assert_exact(problem, modes=("forward",))
    with pytest.raises(InputError, match=r"reverse mode does not work .* a view that was made under no_grad"):
        differentiate(make_loop(problem), SGD, "reverse")
    many = {"lr": double(0.1, 0.2, 0.1, 0.2, 0.1), "momentum": double(0.5, 0.6, 0.7)}
    run = hypergradient_run(make_loop(problem), many)
    assert run.differentiation == "forward" and "has no derivative: clone" in run.reason


class ForcesWithoutGraph(Forces):
    """What has a graph in training only has derivatives in evaluation, too."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=self.training)
        return self.head(force)  # type: ignore[no-any-return]


@pytest.mark.parametrize("forces", [Forces, ForcesWithoutGraph])
def test_gradients_by_inputs(forces: type[Forces]) -> None:
    """They detach their input and require its gradient, which `torch.func` has no way for."""
    problem = make_problem(forces)
    assert_exact(problem, modes=("reverse", "checkpointed_reverse"))
    with pytest.raises(InputError, match="forward mode does not work on this model"):
        differentiate(make_loop(problem), SGD, "forward")
    run = hypergradient_run(make_loop(problem), {"lr": double(0.1)})
    assert run.differentiation == "reverse" and "forward mode does not work on this model" in run.reason


def detached_in_place(net: Any, h: Tensor) -> Tensor:
    return h * net.middle(h).detach_()


def in_inference_mode(net: Any, h: Tensor) -> Tensor:
    with torch.inference_mode():
        gate = torch.sigmoid(h)
    return h * gate.clone()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (detached_in_place, r"detach_\(\) has no derivative of second order: use detach\(\)"),
        (in_inference_mode, r"what is computed in torch.inference_mode\(\) has no derivative: use torch.no_grad\(\)"),
    ],
)
@pytest.mark.parametrize("in_evaluation", [False, True])
def test_refused(function: Function, message: str, in_evaluation: bool) -> None:
    def somewhere(net: Any, h: Tensor) -> Tensor:
        return function(net, h) if net.training or in_evaluation else h

    for mode in ("auto", *MODES):
        with pytest.raises(InputError, match=message):
            differentiate(make_loop(make_problem(between(somewhere, middle=square))), SGD, mode)


def test_in_evaluation_alone_detach_in_place_is_none() -> None:
    def in_evaluation(net: Any, h: Tensor) -> Tensor:
        return h if net.training else detached_in_place(net, h)

    assert_exact(make_problem(between(in_evaluation, middle=square)))


def under_no_grad(p: Tensor, g: Tensor, slots: Any, h: Any, step: Any) -> Any:
    with torch.no_grad():
        scale = p.norm() / g.norm()
    return p - h["lr"] * scale * g, slots


@torch.no_grad()
def all_under_no_grad(p: Tensor, g: Tensor, slots: Any, h: Any, step: Any) -> Any:
    after = p.clone()
    after.sub_(h["lr"] * (p.norm() / g.norm()) * g)
    return after, slots


def detached(p: Tensor, g: Tensor, slots: Any, h: Any, step: Any) -> Any:
    return p - h["lr"] * (p.norm() / g.norm()).detach() * g, slots


def by_data(p: Tensor, g: Tensor, slots: Any, h: Any, step: Any) -> Any:
    return p - h["lr"] * g / (1 + p.data**2), slots


def elementwise_detached(p: Tensor, g: Tensor, slots: Any, h: Any, step: Any) -> Any:
    mean = 0.5 * slots[0] + g
    return p - h["lr"] * torch.tanh(mean.detach() * p), (mean,)


def by_overwritten_data(p: Tensor, g: Tensor, slots: Any, h: Any, step: Any) -> Any:
    m = g.clone()
    m.data = p.tanh() * g
    return p - h["lr"] * m, slots


def by_copy(p: Tensor, g: Tensor, slots: Any, h: Any, step: Any) -> Any:
    m = g.clone()
    with torch.no_grad():
        m.copy_(p.norm() * g)
    return p - h["lr"] * m, slots


def by_item(p: Tensor, g: Tensor, slots: Any, h: Any, step: Any) -> Any:
    return p - h["lr"] * (p.norm() / g.norm()).item() * g, slots


def by_item_later(p: Tensor, g: Tensor, slots: Any, h: Any, step: Any) -> Any:
    return by_item(p, g, slots, h, step) if step > 2 else under_no_grad(p, g, slots, h, step)


def logging(p: Tensor, g: Tensor, slots: Any, h: Any, step: Any) -> Any:
    NORMS.append(float(g.norm()))
    assert NORMS[-1] > 0
    return under_no_grad(p, g, slots, h, step)


NORMS: list[float] = []


class TestRulesOfOptimizers:
    """What a rule of one's own does without gradients is part of the step all the same."""

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        "rule",
        [
            under_no_grad,
            all_under_no_grad,
            detached,
            by_data,
            by_overwritten_data,
            by_copy,
            elementwise_detached,
            logging,
        ],
    )
    def test_against_differences_of_the_rule_itself(self, rule: Any, mode: str) -> None:
        rule_of = Optimizer("own", rule, ("mean",), {"lr": 0.1})
        values = {"lr": double(0.1, 0.05)}
        found = differentiate(make_loop(optimizer=rule_of), values, mode)  # type: ignore[arg-type]
        loop = make_loop()
        for window in range(2):
            losses = []
            for sign in (1, -1):
                rates = values["lr"].clone()
                rates[window] += sign * 1e-6
                losses.append(plain_loss(loop, rule, rates))
            assert float(found.hypergradients["lr"][window]) == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("rule", [by_item, by_item_later])
    def test_numbers_are_refused(self, rule: Any, mode: str) -> None:
        with pytest.raises(InputError) as caught:
            hypergradient(
                make_problem(),
                {"lr": double(0.1)},
                steps=5,
                optimizer=Optimizer("own", rule, (), {"lr": 0.1}),
                differentiation=mode,
                check=False,
            )
        line = by_item.__code__.co_firstlineno + 1
        assert re.match(
            rf"in the update of training step \d, test_stop_gradients.py:{line} `return p", str(caught.value)
        )


def plain_loss(loop: Any, rule: Any, rates: Tensor) -> float:
    """The validation loss after a loop of training steps by hand, with the rule as it is."""
    state = loop.initial_state()
    params, mean = state.params, torch.zeros_like(state.params)
    with loop.running():
        for step in range(5):
            gradient = loop.training(state._replace(params=params), {}, step).gradient
            params, (mean,) = rule(params, gradient, (mean,), {"lr": rates[2 * step // 5]}, step)
        return float(loop.evaluate(state._replace(params=params)).loss)
