"""Layers whose weights respond to hyperparameters, and the registry of which layer becomes which.

A converted layer keeps its parameters, attributes and place: only its class changes, to a subclass that adds the
response to its output. Everything is one product per weight and batch, however many settings of the hyperparameters
the examples of the batch see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_hypergrad.errors import InputError
from tune_hypergrad.stn.response import Perturbation, Response, primal, with_response


class NoExamplesError(InputError):
    """Raised where the input of a layer has not the examples of the perturbation."""


class SelfTuningLayer(nn.Module):
    """Mixin of a layer class: what its response is, and the parameters at one setting of the hyperparameters."""

    response: nn.Module
    """The parameters of the layer's response: a `Response`, or a module that holds one for each weight."""
    perturbation: Perturbation
    """What the layer responds to; shared by the layers of a network."""
    children_within: tuple[str, ...] = ()
    """Names of child modules whose parameters the layer's own forward uses, and which respond as part of the layer."""
    output_dim: int = 0
    """Dimension of a weight along which its outputs lie."""

    @classmethod
    def applies_to(cls, layer: nn.Module) -> bool:
        """Whether a layer of the registered class can become one of this class."""
        return layer._parameters.get("weight") is not None

    def begin_responding(self, response: nn.Module, perturbation: Perturbation) -> None:
        """Take over response and perturbation; called once, when the layer has been converted."""
        self.response, self.perturbation = response, perturbation

    def make_response(self, hyperparameters: int) -> nn.Module:
        """The parameters of the response for this layer's shape, to a number of hyperparameters."""
        raise NotImplementedError

    @property
    def responses(self) -> dict[str, tuple[str, ...]]:
        """The names of the response's parameters by the name of the layer's parameter that responds with them.

        There is one, or one for each of as many equal parts of the parameter's first dimension; beside each is its
        `<name>_scale`.
        """
        names = [name for name in ("weight", "bias") if getattr(self.response, name, None) is not None]
        return {name: (f"response.{name}",) for name in names}

    def parameters_at(self, inputs: Tensor) -> dict[str, Tensor]:
        """The layer's own parameters by name at one setting of the hyperparameters, shape [n]."""
        raise NotImplementedError

    def check_examples(self, x: Tensor, dim: int = 0, *, one_for_all: bool = True) -> None:
        """Refuse an input that has not the perturbation's examples along a dimension, or a single entry for them all.

        Raises:
            InputError: it is such an input.
        """
        inputs, shape = self.perturbation.inputs, tuple(x.shape)
        if inputs is None or inputs.ndim == 1 or not shape or shape[dim] == len(inputs):
            return
        if shape[dim] != 1 or not one_for_all:
            raise NoExamplesError(
                f"{type(self).__name__}: the perturbation is of {len(inputs)} examples, but the input of shape {shape} "
                f"has {shape[dim]} along dimension {dim}, where this layer takes its batch: let examples stay there, "
                "and give positions as arange(t).expand(b, t), or name every hyperparameter in per_minibatch"
            )


class _Affine(SelfTuningLayer):
    """Base of the layers that are a product with a weight, plus a bias."""

    response: Response
    weight: Any
    bias: Any

    channel_dim: int
    """Dimension of the output along which the bias lies."""

    def product(self, x: Tensor, weight: Tensor, *further: Any) -> Tensor:
        """The layer's output for an input with another weight and without bias; `further` are arguments of
        `forward`."""
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])

    def make_response(self, hyperparameters: int) -> Response:
        return Response(self.weight, self.bias, self.outputs, hyperparameters)

    def forward(self, input: Tensor, *further: Any) -> Tensor:
        output = cast(Tensor, super().forward(input, *further))
        seen = self.perturbation
        if seen.inputs is None:
            return output
        self.check_examples(input)
        response = self.response
        scale = self._by_channel(seen.inputs @ response.weight_scale.T, output)
        change = scale * self.product(primal(input) if seen.linearised else input, response.weight, *further)
        if response.bias is not None and response.bias_scale is not None:
            change = change + self._by_channel((seen.inputs @ response.bias_scale.T) * response.bias, output)
        return with_response(output, change, seen.linearised)

    def parameters_at(self, inputs: Tensor) -> dict[str, Tensor]:
        response = self.response
        found = {"weight": self.weight + self._by_row(response.weight_scale @ inputs) * response.weight}
        if self.bias is not None and response.bias is not None and response.bias_scale is not None:
            found["bias"] = self.bias + (response.bias_scale @ inputs) * response.bias
        return found

    def _by_row(self, scale: Tensor) -> Tensor:
        """Numbers, one for each output, shaped so that they multiply the weight."""
        return scale.reshape(-1, *[1] * (self.weight.ndim - 1))

    def _by_channel(self, scale: Tensor, output: Tensor) -> Tensor:
        """Numbers of shape [outputs] or [examples, outputs], shaped so that they multiply the output."""
        shape = [1] * output.ndim
        shape[self.channel_dim] = scale.shape[-1]
        if scale.ndim == 2:
            shape[0] = scale.shape[0]
        return scale.reshape(shape)


