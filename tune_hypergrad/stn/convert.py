"""Any `nn.Module` as a network whose weights respond to hyperparameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from tune_hypergrad.errors import InputError
from tune_hypergrad.stn import attention, recurrent  # noqa: F401 (they register their rules)
from tune_hypergrad.stn.layers import RULES, SelfTuningLayer
from tune_hypergrad.stn.response import Perturbation, Response

_RESPONSE = "response"


class SelfTuningNetwork(nn.Module):
    """A model with responding layers; called like the model, which it is as long as `perturbation` is not set."""

    def __init__(self, model: nn.Module, perturbation: Perturbation, without_rule: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.perturbation = perturbation
        """What the layers see of the hyperparameters."""
        self.without_rule = without_rule
        """Names of the modules whose own parameters do not respond."""

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
        names = {own: response for own, response in self._responses() if own in factors}
        changed = {name: parameters[name] * factor for name, factor in factors.items()}
        changed |= {response: parameters[response] * factors[own] for own, response in names.items()}
        return functional_call(self.model, changed, tuple(inputs))

    def _responses(self) -> Iterator[tuple[str, str]]:
        """Names of weights and of the parameters with which they respond."""
        for prefix, layer in self.model.named_modules():
            if isinstance(layer, SelfTuningLayer):
                path = f"{prefix}." if prefix else ""
                yield from ((path + own, path + response) for own, response in layer.response_weights.items())

    def general_parameters(self) -> dict[str, nn.Parameter]:
        """The plain model's trainable parameters, by its names."""
        return {name: p for name, p in self.model.named_parameters() if not _is_of_response(name) and p.requires_grad}

    def response_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the responses."""
        return {name: p for name, p in self.model.named_parameters() if _is_of_response(name)}

    def parameters_at(self, inputs: Tensor) -> dict[str, Tensor]:
        """The plain model's trainable parameters at one setting of the hyperparameters, differentiable.

        Args:
            inputs: what responses are linear in, shape [n].
        """
        found: dict[str, Tensor] = dict(self.general_parameters())
        for prefix, layer in self.model.named_modules():
            if isinstance(layer, SelfTuningLayer):
                for name, value in layer.parameters_at(inputs).items():
                    path = f"{prefix}.{name}" if prefix else name
                    if path in found:
                        found[path] = value
        return found

    def general_state_dict(self, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """A state dict for the unconverted model.

        Args:
            inputs: the setting of the hyperparameters, shape [n]; None are the general weights alone.
        """
        state = {name: value for name, value in self.model.state_dict().items() if not _is_of_response(name)}
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

    Layers that `RULES` knows respond, unless a parameter of theirs is frozen (`requires_grad=False`); weights that are
    shared keep being shared, and so do their responses. Their names, attributes and the model's `forward` stay as they
    are.

    Args:
        model: any module.
        hyperparameters: how many numbers the weights respond to.

    Raises:
        InputError: no layer responds.
    """
    model = copy.deepcopy(model)
    perturbation = Perturbation()
    shared: dict[int, Response] = {}
    without_rule: list[str] = []
    within: set[nn.Module] = set()
    for name, layer in list(model.named_modules()):
        rule = RULES.get(type(layer))
        if layer in within:
            continue
        trainable = [p.requires_grad for p in layer.parameters(recurse=False)]
        if rule is None or not rule.applies_to(layer) or not all(trainable):
            if any(trainable):
                without_rule.append(name or type(layer).__name__)
            continue
        layer.__class__ = rule
        assert isinstance(layer, SelfTuningLayer)
        within.update(layer.get_submodule(child) for child in layer.children_within)
        layer.begin_responding(layer.make_response(hyperparameters), perturbation)
        _share_responses(layer, shared)
    if not shared:
        raise InputError(
            "the model has no layer whose weights can respond: use one of "
            f"{', '.join(rule.__name__ for rule in RULES)}, or register a rule of your own"
        )
    return SelfTuningNetwork(model, perturbation, tuple(without_rule))


def _share_responses(layer: SelfTuningLayer, shared: dict[int, Response]) -> None:
    """Weights that are shared respond with the response of the first layer that has them.

    Args:
        layer: the layer whose responses to replace.
        shared: the first response of each weight, by the weight's identity; added to.
    """
    for own, path in layer.response_weights.items():
        response = layer.get_submodule(path.rpartition(".")[0])
        assert isinstance(response, Response)
        first = shared.setdefault(id(layer.get_parameter(own)), response)
        if first.weight_scale.shape == response.weight_scale.shape:
            response.weight, response.weight_scale = first.weight, first.weight_scale


def _is_of_response(name: str) -> bool:
    return _RESPONSE in name.split(".")
