"""Any `nn.Module` as a network whose weights respond to hyperparameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.stn.dropout import DROPOUTS, TunedDropout
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


def self_tuning(
    model: nn.Module, hyperparameters: int, *, dropouts: Mapping[str, str] | None = None
) -> SelfTuningNetwork:
    """Convert a copy of a model.

    Layers that `RULES` knows respond; weights that are shared keep being shared, and so do their responses. Their
    names, attributes and the model's `forward` stay as they are.

    Args:
        model: any module.
        hyperparameters: how many numbers the weights respond to.
        dropouts: name of a dropout module to the hyperparameter that is its rate; "*" stands for all of them.

    Raises:
        InputError: no layer responds, or `dropouts` names what is no dropout.
    """
    model = copy.deepcopy(model)
    perturbation = Perturbation()
    shared: dict[int, Response] = {}
    without_rule = []
    for name, layer in list(model.named_modules()):
        rule = RULES.get(type(layer))
        own = dict(layer.named_parameters(recurse=False))
        if rule is None or "weight" not in own:
            if own:
                without_rule.append(name or type(layer).__name__)
            continue
        weight = layer.weight
        layer.__class__ = rule
        assert isinstance(layer, SelfTuningLayer)
        response = layer.make_response(hyperparameters)
        if id(weight) in shared and shared[id(weight)].weight_scale.shape == response.weight_scale.shape:
            response.weight, response.weight_scale = shared[id(weight)].weight, shared[id(weight)].weight_scale
        shared.setdefault(id(weight), response)
        layer.begin_responding(response, perturbation)
    if not shared:
        raise InputError(
            "the model has no layer whose weights can respond: use one of "
            f"{', '.join(rule.__name__ for rule in RULES)}, or register a rule of your own"
        )
    _tune_dropouts(model, dropouts or {}, perturbation)
    return SelfTuningNetwork(model, perturbation, tuple(without_rule))


def _tune_dropouts(model: nn.Module, dropouts: Mapping[str, str], perturbation: Perturbation) -> None:
    plain = {name: layer for name, layer in model.named_modules() if type(layer) in DROPOUTS}
    for name in dropouts:
        if name != "*" and name not in plain:
            raise InputError(
                f"dropouts has {name!r}, which is no dropout module of the model: {', '.join(plain) or 'it has none'}"
                f"{did_you_mean(name, plain)}"
            )
    for name, layer in plain.items():
        hyperparameter = dropouts.get(name, dropouts.get("*"))
        if hyperparameter is not None:
            model.set_submodule(name, TunedDropout(hyperparameter, perturbation, DROPOUTS[type(layer)]))


def _is_of_response(name: str) -> bool:
    return _RESPONSE in name.split(".")
