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
    """The outer step that found the place; below 0 for a rung of the ladder."""
    losses: list[float] = field(default_factory=list)
    steps: int | None = None
    """Inner steps of the runs at the place; None: as many as all runs have."""
    calm: bool = True
    """Whether no derivative at the place was chaotic."""
    confirmed: list[float] = field(default_factory=list)
    """Validation losses of runs at the place with the seeds of confirmations."""
    scores: list[float] = field(default_factory=list)
    """Scores of the place's own runs, where incumbents are chosen by something else than the loss; else none."""
    confirmed_scores: list[float] = field(default_factory=list)
    """Scores of the place's confirmations, where incumbents are chosen by something else than the loss; else none."""
    failures: int = 0
    """Number of confirmations of the place that failed, and told nothing."""
    fallen: bool = False
    """Whether a confirmation of the place came to nothing, or all of them failed."""

    @property
    def val_loss(self) -> float:
        """Mean validation loss over the place's runs that were differentiated."""
        return fmean(self.losses)

    @property
    def confirmed_loss(self) -> float:
        """Mean validation loss over the place's confirmations; inf where there is none, or one diverged."""
        return fmean(self.confirmed) if self.confirmed and all(map(isfinite, self.confirmed)) else inf

    @property
    def confirmed_score(self) -> float:
        """What the place's confirmations are judged by, the lower the better: their mean score, or the mean loss."""
        return fmean(self.confirmed_scores) if self.confirmed_scores else self.confirmed_loss


@dataclass(eq=False)
class Places:
    """All places that a search has trained at, in the order in which it did."""

    tried: list[Place] = field(default_factory=list)
    untrained: float = inf
    """Validation loss that training begins with; inf where nobody knows."""

    @property
    def longest(self) -> int:
        """Inner steps of the longest runs at any place; 0 where all have as many."""
        return max((place.steps or 0 for place in self.tried), default=0)

    @property
    def standing(self) -> list[Place]:
        """Places of the longest runs that no confirmation has spoken against."""
        longest = self.longest
        return [place for place in self.tried if not place.fallen and (place.steps or 0) == longest]

    @property
    def fallen(self) -> list[Place]:
        """Places that a confirmation has spoken against, and that were trained to a finite loss."""
        return [place for place in self.tried if place.fallen and isfinite(place.val_loss)]

    def comparable(self, steps: int | None) -> list[Place]:
        """Places whose runs had `steps` inner steps and that no confirmation has spoken against."""
        return [place for place in self.tried if not place.fallen and place.steps == steps]

    def differentiated(self, steps: int | None) -> list[Place]:
        """Places of `comparable` that outer steps found."""
        return [place for place in self.comparable(steps) if place.outer_step >= 0]

    def best(self, places: Iterable[Place]) -> Place | None:
        """The place of least score; None where there are no places."""
        return min(places, key=self.score, default=None)

    def limit(self, steps: int | None) -> float:
        """The validation loss above which a run of `steps` inner steps is rejected."""
        best = self.best(self.differentiated(steps))
        if best is None or isinf(self.untrained):
            return inf
        return best.val_loss + max(_REJECTED * self.gain(best.val_loss), _NOISE * abs(best.val_loss))

    def gain(self, loss: float) -> float:
        """How far training has lowered the validation loss to reach this one; 0 where nobody knows."""
        return max(self.untrained - loss, 0.0) if isfinite(self.untrained) else 0.0

    def score(self, place: Place) -> float:
        """A place's validation loss, and more where the place is chaotic: with other seeds its loss may be any
        other."""
        wild = 0.0 if place.calm else _WILDNESS * max(self.gain(place.val_loss), abs(place.val_loss))
        return place.val_loss + wild

    def merit(self, place: Place) -> tuple[bool, float]:
        """What an incumbent is chosen by, the lower the better: the score of its place or, where runs are judged by
        something else than the loss, that, calm places before chaotic ones."""
        return (not place.calm, fmean(place.scores)) if place.scores else (False, self.score(place))

    def state_dict(self) -> dict[str, Any]:
        """The places in plain Python values and tensors, as `load_state_dict` takes them."""
        return {"tried": [deepcopy(vars(place)) for place in self.tried], "untrained": self.untrained}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.tried = [Place(**deepcopy(place)) for place in saved["tried"]]
        self.untrained = saved["untrained"]
