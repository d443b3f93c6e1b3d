"""Any `nn.Module` as a network whose weights respond to hyperparameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.stn import attention, recurrent  # noqa: F401 (they register their rules)
from tune_hypergrad.stn.layers import RULES, SelfTuningLayer, rule_of
from tune_hypergrad.stn.response import Perturbation


class SelfTuningNetwork(nn.Module):
    """A model with responding layers; called like the model, which it is as long as `perturbation` is not set."""

    def __init__(self, model: nn.Module, perturbation: Perturbation, without_rule: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.perturbation = perturbation
        """What the network's layers see of the hyperparameters at present."""
        self.without_rule = without_rule
        """Names of the modules whose own parameters do not respond."""
        self._always_evaluating = tuple(m for m in model.modules() if model.training and not m.training)
        self._of_responses = {
            f"{path}response.{name}"
            for path, layer in self._layers(remove_duplicate=False)
            for name in layer.response.state_dict()
        }

    @property
    def dtype(self) -> torch.dtype:
        """The type of the responses' parameters, which the inputs of responses need."""
        return next(p.dtype for name, p in self.model.named_parameters() if name in self._of_responses)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The model's output."""
        output: Tensor = self.model(*inputs)
        return output

    def train(self, mode: bool = True) -> SelfTuningNetwork:
        """Set the model's mode; modules that were in evaluation mode while the model was in training mode stay there.

        Args:
            mode: training, or evaluation.
        """
        super().train(mode)
        for module in self._always_evaluating:
            module.training = False
        return self

    def call(self, predict: Callable[[nn.Module], Any], factors: Mapping[str, Tensor]) -> Any:
        """The model's output with some weights, and their responses, multiplied by factors of the weights' shapes.

        Args:
            predict: gives the output of the model that it is handed.
            factors: by the plain model's names.
        """
        with self.multiplied(factors):
            return predict(self.model)

    @contextmanager
    def multiplied(self, factors: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the body with some weights, and the responses of these, multiplied by factors, as `call` does.

        Taking gradients is such a body: checkpointed parts of a model run again for them.

        Args:
            factors: by the plain model's names.
        """
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        changed = {id(parameters[name]): parameters[name] * factor for name, factor in factors.items()}
        for own, responses in self._responses():
            if own in factors:
                for response, factor in zip(responses, factors[own].chunk(len(responses)), strict=True):
                    whole = parameters[response]
                    changed[id(whole)] = whole * factor.reshape(whole.shape)
        with _replaced(self.model, changed):
            yield

    def _responses(self) -> Iterator[tuple[str, list[str]]]:
        """Names of the parameters that respond, each with the names of the parameters of its response."""
        for path, layer in self._layers():
            yield from ((path + own, [path + name for name in names]) for own, names in layer.responses.items())

    def _layers(self, remove_duplicate: bool = True) -> Iterator[tuple[str, SelfTuningLayer]]:
        """The responding layers, each with what the names of its parameters begin with."""
        for name, layer in self.model.named_modules(remove_duplicate=remove_duplicate):
            if isinstance(layer, SelfTuningLayer):
                yield f"{name}." if name else "", layer

    def general_parameters(self) -> dict[str, nn.Parameter]:
        """The plain model's trainable parameters, by the plain model's names."""
        named = self.model.named_parameters()
        return {name: p for name, p in named if p.requires_grad and name not in self._of_responses}

    def response_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of all responses, by name."""
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


def self_tuning(model: nn.Module, hyperparameters: int, without_response: Collection[str] = ()) -> SelfTuningNetwork:
    """Convert a copy of a model.

    Layers that `RULES` knows respond, unless a parameter of theirs is frozen (`requires_grad=False`); parameters that
    are shared keep being shared, and so do their responses. Their names, attributes and the model's `forward` stay as
    they are. A layer responds in its own forward only: where the model uses its weights elsewhere, as in
    `F.linear(x, layer.weight)`, it has to be named in `without_response`, which `used_elsewhere` finds.

    Args:
        model: any module.
        hyperparameters: how many numbers the weights respond to.
        without_response: names of layers that do not respond, among those of `responding_layers`.

    Raises:
        InputError: no layer responds, a name is unknown, or layers that share a parameter cannot share its response.
    """
    model = copy.deepcopy(model)
    known = responding_layers(model)
    for name in without_response:
        if name not in known:
            raise InputError(f"no layer {name!r} responds: {', '.join(known) or 'none'} can{did_you_mean(name, known)}")
    chosen = {name: parts for name, parts in known.items() if name not in without_response}
    if not chosen:
        raise InputError(_nothing_responds(known))
    responding = {part for parts in chosen.values() for part in parts}
    without_rule = {
        _named(name, module): module
        for name, module in model.named_modules()
        if module not in responding and any(p.requires_grad for p in module.parameters(recurse=False))
    }
    perturbation = Perturbation()
    shared: dict[tuple[int, int], _Shared] = {}
    for name, (layer, *_) in chosen.items():
        rule = rule_of(type(layer))
        assert rule is not None
        layer.__class__ = rule
        assert isinstance(layer, SelfTuningLayer)
        layer.begin_responding(layer.make_response(hyperparameters), perturbation)
        _share_responses(name, layer, shared)
    _refuse_half_responding(without_rule, shared)
    return SelfTuningNetwork(model, perturbation, tuple(without_rule))


def responding_layers(model: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """The layers of a model that can respond, by name: each with those children that respond as part of it."""
    found: dict[str, tuple[nn.Module, ...]] = {}
    within: set[nn.Module] = set()
    for name, layer in model.named_modules():
        rule = rule_of(type(layer))
        if layer in within or rule is None or not rule.applies_to(layer):
            continue
        parts = layer, *(layer.get_submodule(child) for child in rule.children_within)
        if all(p.requires_grad for part in parts for p in part.parameters(recurse=False)):
            found[_named(name, layer)] = parts
            within.update(parts)
    return found


class _Shared(NamedTuple):
    """The response of a parameter in the first layer that has it."""

    layer: str
    output_dim: int
    weight: nn.Parameter
    scale: nn.Parameter


def _named(name: str, module: nn.Module) -> str:
    """The name of a module for messages; the model itself has an empty one."""
    return name or type(module).__name__


def _nothing_responds(known: Collection[str]) -> str:
    if known:
        return (
            f"no layer responds, since the model uses weights of {', '.join(known)} elsewhere than in these layers' "
            "own forward: call the layers, or give other places parameters of their own"
        )
    return (
        "the model has no layer whose weights can respond: use one of "
        f"{', '.join(rule.__name__ for rule in RULES)}, or register a rule of your own"
    )


def _share_responses(name: str, layer: SelfTuningLayer, shared: dict[tuple[int, int], _Shared]) -> None:
    """Let the parameters of a layer that are shared respond with the response of the first layer that has them.

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


@contextmanager
def _replaced(model: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Run the body with tensors in place of parameters, given by the parameters' identities, wherever the model has
    them."""
    places: list[tuple[dict[str, Any], str, nn.Parameter | None]] = [
        (module._parameters, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if id(p) in tensors
    ]
    try:
        for parameters, name, p in places:
            parameters[name] = tensors[id(p)]
        yield
    finally:
        for parameters, name, p in places:
            parameters[name] = p
