"""A model's buffers before and after a forward pass, whatever the pass does to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Buffers = list[tuple[nn.Module, dict[str, Tensor | None]]]
"""The buffers of each module of a model."""


def copied_buffers(model: nn.Module) -> Buffers:
    """Detached copies of the model's buffers; those that are shared stay shared."""
    copies = {id(buffer): buffer.detach().clone() for buffer in model.buffers()}
    return [
        (module, {name: None if buffer is None else copies[id(buffer)] for name, buffer in module._buffers.items()})
        for module in model.modules()
    ]


def put_buffers(buffers: Buffers) -> None:
    """Make these buffers, as `copied_buffers` gives them, the buffers of their model."""
    for module, own in buffers:
        module._buffers.clear()
        module._buffers.update(own)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Run the body with copies of the model's buffers, and put the buffers themselves back at its end."""
    before = [(module, dict(module._buffers)) for module in model.modules()]
    put_buffers(copied_buffers(model))
    try:
        yield
    finally:
        put_buffers(before)


def load_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values to the model's buffers; those of another shape, or that are not there yet, become copies of them.

    Args:
        model: what to change.
        values: by the buffers' names.
    """
    for name, value in values.items():
        path, _, key = name.rpartition(".")
        buffers = model.get_submodule(path)._buffers
        buffer = buffers.get(key)
        if buffer is None or buffer.shape != value.shape:
            buffers[key] = value.clone()
        else:
            with torch.no_grad():
                buffer.copy_(value)
