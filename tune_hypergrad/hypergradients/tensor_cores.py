"""Whether float32 matrix products and convolutions may round their factors to TF32, as a GPU's tensor cores do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def tf32(allowed: bool | None) -> Iterator[None]:
    """For the body, allow it or do not; None leaves torch's own switches as they are. Has no effect but on a GPU."""
    switches, name, value = _switches(allowed)
    before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, value)
        yield
    finally:
        for switch, own in zip(switches, before, strict=True):
            setattr(switch, name, own)


def _switches(allowed: bool | None) -> tuple[tuple[Any, ...], str, Any]:
    """What torch keeps its switches in, their name, and the value that means `allowed`."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if allowed is None:
        return (), "", None
    if hasattr(cudnn, "conv"):  # since torch 2.9, which does not want both ways mixed
        return (matmul, cudnn.conv, cudnn.rnn), "fp32_precision", "tf32" if allowed else "ieee"
    return (matmul, cudnn), "allow_tf32", allowed
