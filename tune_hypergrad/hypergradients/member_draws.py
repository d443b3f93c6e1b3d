"""Random draws of several runs at once: under one `vmap`, every run draws from generators of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tune_hypergrad.hypergradients.lasting import LastingMode
from tune_hypergrad.hypergradients.substitution import replayable_dropout

_MADE = ("empty", "empty_like", "new_empty")
"""Names of functions that make the tensors which random numbers are often written to."""
_DRAWN = (
    "rand",
    "rand_like",
    "randn",
    "randn_like",
    "randint",
    "randint_like",
    "randperm",
    "normal",
    "bernoulli",
    "multinomial",
    "poisson",
    "_standard_gamma",
)
"""Names of functions that give random numbers."""
_IN_PLACE = (
    "bernoulli_",
    "uniform_",
    "normal_",
    "exponential_",
    "geometric_",
    "cauchy_",
    "log_normal_",
    "random_",
)
"""Names of methods that write random numbers to their tensor."""
_FEATURE_DROPOUTS: dict[Any, int] = {F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5}
"""Dropout of whole channels, and the number of dimensions of a batch that has them."""


class MemberDraws(LastingMode):
    """While `under` a `vmap` over S members, every member draws what its own run would draw.

    torch has two answers to a draw under `vmap`: one for all, or all of one generator. Here every member has its own
    generators, whose numbers are those of the global generators of a run by itself that was seeded alike. What draws
    otherwise is left to `vmap`, which refuses it with `randomness="error"`.

    Args:
        count: S.
        device: where the members train; they draw on the CPU as well.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        super().__init__()
        self._generators = {
            kind: [torch.Generator(place) for _ in range(count)]
            for kind, place in {"cpu": torch.device("cpu"), device.type: device}.items()
        }
        self._index: Tensor | None = None

    def seed(self, seeds: Sequence[int]) -> None:
        """Seed every member's generators, as `torch.manual_seed` does the global ones."""
        for generators in self._generators.values():
            for generator, seed in zip(generators, seeds, strict=True):
                generator.manual_seed(seed)

    @contextmanager
    def under(self, index: Tensor) -> Iterator[None]:
        """For the body, within the function that `vmap` maps, draw for the members.

        Args:
            index: the members' numbers, mapped over: shape [] there.
        """
        self._index = index
        try:
            with self:
                yield
        finally:
            self._index = None

    def handle(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(function, "__name__", "")
        if self._index is None or kwargs.get("generator") is not None:
            return function(*args, **kwargs)
        if function is F.dropout:
            with self:  # it draws
                return replayable_dropout(*args, **kwargs)
        if name in _MADE:
            made = function(*args, **kwargs)
            # of each member, so that it can hold its draws; there is nothing in it yet
            return made.fill_(0) + torch.zeros_like(self._index, dtype=made.dtype, device=made.device)
        if name in _DRAWN:
            return self._draw(function, *args, **kwargs)
        if name in _IN_PLACE:
            return args[0].copy_(self._draw(_out_of_place(function), *args, **kwargs))
        if function in _FEATURE_DROPOUTS and args[0].ndim == _FEATURE_DROPOUTS[function]:
            return self._feature_dropout(*args, **kwargs)
        return function(*args, **kwargs)

    def _draw(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if getattr(function, "__name__", "").endswith("_like"):
            function, args, kwargs = _of_shape(function, *args, **kwargs)
        place = kwargs.get("device") or next((arg.device for arg in args if isinstance(arg, Tensor)), "cpu")
        generators = self._generators[torch.device(place).type]
        names, values = tuple(kwargs), tuple(kwargs.values())
        return _Drawn.apply(self._index, function, generators, names, *args, *values)  # type: ignore[no-any-return, no-untyped-call]

    def _feature_dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Dropout of the input's whole channels: what torch does, with its draws in its order."""
        if not training or p == 0:
            return input
        shape = [*input.shape[:2], *[1] * (input.ndim - 2)]
        kept = torch.empty(shape, dtype=input.dtype, device=input.device)
        mask = self._draw(_out_of_place(Tensor.bernoulli_), kept, 1 - p)
        if p < 1:
            mask = mask / (1 - p)
        return input.mul_(mask) if inplace else input * mask


class _Drawn(Function):
    """A draw for every member of a `vmap`: what a function draws, without derivatives."""

    @staticmethod
    def forward(index: Tensor, function: Any, generators: Any, names: Any, *args: Any) -> Tensor:
        raise NotImplementedError("members draw under vmap only")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any,
        dims: tuple[Any, ...],
        index: Tensor,
        function: Callable[..., Tensor],
        generators: Sequence[torch.Generator],
        names: Sequence[str],
        *args: Any,
    ) -> tuple[Tensor, int]:
        positional = len(args) - len(names)
        draws = []
        with torch.no_grad():
            for member, generator in enumerate(generators):
                own = [_of_member(arg, dim, member) for arg, dim in zip(args, dims[4:], strict=True)]
                keywords = dict(zip(names, own[positional:], strict=True))
                draws.append(function(*own[:positional], **keywords, generator=generator))
        return torch.stack(draws), 0


def _of_member(arg: Any, dim: Any, member: int) -> Any:
    return arg.select(dim, member) if isinstance(arg, Tensor) and isinstance(dim, int) else arg


def _out_of_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def drawn(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(torch.empty_like(tensor, memory_format=torch.contiguous_format), *args, **kwargs)

    return drawn


def _of_shape(
    function: Callable[..., Tensor], like: Tensor, *args: Any, **kwargs: Any
) -> tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]:
    """A draw that is like a tensor, by its shape, type and device: `rand_like(x)` as `rand(x.shape)`."""
    kwargs = {name: value for name, value in kwargs.items() if name != "memory_format" and value is not None}
    kwargs = {"dtype": like.dtype, "device": like.device, **kwargs}
    return getattr(torch, function.__name__.removesuffix("_like")), (*args, tuple(like.shape)), kwargs
