"""Normalisation whose running statistics have derivatives.

torch updates running statistics in place and takes them for constants. For a training step as a map of its state they
are neither: with the statistics m, v of a batch of n elements per channel,

    m' = (1 - a) m + a mean(x),        v' = (1 - a) v + a var(x),
    y  = (x - m) r w + b,  r = (v + eps)^-1/2,        in evaluation mode.

The derivatives need no further pass over the activations but one product per layer in the adjoint step: the batch's
statistics come out of torch's kernel, and those of y by m and v out of the sums that its backward pass makes anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tune_hypergrad.hypergradients.stop_gradient import StopGradient, constant
from tune_hypergrad.hypergradients.substitution import Substitutes


def batch_norm_in_training(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` of a training step that is differentiated, running statistics that require a gradient included."""
    moves = running_mean is not None and running_var is not None and running_mean.requires_grad
    if not training:
        if not moves:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return normalised(input, running_mean, running_var, weight, bias, eps)  # type: ignore[arg-type]
    if (running_mean is not None and not moves) or not _is_plain(input, weight, bias):
        return _batch_norm_of_torch(input, running_mean, running_var, weight, bias, momentum, eps)
    before = [None if running is None else constant(running) for running in (running_mean, running_var)]
    output, mean, *moved_values = _Normalised.apply(input, weight, bias, *before, momentum, eps)  # type: ignore[no-untyped-call]
    if running_mean is None or running_var is None:
        return output  # type: ignore[no-any-return]
    moved = _Moved.apply(input, running_mean, running_var, mean, *moved_values, momentum)  # type: ignore[no-untyped-call]
    for running, after in zip((running_mean, running_var), moved, strict=True):
        running.copy_(StopGradient.apply(after))  # type: ignore[no-untyped-call]
    return output  # type: ignore[no-any-return]


def _batch_norm_of_torch(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """The same over batch statistics, out of what torch has."""
    if running_mean is None or running_var is None or not running_mean.requires_grad:
        return F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
    mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)  # no history
    output = F.batch_norm(input, mean, var, weight, bias, True, 1.0, eps)  # leaves the batch's statistics in them
    own_mean, own_var = _BatchStatistics.apply(input, mean, var)  # type: ignore[no-untyped-call]
    move_statistics(running_mean, running_var, own_mean, own_var, momentum)
    return output


