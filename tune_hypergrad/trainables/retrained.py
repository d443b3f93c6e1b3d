"""`Retrained`: plain training up to the step at which an incumbent was judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tune_hypergrad.trainables.base import TrialSettings
from tune_hypergrad.trainables.fixed_schedule import FixedSchedule


@dataclass(frozen=True)
class RetrainedSettings(TrialSettings):
    """Settings of `Retrained`."""

    until: int | None = None
    """The step at which the run ends, since the incumbent was judged there; None is `steps`."""


class Retrained(FixedSchedule):
    """A training run that may end before its schedule does."""

    Settings: ClassVar[type[TrialSettings]] = RetrainedSettings

    def begin(self, settings: Any, hyperparameters: dict[str, Any]) -> None:
        super().begin(settings, hyperparameters)
        self.end = settings.steps if settings.until is None else settings.until
