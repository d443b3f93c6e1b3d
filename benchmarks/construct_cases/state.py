"""Models that keep something from one call to the next, or draw random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from construct_cases.case import Between, Case, between, square


def centred_in_place(net: Any, h: Tensor) -> Tensor:
    """A moving average, updated in place."""
    if net.training:
        with torch.no_grad():
            net.mean.mul_(0.7).add_(0.3 * h.mean(0))
    return h - net.mean


def centred_by_assignment(net: Any, h: Tensor) -> Tensor:
    """A moving average, assigned anew."""
    if net.training:
        net.mean = 0.7 * net.mean + 0.3 * h.detach().mean(0)
    return h - net.mean


def normalised_spectrally(net: Any, h: Tensor) -> Tensor:
    """A weight divided by its largest singular value, of which a step of power iteration overwrites the vectors."""
    weight = net.middle.weight
    if net.training:
        with torch.no_grad():
            net.right.copy_(F.normalize(weight.T @ net.left, dim=0))
            net.left.copy_(F.normalize(weight @ net.right, dim=0))
    return torch.tanh(F.linear(h, weight / (net.left.clone() @ weight @ net.right.clone())))


def with_queue(net: Any, h: Tensor) -> Tensor:
    """Attends to the activations of the last steps."""
    queue = net.queue.clone()
    found = (h @ queue.T).softmax(1) @ queue
    if net.training:
        with torch.no_grad():
            start = int(net.pointer)
            net.queue[start : start + len(h)] = h
            net.pointer[0] = (start + len(h)) % len(net.queue)
    return h + found


def with_teacher(net: Any, h: Tensor) -> Tensor:
    """Adds what a slow copy of a layer says."""
    if net.training:
        with torch.no_grad():
            for slow, fast in zip(net.teacher.parameters(), net.middle.parameters(), strict=True):
                slow.mul_(0.7).add_(0.3 * fast)
    return torch.tanh(net.middle(h)) + torch.tanh(net.teacher(h))


def dropped_layer(net: Any, h: Tensor) -> Tensor:
    """LayerDrop."""
    if net.training and torch.rand(()) < 0.5:
        return h
    return h + torch.tanh(net.middle(h))


def counting(net: Any, h: Tensor) -> Tensor:
    """Warms up by a Python counter."""
    if net.training:
        net.calls += 1
    return h * min(1.0, net.calls / 8)


def counting_in_a_buffer(net: Any, h: Tensor) -> Tensor:
    """Warms up by a counter that is a buffer."""
    if net.training:
        net.calls += 1
    return h * (net.calls / 8).clamp(max=1)


def initialised_by_data(net: Any, h: Tensor) -> Tensor:
    """Keeps the scale of the first batch."""
    if net.scale is None:
        net.scale = h.detach().std(0)
    return h / net.scale


def masked(net: Any, h: Tensor) -> Tensor:
    """Keeps a constant by the shape it is for."""
    if h.shape[1] not in net.cache:
        net.cache[h.shape[1]] = torch.ones(h.shape[1], h.shape[1], dtype=h.dtype).tril()
    return h @ net.cache[h.shape[1]]


def own_generator(net: Any, h: Tensor) -> Tensor:
    """Noise of the model's generator."""
    return h + 0.3 * torch.randn(h.shape, generator=net.generator, dtype=h.dtype) if net.training else h


def own_numpy_generator(net: Any, h: Tensor) -> Tensor:
    """Noise of the model's NumPy generator."""
    return h + 0.3 * torch.from_numpy(net.generator.normal(size=h.shape)) if net.training else h


def global_noise(net: Any, h: Tensor) -> Tensor:
    """Noise of torch's, NumPy's and Python's generators."""
    if not net.training:
        return h
    drawn = torch.randn_like(h) + torch.from_numpy(np.random.normal(size=h.shape)) + random.gauss(0, 1)
    return h + 0.2 * drawn


def seeded_noise(net: Any, h: Tensor) -> Tensor:
    """The same noise every time."""
    torch.manual_seed(0)
    return h + 0.3 * torch.randn(h.shape, dtype=h.dtype) if net.training else h


