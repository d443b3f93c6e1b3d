"""Good models with what is rarer: random samples, stopped gradients, number formats, state of their own."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from check_cases.case import (
    CLASSES,
    Good,
    with_features,
    with_itself,
    with_number,
    with_ratings,
    with_series,
)
from tune_hypergrad.regularisers import InputNoise, Mixup, WeightDecay


class VAE(nn.Module):
    """Kingma and Welling, "Auto-Encoding Variational Bayes", 2014: reconstruction, mean and log-variance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))
        self.decoder = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encoder(x).chunk(2, -1)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return self.decoder(z), mean, logvar


def bound(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    """The negative evidence lower bound, per example."""
    reconstruction, mean, logvar = output
    divergence = -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(1).mean()
    return F.mse_loss(reconstruction, target, reduction="sum") / len(target) + divergence


def weighted_bound(output: tuple[Tensor, Tensor, Tensor], target: Tensor, *, beta: float = 1.0) -> Tensor:
    """The same with a weight of the divergence, as in a beta-VAE."""
    reconstruction, mean, logvar = output
    divergence = -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(1).mean()
    return F.mse_loss(reconstruction, target, reduction="sum") / len(target) + beta * divergence


class Recommender(nn.Module):
    """Embeddings of users and items: their product, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(11, 4), nn.Embedding(17, 4)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        user, item = self.users(users), self.items(items)
        return (user * item).sum(1) + self.mlp(torch.cat([user, item], 1)).squeeze(1)


class Between(nn.Module):
    """A perceptron for children to do something with the hidden units of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.within(torch.tanh(self.first(x))))

    def within(self, h: Tensor) -> Tensor:
        return torch.tanh(self.middle(h))


