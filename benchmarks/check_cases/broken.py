"""Problems with an error each, in a part of a model, in a loss or in a data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations
from torch.utils.data import Dataset

from check_cases.case import (
    CLASSES,
    VOCABULARY,
    Broken,
    Draw,
    Factory,
    make_problem,
    with_features,
    with_number,
    with_series,
    with_tokens,
)
from tune_hypergrad import Problem

PART = r"module 'encoder\.part' \({}\)"
"""How a message calls the part that is wrong."""


class Net(nn.Module):
    """A perceptron with one part amid."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential()
        self.encoder.add_module("first", nn.Linear(8, 6))
        self.encoder.add_module("part", part)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encoder(x)))


def _with(part: Factory, draw: Draw = with_features, **fields: Any) -> Callable[[int], Problem]:
    return partial(make_problem, lambda: Net(part()), draw, **fields)


class ByItem(nn.Module):
    """Divides by a Python number."""

    def forward(self, h: Tensor) -> Tensor:
        return h / h.norm().item()


class ByNumpy(nn.Module):
    """Gates by what NumPy computes."""

    def forward(self, h: Tensor) -> Tensor:
        gate = np.tanh(h.detach().cpu().numpy())
        return h * torch.from_numpy(gate).to(h)


class ByList(nn.Module):
    """Thresholds by Python numbers."""

    def forward(self, h: Tensor) -> Tensor:
        largest = [max(row) for row in h.tolist()]
        return h / torch.tensor(largest, dtype=h.dtype)[:, None].abs()


class _Reversal(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -0.5 * gradients[0]


class _Cube(Function):
    """Right, without what `torch.func` needs."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradients[0]


class _WrongCube(_Cube):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] ** 2 * gradients[0]


class _OnceCube(_Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradients[0]


class _SquareThrice(Function):
    """What the cube's backward computes; its own backward lacks a factor of two."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(h, gradient)
        return 3 * h**2 * gradient

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        h, gradient = ctx.saved_tensors
        return 3 * h * gradient * gradients[0], 3 * h**2 * gradients[0]


class _CubeByFunction(_Cube):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _SquareThrice.apply(ctx.saved_tensors[0], gradients[0])  # type: ignore[no-any-return, no-untyped-call]


class _CubeOfNumbers(_Cube):
    """Keeps its input where autograd does not know of it."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.kept = h.detach().numpy().copy()
        return h**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * torch.from_numpy(ctx.kept) ** 2 * gradients[0]


class Custom(nn.Module):
    """Applies a function of the program's own."""

    def __init__(self, function: type[Function]) -> None:
        super().__init__()
        self.function: Callable[[Tensor], Tensor] = function.apply

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


def _hooked_weight() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.weight.register_hook(lambda gradient: 0.1 * gradient)
    return layer


def _hooked_module() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_full_backward_hook(lambda module, inputs, outputs: (0.5 * inputs[0],))
    return layer


class InList(nn.Module):
    """Uses its weights through a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.weights = [self.layer.weight]

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weights[0], self.layer.bias)


class Unregistered(nn.Module):
    """Has weights that no optimizer gets to see."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = [nn.Parameter(torch.ones(6))]

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scales[0]


class Renormalised(nn.Linear):
    """Writes to its weights."""

    def forward(self, h: Tensor) -> Tensor:
        self.weight.data /= self.weight.data.norm(dim=1, keepdim=True)
        return super().forward(h)


class Centring(nn.Module):
    """Changes what it is given, which is data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.sub_(0.1))


class Recording(nn.Module):
    """Does something else where no gradient is wanted."""

    def forward(self, h: Tensor) -> Tensor:
        return h if torch.is_grad_enabled() else 0.9 * h


class Bag(nn.Module):
    """Sums embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, 6, mode="sum")
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(tokens)))


class ByFrequency(nn.Module):
    """Gradients of words are divided by how often they occur."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 6, scale_grad_by_freq=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(tokens).mean(1)))


class Bounded(ByFrequency):
    """Words have a largest length, which their layer gives them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 6, max_norm=1.0)


class Rooted(nn.Module):
    """Has no derivative at zero, where it is used."""

    def forward(self, h: Tensor) -> Tensor:
        return h.relu().sqrt()


class Noise(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, h: Tensor) -> Tensor:
        if not self.training:
            return h
        return h + 0.1 * torch.randn(h.shape, generator=self.generator, dtype=h.dtype)


class Sampled(nn.Module):
    """Draws from a generator of its own in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.rand(h.shape, generator=self.generator, dtype=h.dtype)


class Annealed(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, h: Tensor) -> Tensor:
        self.calls += self.training
        return h / (1 + 0.5**self.calls)


class Remembering(nn.Module):
    """Keeps a moving average outside of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.average: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            own = h.detach().mean(0)
            self.average = own if self.average is None else 0.9 * self.average + 0.1 * own
        return h if self.average is None else h - self.average


class Aligned(nn.Module):
    """Log-probabilities of symbols over time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, CLASSES)

    def forward(self, series: Tensor) -> Tensor:
        return self.layer(series.transpose(1, 2)).log_softmax(-1)


def _alignment(output: Tensor, target: Tensor) -> Tensor:
    examples, length, _ = output.shape
    symbols = 1 + torch.stack([target, target], 1) % (CLASSES - 1)
    lengths = torch.full((examples,), length), torch.full((examples,), 2)
    return F.ctc_loss(output.transpose(0, 1), symbols, *lengths)


def _distances(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(-torch.cdist(output, torch.eye(CLASSES, dtype=output.dtype)), target)


def _as_number(output: Tensor, target: Tensor, *, temperature: float = 1.5) -> Tensor:
    return F.cross_entropy(output / float(temperature), target)


def _by_math(output: Tensor, target: Tensor, *, log_temperature: float = 0.5) -> Tensor:
    return F.cross_entropy(output / math.exp(log_temperature), target)


def _mlp(outputs: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, outputs))


def _unpaired(seed: int) -> Problem:
    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        x, number = with_number(count, generator)
        return x, number.squeeze(1)

    return make_problem(lambda: _mlp(1), draw, seed, loss=F.mse_loss)


class Jittered(Dataset[Any]):
    """Draws from a generator of its own at every reading."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors, self.generator = tensors, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, label = (tensor[index] for tensor in self.tensors)
        return x + 0.1 * torch.from_numpy(self.generator.standard_normal(x.shape)).to(x), label