def mixed_up(net: Any, h: Tensor) -> Tensor:
    """Examples mixed with others by a Beta draw."""
    if not net.training:
        return h
    share = torch.distributions.Beta(0.5, 0.5).sample().to(h.dtype)
    return share * h + (1 - share) * h[torch.randperm(len(h))]


def sampled(net: Any, h: Tensor) -> Tensor:
    """The reparametrised sample of a variational autoencoder."""
    spread = torch.nn.functional.softplus(net.middle(h))
    return torch.distributions.Normal(h, spread).rsample() if net.training else h


def branching(net: Any, h: Tensor) -> Tensor:
    """Another layer, according to the data."""
    return torch.tanh(net.middle(h)) if h[:, 0].mean() > 0 else h**2


def clamped_weights(net: Any, h: Tensor) -> Tensor:
    """Clamps its weights before it uses them."""
    net.second.weight.data.clamp_(-0.25, 0.25)
    return h


def normalised_weights(net: Any, h: Tensor) -> Tensor:
    """Divides its weights' rows by their norm in place before it uses them."""
    if net.training:
        with torch.no_grad():
            net.second.weight.div_(net.second.weight.norm(dim=1, keepdim=True))
    return h


def for_evaluation(net: Any, h: Tensor) -> Tensor:
    """A layer that training passes by."""
    return h if net.training else h + net.middle(h)


def with_list_of_weights() -> nn.Module:
    """Reaches a weight by a Python list."""
    middle = nn.Linear(6, 6)
    return Between(lambda net, h: h @ net.weights[0], middle=middle, weights=[middle.weight])


def frozen_layer() -> nn.Module:
    """A first layer that does not train."""
    net = Between(lambda net, h: h)
    net.first.requires_grad_(False)
    return net


def frozen() -> nn.Module:
    """A layer to be updated otherwise."""
    return square().requires_grad_(False)


def numpy_generator() -> np.random.Generator:
    """Always the same."""
    return np.random.default_rng(0)


def zeros() -> Tensor:
    """A moving average's beginning."""
    return torch.zeros(6)


STATE = [
    Case("frozen layer", frozen_layer),
    Case("parameter without use", between(lambda net, h: h, middle=square)),
    Case("parameter that only evaluation uses", between(for_evaluation, middle=square)),
    Case("module used twice", between(lambda net, h: torch.tanh(net.middle(torch.tanh(net.middle(h)))), middle=square)),
    Case("parameter reached by a Python list", with_list_of_weights),
    Case("moving average in a buffer, in place", between(centred_in_place, mean=zeros)),
    Case("moving average in a buffer, assigned", between(centred_by_assignment, mean=zeros)),
    Case(
        "spectral norm by power iteration in buffers",
        between(
            normalised_spectrally,
            middle=square,
            left=lambda: F.normalize(torch.arange(1.0, 7.0), dim=0),
            right=lambda: F.normalize(torch.ones(6), dim=0),
        ),
    ),
    Case("counter in a buffer", between(counting_in_a_buffer, calls=lambda: torch.zeros(()))),
    Case(
        "queue of activations in a buffer",
        between(with_queue, queue=lambda: 0.1 * torch.eye(8, 6), pointer=lambda: torch.zeros(1, dtype=torch.long)),
    ),
    Case("frozen parameters moved after others in forward", between(with_teacher, middle=square, teacher=frozen)),
    Case("weights clamped by `.data` in forward", between(clamped_weights)),
    Case("weights normalised in place in forward", between(normalised_weights)),
    Case("LayerDrop", between(dropped_layer, middle=square)),
    Case("branch on the data", between(branching, middle=square)),
    Case("Python counter in forward", between(counting, calls=lambda: 0)),
    Case("first batch's statistics kept by forward", between(initialised_by_data, scale=lambda: None)),
    Case("constant kept by forward", between(masked, cache=dict)),
    Case("noise of the global generators", between(global_noise)),
    Case("noise of the model's torch.Generator", between(own_generator, generator=torch.Generator)),
    Case(
        "noise of the model's NumPy generator", between(own_numpy_generator, generator=lambda: np.random.default_rng(0))
    ),
    Case("torch.manual_seed in forward", between(seeded_noise)),
    Case("mixup in forward", between(mixed_up)),
    Case("reparametrised sample", between(sampled, middle=square)),
]
