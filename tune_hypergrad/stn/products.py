"""Layers that are written out of several products `W x + b`, each with a response of its own."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from tune_hypergrad.errors import InputError
from tune_hypergrad.stn.layers import SelfTuningLayer
from tune_hypergrad.stn.response import Response, primal, with_response


class Product(NamedTuple):
    """A product `W x + b` of x with shape [..., examples, features], with its response to the perturbation."""

    weight: Tensor
    """W, shape [outputs, features]."""
    bias: Tensor | None
    """b, shape [outputs]; None: 0."""
    response_weight: Tensor
    """Weight of the product's response, shape [outputs, features]."""
    scale: Tensor | None
    """Factor of the product with `response_weight`, shape [outputs] or [examples, outputs]; None: 0."""
    shift: Tensor | None
    """Response of the bias, of the same shape as `scale`; None: 0."""
    linearised: bool
    """Whether the response is a tangent of the output in place of a term of it."""

    def __call__(self, x: Tensor) -> Tensor:
        output = F.linear(x, self.weight, self.bias)
        if self.scale is None:
            return output
        change = self.scale * F.linear(primal(x) if self.linearised else x, self.response_weight)
        return with_response(output, change if self.shift is None else change + self.shift, self.linearised)

    def split(self, count: int) -> list[Product]:
        """This product in `count` equal parts of its outputs."""
        nothing = (None,) * count
        parts = zip(
            self.weight.chunk(count),
            nothing if self.bias is None else self.bias.chunk(count),
            self.response_weight.chunk(count),
            nothing if self.scale is None else self.scale.chunk(count, -1),
            nothing if self.shift is None else self.shift.chunk(count, -1),
            strict=True,
        )
        return [Product(*part, self.linearised) for part in parts]


def has_tangent(*tensors: Tensor) -> bool:
    """Whether forward-mode derivatives are being taken by any of the tensors."""
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class OfProducts(SelfTuningLayer):
    """Mixin of a layer that is written out of products `W x + b`, with a response for each."""

    response: nn.ModuleDict

    @classmethod
    def applies_to(cls, layer: nn.Module) -> bool:
        return True

    def products(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weight and bias of each product at present, by the name of its response."""
        raise NotImplementedError

    def make_response(self, hyperparameters: int) -> nn.ModuleDict:
        return nn.ModuleDict(
            {name: Response(w, b, len(w), hyperparameters) for name, (w, b) in self.products().items()}
        )

    def products_at(self, inputs: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weight and bias of each product at one setting of the hyperparameters, shape [n]."""
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name, (weight, bias) in self.products().items():
            response = self._response(name)
            weight = weight + (response.weight_scale @ inputs)[:, None] * response.weight
            if bias is not None and response.bias is not None and response.bias_scale is not None:
                bias = bias + (response.bias_scale @ inputs) * response.bias
            found[name] = weight, bias
        return found

    def responding(self) -> dict[str, Product]:
        """The products with their responses to the perturbation."""
        return {name: self._product(self._response(name), w, b) for name, (w, b) in self.products().items()}

    def runs_plain(self, *tensors: Tensor) -> bool:
        """Whether torch's own forward will do: nothing to respond to, nor a tangent, which fused kernels refuse."""
        return self.perturbation.inputs is None and not has_tangent(*tensors, *self.parameters())

    def check_batch(self, x: Tensor, dims: int, examples_dim: int) -> None:
        """Refuse an input that has not `dims` dimensions, or not the perturbation's examples along one of them."""
        if x.ndim != dims:
            raise InputError(
                f"{type(self).__name__} takes a batch, a tensor with {dims} dimensions, not one of shape "
                f"{tuple(x.shape)}"
            )
        self.check_examples(x, examples_dim, one_for_all=False)

    def _product(self, response: Response, weight: Tensor, bias: Tensor | None) -> Product:
        inputs, scale, shift = self.perturbation.inputs, None, None
        if inputs is not None:
            scale = inputs @ response.weight_scale.T
        if inputs is not None and response.bias is not None and response.bias_scale is not None:
            shift = (inputs @ response.bias_scale.T) * response.bias
        return Product(weight, bias, response.weight, scale, shift, self.perturbation.linearised)

    def _response(self, name: str) -> Response:
        return cast(Response, self.response[name])
