"""The model's forward pass in lower precision: weights, gradients and optimizer state stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from tune_hypergrad.batches import Batch, Forward
from tune_hypergrad.errors import InputError

AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16}
"""Types that `torch.autocast` can compute in, by name. With float16 gradients would have to be scaled, and steps be
skipped."""

_NORMALISATIONS = (F.batch_norm, F.instance_norm, F.layer_norm, F.group_norm)
_WHOLE_ON_CUDA = (F.layer_norm, F.group_norm)  # whose outputs autocast leaves in float32 there


class UnderAutocast(NamedTuple):
    """A problem's `forward` under `torch.autocast`, whose outputs are in the weights' type again.

    Losses and metrics are thus computed as precisely as without. Casts are parts of the graph like all operations, so
    that derivatives of every order go through them; a float64 model is left as it is.
    """

    forward: Forward
    device_type: str
    """Type of the device, as `torch.autocast` takes it: "cpu", "cuda", ..."""
    lower: torch.dtype
    """Type that matrix products and convolutions are computed in."""
    dtype: torch.dtype
    """Type of the model's weights."""

    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        # a cached cast would stay in use where weights are swapped, or of another derivative's level
        with (
            torch.autocast(self.device_type, self.lower, cache_enabled=False),
            _WholeNormalisations(self),
            _even_attention(),
        ):
            output = self.forward(model, batch)
        return tree_map_only(Tensor, self.restored, output)

    def restored(self, tensor: Tensor) -> Tensor:
        """A tensor in the weights' type where it is in the lower one, else as it is."""
        return tensor.to(self.dtype) if tensor.dtype == self.lower else tensor


@contextmanager
def _even_attention() -> Iterator[None]:
    """For the body, attention's math kernel is in lower precision throughout: of a mixture, torch has no second
    derivatives."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # on every device, whatever its name says
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


class _WholeNormalisations(TorchFunctionMode):
    """Normalisation of activations in lower precision by weights in their own, as torch's kernels compute it, with
    casts that can be differentiated twice: of such mixtures torch's formulas have no second derivatives."""

    def __init__(self, under: UnderAutocast) -> None:
        super().__init__()
        self._under = under

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _NORMALISATIONS:
            return func(*args, **kwargs)
        given = next(leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor))
        args, kwargs = tree_map_only(Tensor, self._under.restored, (args, kwargs))
        output = func(*args, **kwargs)
        whole = self._under.device_type == "cuda" and func in _WHOLE_ON_CUDA
        return output if whole else output.to(given.dtype)


def autocast_dtype(name: str) -> torch.dtype:
    """The torch type that goes by that name in the setting `autocast`.

    Raises:
        InputError: there is none.
    """
    if not isinstance(name, str) or name not in AUTOCAST_DTYPES:
        raise InputError(f"autocast is {name!r}: give {' or '.join(map(repr, AUTOCAST_DTYPES))}, or None")
    return AUTOCAST_DTYPES[name]
