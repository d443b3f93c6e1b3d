"""Places: what a robust search has tried, what runs there gave, and how they compare."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from math import inf, isfinite, isinf
from statistics import fmean
from typing import Any

from tune_hypergrad.hypergradients.state import Hyperparameters

_WILDNESS = 0.05  # what a chaotic place is worse by than its loss says, as a share of training's gain
_REJECTED, _NOISE = 0.3, 0.1  # share of the best's gain that a run may lose; of its loss, which seeds may make of it


@dataclass(eq=False)
class Place:
    """Hyperparameters on their internal scales, and what runs with them gave."""

    internal: Hyperparameters
    outer_step: int
    """Which found them; that of a rung of the ladder is below 0."""
    losses: list[float] = field(default_factory=list)
    steps: int | None = None
    """Inner steps of the runs; None: as many as all have."""
    calm: bool = True
    """Whether no derivative there was chaotic."""
    confirmed: list[float] = field(default_factory=list)
    """Losses with the seeds of confirmations."""
    scores: list[float] = field(default_factory=list)
    """Of its own runs, where incumbents are chosen by something else than the loss."""
    confirmed_scores: list[float] = field(default_factory=list)
    """Likewise, of its confirmations."""
    failures: int = 0
    """Confirmations that failed, and told nothing."""
    fallen: bool = False
    """Whether a confirmation came to nothing, or all of them failed."""

    @property
    def val_loss(self) -> float:
        """Mean over the runs that were differentiated."""
        return fmean(self.losses)

    @property
    def confirmed_loss(self) -> float:
        """Mean over the confirmations; inf where there is none, or one diverged."""
        return fmean(self.confirmed) if self.confirmed and all(map(isfinite, self.confirmed)) else inf

    @property
    def confirmed_score(self) -> float:
        """What its confirmations are judged by: their mean score, or the mean loss."""
        return fmean(self.confirmed_scores) if self.confirmed_scores else self.confirmed_loss


@dataclass(eq=False)
class Places:
    """All that were trained at, in their order."""

    tried: list[Place] = field(default_factory=list)
    untrained: float = inf
    """The validation loss that training begins with; inf where nobody knows."""

    @property
    def longest(self) -> int:
        """Inner steps of the longest runs; 0 where all have as many."""
        return max((place.steps or 0 for place in self.tried), default=0)

    @property
    def standing(self) -> list[Place]:
        """Those that no confirmation has spoken against, of the longest runs."""
        longest = self.longest
        return [place for place in self.tried if not place.fallen and (place.steps or 0) == longest]

    @property
    def fallen(self) -> list[Place]:
        """Those that one has spoken against, and that were trained to a finite loss."""
        return [place for place in self.tried if place.fallen and isfinite(place.val_loss)]

    def comparable(self, steps: int | None) -> list[Place]:
        """Those of runs of that length that no confirmation has spoken against."""
        return [place for place in self.tried if not place.fallen and place.steps == steps]

    def differentiated(self, steps: int | None) -> list[Place]:
        """Those of them that outer steps found."""
        return [place for place in self.comparable(steps) if place.outer_step >= 0]

    def best(self, places: Iterable[Place]) -> Place | None:
        """The one of least score, if there is any."""
        return min(places, key=self.score, default=None)

    def limit(self, steps: int | None) -> float:
        """The validation loss above which a run of that length is rejected."""
        best = self.best(self.differentiated(steps))
        if best is None or isinf(self.untrained):
            return inf
        return best.val_loss + max(_REJECTED * self.gain(best.val_loss), _NOISE * abs(best.val_loss))

    def gain(self, loss: float) -> float:
        """By how much training has lowered the validation loss to this one; 0 where nobody knows."""
        return max(self.untrained - loss, 0.0) if isfinite(self.untrained) else 0.0

    def score(self, place: Place) -> float:
        """A place's loss, and more where it is chaotic: with other seeds it may be any other."""
        wild = 0.0 if place.calm else _WILDNESS * max(self.gain(place.val_loss), abs(place.val_loss))
        return place.val_loss + wild

    def merit(self, place: Place) -> tuple[bool, float]:
        """What an incumbent is chosen by, the lower the better: the score of places, or where runs are judged by
        something else than the loss, that, after the calm ones the chaotic."""
        return (not place.calm, fmean(place.scores)) if place.scores else (False, self.score(place))

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"tried": [deepcopy(vars(place)) for place in self.tried], "untrained": self.untrained}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.tried = [Place(**deepcopy(place)) for place in saved["tried"]]
        self.untrained = saved["untrained"]
