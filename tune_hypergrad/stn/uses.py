"""Where a model uses the weights of its layers: in these layers' own forward, or elsewhere, where nothing responds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_WITHOUT_VALUES = (bool, int, str, type(None), type, torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types of results of torch functions that tell no more of a tensor than its shape and kind."""

_LIKE_ANOTHER = ("to", "type", "type_as", "view_as", "expand_as", "reshape_as")
"""Names of methods whose further arguments tell no more than a shape and a kind."""

_READ_OR_WRITE = ("data_ptr", "__set__", "__setitem__")
"""Names of functions that read or write a tensor's elements, whatever their result is."""


def used_elsewhere(
    model: nn.Module, layers: Mapping[str, Sequence[nn.Module]], predict: Callable[[nn.Module], Any]
) -> tuple[str, ...]:
    """Names of the layers of which the model uses a parameter elsewhere than in the layer's own forward.

    Of parameters that layers share, one use elsewhere counts for all of them. Shapes and kinds of tensors are no uses.
    A copy of the model predicts, in training and in evaluation mode; random numbers are drawn from the global
    generators.

    Args:
        model: any module; modules in evaluation mode stay there if the model itself is in training mode.
        layers: the modules, first the layer itself, whose parameters a layer's own forward uses, by the layer's name.
        predict: runs a model on some inputs.
    """
    # in one copy, so that modules of the layers stay those of the model
    model, layers = copy.deepcopy((model, dict(layers)))
    own = {name: _parameters(parts) for name, parts in layers.items()}
    uses = _UsesElsewhere(set().union(*own.values()))
    for name, (layer, *_) in layers.items():
        # an attribute, so that it is also what runs where a model calls `forward` itself
        layer.forward = uses.within(own[name], layer.forward)
    if not model.training:
        model.train()
    with torch.enable_grad(), uses:
        predict(model)
        predict(model.eval())
    return tuple(name for name in layers if own[name] & uses.found)


class _UsesElsewhere(TorchFunctionMode):
    """While entered, finds parameters that are handed to a torch function outside the forward that may use them.

    Args:
        watched: identities of parameters.
    """

    def __init__(self, watched: set[int]) -> None:
        super().__init__()
        self._watched = watched
        self._running: list[set[int]] = []
        self.found: set[int] = set()
        """Identities of the watched parameters that have been used elsewhere."""

    def within(self, own: set[int], forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward, in which its own parameters may be used."""

        @wraps(forward)
        def tracked(*args: Any, **kwargs: Any) -> Any:
            self._running.append(own)
            try:
                return forward(*args, **kwargs)
            finally:
                self._running.pop()

        return tracked

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if _depends_on_elements(name, result):
            read = args[:1] if name in _LIKE_ANOTHER else (args, kwargs)
            allowed = self._running[-1] if self._running else set()
            self.found |= ({id(leaf) for leaf in tree_leaves(read)} & self._watched) - allowed
        return result


def _parameters(modules: Iterable[nn.Module]) -> set[int]:
    """Identities of the modules' own parameters."""
    return {id(p) for module in modules for p in module.parameters(recurse=False)}


def _depends_on_elements(function: str, result: Any) -> bool:
    """Whether what a torch function does depends on more than shapes and kinds."""
    if function.startswith("new_") or function.endswith("_like"):
        return False
    return function in _READ_OR_WRITE or not all(isinstance(leaf, _WITHOUT_VALUES) for leaf in tree_leaves(result))
