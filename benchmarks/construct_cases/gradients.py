"""Models whose gradient is not the derivative of their output, or is computed in another way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from construct_cases.case import Between, Case, between, square


def checkpointed(net: Any, h: Tensor, use_reentrant: bool) -> Tensor:
    """Activations computed twice."""
    result: Tensor = checkpoint(lambda h: torch.tanh(net.middle(h)), h, use_reentrant=use_reentrant)
    return result


def checkpointed_dropout(net: Any, h: Tensor, preserve_rng_state: bool = True) -> Tensor:
    """The same mask twice, or another one."""

    def dropped(h: Tensor) -> Tensor:
        return F.dropout(net.middle(h), 0.3, net.training)

    result: Tensor = checkpoint(dropped, h, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    return result


def saved_on_cpu(net: Any, h: Tensor) -> Tensor:
    """What backward needs goes through `save_on_cpu`."""
    with torch.autograd.graph.save_on_cpu():
        return torch.tanh(net.middle(h)) ** 2


def saved_as_arrays(net: Any, h: Tensor) -> Tensor:
    """What backward needs goes through NumPy."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        return torch.tanh(net.middle(h)) ** 2


def without_gradient(net: Any, h: Tensor) -> Tensor:
    """A layer that is not trained through."""
    with torch.no_grad():
        gate = torch.sigmoid(net.middle(h))
    return gate * h


def scaled_late(net: Any, h: Tensor) -> Tensor:
    if net.training:
        net.calls += 1
    return h / h.norm().item() if net.calls > 3 else h


def through_numpy(net: Any, h: Tensor) -> Tensor:
    """Leaves torch."""
    return h / torch.from_numpy(abs(h.detach().numpy()).max(1, keepdims=True))


def rounded(net: Any, h: Tensor) -> Tensor:
    """Straight-through rounding."""
    return h + ((4 * h).round() / 4 - h).detach()


def gumbel(net: Any, h: Tensor) -> Tensor:
    """A hard choice in training, a soft one in evaluation."""
    return h * (F.gumbel_softmax(h, hard=True) if net.training else h.softmax(1))


