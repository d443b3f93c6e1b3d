"""Convolutions whose second derivatives are convolutions of the same kind.

torch makes the weights' part of a convolution's second derivative, a sum over examples and places, by another
convolution whose kernel is as large as the image: on a GPU many times the cost of the product that the first
derivative takes for the same sum. With y = x * w, the gradient's parts gx = X(gy, w) and gw = W(gy, x), both bilinear,
have the derivatives

    by gy: vx * w + x * vw,        by x: X(gy, vw),        by w: W(gy, vx)

along vx and vw: nothing but what torch has for the first derivative. These take the place of torch's own in the adjoint
of a training step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tune_hypergrad.hypergradients.substitution import Substitutes

_Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]
"""A convolution's stride, padding, dilation, whether it is transposed, output padding and groups, as torch's kernel
takes them."""


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry, ctx.with_bias = geometry, bias is not None
        return _convolved(x, w, bias, geometry)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_bias, _ = ctx.needs_input_grad
        wanted = (needs_x, needs_w, ctx.with_bias and needs_bias)
        return (*_Gradient.apply(gy, x, w, ctx.geometry, wanted), None)  # type: ignore[no-untyped-call]


class _Gradient(Function):
    """The first derivative of a convolution, as a function of the output's cotangent, the input and the weight."""

    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, w: Tensor, geometry: _Geometry, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(gy, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _gradients(gy, x, w, geometry, wanted)

    @staticmethod
    def backward(
        ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        gy, x, w = ctx.saved_tensors
        needs_gy, needs_x, needs_w = ctx.needs_input_grad[:3]
        by_gy: Tensor | None = None
        if needs_gy:
            parts = [
                _convolved(a, b, None, ctx.geometry) for a, b in ((vx, w), (x, vw)) if a is not None and b is not None
            ]
            with torch._C.DisableTorchFunction():  # a mode that looks for stop-gradients finds none here
                parts += [] if vb is None else [vb.view(-1, *(1 for _ in gy.shape[2:])).expand_as(gy)]
                by_gy = sum(parts[1:], parts[0]) if parts else None
        by_x = _gradients(gy, x, vw, ctx.geometry, (True, False, False))[0] if needs_x and vw is not None else None
        by_w = _gradients(gy, vx, w, ctx.geometry, (False, True, False))[1] if needs_w and vx is not None else None
        return by_gy, by_x, by_w, None, None


def _convolved(x: Tensor, w: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    with torch._C.DisableTorchFunction():
        return torch.ops.aten.convolution(x, w, bias, *geometry)  # type: ignore[no-any-return]


def _gradients(
    gy: Tensor, x: Tensor, w: Tensor, geometry: _Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    with torch._C.DisableTorchFunction():
        channels = [gy.shape[1]] if wanted[2] else None
        return torch.ops.aten.convolution_backward(gy, x, w, channels, *geometry, wanted)  # type: ignore[no-any-return]


def _sized(value: int | tuple[int, ...], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value) * (count if len(value) == 1 else 1)


def _applicable(input: Tensor, weight: Tensor, padding: Any) -> bool:
    """Whether a convolution is of a plain batch: others are torch's, which has error messages and more cases."""
    same = isinstance(input, Tensor) and isinstance(weight, Tensor) and input.dtype == weight.dtype
    real = same and input.is_floating_point() and not isinstance(padding, str)
    return real and input.ndim == weight.ndim and 0 not in input.shape and not _is_autocast(input.device.type)


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _plain(torch_convolution: Any, dimensions: int) -> Any:
    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if not _applicable(input, weight, padding):
            return torch_convolution(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]
        sizes = (_sized(value, dimensions) for value in (stride, padding, dilation))
        return _Convolution.apply(input, weight, bias, (*sizes, False, [0] * dimensions, groups))  # type: ignore[no-any-return, no-untyped-call]

    return convolution


def _transposed(torch_convolution: Any, dimensions: int) -> Any:
    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        if not _applicable(input, weight, padding):
            return torch_convolution(input, weight, bias, stride, padding, output_padding, groups, dilation)  # type: ignore[no-any-return]
        sizes = (_sized(value, dimensions) for value in (stride, padding, dilation))
        geometry = (*sizes, True, _sized(output_padding, dimensions), groups)
        return _Convolution.apply(input, weight, bias, geometry)  # type: ignore[no-any-return, no-untyped-call]

    return convolution


CONVOLUTIONS: Substitutes = {
    **{f: _plain(f, d) for f, d in ((F.conv1d, 1), (F.conv2d, 2), (F.conv3d, 3))},
    **{f: _transposed(f, d) for f, d in ((F.conv_transpose1d, 1), (F.conv_transpose2d, 2), (F.conv_transpose3d, 3))},
}
"""Convolutions with second derivatives of the same kind, by torch's functions, for the adjoint of a training step."""
