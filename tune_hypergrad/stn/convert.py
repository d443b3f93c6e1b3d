"""Any `nn.Module` as a network whose weights respond to hyperparameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tune_hypergrad.errors import InputError
from tune_hypergrad.stn import attention, recurrent  # noqa: F401 (they register their rules)
from tune_hypergrad.stn.layers import RULES, SelfTuningLayer
from tune_hypergrad.stn.response import Perturbation


class SelfTuningNetwork(nn.Module):
    """A model with responding layers; called like the model, which it is as long as `perturbation` is not set."""

    def __init__(self, model: nn.Module, perturbation: Perturbation, without_rule: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.perturbation = perturbation
        """What the layers see of the hyperparameters."""
        self.without_rule = without_rule
        """Names of the modules whose own parameters do not respond."""
        self._of_responses = {
            f"{path}response.{name}"
            for path, layer in self._layers(remove_duplicate=False)
            for name in layer.response.state_dict()
        }

    @property
    def dtype(self) -> torch.dtype:
        """The responses' type, which their inputs need."""
        return next(p.dtype for name, p in self.model.named_parameters() if name in self._of_responses)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The model's output."""
        output: Tensor = self.model(*inputs)
        return output

    def call(self, inputs: Sequence[Any], factors: Mapping[str, Tensor]) -> Any:
        """The model's output with some weights, and their responses, multiplied by factors of their shapes.

        Args:
            inputs: the model's positional arguments.
            factors: by the plain model's names.
        """
        if not factors:
            return self.model(*inputs)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        changed = {name: parameters[name] * factor for name, factor in factors.items()}
        for own, responses in self._responses():
            if own in factors:
                for response, factor in zip(responses, factors[own].chunk(len(responses)), strict=True):
                    changed[response] = parameters[response] * factor.reshape(parameters[response].shape)
        return functional_call(self.model, changed, tuple(inputs))

    def _responses(self) -> Iterator[tuple[str, list[str]]]:
        """Names of parameters and of those with which they respond."""
        for path, layer in self._layers():
            yield from ((path + own, [path + name for name in names]) for own, names in layer.responses.items())

    def _layers(self, remove_duplicate: bool = True) -> Iterator[tuple[str, SelfTuningLayer]]:
        """What the names of each responding layer's parameters begin with, and the layer."""
        for name, layer in self.model.named_modules(remove_duplicate=remove_duplicate):
            if isinstance(layer, SelfTuningLayer):
                yield f"{name}." if name else "", layer

    def general_parameters(self) -> dict[str, nn.Parameter]:
        """The plain model's trainable parameters, by its names."""
        named = self.model.named_parameters()
        return {name: p for name, p in named if p.requires_grad and name not in self._of_responses}

    def response_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the responses."""
        return {name: p for name, p in self.model.named_parameters() if name in self._of_responses}

    def parameters_at(self, inputs: Tensor) -> dict[str, Tensor]:
        """The plain model's trainable parameters at one setting of the hyperparameters, differentiable.

        Args:
            inputs: what responses are linear in, shape [n].
        """
        found: dict[str, Tensor] = dict(self.general_parameters())
        for path, layer in self._layers():
            for name, value in layer.parameters_at(inputs).items():
                if path + name in found:
                    found[path + name] = value
        return found

    def general_state_dict(self, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """A state dict for the unconverted model.

        Args:
            inputs: the setting of the hyperparameters, shape [n]; None are the general weights alone.
        """
        state = {name: value for name, value in self.model.state_dict().items() if name not in self._of_responses}
        if inputs is None:
            return state
        at = {name: value.detach() for name, value in self.parameters_at(inputs).items()}
        tied = {id(p): name for name, p in self.general_parameters().items()}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if name in state and id(p) in tied:
                state[name] = at[tied[id(p)]]
        return state


def self_tuning(model: nn.Module, hyperparameters: int) -> SelfTuningNetwork:
    """Convert a copy of a model.

    Layers that `RULES` knows respond, unless a parameter of theirs is frozen (`requires_grad=False`); parameters that
    are shared keep being shared, and so do their responses. Their names, attributes and the model's `forward` stay as
    they are.

    Args:
        model: any module.
        hyperparameters: how many numbers the weights respond to.

    Raises:
        InputError: no layer responds, or layers that share a parameter cannot share its response.
    """
    model = copy.deepcopy(model)
    perturbation = Perturbation()
    shared: dict[tuple[int, int], _Shared] = {}
    without_rule: dict[str, nn.Module] = {}
    within: set[nn.Module] = set()
    for name, layer in list(model.named_modules()):
        name = name or type(layer).__name__
        if layer in within:
            continue
        rule = _rule(layer)
        if rule is None:
            if any(p.requires_grad for p in layer.parameters(recurse=False)):
                without_rule[name] = layer
            continue
        layer.__class__ = rule
        assert isinstance(layer, SelfTuningLayer)
        within.update(layer.get_submodule(child) for child in layer.children_within)
        layer.begin_responding(layer.make_response(hyperparameters), perturbation)
        _share_responses(name, layer, shared)
    if not shared:
        raise InputError(
            "the model has no layer whose weights can respond: use one of "
            f"{', '.join(rule.__name__ for rule in RULES)}, or register a rule of your own"
        )
    _refuse_half_responding(without_rule, shared)
    return SelfTuningNetwork(model, perturbation, tuple(without_rule))


class _Shared(NamedTuple):
    """The response of a parameter in the first layer that has it."""

    layer: str
    output_dim: int
    weight: nn.Parameter
    scale: nn.Parameter


def _rule(layer: nn.Module) -> type[SelfTuningLayer] | None:
    """What a layer becomes: None if there is no rule for it, or a parameter that would respond is frozen."""
    rule = RULES.get(type(layer))
    if rule is None or not rule.applies_to(layer):
        return None
    parts = [layer, *(layer.get_submodule(child) for child in rule.children_within)]
    return rule if all(p.requires_grad for part in parts for p in part.parameters(recurse=False)) else None


def _share_responses(name: str, layer: SelfTuningLayer, shared: dict[tuple[int, int], _Shared]) -> None:
    """Parameters that are shared respond with the response of the first layer that has them.

    Args:
        name: the layer's.
        layer: whose responses to replace.
        shared: the first response of each part of a parameter, by the parameter's identity; added to.
    """
    for own, paths in layer.responses.items():
        parameter = layer.get_parameter(own)
        dim = layer.output_dim if parameter.ndim > 1 else 0
        for part, path in enumerate(paths):
            module, _, attribute = path.rpartition(".")
            response, attributes = layer.get_submodule(module), (attribute, f"{attribute}_scale")
            mine = _Shared(name, dim, *(response.get_parameter(each) for each in attributes))
            first = shared.setdefault((id(parameter), part), mine)
            if (first.output_dim, first.scale.shape) != (dim, mine.scale.shape):
                raise InputError(
                    f"{first.layer!r} and {name!r} share {own!r}, but its outputs in one are not its outputs in the "
                    "other, so that they cannot respond alike: give each a parameter of its own, or freeze it"
                )
            for each, value in zip(attributes, first[2:], strict=True):
                setattr(response, each, value)


def _refuse_half_responding(without_rule: Mapping[str, nn.Module], shared: Mapping[tuple[int, int], _Shared]) -> None:
    for name, layer in without_rule.items():
        for own, parameter in layer.named_parameters(recurse=False):
            first = shared.get((id(parameter), 0))
            if first is not None:
                raise InputError(
                    f"{first.layer!r} and {name!r} share {own!r}, which responds in the first only: give each a "
                    f"parameter of its own, or register a rule for {type(layer).__name__}"
                )
