"""`TrainingDefaults`: how a person's own script trains, as settings to begin a search from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tune_hypergrad.errors import InputError
from tune_hypergrad.schedules import Schedule, stretched
from tune_hypergrad.space import gradient_ranges, in_form_of


class ParameterGroup(NamedTuple):
    """Parameters that an optimizer trains with the same hyperparameters."""

    name: str
    parameters: tuple[str, ...]
    """Their names in the model."""
    schedule: Schedule
    """The hyperparameters' values over the training run."""


@dataclass(frozen=True)
class TrainingDefaults:
    """How the script trains that a problem was taken from.

    ```python
    own = problem.defaults
    FDS.from_problem(problem, space=space, **own.trial_settings(space))
    compare(problem, space=space, **own.comparison_settings(space))
    ```
    """

    optimizer: str
    """Name of the inner optimizer."""
    steps: int
    """Inner steps of the training run."""
    epochs: float
    """The same in passes over the training split."""
    groups: tuple[ParameterGroup, ...]
    """The optimizer's parameter groups."""
    left_out: tuple[str, ...] = ()
    """What the script does and these settings do not, one sentence each."""
    clip_gradient: float | None = None
    """What the training gradient's elements are clamped to, +-."""

    @property
    def schedule(self) -> Schedule:
        """The values of the group with the most parameters."""
        return max(self.groups, key=lambda group: len(group.parameters)).schedule

    def start(self, space: Mapping[str, Any]) -> dict[str, Any]:
        """The script's values of what a search space tunes, in the space's form and within its ranges.

        Of a schedule with other windows than the space's, every window has the mean over its part of the run. What has
        no such form (the peak of a curve, choices) is left out.

        Args:
            space: Ray domains by name.
        """
        begin: dict[str, Any] = {}
        for name, entry in space.items():
            if name not in self.schedule.values:
                continue
            with suppress(InputError):  # a constant, or nothing that a gradient moves
                limits = gradient_ranges({name: entry})[0].get(name)
                if limits is not None:
                    windows = torch.tensor(
                        stretched(self.schedule.windows(name, self.steps), limits.windows), dtype=torch.float64
                    )
                    begin |= in_form_of(space, {name: limits.project(windows)})
        return begin

    def fixed(self, space: Mapping[str, Any]) -> dict[str, Any]:
        """The script's values of what a search space does not have, as a trial's config has them."""
        return {name: value for name, value in self.schedule.to_config().items() if name not in space}

    def trial_settings(self, space: Mapping[str, Any]) -> dict[str, Any]:
        """Settings for `FDS.from_problem`: `optimizer`, `steps`, `fixed`, `clip_gradient`, and `initial`, where the
        search begins.

        Args:
            space: Ray domains by name, the same as are given to the trainable.
        """
        return {
            "optimizer": self.optimizer,
            "steps": self.steps,
            "fixed": self.fixed(space),
            "clip_gradient": self.clip_gradient,
            "initial": self.start(space),
        }

    def comparison_settings(self, space: Mapping[str, Any]) -> dict[str, Any]:
        """Settings for `compare`: `optimizer`, `epochs`, `fixed`, and `start`, where all methods begin.

        Args:
            space: Ray domains by name, the same as are given to `compare`.
        """
        start = self.start(space)
        return {
            "optimizer": self.optimizer,
            "epochs": self.epochs,
            "fixed": self.fixed(space),
            **({"start": start} if start else {}),
        }