class _Reversed(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -0.5 * gradients[0]


class _Cubed(Function):
    """Right, with what `torch.func` needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return h**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradients[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * tangents[0]


class _WithoutJvp(_Cubed):
    jvp = Function.jvp


class _WrongBackward(_Cubed):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] ** 2 * gradients[0]


class _OldStyle(Function):
    """Right, without `setup_context`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradients[0]


class _Once(_OldStyle):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradients[0]


class _KeptAside(_OldStyle):
    """Keeps a detached tensor: the second derivative is lost without a word."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.kept = h.detach()
        return h**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * ctx.kept**2 * gradients[0]


def applied(function: type[Function]) -> Callable[[], nn.Module]:
    """A custom function amid."""
    return between(lambda net, h: function.apply(h))


def two_heads(net: Any, h: Tensor) -> Tensor:
    """A second branch behind a gradient reversal."""
    return net.middle(h) + torch.tanh(net.domain(_Reversed.apply(h)))  # type: ignore[no-untyped-call]


def hooked(net: Any, h: Tensor) -> Tensor:
    """Halves the gradient of its activations."""
    if h.requires_grad:
        h.register_hook(lambda gradient: 0.5 * gradient)
    return h


def with_parameter_hook() -> nn.Module:
    """A tenth of the gradient for one weight."""
    net = Between(lambda net, h: h)
    net.first.weight.register_hook(lambda gradient: 0.1 * gradient)
    return net


def with_accumulation_hook() -> nn.Module:
    """The gradients of one weight are clipped."""
    net = Between(lambda net, h: h)

    def clip(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.clamp_(-0.02, 0.02)

    net.first.weight.register_post_accumulate_grad_hook(clip)
    return net


def halved(module: nn.Module, inputs: Any, outputs: Any) -> tuple[Tensor]:
    """Of the gradient by the inputs."""
    return (0.5 * inputs[0],)


def with_backward_hook() -> nn.Module:
    """A layer that hands on half of its gradient."""
    middle = square()
    middle.register_full_backward_hook(halved)
    return Between(lambda net, h: net.middle(h), middle=middle)


def with_forward_hook() -> nn.Module:
    """A hook makes the layer's output."""
    middle = square()
    middle.register_forward_hook(lambda module, inputs, output: torch.sigmoid(output) * inputs[0])
    return Between(lambda net, h: net.middle(h), middle=middle)


def hooked_node(net: Any, h: Tensor) -> Tensor:
    """Halves the gradient at the operation that made its activations."""
    if h.grad_fn is not None and net.training:
        h.grad_fn.register_prehook(lambda gradients: tuple(None if g is None else 0.5 * g for g in gradients))
    return h


def saved_in_half(net: Any, h: Tensor) -> Tensor:
    """What backward needs is kept in half precision."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().half(), lambda t: t.double()):
        return torch.tanh(net.middle(h)) ** 2


def activated_without_gradient(net: Any, h: Tensor) -> Tensor:
    """An in-place activation that gradients do not see."""
    h = net.middle(h)
    with torch.no_grad():
        F.silu(h, inplace=True)
    return h


class Forces(nn.Module):
    """The gradient of an energy by the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return self.head(force)


class FunctionalForces(Forces):
    """The same by `torch.func`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.func.grad(lambda x: self.energy(x).sum())(x))


GRADIENTS = [
    Case("checkpointing, use_reentrant=False", between(partial(checkpointed, use_reentrant=False), middle=square)),
    Case("checkpointing, use_reentrant=True", between(partial(checkpointed, use_reentrant=True), middle=square)),
    Case("checkpointing around dropout", between(checkpointed_dropout, middle=square)),
    Case("save_on_cpu", between(saved_on_cpu, middle=square)),
    Case("saved_tensors_hooks", between(saved_as_arrays, middle=square)),
    Case("saved_tensors_hooks in half precision", between(saved_in_half, middle=square)),
    Case(
        "checkpointing around dropout, preserve_rng_state=False",
        between(partial(checkpointed_dropout, preserve_rng_state=False), middle=square),
    ),
    Case("detached normaliser", between(lambda net, h: h / h.detach().norm(dim=1, keepdim=True))),
    Case("torch.no_grad block", between(without_gradient, middle=square)),
    Case("in-place activation under torch.no_grad", between(activated_without_gradient, middle=square)),
    Case("`.data`", between(lambda net, h: h * h.data.sigmoid())),
    Case("`.item()`", between(lambda net, h: h / h.norm().item())),
    Case("`.item()` that begins in the fourth step", between(scaled_late, calls=lambda: torch.tensor(0))),
    Case("activations through NumPy", between(through_numpy)),
    Case("straight-through rounding", between(rounded)),
    Case("straight-through Gumbel softmax", between(gumbel)),
    Case("gradient reversal", between(two_heads, middle=square, domain=square)),
    Case("autograd.Function, right", applied(_Cubed)),
    Case("autograd.Function without jvp", applied(_WithoutJvp)),
    Case("autograd.Function without setup_context", applied(_OldStyle)),
    Case("autograd.Function with a wrong backward", applied(_WrongBackward)),
    Case("autograd.Function, once_differentiable", applied(_Once)),
    Case("autograd.Function that keeps a detached tensor", applied(_KeptAside)),
    Case("tensor.register_hook that scales the gradient", between(hooked)),
    Case("tensor.grad_fn.register_prehook that scales the gradient", between(hooked_node)),
    Case("full backward hook that scales the gradient", with_backward_hook),
    Case("parameter hook", with_parameter_hook),
    Case("post-accumulate gradient hook", with_accumulation_hook),
    Case("forward hook", with_forward_hook),
    Case("gradient by the inputs in forward (autograd.grad)", Forces),
    Case("gradient by the inputs in forward (torch.func.grad)", FunctionalForces),
    Case("branch on torch.is_grad_enabled()", between(lambda net, h: h if torch.is_grad_enabled() else 0.9 * h)),
]
