"""What goes into a model and comes out of it, and in which numbers it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from construct_cases.case import Between, Case, between, labels, mlp, square, vectors


@dataclass
class Output:
    """An output that torch does not know how to take apart."""

    logits: Tensor


class Wrapped(Between):
    """Logits within something else."""

    def __init__(self, wrap: Any) -> None:
        super().__init__(lambda net, h: h)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))


class TwoInputs(nn.Module):
    """Takes features twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)) * self.second(y))


class OwnLoss(Between):
    """Takes the labels, too, and returns its loss."""

    def __init__(self) -> None:
        super().__init__(lambda net, h: h)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(super().forward(x), target)


class ComplexLayer(nn.Module):
    """Magnitudes of complex combinations."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.4 * torch.randn(inputs, 6, dtype=torch.complex128))

    def forward(self, h: Tensor) -> Tensor:
        return (h.to(torch.complex128) @ self.weight).abs()


class ComplexOnly(nn.Module):
    """Without a real parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ComplexLayer(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).unflatten(1, (3, 2)).sum(2)


def in_bfloat16(net: Any, h: Tensor) -> Tensor:
    """A block under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.tanh(net.middle(h)).float()


def inner_float32(net: Any, h: Tensor) -> Tensor:
    """A softmax in single precision."""
    return h * h.float().softmax(1).double()


class ChangesInput(Between):
    """Scales its input in place."""

    def __init__(self) -> None:
        super().__init__(lambda net, h: h)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.mul_(1.1))


TWICE = vectors(inputs=lambda x: (x, x))
WITH_LABELS = vectors(inputs=lambda x: (x, labels(x)))

FORMATS = [
    Case("dict output", lambda: Wrapped(lambda y: {"logits": y}), loss=lambda o, t: F.cross_entropy(o["logits"], t)),
    Case("tuple output", lambda: Wrapped(lambda y: (y, None)), loss=lambda o, t: F.cross_entropy(o[0], t)),
    Case("dataclass output", lambda: Wrapped(Output), loss=lambda o, t: F.cross_entropy(o.logits, t)),
    Case("two inputs", TwoInputs, TWICE),
    Case("model that returns its loss", OwnLoss, WITH_LABELS, loss=lambda loss, target: loss),
    Case("input changed in place", ChangesInput),
    Case("input changed in place, full batch", ChangesInput, batch_size=16),
    Case("complex parameters beside real ones", between(lambda net, h: net.layer(h), layer=lambda: ComplexLayer(6))),
    Case("complex parameters only", ComplexOnly),
    Case(
        "`logits.float()` (to 1e-4)",
        lambda: Wrapped(torch.Tensor.float),
        twin=mlp,
        precision=1e-4,
        loss_precision=1e-6,
    ),
    Case(
        "softmax in single precision (to 1e-4)",
        between(inner_float32),
        twin=between(lambda net, h: h * h.softmax(1)),
        precision=1e-4,
        loss_precision=1e-6,
    ),
    Case(
        "float32 model (to 1e-3)",
        between(lambda net, h: torch.tanh(net.middle(h)), middle=square),
        dtype=torch.float32,
        twin=between(lambda net, h: torch.tanh(net.middle(h)), middle=square),
        precision=1e-3,
        loss_precision=1e-5,
    ),
    Case(
        "autocast bfloat16 block in a float32 model (to 5 %)",
        between(in_bfloat16, middle=square),
        dtype=torch.float32,
        twin=between(lambda net, h: torch.tanh(net.middle(h)), middle=square),
        precision=5e-2,
        loss_precision=1e-2,
    ),
]
