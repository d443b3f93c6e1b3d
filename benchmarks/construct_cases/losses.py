"""Losses of training and of validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from construct_cases.case import ALIGNED, SGD, SMALL_SGD, Case, Values, labels, scores, vectors
from tune_hypergrad.losses import smoothed_cross_entropy

SMOOTHED: Values = {**SGD, "a": (0.1, 0.2)}
WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def partly_ignored(inputs: Tensor) -> Tensor:
    """Labels, two of five of which do not count."""
    return torch.where(torch.arange(len(inputs)) % 5 < 2, -100, labels(inputs))


REAL = vectors(scores)
COLUMN = vectors(lambda x: scores(x, 1)[:, 0])
PROBABILITIES = vectors(lambda x: scores(x).softmax(1))
BITS = vectors(lambda x: (scores(x) > 0).double())
COUNTS = vectors(lambda x: scores(x).exp().round())
SIGNS = vectors(lambda x: scores(x)[:, 0].sign())
IGNORED = vectors(partly_ignored)


def one_output() -> nn.Module:
    """Four numbers in, one out."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def six_outputs() -> nn.Module:
    """Four numbers in, six out."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))


def symbols() -> nn.Module:
    """Scores of five symbols along a sequence."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.LogSoftmax(2))


def divergence(output: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(output, 1), target, reduction="batchmean")


def gaussian(output: Tensor, target: Tensor) -> Tensor:
    return F.gaussian_nll_loss(output[:, :1], target[:, :1], F.softplus(output[:, 1:2]))


def triplet(output: Tensor, target: Tensor) -> Tensor:
    anchor, positive, negative = output.split(2, 1)
    return F.triplet_margin_loss(anchor, positive, negative, margin=3.0)


def cosine(output: Tensor, target: Tensor) -> Tensor:
    first, second = output.split(3, 1)
    return F.cosine_embedding_loss(first, second, target, margin=0.2)


def connectionist(output: Tensor, target: Tensor) -> Tensor:
    lengths = torch.full((len(output),), 6)
    return F.ctc_loss(output.transpose(0, 1), target, lengths, torch.full_like(lengths, 2))


def contrastive(output: Tensor, target: Tensor) -> Tensor:
    """InfoNCE: every example's own target among those of the batch."""
    similarities = F.normalize(output, dim=1) @ F.normalize(target, dim=1).T / 0.5
    return F.cross_entropy(similarities, torch.arange(len(output)))


def mined(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none").topk(2).values.mean()


def focal(output: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(output, target, reduction="none")
    return ((1 - (-losses).exp()).detach() ** 2 * losses).mean()


def sum_and_count(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(output, target, reduction="sum"), (target >= 0).sum()


class LearnedTemperature(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output * self.log_scale.exp(), target)


class Centred(nn.Module):
    """A loss with a moving average of outputs."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.7).add_(0.3 * output.mean(0))
        return F.cross_entropy(output - self.mean, target) + (output - self.mean).square().mean()


class Normalised:
    """A loss divided by its own moving average, which is a Python float."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target)
        self.scale = 0.7 * self.scale + 0.3 * loss.item()
        return loss / self.scale


def penalised(output: Tensor, target: Tensor, *, a: Any = 0.0, params: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(output, target) + a * sum(p.square().sum() for p in params.values())


def smoothed_by(number: Callable[[Any], Any]) -> Callable[..., Tensor]:
    """Smoothed cross entropy whose tuned value is turned into another number first."""

    def loss(output: Tensor, target: Tensor, *, a: Any = 0.0) -> Tensor:
        return smoothed_cross_entropy(output, target, label_smoothing=number(a))

    return loss


def torch_smoothing(output: Tensor, target: Tensor, *, a: Any = 0.0) -> Tensor:
    return F.cross_entropy(output, target, label_smoothing=a)


def tuned(name: str, train_loss: Callable[..., Tensor]) -> Case:
    """A train loss with a hyperparameter of its own."""
    return Case(name, train_loss=train_loss, values=SMOOTHED)


def summed(name: str, **fields: Any) -> Case:
    """A sum over the batch."""
    return Case(name, loss=partial(F.cross_entropy, reduction="sum"), values=SMALL_SGD, **fields)


LOSSES = [
    Case("cross_entropy with ignore_index", data=IGNORED),
    Case("cross_entropy with ignore_index, validated in parts", data=IGNORED, eval_batch_size=3),
    Case("cross_entropy with class weights", loss=partial(F.cross_entropy, weight=WEIGHTS)),
    Case(
        "cross_entropy with class weights, validated in parts",
        loss=partial(F.cross_entropy, weight=WEIGHTS),
        eval_batch_size=3,
    ),
    Case("nn.CrossEntropyLoss with class weights", loss=nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1)),
    summed('cross_entropy, reduction="sum"'),
    summed('cross_entropy, reduction="sum", validated in parts', eval_batch_size=3),
    Case("cross_entropy with soft targets", data=PROBABILITIES),
    Case("nll_loss", loss=lambda output, target: F.nll_loss(output.log_softmax(1), target)),
    Case("mse_loss", data=REAL, loss=F.mse_loss),
    Case("mse_loss of (N, 1) and (N,)", one_output, COLUMN, loss=F.mse_loss),
    Case("l1_loss", data=REAL, loss=F.l1_loss),
    Case("smooth_l1_loss", data=REAL, loss=F.smooth_l1_loss),
    Case("huber_loss", data=REAL, loss=partial(F.huber_loss, delta=0.5)),
    Case(
        "binary_cross_entropy_with_logits with pos_weight",
        data=BITS,
        loss=partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHTS),
    ),
    Case("kl_div", data=PROBABILITIES, loss=divergence),
    Case("gaussian_nll_loss", data=REAL, loss=gaussian),
    Case("poisson_nll_loss", data=COUNTS, loss=F.poisson_nll_loss),
    Case("multi_margin_loss", loss=F.multi_margin_loss),
    Case("triplet_margin_loss", six_outputs, loss=triplet, values=SMALL_SGD),
    Case("cosine_embedding_loss", six_outputs, SIGNS, loss=cosine),
    Case("ctc_loss", symbols, ALIGNED, loss=connectionist),
    Case("InfoNCE over the batch", data=REAL, loss=contrastive),
    Case("InfoNCE over the batch, validated in parts", data=REAL, loss=contrastive, eval_batch_size=3),
    Case("hardest examples only", train_loss=mined),
    Case("focal loss with detached weights", train_loss=focal),
    Case("(sum, count)", loss=sum_and_count),
    Case("(sum, count), validated in parts", loss=sum_and_count, eval_batch_size=3),
    Case("loss module with a parameter", loss=LearnedTemperature()),
    Case("train loss module with a parameter", train_loss=LearnedTemperature()),
    Case("train loss module with a moving average", train_loss=Centred()),
    Case("train loss divided by its own moving average", train_loss=Normalised()),
    tuned("penalty of `params`", penalised),
    tuned("smoothed_cross_entropy", smoothed_by(lambda a: a)),
    tuned("F.cross_entropy(label_smoothing=a)", torch_smoothing),
    tuned("`float(a)` of a tuned value", smoothed_by(float)),
    tuned("`a.item()`", smoothed_by(lambda a: a.item())),
    tuned("`math.exp(a)`", smoothed_by(lambda a: 1 - math.exp(-a))),
    tuned("`torch.tensor([a])`", smoothed_by(lambda a: torch.tensor([a], dtype=torch.float64))),
    tuned("branch on a tuned value", smoothed_by(lambda a: a if a > 0.15 else a**2)),
]
