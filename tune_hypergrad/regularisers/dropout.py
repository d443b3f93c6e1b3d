"""Dropout whose rate is a hyperparameter: of elements, channels, whole sequences, words, and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tune_hypergrad.errors import InputError
from tune_hypergrad.regularisers.base import (
    Context,
    Regulariser,
    Strength,
    Values,
    as_factor,
    first_output,
    matching,
    require_time,
    trainable,
)


class _AtRate(Regulariser):
    """Base of the regularisers by dropout: one hyperparameter, the share of something that becomes zero."""

    rate: str

    @property
    def hyperparameters(self) -> dict[str, Strength]:
        return {self.rate: Strength(neutral=0.0, lower=0.0, upper=1.0, usual=(0.0, 0.95))}


@dataclass(frozen=True)
class Dropout(_AtRate):
    """The rate of a model's plain dropout modules: `nn.Dropout`, `nn.Dropout1d`, `nn.Dropout2d`, `nn.Dropout3d`.

    Without a value for it, the modules keep the rate that they were made with. Of several regularisers that could have
    a module, the first one has it: put patterns for a few modules before the pattern for the rest.

    Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014; channels:
    Tompson et al., "Efficient Object Localization Using Convolutional Networks", 2015.
    """

    rate: str = "dropout"
    """Name of the hyperparameter: the share of elements or channels that become zero, below 1."""
    modules: str = "*"
    """Dropout modules that the rate is of: their names, or a pattern such as "features.*"."""

    def attach(self, model: nn.Module, context: Context) -> None:
        plain = {name: layer for name, layer in model.named_modules() if type(layer) in DROPOUTS}
        for name in matching(list(plain), self.modules, "plain dropout module"):
            _tune(plain[name], self.rate, context)


@dataclass(frozen=True)
class VariationalDropout(_AtRate):
    """Dropout with one mask for all time steps of a sequence, at a module's output of shape [examples, time, ...].

    Source: Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", 2016.
    """

    rate: str = "dropout"
    """Modules whose outputs are dropped: their names, or a pattern; plain dropout modules among them act no more by
    themselves."""
    modules: str = "*dropout"
    """At which modules' outputs: their names, or a pattern; plain dropout modules act no more by themselves."""

    def attach(self, model: nn.Module, context: Context) -> None:
        layers = {name: layer for name, layer in model.named_modules() if name and not isinstance(layer, TunedDropout)}
        for name in matching(list(layers), self.modules, "module"):
            if type(layers[name]) in DROPOUTS:
                _tune(layers[name], self.rate, context, _one_for_all_times)
            else:
                layers[name].register_forward_hook(_DropOutput(self.rate, context))


@dataclass(frozen=True)
class EmbeddingDropout(_AtRate):
    """Whole words of an example's vocabulary become zero vectors, and the others are scaled up.

    Source: Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", 2016.
    """

    rate: str = "embedding_dropout"
    """Name of the hyperparameter: the share of words that become zero vectors, below 1."""
    modules: str = "*"
    """`nn.Embedding` modules whose words are dropped: their names, or a pattern."""

    def attach(self, model: nn.Module, context: Context) -> None:
        embeddings = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Embedding)}
        for name in matching(list(embeddings), self.modules, "embedding"):
            embeddings[name].register_forward_hook(_DropWords(self.rate, context))


@dataclass(frozen=True)
class DropConnect(_AtRate):
    """Elements of weights become zero, with one mask for a minibatch and all time steps; the others are scaled up.

    Source: Wan et al., "Regularization of Neural Networks using DropConnect", 2013; on recurrent weights: Merity et
    al., "Regularizing and Optimizing LSTM Language Models", 2018.
    """

    per_example: ClassVar[bool] = False

    rate: str = "weight_drop"
    """Name of the hyperparameter: the share of elements that become zero, below 1."""
    parameters: str = "*weight_hh*"
    """Parameters whose elements are dropped: their names, or a pattern; by default the recurrent weights."""

    def attach(self, model: nn.Module, context: Context) -> None:
        matching(trainable(model), self.parameters, "trainable parameter")

    def weight_factors(self, parameters: Mapping[str, Tensor], values: Values) -> dict[str, Tensor]:
        names = matching(list(parameters), self.parameters, "trainable parameter")
        return {name: _mask(values[self.rate], parameters[name], parameters[name].shape) for name in names}


