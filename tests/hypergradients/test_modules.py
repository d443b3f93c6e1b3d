"""Which models work: exact hypergradients through every kind of module, or a refusal."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_problems import (
    ARCHITECTURES,
    FEATURES,
    IMAGES,
    MODES,
    TOKENS,
    Recurrent,
    assert_close,
    differentiate,
    double,
    make_loop,
    make_problem,
    max_pool_relu,
    mlp,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.check import finite_differences

VALUES = {"lr": double(0.1, 0.2, 0.15), "momentum": double(0.6, 0.8), "weight_decay": double(0.02)}
ADAM_VALUES = {"lr": double(0.05, 0.02), "beta1": double(0.8), "beta2": double(0.9, 0.8, 0.95)}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str, optimizer: str) -> None:
    fixed, values = ({}, VALUES) if optimizer == "sgd" else ({"eps": 1e-3}, ADAM_VALUES)
    loop = make_loop(make_problem(architecture), optimizer=optimizer, fixed=fixed)
    expected = finite_differences(loop, values)
    forward, *others = (differentiate(loop, values, mode) for mode in MODES)
    assert_close(forward.hypergradients, expected, 1e-5)
    for other in others:
        assert_close(other.hypergradients, forward.hypergradients, 1e-9)
        for name, parameter in forward.params.items():
            torch.testing.assert_close(other.params[name], parameter, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_kinks_do_not_set_modes_apart(seed: int) -> None:
    """ReLU and max-pooling: no finite differences, but forward is reverse."""
    loop = make_loop(make_problem(max_pool_relu, IMAGES), seed=seed)
    forward, *others = (differentiate(loop, VALUES, mode) for mode in MODES)
    for other in others:
        assert_close(other.hypergradients, forward.hypergradients, 1e-9)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_single_precision_recurrent_networks(cell: Any) -> None:
    """oneDNN's fused kernels have no derivatives of derivatives; the engine goes round them."""
    loop = make_loop(make_problem(lambda: Recurrent(cell), TOKENS, dtype=torch.float32))
    forward, *others = (differentiate(loop, VALUES, mode) for mode in MODES)
    for other in others:
        assert other.hypergradients["lr"].dtype == torch.float32
        assert_close(other.hypergradients, forward.hypergradients, 1e-4)


def test_gradients_enter_tied_weights_once() -> None:
    loop = make_loop(make_problem("tied_weights"))
    assert loop.size == 7 * 5 + 5 * 5 + 5
    assert loop.size == sum(parameter.numel() for parameter in loop.model.parameters())


def test_frozen_parameters_stay() -> None:
    loop = make_loop(make_problem("frozen"))
    before = loop.model.layers[0].weight.detach().clone()
    result = differentiate(loop, VALUES)
    assert set(result.params) == {"layers.2.weight", "layers.2.bias"}
    assert torch.equal(loop.model.layers[0].weight, before)


