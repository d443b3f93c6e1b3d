"""Batch normalisation over batch statistics with tangents by the fewest passes over memory.

torch composes the tangents of batch normalisation and of its backward pass from some thirty elementwise operations,
each over the activations of all columns: more than the convolutions beside them cost. By hand, with sums over all but
the channels, n elements in a channel, r = (var x + eps)^-1/2, x^ = (x - mean x) r and the projection
P(v) = v - mean(v) - x^ mean(x^ v),

    y  = w x^ + b        dy  = w r P(dx) + dw x^ + db
    gx = w r P(gy)       dgx = w r P(dgy - r mean(x^ gy) dx) + (dw r - w r^2 mean(x^ dx)) P(gy)
                               - w r^2 mean(P(gy) dx) x^
    gw = sum x^ gy       dgw = sum x^ dgy + r sum P(gy) dx
    gb = sum gy          dgb = sum dgy

(ds the tangent of s, gs the loss's gradient by s; dx^ = r P(dx) and dr = -r^2 mean(x^ dx)); the batch's mean and
variance, towards which running statistics move, have the tangents mean(dx) and 2 sum(x^ dx) / (r (n - 1)).
`fused_batch_norm` takes the place of `F.batch_norm` for `jvp(grad(...))` under one `vmap` over tangents: for forward
mode, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tune_hypergrad.hypergradients.normalisation import batch_norm, move_statistics

_Columns = Iterable[tuple[Tensor, ...]]
"""Tangents of the inputs, column by column: one column's activations at a time stay in the processor's cache."""


def fused_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`, over batch statistics on a CPU as above, else out of torch's operations."""
    parameters = [tensor for tensor in (weight, bias) if tensor is not None]
    fusable = training and input.device.type == "cpu" and all(tensor.dtype == input.dtype for tensor in parameters)
    if not fusable or input.numel() <= input.shape[1]:  # for which torch has an error message
        return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    channels = torch.ones(input.shape[1], dtype=input.dtype)
    output, _, _, mean, var = _Normalise.apply(  # type: ignore[no-untyped-call]
        input, channels if weight is None else weight, torch.zeros_like(channels) if bias is None else bias, eps
    )
    if running_mean is not None and running_var is not None:
        move_statistics(running_mean, running_var, mean, var, momentum)
    return output  # type: ignore[no-any-return]


class _OfPrimals(Function):
    """A function of the values that tangents are taken at, which are the same for all columns."""

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> Any:
        raise NotImplementedError("fused_batch_norm is for vmap over tangents, not over inputs")


