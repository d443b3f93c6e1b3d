"""A batch of any form: how a model reads it, and what its output is judged against."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tune_hypergrad.errors import InputError

Batch = Any
"""What one batch is: any tree of tuples, lists, dicts and data classes, whose leaves mostly are tensors."""

Forward = Callable[[nn.Module, Batch], Any]
"""`forward(model, batch)`: the model's output for a batch."""


def call_model(model: nn.Module, batch: Batch) -> Any:
    """The default `forward`.

    - A tuple or list is `(*inputs, target)`: the model gets the inputs by position, a sole element included.
    - Of a mapping the model gets, by name, what its `forward` takes, labels included: all of it where that takes
      `**kwargs`.
    - Anything else is the model's only argument.

    Raises:
        InputError: the model takes nothing of a mapping.
    """
    if isinstance(batch, Mapping):
        return model(**_taken(model, batch))
    if is_pair(batch):
        return model(*(batch[:-1] if len(batch) > 1 else batch))
    return model(batch)


def target_of(batch: Batch) -> Any:
    """The default `target` of a batch: the last element of a tuple or list, and else the batch itself."""
    return batch[-1] if is_pair(batch) else batch


def is_pair(batch: Batch) -> bool:
    """Whether a batch is a tuple or list with inputs and, last, a target; named tuples are batches of their own."""
    return isinstance(batch, tuple | list) and not hasattr(batch, "_fields") and len(batch) > 0


def default_loss(output: Any, target: Any) -> Tensor:
    """The model's own loss where its output has one, and else the cross entropy.

    Args:
        output: has `loss`, as an attribute or by that key, which is not None; or logits, floating, [b, classes, ...].
        target: class indices, int64, [b, ...]; not used where the output has a loss.

    Raises:
        InputError: there is neither.
    """
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    if isinstance(output, Tensor) and isinstance(target, Tensor):
        return F.cross_entropy(output, target)
    raise InputError(
        f"the model's output, a {type(output).__name__}, has no `loss`: give the model labels in the batch, or the "
        "problem loss=..., a function of (output, batch)"
    )


def as_tree(output: Any) -> Any:
    """A model's output as it is, after telling torch to take the data classes in it for trees."""
    for leaf in pytree.tree_leaves(output):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            pytree.register_dataclass(type(leaf))
            as_tree({field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)})
    return output


def _taken(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that a model's `forward` takes by name; an `InputError` where there are none."""
    names = _arguments(type(model))
    taken = {name: value for name, value in batch.items() if names is None or name in names}
    if not taken:
        raise InputError(
            f"the model takes {', '.join(names or ()) or 'nothing'}, and a batch has {', '.join(batch)}: rename them, "
            "or give the problem forward=..., a function of (model, batch)"
        )
    return taken


def _arguments(kind: type[nn.Module]) -> tuple[str, ...] | None:
    """Names of the arguments that a model class's `forward` takes by name; None where it takes any."""
    parameters = inspect.signature(kind.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    by_name = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return tuple(name for name in by_name if name != "self")


def first_input(batch: Batch) -> Any:
    """The part of a batch that regularisers of inputs act on: a tuple's first element, or a mapping's first floating
    tensor."""
    key = _first_key(batch)
    return batch if key is None else batch[key]


def with_first_input(batch: Batch, x: Any) -> Batch:
    """A batch with `x` in place of its first input (see `first_input`)."""
    key = _first_key(batch)
    if key is None:
        return x
    return {**batch, key: x} if isinstance(batch, Mapping) else (x, *batch[1:])


def _first_key(batch: Batch) -> Any:
    """The index or key of a batch's first input; None where that is the batch itself."""
    if is_pair(batch):
        return 0
    if not isinstance(batch, Mapping):
        return None
    floating = (name for name, value in batch.items() if isinstance(value, Tensor) and value.is_floating_point())
    return next(floating, next(iter(batch), None))