class Autocast(Between):
    """The middle in bfloat16."""

    def within(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = F.gelu(self.middle(h))
        return h.float()


class Island(Between):
    """A normalisation in float32 inside a block in bfloat16."""

    def within(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.middle(h)
            with torch.autocast("cpu", enabled=False):
                wide = h.to(torch.float32)
                h = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)
            return self.middle(h).float()


class WideIsland(Between):
    """A softmax in float32, whatever the model is in."""

    def within(self, h: Tensor) -> Tensor:
        return h * F.softmax(self.middle(h), -1, dtype=torch.float32).to(h.dtype)


class Detached(Between):
    """Divides by statistics that no gradient passes."""

    def within(self, h: Tensor) -> Tensor:
        h = self.middle(h)
        with torch.no_grad():
            scale = h.std(0, keepdim=True) + 0.1
        return (h - h.detach().mean(0)) / scale


class Quantised(Between):
    """Activations and weights of few levels, gradients straight through."""

    def within(self, h: Tensor) -> Tensor:
        return F.linear(self._quantise(h), self._quantise(self.middle.weight), self.middle.bias)

    @staticmethod
    def _quantise(x: Tensor) -> Tensor:
        scale = x.detach().abs().max() / 7
        return x + ((x / scale).round().clamp(-7, 7) * scale - x).detach()


class Dropping(Between):
    """Leaves its middle out at times."""

    def within(self, h: Tensor) -> Tensor:
        for probability in (0.3, 0.6):
            if not (self.training and random.random() < probability):
                h = h + torch.tanh(self.middle(h))
        return h


class Averaging(Between):
    """Centres by an exponential moving average that it keeps in a buffer."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(12))

    def within(self, h: Tensor) -> Tensor:
        if self.training:
            self.average.lerp_(h.detach().mean(0), 0.2)
        return torch.tanh(self.middle(h - self.average))


class MeanTeacher(Between):
    """Follows a slow copy of its middle: Tarvainen and Valpola, "Mean teachers are better role models", 2017."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.middle).requires_grad_(False)

    def within(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            if self.training:
                for slow, own in zip(self.teacher.parameters(), self.middle.parameters(), strict=True):
                    slow.mul_(0.9).add_(own, alpha=0.1)
            taught = torch.tanh(self.teacher(h))
        return torch.tanh(self.middle(h)) + 0.5 * taught


class Balanced(Between):
    """Normalises rows and columns in turn until a number says that it is done (Sinkhorn), and keeps that number."""

    def within(self, h: Tensor) -> Tensor:
        h = self.middle(h).exp()
        for _ in range(10):
            before, h = h, h / h.sum(1, keepdim=True)
            h = h / h.sum(0, keepdim=True)
            self.change = (h - before).abs().max().item()
            if self.change < 0.01:
                break
        return h


class Experts(Between):
    """The two best of four experts for each example, as a gate says."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(12, 4), nn.ModuleList(nn.Linear(12, 12) for _ in range(4))

    def within(self, h: Tensor) -> Tensor:
        best, chosen = self.gate(h).softmax(-1).topk(2, -1)
        shares = torch.zeros(len(h), 4, dtype=h.dtype).scatter(1, chosen, best / best.sum(-1, keepdim=True))
        return torch.stack([torch.tanh(expert(h)) for expert in self.experts], 1).mul(shares[..., None]).sum(1)


class TwoTowers(nn.Module):
    """Similarities of users and items at a learned temperature, in a batch of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(8, 6)
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.normalize(self.first(x), dim=1), F.normalize(self.second(x.tanh()), dim=1)
        return self.log_scale.exp() * first @ second.T


def contrastive(output: Tensor, target: Tensor) -> Tensor:
    """Each example's own partner among all, both ways."""
    own = torch.arange(len(output))
    return (F.cross_entropy(output, own) + F.cross_entropy(output.T, own)) / 2


class Fourier(nn.Module):
    """Li et al., "Fourier Neural Operator", 2021: complex weights of the lowest frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.past, self.head = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 4, 1), nn.Linear(4, CLASSES)
        self.weight = nn.Parameter(0.3 * torch.randn(4, 4, 4, dtype=torch.complex64))

    def forward(self, series: Tensor) -> Tensor:
        x = self.widen(series)
        low = torch.einsum("bif,iof->bof", torch.fft.rfft(x)[..., :4], self.weight.to(_complex(x.dtype)))
        x = F.gelu(torch.fft.irfft(low, n=x.shape[-1]) + self.past(x))
        return self.head(x.mean(-1))


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.complex64)


class Cells(nn.Module):
    """A recurrent cell in a loop of the program's own, which ends early where all is said."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 6), nn.Linear(6, CLASSES)

    def forward(self, series: Tensor) -> Tensor:
        h = c = series.new_zeros(len(series), 6)
        for x in series.unbind(-1)[:6]:
            h, c = self.cell(x, (h, c))
        return self.head(h)


class _Swish(Function):
    """Saves memory by computing once more, as many programs do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradients[0] * s * (1 + x * (1 - s))


swish: Callable[[Tensor], Tensor] = _Swish.apply


class Swish(Between):
    """An activation with a backward of its own."""

    def within(self, h: Tensor) -> Tensor:
        return swish(self.middle(h))


class Graph(nn.Module):
    """Messages along the edges of a ring, added up by `index_add`."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.message, self.head = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, CLASSES)

    def forward(self, series: Tensor) -> Tensor:
        nodes = series.transpose(1, 2)
        target = torch.arange(nodes.shape[1]).roll(1)
        h = F.elu(self.own(nodes).index_add(1, target, self.message(nodes)))
        return self.head(h.amax(1))


class Distances(nn.Module):
    """Cross entropy of distances from centres that are trained with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(CLASSES, CLASSES))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(-(output[:, None] - self.centres).square().sum(-1), target)


def regressor() -> nn.Module:
    """An MLP with LayerNorm for one number."""
    return nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Softplus(), nn.Linear(12, 1))


def mixed(output: Tensor, target: Tensor, *, delta: float = 0.7) -> Tensor:
    """The Huber loss, whose threshold is tuned, out of torch operations."""
    error = (output - target).abs()
    return torch.where(error < delta, error**2 / 2, delta * (error - delta / 2)).mean()


def squares(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """The sum of squares, and of how many."""
    return F.mse_loss(output, target, reduction="sum"), target.numel()


# torch's forward-mode derivative of a 0-dim float32 tensor times a Python number is float64
_WIDENED = {"forward": "expected m1 and m2 to have the same dtype, but got: double != float"}

OTHERS = [
    Good("VAE", VAE, with_itself, "adam", loss=bound),
    Good("beta-VAE, tuned", VAE, with_itself, "adam", loss=bound, train_loss=weighted_bound, refused=_WIDENED),
    Good("recommender", Recommender, with_ratings, "adam", loss=F.binary_cross_entropy_with_logits),
    Good("regression, mean squared error", regressor, with_number, loss=F.mse_loss),
    Good("regression, (sum, count)", regressor, with_number, "rmsprop", loss=squares),
    Good("regression, Huber", regressor, with_number, "nesterov", loss=partial(F.huber_loss, delta=0.5)),
    Good("regression, tuned threshold", regressor, with_number, "adam", loss=F.mse_loss, train_loss=mixed),
    Good("autocast block", Autocast, with_features),
    Good("float32 inside autocast", Island, with_features, "adamw"),
    Good("softmax in float32", WideIsland, with_features, "nesterov"),
    Good("detached statistics", Detached, with_features),
    Good("straight-through quantisation", Quantised, with_features),
    Good("LayerDrop", Dropping, with_features, "adamw"),
    Good("moving average in a buffer", Averaging, with_features, "rmsprop"),
    Good("mean teacher", MeanTeacher, with_features, "nesterov"),
    Good("iteration until a number is small", Balanced, with_features),
    Good("mixture of experts", Experts, with_features, "adam"),
    Good("graph network", Graph, with_series, "nesterov"),
    Good("contrastive, learned temperature", TwoTowers, with_features, "adam", loss=contrastive),
    Good("Fourier neural operator", Fourier, with_series),
    Good("LSTM cell in a loop", Cells, with_series, "adam"),
    Good("autograd.Function of one's own", Swish, with_features, refused={"forward": "setup_context"}),
    Good("loss with parameters", Between, with_features, "rmsprop", loss=Distances()),
    Good("bfloat16 throughout", lambda: Between().bfloat16(), with_features),
    Good(
        "regularised",
        Between,
        with_features,
        "nesterov",
        regularisers=(WeightDecay(), InputNoise(), Mixup(classes=CLASSES)),
    ),
]
