"""One step's hyperparameters set on another library's optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch.optim import Optimizer

from tune_hypergrad.errors import InputError
from tune_hypergrad.schedules import Schedule

Schedules = Schedule | Mapping[str, Schedule]
"""A schedule of all param groups, or one by a group's name."""


def replay(schedules: Schedules, optimizers: Iterable[Optimizer], step: int, total_steps: int) -> None:
    """Set the values of an inner step, from 0 to `total_steps` - 1.

    Raises:
        InputError: an optimizer has no place for a hyperparameter, or no such param group.
    """
    by_group = {None: schedules} if isinstance(schedules, Schedule) else schedules
    for optimizer in optimizers:
        for group, schedule in by_group.items():
            left = schedule.apply(optimizer, step, total_steps, group=group)
            if left:
                raise InputError(
                    f"the schedule has {', '.join(left)}, which the optimizer has no place for: set it in the loss, "
                    "and give the callback a schedule without it"
                )