class _Normalise(_OfPrimals):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        mean, var = (torch.zeros(x.shape[1], dtype=x.dtype) for _ in range(2))
        y, saved_mean, r = torch.native_batch_norm(x, weight, bias, mean, var, True, 1.0, eps)
        return y, saved_mean, r, mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:3])
        saved = (*inputs[:2], *output[1:3])
        ctx.save_for_forward(*saved)
        ctx.save_for_backward(*saved)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        dy, dmean, dvar = _NormaliseTangent.apply(*ctx.saved_tensors, *tangents[:3])  # type: ignore[no-untyped-call]
        return dy, None, None, dmean, dvar

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        by_inputs = _NormaliseBackward.apply(gradients[0], *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return *by_inputs, None


class _NormaliseTangent(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, *tangents: Tensor) -> tuple[Tensor, ...]:
        outputs = _normalise_tangents(x, weight, mean, r, 1, [tangents])
        return tuple(output[0] for output in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, *tangents: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        columns = _columns(info.batch_size, dims[4:], tangents)
        return _normalise_tangents(x, weight, mean, r, info.batch_size, columns), (0, 0, 0)


class _NormaliseBackward(_OfPrimals):
    @staticmethod
    def forward(gy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor) -> Any:
        return _native_backward(gy, x, weight, mean, r, [True, True, True])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        # mean and r come from x: their tangents are in the formulas
        return _NormaliseBackwardTangent.apply(*ctx.saved_tensors, *tangents[:3])  # type: ignore[no-untyped-call]


class _NormaliseBackwardTangent(Function):
    @staticmethod
    def forward(
        gy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, *tangents: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = _normalise_backward_tangents(gy, x, weight, mean, r, 1, [tangents])
        return tuple(output[0] for output in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any,
        dims: tuple[int | None, ...],
        gy: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        r: Tensor,
        *tangents: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        columns = _columns(info.batch_size, dims[5:], tangents)
        return _normalise_backward_tangents(gy, x, weight, mean, r, info.batch_size, columns), (0, 0, 0)


def _normalise_tangents(
    x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, count: int, columns: _Columns
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of the output, [count, *x.shape], and of the mean and the unbiased variance, [count, channels], for
    columns of (dx, dw, db)."""
    per_channel = _channel_view(x)
    normal, scale, n = _normalised(x, mean, r), weight * r, x.numel() // x.shape[1]
    dy, dmean, dvar = x.new_empty(count, *x.shape), x.new_empty(count, x.shape[1]), x.new_empty(count, x.shape[1])
    for column, (dx, dweight, dbias) in enumerate(columns):
        sum_dx, sum_normal_dx = _sums(dx, x, mean, r)
        dmean[column], dvar[column] = sum_dx / n, 2 * sum_normal_dx / (r * (n - 1))
        constant, of_normal = dbias - scale * sum_dx / n, dweight - scale * sum_normal_dx / n
        torch.addcmul(per_channel(constant), normal, per_channel(of_normal), out=dy[column])
        dy[column].addcmul_(dx, per_channel(scale))
    return dy, dmean, dvar


def _normalise_backward_tangents(
    gy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, count: int, columns: _Columns
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of the gradients by x, [count, *x.shape], and by weight and bias, [count, channels], for columns of
    (dgy, dx, dw)."""
    per_channel = _channel_view(x)
    normal, scale, n = _normalised(x, mean, r), weight * r, x.numel() // x.shape[1]
    mean_gy, mean_normal_gy = (total / n for total in _sums(gy, x, mean, r))
    projected = torch.addcmul(gy - per_channel(mean_gy), normal, per_channel(mean_normal_gy), value=-1)
    of_dx = -r * mean_normal_gy
    zero, one = torch.zeros_like(mean), torch.ones_like(mean)
    dgx = x.new_empty(count, *x.shape)
    dgweight, dgbias = x.new_empty(count, x.shape[1]), x.new_empty(count, x.shape[1])
    for column, (dgy, dx, dweight) in enumerate(columns):
        sum_dgy, sum_normal_dgy = _sums(dgy, x, mean, r)
        sum_dx, sum_normal_dx = _sums(dx, x, mean, r)
        _, sum_projected_dx = _sums(dx, projected, zero, one)
        dgweight[column], dgbias[column] = sum_normal_dgy + r * sum_projected_dx, sum_dgy
        constant = -scale * (sum_dgy + of_dx * sum_dx) / n
        of_normal = -scale * (sum_normal_dgy + of_dx * sum_normal_dx + r * sum_projected_dx) / n
        of_projected = dweight * r - scale * r * sum_normal_dx / n
        torch.addcmul(per_channel(constant), normal, per_channel(of_normal), out=dgx[column])
        dgx[column].addcmul_(projected, per_channel(of_projected))
        dgx[column].addcmul_(dgy, per_channel(scale)).addcmul_(dx, per_channel(scale * of_dx))
    return dgx, dgweight, dgbias


def _columns(count: int, dims: tuple[int | None, ...], tangents: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    for column in range(count):
        yield tuple(t if dim is None else t.select(dim, column) for t, dim in zip(tangents, dims, strict=True))


def _sums(v: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of v and of v (x - mean) r over all but the channels, in one pass: native batch normalisation's."""
    _, with_x, alone = _native_backward(v, x, None, mean, r, [False, True, True])
    return alone, with_x


def _native_backward(gy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, r: Tensor, mask: list[bool]) -> Any:
    return torch.ops.aten.native_batch_norm_backward(gy, x, weight, None, None, mean, r, True, 0.0, mask)


def _normalised(x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    per_channel = _channel_view(x)
    return (x - per_channel(mean)).mul_(per_channel(r))


def _channel_view(x: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that views a value per channel so that it broadcasts with x."""
    return lambda value: value.view(-1, *(1 for _ in x.shape[2:]))
