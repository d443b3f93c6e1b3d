"""Operations in a model's forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from construct_cases.case import Case, between, square


def in_place(net: Any, h: Tensor) -> Tensor:
    """Writes to its own activations."""
    y = 2 * h
    y += 1
    y[:, 0] = h[:, 1] * h[:, 2]
    return y.sigmoid_()


def gathered(net: Any, h: Tensor) -> Tensor:
    """Units in another order in every example."""
    order = (torch.arange(6) + torch.arange(len(h))[:, None]) % 6
    return h.gather(1, order) * h


def scattered(net: Any, h: Tensor) -> Tensor:
    """Two units into one."""
    return torch.zeros_like(h).scatter_add(1, (torch.arange(6) // 2).expand(len(h), 6), h**2)


def put(net: Any, h: Tensor) -> Tensor:
    """`index_put`, with an index that comes twice."""
    return h.index_put((torch.arange(len(h))[:, None], torch.tensor([0, 2, 2])), h[:, 3:] ** 2, accumulate=True)


def distances(net: Any, h: Tensor) -> Tensor:
    """To the rows of a weight."""
    return torch.cdist(h, net.middle.weight)


def positive_definite(h: Tensor) -> Tensor:
    """A matrix for every example, shape [n, 6, 6]."""
    return torch.eye(6, dtype=h.dtype) + h[:, :, None] * h[:, None, :]


def shifted(net: Any, h: Tensor) -> Tensor:
    """A matrix for every example without multiple eigenvalues, shape [n, 6, 6]."""
    return h.diag_embed() + net.middle.weight


def solved(net: Any, h: Tensor) -> Tensor:
    """`torch.linalg.solve`."""
    return torch.linalg.solve(positive_definite(h), net.middle(h))


def inverted(net: Any, h: Tensor) -> Tensor:
    """`torch.inverse`."""
    return (torch.inverse(positive_definite(h)) @ net.middle(h)[:, :, None])[:, :, 0]


def decomposed(net: Any, h: Tensor) -> Tensor:
    """Cholesky factor and determinant."""
    matrices = positive_definite(h)
    return torch.linalg.cholesky(matrices).diagonal(dim1=1, dim2=2) + torch.logdet(matrices)[:, None] * h


def eigenvalues(net: Any, h: Tensor) -> Tensor:
    """Of a symmetric matrix."""
    matrices = shifted(net, h)
    return torch.linalg.eigvalsh(matrices + matrices.mT)


def eigenvalues_of_half(net: Any, h: Tensor) -> Tensor:
    """Reads one triangle only, while torch's gradient is for both."""
    return torch.linalg.eigvalsh(shifted(net, h))


def divided_by_norm(net: Any, h: Tensor) -> Tensor:
    """A layer whose weight has a spectral norm of 1."""
    return F.linear(h, net.middle.weight / torch.linalg.matrix_norm(net.middle.weight, 2), net.middle.bias)


def transformed(net: Any, h: Tensor) -> Tensor:
    """A filter in the frequency domain."""
    return torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(net.middle.bias), n=6)


def best_of(net: Any, h: Tensor) -> Tensor:
    """The three largest units twice."""
    return h.topk(3).values.repeat(1, 2) * h


def resampled(net: Any, h: Tensor) -> Tensor:
    """A spatial transformer of one row."""
    places = torch.stack([net.middle(h).tanh(), torch.zeros_like(h)], -1)[:, None]
    return F.grid_sample(h[:, None, None], places, align_corners=False)[:, 0, 0]


OPERATIONS = [
    Case("in-place operations", between(in_place)),
    Case("gather", between(gathered)),
    Case("scatter_add", between(scattered)),
    Case("index_put", between(put)),
    Case("einsum", between(lambda net, h: torch.einsum("ni,ij,nj->ni", h, net.middle.weight, h), middle=square)),
    Case("cdist", between(distances, middle=square)),
    Case("linalg.solve", between(solved, middle=square)),
    Case("inverse", between(inverted, middle=square)),
    Case("cholesky, logdet", between(decomposed)),
    Case("eigvalsh", between(eigenvalues, middle=square)),
    Case(
        "eigvalsh of an asymmetric matrix",
        between(eigenvalues_of_half, middle=square),
    ),
    Case("linalg.matrix_norm(w, 2)", between(divided_by_norm, middle=square)),
    Case("fft", between(transformed, middle=square)),
    Case("sort", between(lambda net, h: h.sort(1).values)),
    Case("topk", between(best_of)),
    Case("median", between(lambda net, h: h - h.median(1, keepdim=True).values)),
    Case("where, clamp, abs", between(lambda net, h: torch.where(h > 0, h.clamp(max=0.5), 0.1 * h.abs()))),
    Case("prod, cumsum, logsumexp", between(lambda net, h: h.cumsum(1) * h.logsumexp(1, True) + h.prod(1, True))),
    Case("norm", between(lambda net, h: h / (1 + h.norm(dim=1, keepdim=True)))),
    Case("grid_sample", between(resampled, middle=square)),
]
