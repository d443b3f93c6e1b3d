"""`TrainingDefaults`: how a person's own script trains, as settings to begin a search from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tune_hypergrad.curves import split_group
from tune_hypergrad.errors import InputError
from tune_hypergrad.groups import ungrouped
from tune_hypergrad.schedules import Schedule, stretched
from tune_hypergrad.space import gradient_ranges, in_form_of


class ParameterGroup(NamedTuple):
    """Parameters that an optimizer trains with the same hyperparameters, and the values of these."""

    name: str
    """Name of the group, by which its values are called, such as `lr/backbone`."""
    parameters: tuple[str, ...]
    """Names of the group's parameters in the model."""
    schedule: Schedule
    """Values of the group's hyperparameters over the training run."""


@dataclass(frozen=True)
class TrainingDefaults:
    """How the script trains that a problem was taken from: optimizer, length, parameter groups and their schedules.

    ```python
    own = problem.defaults
    FDS.from_problem(problem, space=space, **own.trial_settings(space))
    compare(problem, space=space, **own.comparison_settings(space))
    ```
    """

    optimizer: str
    """Name of the script's optimizer among the engine's inner optimizers."""
    steps: int
    """Inner steps of the script's training run."""
    epochs: float
    """Length of the script's training run in passes over the training split."""
    groups: tuple[ParameterGroup, ...]
    """The parameter groups of the script's optimizer."""
    schedule: Schedule
    """Values over the training run: those that all groups have in common, such as `lr`, and those of groups that
    differ, such as `lr/backbone`."""
    left_out: tuple[str, ...] = ()
    """What the script does and these settings do not, one sentence each."""
    clip_gradient: float | None = None
    """Value that the training gradient's elements are clamped to, +-; None does not clamp."""
    clip_norm: float | None = None
    """Norm over all weights that a longer training gradient is scaled down to; None does not scale."""
    autocast: str | None = None
    """Type that the model's forward pass is computed in under `torch.autocast`: "bfloat16"; None is the model's own."""

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings `clip_gradient`, `clip_norm` and `autocast` that are not None, by name."""
        settings = {name: getattr(self, name) for name in ("clip_gradient", "clip_norm", "autocast")}
        return {name: value for name, value in settings.items() if value is not None}

    def start(self, space: Mapping[str, Any]) -> dict[str, Any]:
        """The script's values of what a search space tunes, in the space's form and within its ranges.

        Of a schedule with other windows than the space's, every window has the mean over its part of the run. What has
        no such form (the peak of a curve, choices) is left out. Of a group whose value is the common one, that is it.

        Args:
            space: Ray domains by name.
        """
        begin: dict[str, Any] = {}
        space = ungrouped(space)
        for name, entry in space.items():
            own = name if name in self.schedule.values else split_group(name)[0]
            if own not in self.schedule.values:
                continue
            with suppress(InputError):  # a constant, or nothing that a gradient moves
                limits = gradient_ranges({name: entry})[0].get(name)
                if limits is not None:
                    windows = torch.tensor(
                        stretched(self.schedule.windows(own, self.steps), limits.windows), dtype=torch.float64
                    )
                    begin |= in_form_of(space, {name: limits.project(windows)})
        return begin

    def fixed(self, space: Mapping[str, Any]) -> dict[str, Any]:
        """The script's values of what a search space does not have, those of groups among them, as a trial's config
        has them."""
        tuned = ungrouped(space)
        return {name: value for name, value in self.schedule.to_config().items() if name not in tuned}

    def trial_settings(self, space: Mapping[str, Any]) -> dict[str, Any]:
        """Settings for `FDS.from_problem`: `optimizer`, `steps`, `fixed`, the `recipe`, and `initial`, where the search
        begins.

        Args:
            space: Ray domains by name, the same as are given to the trainable.
        """
        return {
            "optimizer": self.optimizer,
            "steps": self.steps,
            "fixed": self.fixed(space),
            **self.recipe,
            "initial": self.start(space),
        }

    def comparison_settings(self, space: Mapping[str, Any]) -> dict[str, Any]:
        """Settings for `compare`: `optimizer`, `epochs`, `fixed`, the `recipe`, and `start`, where all methods begin.

        Args:
            space: Ray domains by name, the same as are given to `compare`.
        """
        start = self.start(space)
        return {
            "optimizer": self.optimizer,
            "epochs": self.epochs,
            "fixed": self.fixed(space),
            **self.recipe,
            **({"start": start} if start else {}),
        }
