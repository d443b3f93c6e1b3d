"""How weights respond to hyperparameters, and the perturbation that the layers of one network respond to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn


class Perturbation:
    """What the layers of one network see of the hyperparameters at present: nothing, outside `set_to`.

    A plain Python object that the layers share, neither parameter nor buffer: functional calls, autocast and several
    networks in one process leave it alone.
    """

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        """What responses are linear in, shape [n], or [examples, n]; None: weights do not respond."""
        self.linearised = False
        """Whether a response is a tangent of the unperturbed network (forward-mode AD) in place of a term of it."""

    @contextmanager
    def set_to(self, inputs: Tensor, *, linearised: bool = False) -> Iterator[None]:
        """For the body, layers see these inputs of responses, and whether responses are linearised."""
        before = self.inputs, self.linearised
        self.inputs, self.linearised = inputs, linearised
        try:
            yield
        finally:
            self.inputs, self.linearised = before


class Response(nn.Module):
    """How a layer's weight and bias respond to n hyperparameters h, output by output.

    `weight(h) = W0 + (Qw h) * W1` and `bias(h) = b0 + (Qb h) * b1`, where W0 and b0 are the layer's own (MacKay et al.
    2019, equation 13). `Qw` and `Qb` begin at zero: the network begins as the plain one, whatever h is.

    Args:
        weight: the layer's own, of any shape.
        bias: the layer's own, shape [outputs], if it has one.
        outputs: how many rows `Qw` has.
        hyperparameters: n.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, outputs: int, hyperparameters: int) -> None:
        super().__init__()
        zeros = weight.detach().new_zeros(outputs, hyperparameters)
        self.weight = nn.Parameter(weight.detach().clone())
        self.weight_scale = nn.Parameter(zeros.clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().new_ones(outputs))
        self.bias_scale = None if bias is None else nn.Parameter(zeros.clone())


def primal(x: Tensor) -> Tensor:
    """A tensor without its tangent."""
    return cast(Tensor, forward_ad.unpack_dual(x).primal)


def with_response(output: Tensor, response: Tensor, linearised: bool) -> Tensor:
    """A layer's output with its response, in the output's dtype: as a term, or added to the output's tangent.

    Where the response is of several examples and the output one for all of them, the result is of the examples.
    """
    response = response.to(output.dtype)  # autocast leaves products with biases in single precision
    if not linearised:
        return output + response
    value, tangent = forward_ad.unpack_dual(output)
    shape = torch.broadcast_shapes(value.shape, response.shape)
    if shape != value.shape:
        value = value.expand(shape).clone()  # a value that shares memory with itself cannot have a tangent
    response = response.expand(shape)
    return cast(Tensor, forward_ad.make_dual(value, response if tangent is None else tangent + response))
