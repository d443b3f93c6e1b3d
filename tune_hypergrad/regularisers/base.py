"""What a regulariser is: a piece of training whose strength is a hyperparameter, of each example if need be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from tune_hypergrad.batches import Batch
from tune_hypergrad.errors import InputError, did_you_mean

Values = Mapping[str, Tensor]
"""Hyperparameters' values by name, each of shape [] or, with a value for each example of the batch, [examples]."""


_LISTED = 12
"""How many names an error message lists."""


class Strength(NamedTuple):
    """What one hyperparameter of a regulariser can be."""

    neutral: float
    """Value of the hyperparameter at which the regulariser does nothing."""
    lower: float
    """Smallest value of the hyperparameter that has a meaning."""
    upper: float
    """Largest value of the hyperparameter that has a meaning."""
    usual: tuple[float, float]
    """Least and largest value that are searched where nothing else is said."""
    log: bool = False
    """Whether the hyperparameter is searched on a log scale."""
    whole: bool = False
    """Whether the hyperparameter is a whole number; other values of it are rounded."""


class Context:
    """What the modules of a regularised model see of the training step at hand: nothing, outside `set_to`.

    A plain Python object that modules hold, neither parameter nor buffer: functional calls, autocast and several models
    in one process leave it alone. Copies of a model go on reading the same one.
    """

    def __init__(self) -> None:
        self.values: Values = {}
        """Values of the hyperparameters that are in force, by name."""
        self.activations: dict[str, Tensor] = {}
        """Activations that modules left for penalties, by a key of their own."""

    @contextmanager
    def set_to(self, values: Values) -> Iterator[dict[str, Tensor]]:
        """For the body, these are the values in force; gives the activations that modules leave meanwhile."""
        before = self.values, self.activations
        self.values, self.activations = values, {}
        try:
            yield self.activations
        finally:
            self.values, self.activations = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        return self


class Regulariser:
    """Base of the regularisers; each overrides the stage of a training step in which it acts, the rest do nothing.

    Random draws come from the global generators, which the caller of a training step seeds. A regulariser is stateless
    and can be pickled; names of hyperparameters are what a search space calls them.
    """

    per_example: ClassVar[bool] = True
    """Whether every example of a batch can have a value of the hyperparameters of its own; else values are of shape
    []."""
    differentiable: ClassVar[bool] = False
    """Whether the training loss can be differentiated by the regulariser's hyperparameters."""

    @property
    def hyperparameters(self) -> dict[str, Strength]:
        """The regulariser's hyperparameters by name, with what each can be."""
        raise NotImplementedError

    def attach(self, model: nn.Module, context: Context) -> None:
        """Change or hook the model's modules, once; they act in training mode, on the values in `context`.

        Raises:
            InputError: the model has no module that it could act on.
        """

    def transform(self, batch: Batch, values: Values) -> Batch:
        """The batch that is trained on in place of `batch`."""
        return batch

    def weight_factors(self, parameters: Mapping[str, Tensor], values: Values) -> dict[str, Tensor]:
        """Factors of parameters in the forward pass, by name, of the parameters' shapes."""
        return {}

    def penalty(
        self, parameters: Mapping[str, Tensor], activations: Mapping[str, Tensor], values: Values
    ) -> Tensor | None:
        """The regulariser's term of the training loss, shape []; None where it has none."""
        return None


def as_factor(value: Tensor, like: Tensor) -> Tensor:
    """A value of shape [] or [examples], in `like`'s dtype, shaped so that it multiplies `like`, [examples, ...]."""
    value = value.to(like.dtype)
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim else value


def first_output(output: Any) -> Tensor:
    """The tensor that a module gives, or gives first: recurrent modules give their output and their state.

    Raises:
        InputError: there is no tensor.
    """
    first = output[0] if type(output) is tuple else output
    if not isinstance(first, Tensor):
        raise InputError(
            f"a regularised module gives a {type(first).__name__}: it has to give a tensor, alone or first"
        )
    return first


def require_time(output: Tensor, regulariser: str) -> None:
    """Refuse a module's output that is not of shape [examples, time, features, ...].

    Raises:
        InputError: it is not.
    """
    if output.ndim < 3:
        raise InputError(
            f"{regulariser} acts on outputs of shape [examples, time, features], not {list(output.shape)}: choose "
            "other modules"
        )


def trainable(model: nn.Module) -> list[str]:
    """Names of the parameters of a model that are trained."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def matching(names: list[str], pattern: str, what: str) -> list[str]:
    """The names that a shell-style pattern matches, such as "*" or "features.*".

    Raises:
        InputError: none does.
    """
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        raise InputError(
            f"the model has no {what} {pattern!r}: it has {listed or 'none'}{did_you_mean(pattern, names)}"
        )
    return found
