"""One step's hyperparameters set on another library's optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch.optim import Optimizer

from tune_hypergrad.errors import InputError
from tune_hypergrad.schedules import Schedule


def replay(
    schedule: Schedule, optimizers: Iterable[Optimizer], step: int, total_steps: int, groups: Mapping[int, str] | None
) -> None:
    """Set the values of an inner step, from 0 to `total_steps` - 1, as `Schedule.apply` does.

    Raises:
        InputError: an optimizer has no place for a hyperparameter, or no such param group.
    """
    for optimizer in optimizers:
        left = schedule.apply(optimizer, step, total_steps, groups)
        if left:
            raise InputError(
                f"the schedule has {', '.join(left)}, which the optimizer has no place for: set it in the loss, "
                "and give the callback a schedule without it"
            )
