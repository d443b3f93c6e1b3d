"""Dropout whose rate is a hyperparameter, with a rate of its own for each example of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tune_hypergrad.errors import InputError
from tune_hypergrad.stn.response import Perturbation

DROPOUTS: dict[type[nn.Module], int | None] = {
    nn.Dropout: None,
    nn.Dropout1d: 2,
    nn.Dropout2d: 2,
    nn.Dropout3d: 2,
}
"""Plain dropout modules, and how many leading dimensions have a mask of their own (None: all)."""


class TunedDropout(nn.Module):
    """Zero elements or channels at the rate that the perturbation gives this hyperparameter, and scale the rest.

    Args:
        hyperparameter: name of the rate.
        perturbation: where its values are found, of shape [] or [examples].
        masked_dims: how many leading dimensions have a mask of their own: 2 zeroes channels; None zeroes elements.
    """

    def __init__(self, hyperparameter: str, perturbation: Perturbation, masked_dims: int | None) -> None:
        super().__init__()
        self.hyperparameter, self.perturbation, self.masked_dims = hyperparameter, perturbation, masked_dims

    def forward(self, x: Tensor) -> Tensor:
        """Inputs of shape [examples, ...]; as they are in evaluation."""
        if not self.training:
            return x
        values = self.perturbation.values
        if self.hyperparameter not in values:
            raise InputError(f"dropout {self.hyperparameter!r} has no value: run the network in a step of its training")
        rate = values[self.hyperparameter].detach().to(x.dtype)
        keep = 1 - (rate.reshape(-1, *[1] * (x.ndim - 1)) if rate.ndim else rate)
        dims = x.ndim if self.masked_dims is None else self.masked_dims
        mask = torch.rand(*x.shape[:dims], *[1] * (x.ndim - dims), dtype=x.dtype, device=x.device) < keep
        return x * (mask / keep)