class SelfTuningLinear(_Affine, nn.Linear):
    """`nn.Linear`; inputs of shape [examples, ..., features]."""

    channel_dim = -1

    def product(self, x: Tensor, weight: Tensor, *further: Any) -> Tensor:
        return F.linear(x, weight)


class SelfTuningBilinear(_Affine, nn.Bilinear):
    """`nn.Bilinear`; both inputs of shape [examples, ..., features]."""

    channel_dim = -1

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        self.check_examples(input2)
        return super().forward(input1, input2)

    def product(self, x: Tensor, weight: Tensor, *further: Any) -> Tensor:
        (other,) = further
        return F.bilinear(x, primal(other) if self.perturbation.linearised else other, weight)


class _InputsFirst(_Affine):
    """The `Conv1D` of Hugging Face's transformers: `x W + b` with W of shape [features, outputs]."""

    channel_dim = -1
    output_dim = 1

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def product(self, x: Tensor, weight: Tensor, *further: Any) -> Tensor:
        return x @ weight

    def _by_row(self, scale: Tensor) -> Tensor:
        return scale


class _Convolution(_Affine):
    channel_dim = 1
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def product(self, x: Tensor, weight: Tensor, *further: Any) -> Tensor:
        return self._conv_forward(x, weight, None)


class SelfTuningConv1d(_Convolution, nn.Conv1d):
    """`nn.Conv1d` on batches."""


class SelfTuningConv2d(_Convolution, nn.Conv2d):
    """`nn.Conv2d` on batches."""


class SelfTuningConv3d(_Convolution, nn.Conv3d):
    """`nn.Conv3d` on batches."""


