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

from tune_hypergrad.hypergradients.stop_gradient import StopGradient
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
    if running_mean is None or running_var is None or not running_mean.requires_grad:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        return normalised(input, running_mean, running_var, weight, bias, eps)
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


class _BatchStatistics(Function):
    """The mean and the unbiased variance of each channel, where they are known, as functions of the activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, mean)
        return mean.clone(), var.clone()

    @staticmethod
    def backward(ctx: Any, by_mean: Tensor, by_var: Tensor) -> tuple[Tensor, None, None]:
        x, mean = ctx.saved_tensors
        with torch._C.DisableTorchFunction():  # there is nothing here that a mode should see
            n = x.numel() // x.shape[1]
            slope = 2 * by_var / (n - 1)
            constant = by_mean / n - mean * slope
            return torch.addcmul(_per_channel(constant, x), x, _per_channel(slope, x)), None, None


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
        gx, by_normal, by_shift = torch.ops.aten.native_batch_norm_backward(
            gy, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        r = torch.rsqrt(var + ctx.eps)
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