def test_batch_norm_statistics_are_those_of_plain_training() -> None:
    problem = make_problem("batch_norm", batch_size=12)
    loop = make_loop(problem)
    model = copy.deepcopy(loop.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = problem.train.tensors
    for _ in range(loop.steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for mode in MODES:
        buffers = differentiate(loop, {"lr": double(0.1)}, mode).buffers
        assert set(buffers) == {name for name, _ in model.named_buffers()}
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-10, atol=1e-12)


def test_the_template_is_left_alone() -> None:
    """Training goes through functional calls: the module keeps its first weights and statistics."""
    loop = make_loop(make_problem("conv"))
    before = copy.deepcopy(loop.model.state_dict())
    for mode in MODES:
        differentiate(loop, VALUES, mode)
    for name, tensor in loop.model.state_dict().items():
        assert torch.equal(tensor, before[name])


class Counting(nn.Module):
    """Buffers updated in place and by assignment, in training and in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.layers[:2](x)
        self.average = 0.9 * self.average + 0.1 * hidden.mean(0)
        return self.layers[2](hidden)


@pytest.mark.parametrize("horizon", [1, 2, None])
@pytest.mark.parametrize("mode", MODES)
def test_buffers_follow_training_steps_only(mode: str, horizon: int | None) -> None:
    loop = make_loop(make_problem(Counting))
    with loop.running():
        plain = loop.run(VALUES).buffers
    buffers = differentiate(loop, VALUES, mode, horizon=horizon).buffers
    assert float(buffers["calls"]) == loop.steps
    assert not buffers["average"].requires_grad and float(buffers["average"].abs().sum()) > 0
    for name in buffers:
        torch.testing.assert_close(buffers[name], plain[name], rtol=1e-10, atol=1e-12)


class TransposedDropout(nn.Module):
    """Dropout of activations that are stored column by column."""

    def __init__(self, dropout: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.dropout = nn.Linear(4, 6), nn.Linear(6, 3), dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)).t().contiguous().t()
        return self.second(self.dropout(hidden, self.training))


@pytest.mark.parametrize(
    "dropout",
    [
        lambda x, training: F.dropout(x, 0.4, training),
        lambda x, training: F.dropout(x * 1, 0.4, training, inplace=True),
        lambda x, training: nn.Dropout(0.4).train(training)(x),
    ],
    ids=["functional", "in place", "module"],
)
def test_dropout_masks_are_the_same_in_every_mode(dropout: Callable[[Tensor, bool], Tensor]) -> None:
    loop = make_loop(make_problem(lambda: TransposedDropout(dropout)))
    with loop.running():
        plain = loop.run(VALUES)
    for mode in MODES:
        result = differentiate(loop, VALUES, mode)
        weights = torch.cat([parameter.reshape(-1) for parameter in result.params.values()])
        torch.testing.assert_close(weights, plain.params, rtol=1e-10, atol=1e-12)
        assert_close(result.hypergradients, finite_differences(loop, VALUES), 1e-5)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_keeps_its_meaning(p: float) -> None:
    loop = make_loop(make_problem(lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(p))))
    x = torch.ones(2000, 10, dtype=torch.float64)
    with loop.running():
        y = F.dropout(x, p)
        assert F.dropout(x, p, training=False) is x
    kept = y[y != 0]
    assert kept.numel() / y.numel() == pytest.approx(1 - p, abs=0.01)
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p) if p < 1 else 0.0))


def two_dtypes() -> nn.Module:
    model = mlp().double()
    model[2].float()
    return model


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), torch.nn.utils.weight_norm(nn.Linear(6, 3)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "weight_norm": (old_weight_norm, FEATURES, r"module '2' \(Linear\) uses weight_norm"),
    "parametrised weight_norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))),
        FEATURES,
        r"module '0' \(ParametrizedLinear\) uses weight_norm, whose second derivative is silently wrong in torch",
    ),
    "weight_norm of the whole model": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        FEATURES,
        r"the model \(ParametrizedLinear\) uses weight_norm",
    ),
    "spectral_norm": (
        lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 3))),
        FEATURES,
        r"module '0' \(Linear\) uses spectral_norm, whose power iteration",
    ),
    "parametrised spectral_norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))),
        FEATURES,
        r"module '0' \(ParametrizedLinear\) uses spectral_norm",
    ),
    "Embedding with scale_grad_by_freq": (
        lambda: nn.Sequential(nn.Embedding(7, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(16, 3)),
        TOKENS,
        r"module '0' \(Embedding\) has scale_grad_by_freq, whose second derivative is silently wrong in torch",
    ),
    "EmbeddingBag": (
        lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3)),
        TOKENS,
        r"module '0' \(EmbeddingBag\) has no second derivative in torch: use nn.Embedding",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(3)),
        FEATURES,
        r"module '0' \(LazyLinear\) is lazy: give it its sizes",
    ),
    "no weights": (lambda: nn.Sequential(nn.Tanh()), FEATURES, "no parameter that requires a gradient"),
    "all frozen": (lambda: mlp().requires_grad_(False), FEATURES, "no parameter that requires a gradient"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    factory, kind, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        make_loop(make_problem(factory, kind))
    assert "\n" not in str(caught.value)


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(InputError, match=r"mixes parameter dtypes \(torch.float32, torch.float64\): convert it to one"):
        make_loop(make_problem().replace(model=two_dtypes))
