"""Images with their channels last in memory, as convolutions are often faster."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_map_only

from tune_hypergrad.batches import Batch, Forward

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class ChannelsLast(NamedTuple):
    """A problem's `forward` that is given images and volumes with their channels last in memory.

    Shapes and numbers are the same; what a model computes keeps the layout, since torch's kernels do. Convolutions lay
    out their weights for themselves, which are small beside the images.
    """

    forward: Forward

    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        return self.forward(model, tree_map_only(Tensor, _laid_out, batch))


def _laid_out(leaf: Tensor) -> Tensor:
    if leaf.ndim not in _FORMATS or is_functorch_wrapped_tensor(leaf):  # under `vmap` layouts are not ours to choose
        return leaf
    return leaf.contiguous(memory_format=_FORMATS[leaf.ndim])
