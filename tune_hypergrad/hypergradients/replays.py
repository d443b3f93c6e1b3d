"""Whether what is run again is what was run before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tune_hypergrad.errors import InputError


class NotReplayedError(InputError):
    """A training step that was run again was another one."""


def refuse_another_step(steps: Sequence[int], first: Tensor, again: Tensor, *, elsewhere: bool = False) -> None:
    """Refuse to differentiate steps that are not those that were trained with.

    Args:
        steps: which ones.
        first: their losses on the way there, shape [steps], or [steps, S] of S runs at once.
        again: their losses on the way back, of that shape.
        elsewhere: whether the way there was on another kind of device.

    Raises:
        NotReplayedError: they differ.
    """
    differ = ~are_replayed(first, again, elsewhere=elsewhere)
    if bool(differ.any()):
        position = tuple(differ.nonzero()[0].tolist())
        raise NotReplayedError(
            f"training step {steps[position[0]]} was another one when it was run again (a loss of "
            f"{float(again[position]):.6g}, not {float(first[position]):.6g}): something in the data or the model "
            "draws from a generator of its own, counts calls or caches; draw from torch's, NumPy's or Python's global "
            "generators, or set differentiation='forward'"
        )


def is_same(value: Tensor, other: Tensor) -> bool:
    """Whether two losses are of the same computation: to the bit on a CPU, to rounding where sums have no order."""
    return torch.equal(value, other) if value.device.type == "cpu" else bool(are_replayed(value, other).all())


def are_replayed(first: Tensor, again: Tensor, *, elsewhere: bool = False) -> Tensor:
    """Which losses are those of the same steps, elementwise: to a few last bits on a CPU, to rounding on other devices,
    where sums are added up in another order at every call, and between two of them."""
    precision = torch.finfo(again.dtype).eps
    exact = again.device.type == "cpu" and not elsewhere
    relative, absolute = (16 * precision, 0.0) if exact else (1e-3, 16 * precision)
    return torch.isclose(again, first, rtol=relative, atol=absolute, equal_nan=True)