def _jittered(seed: int) -> Problem:
    train = Jittered(with_features(48, torch.Generator().manual_seed(seed)))
    return make_problem(_mlp, with_features, seed, train=train)


class Prototypes(nn.Module):
    """A loss with parameters, to be given as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(CLASSES, CLASSES))

    def compare(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of distances."""
        return F.cross_entropy(-torch.cdist(output, self.centres), target)


def _method(seed: int) -> Problem:
    return make_problem(_mlp, with_features, seed, loss=Prototypes().compare)


_LINE = r".* at broken\.py:\d+ `{}"

BROKEN = [
    Broken("`.item()`", _with(ByItem), PART.format("ByItem") + _LINE.format(r"return h / h\.norm\(\)\.item\(\)`")),
    Broken("NumPy amid", _with(ByNumpy), PART.format("ByNumpy") + _LINE.format(r"gate = np\.tanh")),
    Broken("`.tolist()`", _with(ByList), PART.format("ByList") + _LINE.format("largest =")),
    Broken("gradient reversal", _with(lambda: Custom(_Reversal)), "'_Reversal' in " + PART.format("Custom")),
    Broken("wrong backward", _with(lambda: Custom(_WrongCube)), "'_WrongCube' in " + PART.format("Custom")),
    Broken("once_differentiable", _with(lambda: Custom(_OnceCube)), "'_OnceCube' in " + PART.format("Custom")),
    Broken(
        "wrong double backward",
        _with(lambda: Custom(_CubeByFunction)),
        "'_(CubeByFunction|SquareThrice)' in " + PART.format("Custom") + ".*second derivative",
    ),
    Broken(
        "backward of an array",
        _with(lambda: Custom(_CubeOfNumbers)),
        "'_CubeOfNumbers' in " + PART.format("Custom") + ".*second derivative",
    ),
    Broken(
        "weight_norm",
        _with(lambda: parametrizations.weight_norm(nn.Linear(6, 6))),
        PART.format(r"\w+") + " uses weight_norm",
    ),
    Broken(
        "spectral_norm",
        _with(lambda: parametrizations.spectral_norm(nn.Linear(6, 6))),
        PART.format(r"\w+") + " uses spectral_norm",
    ),
    Broken("EmbeddingBag", partial(make_problem, Bag, with_tokens), r"module 'bag' \(EmbeddingBag\)"),
    Broken("hook of a parameter", _with(_hooked_weight), r"parameter 'encoder\.part\.weight' has a gradient hook"),
    Broken("full backward hook", _with(_hooked_module), PART.format("Linear") + " has a backward hook"),
    Broken("parameter by a Python list", _with(InList), r"parameter 'encoder\.part\.layer\.weight'.*list"),
    Broken("parameter that is not registered", _with(Unregistered), r"shape \(6,\).*list"),
    Broken("Embedding, max_norm", partial(make_problem, Bounded, with_tokens), r"module 'words' \(Embedding\) writes"),
    Broken("writes to its weights", _with(lambda: Renormalised(6, 6)), PART.format("Renormalised") + " writes to"),
    Broken("input changed in place", partial(make_problem, Centring, with_features), "changes its input in place"),
    Broken(
        "tuned value to a Python number",
        partial(make_problem, _mlp, with_features, train_loss=_as_number),
        r"broken\.py:\d+ `return F\.cross_entropy\(output / float\(temperature\)",
    ),
    Broken(
        "tuned value to `math`",
        partial(make_problem, _mlp, with_features, train_loss=_by_math),
        r"broken\.py:\d+ `return F\.cross_entropy\(output / math\.exp",
    ),
    Broken("[N, 1] against [N]", _unpaired, r"shape \(16, 1\) and the target \(16,\)"),
    Broken("CTC loss", partial(make_problem, Aligned, with_series, loss=_alignment), r"ctc_loss.*broken\.py:\d+"),
    Broken("asks torch.is_grad_enabled", _with(Recording), PART.format("Recording") + r".*is_grad_enabled\(\)"),
    Broken(
        "scale_grad_by_freq",
        partial(make_problem, ByFrequency, with_tokens),
        r"module 'words' \(Embedding\) has scale_grad_by_freq",
    ),
    Broken("square root at zero", _with(Rooted), "sqrt in " + PART.format("Rooted")),
    Broken(
        "cdist", partial(make_problem, _mlp, with_features, loss=_distances), r"torch\.functional\.cdist in broken\.py"
    ),
    Broken("model's own generator", _with(Noise), PART.format("Noise"), refused=("reverse",)),
    Broken("evaluation's own generator", _with(Sampled), PART.format("Sampled") + ".* in evaluation"),
    Broken("model counts its calls", _with(Annealed), PART.format("Annealed"), refused=("reverse",)),
    Broken("state in an attribute", _with(Remembering), PART.format("Remembering")),
    Broken("data set's own generator", _jittered, r"the train data \(Jittered\)", refused=("reverse",)),
    Broken("method of a module as loss", _method, "loss is a method of a module that has parameters"),
]