def batch_norm_in_evaluation(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` of an evaluation that is differentiated, by running statistics too."""
    if training or running_mean is None or not running_mean.requires_grad:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _Evaluated.apply(input, running_mean, running_var, weight, bias, eps)  # type: ignore[no-any-return, no-untyped-call]


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.instance_norm`, whose running statistics, where there are any, have derivatives."""
    if running_mean is None or running_var is None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if not use_input_stats:
        return normalised(input, running_mean, running_var, weight, bias, eps)
    over = list(range(2, input.ndim))
    mean, var = input.mean([0, *over]), input.var(over).mean(0)
    move_statistics(running_mean, running_var, mean, var, momentum)
    return F.instance_norm(input, None, None, weight, bias, True, momentum, eps)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` with statistics made of torch operations, so that they have tangents on every device."""
    if running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        return normalised(input, running_mean, running_var, weight, bias, eps)
    output = F.batch_norm(input, None, None, weight, bias, True, momentum, eps)
    over = [0, *range(2, input.ndim)]
    move_statistics(running_mean, running_var, input.mean(over), input.var(over), momentum)
    return output


def move_statistics(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float) -> None:
    """Running statistics move towards a batch's, in place; the loss's gradient stops there, as it does in torch."""
    for running, own in ((running_mean, mean), (running_var, var)):
        running.mul_(1 - momentum).add_(momentum * StopGradient.apply(own))  # type: ignore[no-untyped-call]


def normalised(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(x - m) (v + eps)^-1/2 w + b, channel by channel, out of torch operations."""
    scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
    shift = -mean * scale if bias is None else bias - mean * scale
    return input * _per_channel(scale, input) + _per_channel(shift, input)


def _is_plain(input: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the kernels of a CPU take it as it is; those of a GPU have statistics of another form."""
    same = all(p is None or p.dtype == input.dtype for p in parameters)
    return same and input.device.type == "cpu" and input.numel() > input.shape[1]


class _Normalised(Function):
    """Batch normalisation over batch statistics: the output, the batch's mean, and the running statistics, moved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, ...]:
        moved = [torch.zeros(()) if running is None else running.clone() for running in (running_mean, running_var)]
        given = [None, None] if running_mean is None else moved
        with torch._C.DisableTorchFunction():  # there is nothing here that a mode should see
            y, mean, r = torch.ops.aten.native_batch_norm(x, weight, bias, *given, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, r)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, *moved)
        return y, mean, *moved

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        none = (None,) * 7
        if gy is None:
            return none
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        gx, gw, gb = _NormalisedGradient.apply(gy, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return gx, gw if needs_weight else None, gb if needs_bias else None, *none[3:]


class _NormalisedGradient(Function):
    """The gradient of `_Normalised` by x, weight and bias, as a function of what it is made of."""

    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gx, gw, gb = _native_backward(gy, x, weight, mean, r, [True, True, True])
        ctx.save_for_backward(gy, x, weight, mean, r, gw, gb)
        ctx.set_materialize_grads(False)
        return gx, gw, gb

    @staticmethod
    def backward(
        ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():  # the history of what follows would lack what is computed below
            raise RuntimeError(
                "batch normalisation has no third derivative here, as a penalty on a gradient through it needs: use "
                "differentiation='forward', or another normalisation"
            )
        gy, x, weight, mean, r, gw, gb = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            n = x.numel() // x.shape[1]
            scale = r if weight is None else weight * r
            zero = torch.zeros_like(mean)
            vw = zero if vw is None else vw
            vb = zero if vb is None else vb
            # with x^ = (x - mean) r: sums of gy and x^ gy are gb and gw; of vx, x^ vx and P(gy) vx as follows
            if vx is None:
                vx, sum_vx, sum_normal_vx, along = zero, zero, zero, zero
                wide = _per_channel(zero, x)
            else:
                _, sum_normal_vx, sum_vx = _native_backward(vx, x, None, mean, r, [False, True, True])
                _, product, _ = _native_backward(vx, gy, None, zero, torch.ones_like(r), [False, True, False])
                along = product - (gb * sum_vx + gw * sum_normal_vx) / n
                wide = vx
            mean_gw, mean_gb = gw / n, gb / n
            # by gy: scale P(vx) + vw x^ + vb
            of_normal = vw - scale * sum_normal_vx / n
            shift = vb - scale * sum_vx / n
            by_gy = _combined(x, (shift - of_normal * r * mean), [(of_normal * r, x), (scale, wide)])
            # by x: - scale r (mean(x^ gy) P(vx) + along/n x^ + mean(x^ vx) P(gy)) + r vw P(gy)
            of_vx = -scale * r * mean_gw
            of_gy = r * vw - scale * r * sum_normal_vx / n
            of_normal = -scale * r * along / n - of_vx * sum_normal_vx / n - of_gy * mean_gw
            shift = -of_vx * sum_vx / n - of_gy * mean_gb
            by_x = _combined(x, shift - of_normal * r * mean, [(of_normal * r, x), (of_vx, wide), (of_gy, gy)])
            by_weight = None if weight is None else r * along
        return by_gy, by_x, by_weight, None, None


def _combined(x: Tensor, constant: Tensor, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A constant and multiples of tensors like x, channel by channel."""
    (factor, first), *others = terms
    total = torch.addcmul(_per_channel(constant, x), first, _per_channel(factor, x))
    for factor, other in others:
        total.addcmul_(other, _per_channel(factor, x))
    return total


class _Moved(Function):
    """Running statistics after a batch, where they are known, as functions of those before and of the activations."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        mean: Tensor,
        moved_mean: Tensor,
        moved_var: Tensor,
        momentum: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, mean)
        ctx.momentum = momentum
        return moved_mean.clone(), moved_var.clone()

    @staticmethod
    def backward(ctx: Any, by_mean: Tensor, by_var: Tensor) -> tuple[Tensor | None, ...]:
        x, mean = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            a = ctx.momentum
            by_x = _by_activations(x, mean, a * by_mean, a * by_var)
            return by_x, (1 - a) * by_mean, (1 - a) * by_var, None, None, None, None


def _native_backward(
    gy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, r: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    with torch._C.DisableTorchFunction():
        return torch.ops.aten.native_batch_norm_backward(  # type: ignore[no-any-return]
            gy, x, weight, None, None, mean, r, True, 0.0, wanted
        )


def _by_activations(x: Tensor, mean: Tensor, by_mean: Tensor, by_var: Tensor) -> Tensor:
    """By the activations, what is given by the mean and by the unbiased variance of each channel."""
    n = x.numel() // x.shape[1]
    slope = 2 * by_var / (n - 1)
    return torch.addcmul(_per_channel(by_mean / n - mean * slope, x), x, _per_channel(slope, x))


class _BatchStatistics(Function):
    """The mean and the unbiased variance of each channel, where they are known, as functions of the activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, mean)
        return mean.clone(), var.clone()

    @staticmethod
    def backward(ctx: Any, by_mean: Tensor, by_var: Tensor) -> tuple[Tensor, None, None]:
        x, mean = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            return _by_activations(x, mean, by_mean, by_var), None, None


class _Evaluated(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, mean, var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, weight = ctx.saved_tensors
        r = torch.rsqrt(var + ctx.eps)
        # the statistics as those of a batch, too: a GPU's kernel for channels that are last in memory wants them
        gx, by_normal, by_shift = torch.ops.aten.native_batch_norm_backward(
            gy, x, weight, mean, var, mean, r, False, ctx.eps, [True, True, True]
        )
        scale = r if weight is None else weight * r
        by_mean, by_var = -scale * by_shift, -0.5 * scale * r * by_normal
        needs_weight, needs_bias = ctx.needs_input_grad[3:5]
        return gx, by_mean, by_var, by_normal if needs_weight else None, by_shift if needs_bias else None, None


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.view(-1, *(1 for _ in x.shape[2:]))


IN_TRAINING: Substitutes = {F.batch_norm: batch_norm_in_training, F.instance_norm: instance_norm}
"""For the adjoint of a training step."""
IN_EVALUATION: Substitutes = {F.batch_norm: batch_norm_in_evaluation, F.instance_norm: instance_norm}
"""For the gradient of a validation loss."""
