"""Convolutions in the adjoint of a training step: torch's values, first and second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tune_hypergrad.hypergradients.convolution import CONVOLUTIONS

CASES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": (F.conv2d, (2, 3, 6, 5), (4, 3, 3, 2), {}),
    "strided, padded": (F.conv2d, (2, 3, 6, 5), (4, 3, 3, 3), {"stride": 2, "padding": (1, 2)}),
    "dilated, grouped": (F.conv2d, (2, 4, 7, 7), (6, 2, 3, 3), {"dilation": 2, "groups": 2}),
    "depthwise": (F.conv2d, (2, 3, 5, 5), (3, 1, 3, 3), {"groups": 3, "padding": [1]}),
    "one dimension": (F.conv1d, (2, 3, 9), (4, 3, 3), {"stride": (2,)}),
    "three dimensions": (F.conv3d, (1, 2, 4, 4, 4), (3, 2, 2, 2, 2), {"padding": 1}),
    "transposed": (F.conv_transpose2d, (2, 3, 4, 4), (3, 4, 3, 3), {"stride": 2, "output_padding": 1}),
    "transposed, grouped": (F.conv_transpose1d, (2, 4, 5), (4, 2, 3), {"groups": 2, "dilation": 2, "padding": 1}),
    "same padding": (F.conv2d, (2, 3, 6, 6), (4, 3, 3, 3), {"padding": "same"}),
    "no batch": (F.conv2d, (3, 6, 6), (4, 3, 3, 3), {}),
}


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def derivatives(function: Any, given: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """The value, the gradient of a curved loss, and the gradient of a curved function of that."""
    output = function(*given, **options)
    first = torch.autograd.grad(output.sin().sum(), given, create_graph=True)
    second = torch.autograd.grad(sum((part**2).sum() for part in first), given)
    return [output, *first, *second]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives_are_torchs(case: str, with_bias: bool) -> None:
    function, x, w, options = CASES[case]
    transposed = function in (F.conv_transpose1d, F.conv_transpose2d)
    channels = w[1] * options.get("groups", 1) if transposed else w[0]
    given = tensors(x, w, *([(channels,)] if with_bias else []))
    ours = derivatives(CONVOLUTIONS[function], given, options)
    for mine, torchs in zip(ours, derivatives(function, given, options), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("constant", [0, 1, 2])
def test_derivatives_where_a_part_needs_none(constant: int) -> None:
    given = tensors((2, 3, 5, 5), (4, 3, 3, 3), (4,))
    given[constant].requires_grad_(False)
    moving = [tensor for tensor in given if tensor.requires_grad]

    def products(function: Any) -> list[Tensor]:
        first = torch.autograd.grad(function(*given).sin().sum(), moving, create_graph=True)
        return list(torch.autograd.grad(sum((part**2).sum() for part in first), moving))

    for mine, torchs in zip(products(CONVOLUTIONS[F.conv2d]), products(F.conv2d), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-10, atol=1e-11)


def test_second_derivatives_agree_with_finite_differences() -> None:
    given = tensors((2, 2, 4, 4), (3, 2, 3, 3), (3,))
    assert torch.autograd.gradgradcheck(CONVOLUTIONS[F.conv2d], given)
