"""Fused batch normalisation against torch's own, in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap

from tune_hypergrad.hypergradients.fused_batch_norm import fused_batch_norm
from tune_hypergrad.hypergradients.normalisation import batch_norm
from tune_hypergrad.hypergradients.substitution import Substituting

COLUMNS, CHANNELS = 3, 4
SHAPES = [(6, CHANNELS), (5, CHANNELS, 7), (3, CHANNELS, 4, 5), (2, CHANNELS, 3, 2, 2)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fixed(*shape: int, seed: int) -> Tensor:
    """Values without a generator, which vmap refuses."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, count + 1, dtype=torch.float64) * (seed + 0.37)).reshape(shape)


def fused() -> Substituting:
    return Substituting({F.batch_norm: fused_batch_norm})


def composed() -> Substituting:
    """Out of torch's operations, since torch's own kernel takes no running statistics that have tangents."""
    return Substituting({F.batch_norm: batch_norm})


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def with_statistics(*inputs: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A loss through batch normalisation, and the running statistics after it."""
    x, weight, bias = inputs
    # of the inputs' kind: what has no tangent cannot be given one in place
    nothing = 0 * (x.sum() + weight.sum() + bias.sum())
    running = (fixed(CHANNELS, seed=7) + nothing, fixed(CHANNELS, seed=8).square() + nothing)
    y = F.batch_norm(x, *running, weight, bias, True, 0.3, 1e-3)
    return (y.tanh() * fixed(*x.shape, seed=9)).sum(), running


def without_parameters(*inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    y = F.batch_norm(inputs[0], None, None, training=True)
    return (y.tanh() * fixed(*y.shape, seed=9)).sum(), ()


def in_evaluation(*inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    x, weight, bias = inputs
    y = F.batch_norm(x, fixed(CHANNELS, seed=7), fixed(CHANNELS, seed=8).square(), weight, bias, False)
    return (y.tanh() * fixed(*y.shape, seed=9)).sum(), ()


LOSSES = (with_statistics, without_parameters, in_evaluation)


def inputs_and_tangents(shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    shapes = (shape, (CHANNELS,), (CHANNELS,))
    inputs = tuple(random(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return inputs, tuple(random(COLUMNS, *shape, seed=10 + seed) for seed, shape in enumerate(shapes))


def gradients_of(loss: Callable[..., Any], argnums: tuple[int, ...] = (0, 1, 2)) -> Callable[..., Any]:
    return grad(loss, argnums, has_aux=True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_and_running_statistics(shape: tuple[int, ...], loss: Callable[..., Any]) -> None:
    inputs, _ = inputs_and_tangents(shape)
    with composed():
        expected = gradients_of(loss)(*inputs)
    with fused():
        close(gradients_of(loss)(*inputs), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tangents_of_the_loss(shape: tuple[int, ...], loss: Callable[..., Any]) -> None:
    inputs, tangents = inputs_and_tangents(shape)
    one = tuple(tangent[0] for tangent in tangents)
    with composed():
        expected = jvp(lambda *x: loss(*x)[0], inputs, one)
    with fused():
        close(jvp(lambda *x: loss(*x)[0], inputs, one), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_batched_hessian_products(shape: tuple[int, ...], loss: Callable[..., Any]) -> None:
    inputs, tangents = inputs_and_tangents(shape)

    def product(*tangents: Tensor) -> Any:
        return jvp(gradients_of(loss), inputs, tangents, has_aux=True)

    with composed():
        _, expected, _ = vmap(product, out_dims=(None, 0, None))(*tangents)
        by_columns = [product(*column)[1] for column in zip(*tangents, strict=True)]
    with fused():
        _, actual, _ = vmap(product, out_dims=(None, 0, None))(*tangents)
        one_by_one = [product(*column)[1] for column in zip(*tangents, strict=True)]
    close(actual, expected)
    close(one_by_one, by_columns)


def test_agrees_with_double_backward() -> None:
    inputs, tangents = inputs_and_tangents(SHAPES[2])
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with composed():
        gradients = torch.autograd.grad(with_statistics(*leaves)[0], leaves, create_graph=True)
    expected = torch.autograd.grad(gradients, leaves, [tangent[0] for tangent in tangents])
    with fused():
        _, actual, _ = jvp(gradients_of(with_statistics), inputs, tuple(t[0] for t in tangents), has_aux=True)
    close(actual, expected)


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1)])
def test_inputs_that_stand_still(moving: tuple[int, ...]) -> None:
    """Frozen weights, or a normalisation right after the data."""
    inputs, tangents = inputs_and_tangents(SHAPES[2])

    def product(*tangents: Tensor) -> Any:
        def gradients(*moved: Tensor) -> Any:
            point = list(inputs)
            for position, tensor in zip(moving, moved, strict=True):
                point[position] = tensor
            return gradients_of(with_statistics, moving)(*point)

        return jvp(gradients, tuple(inputs[position] for position in moving), tangents, has_aux=True)[1]

    columns = [tangents[position] for position in moving]
    with composed():
        expected = vmap(product)(*columns)
    with fused():
        close(vmap(product)(*columns), expected)


def test_one_value_per_channel_fails_as_in_torch() -> None:
    for mode in (nullcontext(), fused()):
        with mode, pytest.raises(ValueError, match="more than 1 value per channel"):
            F.batch_norm(random(1, CHANNELS), None, None, training=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_tangents_of_running_statistics(shape: tuple[int, ...]) -> None:
    """Of the fused kernels and of torch's operations alike, against differences."""
    (x, weight, bias), (dx, *_) = inputs_and_tangents(shape)
    start = (fixed(CHANNELS, seed=7), fixed(CHANNELS, seed=8).square())

    def statistics(x: Tensor, *running: Tensor, function: Callable[..., Tensor] = F.batch_norm) -> tuple[Tensor, ...]:
        running = tuple(tensor.clone() for tensor in running)
        function(x, *running, weight, bias, True, 0.3, 1e-3)
        return running

    step = 1e-6
    ahead, behind = (statistics(x + sign * step * dx[0], *start) for sign in (1, -1))
    expected = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
    for function in (fused_batch_norm, batch_norm):
        tangents = (dx[0], *(torch.zeros_like(tensor) for tensor in start))
        values, found = jvp(lambda *each, f=function: statistics(*each, function=f), (x, *start), tangents)
        close(values, statistics(x, *start))
        torch.testing.assert_close(found, tuple(expected), rtol=1e-7, atol=1e-7)
