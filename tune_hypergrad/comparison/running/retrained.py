"""`Retrained`: plain training up to the step at which an incumbent was judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tune_hypergrad.hypergradients import Optimizer
from tune_hypergrad.trainables.base import TrialSettings
from tune_hypergrad.trainables.fixed_schedule import FixedSchedule


@dataclass(frozen=True)
class RetrainedSettings(TrialSettings):
    """Settings of `Retrained`."""

    until: int | None = None
    """Inner step at which the run ends, since the incumbent was judged there; None is `steps`."""
    own_optimizers: Mapping[str, Optimizer] = field(default_factory=dict)
    """Inner optimizers that are not built in, by the name that an incumbent's records have."""


class Retrained(FixedSchedule):
    """Plain training that may end before its schedule does, at the step at which an incumbent was judged."""

    Settings: ClassVar[type[TrialSettings]] = RetrainedSettings

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        named = self._settings.own_optimizers  # type: ignore[attr-defined]
        name = new_config.get("optimizer")
        chosen = {"optimizer": named[name]} if isinstance(name, str) and name in named else {}
        return super().reset_config({**new_config, **chosen})

    def begin(self, settings: Any, hyperparameters: dict[str, Any]) -> None:
        super().begin(settings, hyperparameters)
        self.end = settings.steps if settings.until is None else settings.until