class TunedDropout(nn.Module):
    """Mixin that a plain dropout module gets: its rate is the one that a context gives, else the module's own."""

    hyperparameter: str
    """Name of the hyperparameter that is the module's rate."""
    context: Context
    """Where the rate in force is found, of shape [] or [examples]."""
    mask_shape: Callable[[Tensor], Sequence[int]]
    """Shape of the mask for some inputs: ones stand for dimensions over which it is the same."""

    def forward(self, input: Tensor) -> Tensor:
        """Dropout of inputs of shape [examples, ...] at the rate in force; in evaluation mode, the inputs as they
        are."""
        rate = self.context.values.get(self.hyperparameter) if self.training else None
        if rate is None:
            return cast(Tensor, super().forward(input))
        return input * _mask(rate, input, self.mask_shape(input))


class _TunedDropout(TunedDropout, nn.Dropout):
    pass


class _TunedDropout1d(TunedDropout, nn.Dropout1d):
    pass


class _TunedDropout2d(TunedDropout, nn.Dropout2d):
    pass


class _TunedDropout3d(TunedDropout, nn.Dropout3d):
    pass


def _one_for_each_element(x: Tensor) -> Sequence[int]:
    return x.shape


def _one_for_each_channel(x: Tensor) -> Sequence[int]:
    return [*x.shape[:2], *[1] * (x.ndim - 2)]


def _one_for_all_times(x: Tensor) -> Sequence[int]:
    require_time(x, VariationalDropout.__name__)
    return [len(x), 1, *x.shape[2:]]


DROPOUTS: dict[type[nn.Module], tuple[type[TunedDropout], Callable[[Tensor], Sequence[int]]]] = {
    nn.Dropout: (_TunedDropout, _one_for_each_element),
    nn.Dropout1d: (_TunedDropout1d, _one_for_each_channel),
    nn.Dropout2d: (_TunedDropout2d, _one_for_each_channel),
    nn.Dropout3d: (_TunedDropout3d, _one_for_each_channel),
}
"""Plain dropout modules by class, with what they become and the shapes of their masks."""


def _tune(
    layer: nn.Module,
    hyperparameter: str,
    context: Context,
    mask_shape: Callable[[Tensor], Sequence[int]] | None = None,
) -> None:
    """Change a plain dropout module in place: whoever holds it, and its hooks, go on as before."""
    kind, own_mask_shape = DROPOUTS[type(layer)]
    layer.__class__ = kind
    assert isinstance(layer, TunedDropout)
    layer.hyperparameter, layer.context, layer.mask_shape = hyperparameter, context, mask_shape or own_mask_shape


class _DropOutput:
    """Forward hook: dropout of a module's output, with one mask for all time steps."""

    def __init__(self, hyperparameter: str, context: Context) -> None:
        self.hyperparameter, self.context = hyperparameter, context

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        rate = self.context.values.get(self.hyperparameter) if module.training else None
        if rate is None:
            return None
        sequence = first_output(output)
        dropped = sequence * _mask(rate, sequence, _one_for_all_times(sequence))
        return dropped if isinstance(output, Tensor) else (dropped, *output[1:])


class _DropWords:
    """Forward hook of an embedding: dropout of words, where in each example all occurrences of a word share their
    fate."""

    def __init__(self, hyperparameter: str, context: Context) -> None:
        self.hyperparameter, self.context = hyperparameter, context

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        rate = self.context.values.get(self.hyperparameter) if module.training else None
        if rate is None:
            return None
        words = cast(Tensor, inputs[0])
        vocabulary = _mask(rate, output, [len(words), cast(nn.Embedding, module).num_embeddings])
        # of one row of words for all examples, each example drops its own
        fates = vocabulary.gather(1, words.reshape(len(words), -1).expand(len(vocabulary), -1))
        return output * fates.reshape(len(vocabulary), *words.shape[1:], 1)


def _mask(rate: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask for dropout at a rate of shape [] or [examples]: zeros, else 1 / (1 - rate), in `like`'s dtype.

    Where the shape has one entry for all examples, and they have a rate each, the mask has one for each of them.
    """
    if rate.ndim and shape[0] not in (1, len(rate)):
        raise InputError(
            f"dropout has rates for {len(rate)} examples, but acts on a tensor of shape {tuple(like.shape)}, which has "
            f"{shape[0]} along dimension 0: let examples stay there (positions as arange(t).expand(b, t)), choose "
            "other modules, or name the rate in per_minibatch"
        )
    if rate.ndim:
        shape = [len(rate), *shape[1:]]
    # half precision is too coarse for small rates
    dtype = torch.promote_types(rate.dtype, torch.float32)
    draws = torch.rand(tuple(shape), dtype=dtype, device=like.device)
    keep = 1 - as_factor(rate.detach(), draws)
    # a rate of 1 keeps nothing, and must not give 0 / 0
    return ((draws < keep) / keep.clamp(min=torch.finfo(dtype).tiny)).to(like.dtype)