class _TransposedConvolution(_Affine):
    channel_dim = 1
    output_dim = 1
    convolve: Callable[..., Tensor]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(input, output_size)

    @property
    def outputs(self) -> int:
        return cast(int, self.out_channels)

    def product(self, x: Tensor, weight: Tensor, output_size: list[int] | None = None, *further: Any) -> Tensor:
        dims = self.weight.ndim - 2
        padding = self._output_padding(  # type: ignore[operator]
            x, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        return type(self).convolve(x, weight, None, self.stride, self.padding, padding, self.groups, self.dilation)

    def _by_row(self, scale: Tensor) -> Tensor:
        inputs, outputs_of_a_group, *kernel = self.weight.shape
        groups = cast(int, self.groups)
        by_group = scale.reshape(groups, 1, outputs_of_a_group).expand(-1, inputs // groups, -1)
        return by_group.reshape(inputs, outputs_of_a_group, *[1] * len(kernel))


class SelfTuningConvTranspose1d(_TransposedConvolution, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` on batches."""

    convolve = staticmethod(F.conv_transpose1d)


class SelfTuningConvTranspose2d(_TransposedConvolution, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` on batches."""

    convolve = staticmethod(F.conv_transpose2d)


class SelfTuningConvTranspose3d(_TransposedConvolution, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` on batches."""

    convolve = staticmethod(F.conv_transpose3d)


class SelfTuningEmbedding(SelfTuningLayer, nn.Embedding):
    """`nn.Embedding` of indices of shape [examples, ...]; the rows respond, so that a tied output layer's rows do.

    Not with `max_norm`, which changes the weight in place, nor with gradients of its own.
    """

    response: Response

    @classmethod
    def applies_to(cls, layer: nn.Module) -> bool:
        return super().applies_to(layer) and layer.max_norm is None and not (layer.scale_grad_by_freq or layer.sparse)

    def make_response(self, hyperparameters: int) -> Response:
        return Response(self.weight, None, self.num_embeddings, hyperparameters)

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        seen = self.perturbation
        if seen.inputs is None:
            return output
        self.check_examples(input)
        inputs = seen.inputs
        if inputs.ndim == 2:
            inputs = inputs.reshape(len(inputs), *[1] * (input.ndim - 1), -1)
        scale = (F.embedding(input, self.response.weight_scale, self.padding_idx) * inputs).sum(-1, keepdim=True)
        change = scale * F.embedding(input, self.response.weight, self.padding_idx)
        return with_response(output, change, seen.linearised)

    def parameters_at(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"weight": self.weight + (self.response.weight_scale @ inputs)[:, None] * self.response.weight}


class SelfTuningPReLU(SelfTuningLayer, nn.PReLU):
    """`nn.PReLU`; inputs of shape [examples, channels, ...], or [examples, ...] where it has one slope."""

    response: Response

    def make_response(self, hyperparameters: int) -> Response:
        return Response(self.weight, None, self.num_parameters, hyperparameters)

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        seen = self.perturbation
        if seen.inputs is None:
            return output
        self.check_examples(input)
        slopes = (seen.inputs @ self.response.weight_scale.T) * self.response.weight
        examples = slopes.shape[:-1] or (1,)
        by_channel = slopes.reshape(*examples, slopes.shape[-1], *[1] * (input.ndim - 2))
        change = (by_channel if input.ndim > 1 else slopes[..., 0]) * (primal(input) if seen.linearised else input)
        return with_response(output, torch.where(input < 0, change, 0.0), seen.linearised)

    def parameters_at(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"weight": self.weight + (self.response.weight_scale @ inputs) * self.response.weight}


class _Normalisation(SelfTuningLayer):
    """Base of the normalisations with an affine part, which is what responds."""

    response: Response
    weight: Any
    bias: Any

    def normalise(self, x: Tensor) -> Tensor:
        """The layer's output without its affine part."""
        raise NotImplementedError

    def by_channel(self, parameter: Tensor, output: Tensor) -> Tensor:
        """Numbers of the weight's shape, behind [examples] or not, shaped so that they multiply the output."""
        raise NotImplementedError

    def make_response(self, hyperparameters: int) -> Response:
        ones = torch.ones_like(self.weight).flatten()
        return Response(ones, None if self.bias is None else ones, len(ones), hyperparameters)

    def forward(self, input: Tensor) -> Tensor:
        seen = self.perturbation
        if seen.inputs is None:
            return cast(Tensor, super().forward(input))
        self.check_examples(input)
        normalised = self.normalise(input)
        output = normalised * self.by_channel(self.weight, normalised)
        if self.bias is not None:
            output = output + self.by_channel(self.bias, normalised)
        weight, bias = self._changes(seen.inputs)
        change = (primal(normalised) if seen.linearised else normalised) * self.by_channel(weight, normalised)
        if bias is not None:
            change = change + self.by_channel(bias, normalised)
        # under autocast, products with parameters in single precision are single
        return with_response(output.to(normalised.dtype), change, seen.linearised)

    def parameters_at(self, inputs: Tensor) -> dict[str, Tensor]:
        weight, bias = self._changes(inputs)
        found = {"weight": self.weight + weight}
        return found if bias is None or self.bias is None else {**found, "bias": self.bias + bias}

    def _changes(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        response, shape = self.response, (*inputs.shape[:-1], *self.weight.shape)
        weight = ((inputs @ response.weight_scale.T) * response.weight).reshape(shape)
        if response.bias is None or response.bias_scale is None:
            return weight, None
        return weight, ((inputs @ response.bias_scale.T) * response.bias).reshape(shape)


class _ChannelNormalisation(_Normalisation):
    def by_channel(self, parameter: Tensor, output: Tensor) -> Tensor:
        leading = parameter.shape if parameter.ndim == 2 else (1, *parameter.shape)
        return parameter.reshape(*leading, *[1] * (output.ndim - 2))


class _BatchNorm(_ChannelNormalisation):
    """Base of the batch normalisations. Running statistics follow the batches of unperturbed and of jointly perturbed
    steps, not of linearised ones."""

    def normalise(self, x: Tensor) -> Tensor:
        layer = cast(nn.BatchNorm1d, self)
        layer._check_input_dim(x)
        by_batch = layer.training or layer.running_mean is None
        if self.perturbation.linearised or not layer.training:
            stored = (None, None) if by_batch else (layer.running_mean, layer.running_var)
            return F.batch_norm(x, *stored, training=by_batch, eps=layer.eps)
        momentum = 0.0 if layer.momentum is None else layer.momentum
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            if layer.momentum is None:  # a cumulative average
                momentum = 1.0 / float(layer.num_batches_tracked)
        return F.batch_norm(x, layer.running_mean, layer.running_var, training=True, momentum=momentum, eps=layer.eps)


class SelfTuningBatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with an affine part."""


class SelfTuningBatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with an affine part."""


class SelfTuningBatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` with an affine part."""


class _InstanceNorm(_ChannelNormalisation):
    """Base of the instance normalisations of batches; running statistics follow steps as those of `_BatchNorm` do."""

    def normalise(self, x: Tensor) -> Tensor:
        layer = cast(nn.InstanceNorm1d, self)
        layer._check_input_dim(x)
        if x.ndim == layer._get_no_batch_dim():
            raise InputError(
                f"{type(self).__name__} takes a batch: give an input of shape {tuple(x.shape)} a first dimension"
            )
        by_instance = layer.training or not layer.track_running_stats
        stored = layer.running_mean, layer.running_var
        if by_instance and self.perturbation.linearised:
            stored = None, None
        momentum = 0.0 if layer.momentum is None else layer.momentum
        return F.instance_norm(x, *stored, use_input_stats=by_instance, momentum=momentum, eps=layer.eps)


class SelfTuningInstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`nn.InstanceNorm1d` with an affine part."""


class SelfTuningInstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`nn.InstanceNorm2d` with an affine part."""


class SelfTuningInstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`nn.InstanceNorm3d` with an affine part."""


class SelfTuningGroupNorm(_ChannelNormalisation, nn.GroupNorm):
    """`nn.GroupNorm` with an affine part."""

    def normalise(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, eps=self.eps)


class _TrailingNormalisation(_Normalisation):
    """Base of the normalisations over trailing dimensions, of inputs of shape [examples, ..., *normalized_shape]."""

    def by_channel(self, parameter: Tensor, output: Tensor) -> Tensor:
        if parameter.shape == self.weight.shape:
            return parameter
        between = output.ndim - parameter.ndim
        return parameter.reshape(parameter.shape[0], *[1] * between, *self.weight.shape)


class SelfTuningLayerNorm(_TrailingNormalisation, nn.LayerNorm):
    """`nn.LayerNorm` with an affine part."""

    def normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, eps=self.eps)


class SelfTuningRMSNorm(_TrailingNormalisation, nn.RMSNorm):
    """`nn.RMSNorm` with its weight."""

    bias = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def normalise(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, eps=self.eps)


Rule = TypeVar("Rule", bound=type[SelfTuningLayer])

RULES: dict[type[nn.Module], type[SelfTuningLayer]] = {
    nn.Linear: SelfTuningLinear,
    nn.Bilinear: SelfTuningBilinear,
    nn.Conv1d: SelfTuningConv1d,
    nn.Conv2d: SelfTuningConv2d,
    nn.Conv3d: SelfTuningConv3d,
    nn.ConvTranspose1d: SelfTuningConvTranspose1d,
    nn.ConvTranspose2d: SelfTuningConvTranspose2d,
    nn.ConvTranspose3d: SelfTuningConvTranspose3d,
    nn.Embedding: SelfTuningEmbedding,
    nn.BatchNorm1d: SelfTuningBatchNorm1d,
    nn.BatchNorm2d: SelfTuningBatchNorm2d,
    nn.BatchNorm3d: SelfTuningBatchNorm3d,
    nn.InstanceNorm1d: SelfTuningInstanceNorm1d,
    nn.InstanceNorm2d: SelfTuningInstanceNorm2d,
    nn.InstanceNorm3d: SelfTuningInstanceNorm3d,
    nn.GroupNorm: SelfTuningGroupNorm,
    nn.LayerNorm: SelfTuningLayerNorm,
    nn.RMSNorm: SelfTuningRMSNorm,
    nn.PReLU: SelfTuningPReLU,
}
"""Which class a layer becomes, by its own class."""

_OF_OTHER_PACKAGES = {"transformers.pytorch_utils.Conv1D": _InputsFirst}
"""Mixins of layers of other packages, by the full name of a class that is not imported here."""


def rule_of(kind: type[nn.Module]) -> type[SelfTuningLayer] | None:
    """The class that a layer of exactly this class becomes; None: it does not respond.

    A program's own subclass of a class with a rule has the rule, unless it has a forward of its own. Those of torch
    have not: their weights are used by others' forward, or made by parametrizations.
    """
    if kind in RULES:
        return RULES[kind]
    of_name = _OF_OTHER_PACKAGES.get(f"{kind.__module__}.{kind.__qualname__}")
    if of_name is not None:
        return _derived(of_name, kind)
    if kind.__module__.split(".")[0] == "torch":
        return None
    base = next((each for each in kind.__mro__ if each in RULES), None)
    if base is None or kind.forward is not base.forward:
        return None
    return _derived(RULES[base], kind)


_DERIVED: dict[tuple[Any, Any], type[SelfTuningLayer]] = {}


def _derived(rule: type[SelfTuningLayer], kind: type[nn.Module]) -> type[SelfTuningLayer]:
    """The rule's class with another class of layers as a base."""
    if (rule, kind) not in _DERIVED:
        made = type(f"SelfTuning{kind.__name__}", (rule, kind), {"__doc__": f"`{kind.__name__}`, responding."})
        _DERIVED[rule, kind] = made
    return _DERIVED[rule, kind]


def register(layer: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Decorator: layers of the class `layer`, and of subclasses with its forward, become the decorated class, its
    subclass."""

    def add(rule: Rule) -> Rule:
        RULES[layer] = rule
        return rule

    return add
