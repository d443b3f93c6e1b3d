"""`RobustSearch`: descend by hypergradients whose noise and whose chaos are known for what they are.

Training at a learning rate near the edge of stability is chaotic: another seed changes its loss by several per cent,
and its derivative by a hyperparameter, exact as it is, grows to any size and tells nothing of the mean over seeds. So,
on each hyperparameter's natural scale,

- where nothing is known, plain trainings with learning rates four times apart come first, and the first outer step
  begins at the lowest that learned most of what the best one did, since derivatives are true where training is calm;
- a derivative g says how far to go, not only which way: step_size g / (|g| + s), s a small share of the loss or half of
  what is typical of all derivatives, so that what would change little moves little. Directions of neighbouring windows
  and of successive outer steps, each with seeds of its own, are averaged;
- a derivative by which one step would change the loss by more than all that training gains, or more than a quarter of
  it where there are several windows, is *chaotic*. It is not followed: what calms training when it is lowered (learning
  rates, momentum) is lowered there, others wait until their steps, halved, are small enough, and where the loss is no
  better either, the next run is nearer to the best so far;
- a run that lost much of what the best so far had gained is *rejected*: it is not differentiated, costs one training,
  and the next one is nearer to where the search came from;
- what is called best is calm, or better by more than chaos may hide, and has been confirmed: trained with other seeds,
  which are the same for all candidates. A plain training that ended below all of them is one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from math import inf, isfinite, isinf, isnan, nan
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tune_hypergrad.budget import GRADIENTS_PER
from tune_hypergrad.curves import split_group, split_name
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.outer.natural_scales import STEP, beginning
from tune_hypergrad.outer.places import Place, Places
from tune_hypergrad.outer.searches import (
    Evaluated,
    Outcome,
    OuterSearch,
    Proposal,
    length_of,
    mean_outcome,
)
from tune_hypergrad.outer.sharing import Sharing
from tune_hypergrad.space import Range

_SOFT, _TYPICAL = 0.02, 0.5  # shares of the loss and of a typical derivative: the smaller one moves half a step
_CHAOS, _CHAOS_ALONE = 0.25, 1.0  # shares of training's gain that no step of a window, or sole value, changes
_MEMORY = 0.3  # weight of earlier directions
_GROWTH, _SHRINKAGE, _LARGEST, _SMALLEST = 1.5, 0.5, 3.0, 0.05  # of step sizes; the last two are shares of the first
_APPROACH, _SHORTER = 0.35, 0.6  # of the way to a place that was given up; of the steps after it
_LADDERS = ((0, 2, 4), (-2, -4, -6))  # first steps by which the learning rates of plain trainings differ from the start
_LEARNED = 0.75  # of what the best of them learned, that the first outer step's learning rate has to
_FIRST_RETREAT = 1.5  # by how much a first run that came to nothing is calmed, on logarithmic scales
_REJECTIONS = 6  # in a row, after which there is nothing more to be found; of rounds that failed altogether likewise
_PATIENCE = 3  # outer steps without a better run, after which more seeds are averaged
_LARGEST_ENSEMBLE = 4
_LEAST_SHARED = 16  # windows of a hyperparameter that may move together
_CANDIDATES, _CONFIRMATIONS = 2, 3  # places that are confirmed before the search ends, and seeds it is done with
_CONFIRMING = 0.2  # of the budget, that this may cost
_CONFIRMATION = 1 << 20  # seeds of confirmations, apart from those of outer steps


class RobustSearch(OuterSearch):
    """The default search by hypergradients; the module tells how it goes.

    Args:
        ranges: what is tuned, by name; moved on the scale of `natural_range`, but for those with a step size.
        initial: values to begin with, each of shape [N]; those missing begin at `natural_start`. Without any, and
            where `trainings` pay for it, three plain trainings look for a learning rate first, and three more where
            these learned nothing.
        step_sizes: first step sizes by name, on the range's own scale; others are log(2) of a logarithm, log(1.5) of
            that of 1 - momentum, a tenth of the range on linear scales.
        ensemble: runs in a round at the beginning, whose hypergradients are averaged; it doubles, up to 4, where three
            outer steps have brought nothing better.
        outer_steps: outer steps at the most, rejected ones included; None: as many as it takes.
        trainings: what the whole search may cost, in plain trainings, confirmations included; None: no limit.
        new_seeds: whether every outer step has seeds of its own; without, all have the same.
        lengths: inner steps of successive outer steps' runs, the last one for all further ones; None: all the same.
            What was best at another length is no measure. A schedule that is fine for a short run may be too much for a
            long one, whose first run then retreats as the search's first one does.
        adaptive_sharing: whether neighbouring windows, of a hyperparameter that has at least 16, move together where
            that makes the estimated error of their hypergradient least (see `Sharing`).
        confirmations: other seeds with which the two best places, and the initial one if `polish`, are trained before
            the search ends, a plain training that ended below both in place of the second; None: 3, or as many as a
            fifth of `trainings` pays for with two places, but at least 1 where an outer step leaves enough for it. What
            comes to nothing there is replaced by the next best; where all has, the search goes on from there with what
            calms training lowered.
        polish: whether what is found must not be worse than `initial`, by mean validation loss over the confirmations.

    Raises:
        InputError: an unknown name, initial values that do not fit, a range without bounds and step size, or
            `trainings` that do not suffice for one outer step and the confirmations that were asked for.
    """

    def __init__(
        self,
        ranges: Mapping[str, Range],
        *,
        initial: Mapping[str, Tensor] | None = None,
        step_sizes: Mapping[str, float] | None = None,
        ensemble: int = 1,
        outer_steps: int | None = None,
        trainings: float | None = None,
        new_seeds: bool = True,
        lengths: Sequence[int] | None = None,
        adaptive_sharing: bool = False,
        confirmations: int | None = None,
        polish: bool = False,
    ) -> None:
        self.ranges, self._start_values, self._internal, self._first = beginning(ranges, initial, step_sizes)
        self._start = dict(self._internal)
        self.ensemble, self.outer_steps, self.trainings = ensemble, outer_steps, trainings
        self.new_seeds, self.lengths, self.adaptive_sharing = new_seeds, lengths, adaptive_sharing
        self.polish = polish
        self.outer_step, self.spent, self.rejected = 0, 0.0, 0
        self.incumbent: Evaluated | None = None
        self.start_loss = nan
        """Validation loss of the place the search began at: its own run's, then, with `polish`, its confirmations'."""
        self._steps = {n: torch.full_like(x, self._first[n]) for n, x in self._internal.items()}
        self._directions = {n: torch.zeros_like(x) for n, x in self._internal.items()}
        self._signs = {n: torch.zeros_like(x) for n, x in self._internal.items()}
        self._moves = 0
        self._places = Places()
        self._rejections = 0  # in a row
        self._failures = 0  # rounds in a row all of whose runs failed
        self._ladder: int | None = None  # whose rungs are run; None: there is none (left)
        self._falls = 0  # times that nothing was left of what was to be confirmed
        self._since_best = 0  # outer steps
        self._dearest = 0.0  # of the runs that were differentiated, in trainings
        self._candidates: list[Place] = []  # being confirmed
        self._ended = False
        if trainings is not None and not trainings >= self._expected_cost:
            raise InputError(
                f"trainings is {trainings:g}: one outer step costs about {self._expected_cost:.3g}; raise it, or lower "
                "ensemble"
            )
        needed = len(_LADDERS[0]) + self._expected_cost + (confirmations or 0) * (_CANDIDATES + polish)
        if not initial and not polish and (trainings is None or trainings >= needed):
            self._ladder = self._next_ladder(0)
        self.confirmations = self._usual_confirmations if confirmations is None else confirmations
        needed = self._expected_cost + self._confirmation_cost
        if trainings is not None and not trainings >= needed:
            raise InputError(
                f"trainings is {trainings:g}: one outer step and its confirmation cost about {needed:.3g}; raise it, "
                "or lower confirmations or ensemble"
            )

    @property
    def values(self) -> Hyperparameters:
        place = self._lacking[0].internal if self._candidates else self._internal
        return self._values(place)

    def round(self) -> tuple[Proposal, ...]:
        if self._ended:
            return ()
        if self._candidates:
            return tuple(
                Proposal(
                    self._values(c.internal),
                    _CONFIRMATION + len(c.confirmed),
                    -inf,
                    tuple(c.confirmed),
                    c.steps,
                    self._fall_above(c),
                )
                for c in self._lacking
            )
        if self._ladder is not None:
            # another seed than the first outer step's, which may be at a rung; after failures others
            seed = (_CONFIRMATION - 1 if self.new_seeds else 0) - self._failures
            rungs = self._rungs(self._ladder)
            return tuple(Proposal(self._values(rung), abs(seed), -inf, steps=self._steps_of_runs) for rung in rungs)
        first = self.outer_step * max(_LARGEST_ENSEMBLE, self.ensemble) if self.new_seeds else 0
        return tuple(
            Proposal(self.values, first + member, self._limit, steps=self._steps_of_runs)
            for member in range(self.ensemble)
        )

    def tell(self, outcomes: Sequence[Outcome | None]) -> None:
        ended = [outcome for outcome in outcomes if outcome is not None]
        self.spent += sum(outcome.cost for outcome in ended)
        self._failures = 0 if ended else self._failures + 1
        if self._candidates:
            self._take_confirmations(outcomes)
            return
        if self._ladder is not None:
            self._take_ladder(outcomes, self._ladder)
        else:
            self._take_outer_step(outcomes)
            self.outer_step += 1
        if self._is_over():
            self._begin_confirmation()

    def _rungs(self, ladder: int) -> list[Hyperparameters]:
        """The start with the learning rates of a ladder: a place for each rung within the range that differs from the
        others."""
        rungs: dict[tuple[float, ...], Hyperparameters] = {}
        for steps in _LADDERS[ladder]:
            rung = self._calmer(self._start, -steps, _is_rate)
            rungs.setdefault(tuple(torch.cat([*rung.values()]).tolist()), rung)
        return list(rungs.values())

    def _next_ladder(self, ladder: int) -> int | None:
        """The number of this ladder, if there is one and it has rungs that differ; else None."""
        exists = ladder < len(_LADDERS) and any(_is_rate(n) and r.scale == "log" for n, r in self.ranges.items())
        return ladder if exists and len(self._rungs(ladder)) > 1 else None

    def _take_ladder(self, outcomes: Sequence[Outcome | None], ladder: int) -> None:
        """Begin at the lowest rung that learned most of what the best one did: from there on derivatives tell. Where
        all came to nothing, climb down from the start, then begin at the bottom."""
        if all(outcome is None for outcome in outcomes):
            return  # once more
        rungs = self._rungs(ladder)
        if ladder == 0 and outcomes[0] is not None:
            self.start_loss = outcomes[0].val_loss
        ran = [
            (outcome.val_loss, number)
            for number, outcome in enumerate(outcomes)
            if outcome is not None and isfinite(outcome.val_loss) and not outcome.val_loss >= outcome.untrained_loss
        ]
        if not ran:
            self._ladder, self._internal = self._next_ladder(ladder + 1), rungs[-1 if ladder else 0]
            return
        loss, number = min(ran)
        untrained = fmean(o.untrained_loss for o in outcomes if o is not None)
        self._ladder = None
        self._places.untrained = untrained if isfinite(untrained) else inf
        # one run says nothing of how calm the place is
        place = Place(rungs[number], -1 - number, [loss], self._steps_of_runs, calm=False)
        place.scores = [o.judged for o in outcomes[number : number + 1] if o is not None and o.score is not None]
        self._places.tried.append(place)
        self.incumbent = self._evaluated(place)
        learned = [rungs[n] for own, n in ran if n == number or untrained - own >= _LEARNED * (untrained - loss)]
        lowest = min(learned, key=self._total_rate)
        self._internal = dict(lowest)  # that of the best rung stays as it is

    def _evaluated(self, place: Place) -> Evaluated:
        score = fmean(place.scores) if place.scores else None
        return Evaluated(self._values(place.internal), place.val_loss, place.outer_step, len(place.losses), score)

    def _total_rate(self, place: Hyperparameters) -> float:
        return sum(float(x.sum()) for name, x in place.items() if _is_rate(name))

    def _calmer(self, place: Hyperparameters, steps: float, which: Callable[[str], bool]) -> Hyperparameters:
        """A place from which some hyperparameters are lowered by a number of first steps."""
        return {
            name: self._projected(name, x - steps * self._first[name]) if which(name) else x.clone()
            for name, x in place.items()
        }

    def _take_outer_step(self, outcomes: Sequence[Outcome | None]) -> None:
        limit = self._limit
        mean = mean_outcome(outcomes)
        ended = [outcome for outcome in outcomes if outcome is not None]
        lost = any(not isfinite(o.val_loss) or o.val_loss > limit or o.hypergradients is None for o in ended)
        if not ended:
            return  # every run failed: once more
        if (
            isnan(self.start_loss)
            and not self._places.tried
            and not self._rejections
            and self._is_start(self._internal)
        ):
            self.start_loss = mean.val_loss
        if lost or mean.hypergradients is None or not _is_followable(mean.hypergradients):
            self._retreat()
            return
        self._places.untrained = mean.untrained_loss if isfinite(mean.untrained_loss) else inf
        losses = [outcome.val_loss for outcome in ended]
        place = Place(dict(self._internal), self.outer_step, losses, self._steps_of_runs)
        place.scores = [outcome.judged for outcome in ended if outcome.score is not None]
        gradients = [self._by_internal(o.hypergradients) for o in ended if o.hypergradients is not None]
        place.calm = self._move(gradients, mean.val_loss)
        best = self._places.best(self._differentiated)
        improved = best is None or self._places.score(place) < self._places.score(best)
        if not place.calm and best is not None and not improved:
            self._approach(best.internal)
        # a rung that was run here told no more of this place
        self._places.tried = [
            p for p in self._places.tried if p.outer_step >= 0 or not _are_same(p.internal, place.internal)
        ]
        self._places.tried.append(place)
        self._rejections, self._dearest = 0, max(self._dearest, mean.cost / len(ended))
        self._since_best = 0 if improved else self._since_best + 1
        if self.incumbent is None or min(self._places.comparable(self._steps_of_runs), key=self._places.merit) is place:
            self.incumbent = self._evaluated(place)
        if self._since_best >= _PATIENCE and self.ensemble < _LARGEST_ENSEMBLE:
            self.ensemble, self._since_best = min(2 * self.ensemble, _LARGEST_ENSEMBLE), 0

    def _move(self, gradients: list[Hyperparameters], loss: float) -> bool:
        """Take a step along the members' derivatives on the internal scales; returns whether none was chaotic."""
        most = max(self._places.gain(loss), abs(loss))
        chaos = {n: (_CHAOS_ALONE if r.windows == 1 else _CHAOS) * most for n, r in self.ranges.items()}
        members = {name: torch.stack([g[name] for g in gradients]) for name in self.ranges}
        reach = {name: self._steps[name].clamp(max=self._first[name]) for name in self.ranges if not _is_calming(name)}
        # NaN is wild, too
        wild = {
            name: (~(m.abs() * reach.get(name, self._first[name]) <= chaos[name])).any(0) for name, m in members.items()
        }
        means = {name: torch.where(wild[name], 0.0, m.mean(0)) for name, m in members.items()}
        followed = {name: torch.where(wild[name], 0.0, m) for name, m in members.items()}
        shared = self._share(means, followed) if self.adaptive_sharing else {}
        sizes = torch.cat([(means[name].abs() * self._first[name])[~wild[name]] for name in self.ranges])
        typical = float(sizes.median()) if len(sizes) else inf
        self._moves += 1
        for name, x in list(self._internal.items()):
            soft = min(_SOFT * abs(loss), _TYPICAL * typical / self._first[name]) + 1e-30
            direction = means[name] / (means[name].abs() + soft)
            direction = torch.where(wild[name], 1.0 if _is_calming(name) else 0.0, direction)
            direction = shared[name].average(direction) if name in shared else _smoothed(direction)
            agreement = direction.sign() * self._signs[name]
            change = torch.where(agreement > 0, _GROWTH, torch.where(agreement < 0, _SHRINKAGE, 1.0))
            if name in reach:  # nothing takes such a step back to where it can be followed but a smaller step
                change = torch.where(wild[name], _SHRINKAGE, change)
            steps = self._steps[name] * change
            self._steps[name] = steps.clamp(_SMALLEST * self._first[name], _LARGEST * self._first[name])
            self._signs[name] = torch.where(direction == 0, self._signs[name], direction.sign())
            self._directions[name] = _MEMORY * self._directions[name] + (1 - _MEMORY) * direction
            averaged = self._directions[name] / (1 - _MEMORY**self._moves)
            self._internal[name] = self._projected(name, x - self._steps[name] * averaged)
        return not any(bool(w.any()) for w in wild.values())

    def _share(self, means: Hyperparameters, members: Hyperparameters) -> dict[str, Sharing]:
        """Tie windows that are better off together, in everything that is known of them; returns their sharing by
        hyperparameter."""
        shared = {}
        for name, own in members.items():
            if split_name(name)[1] or own.shape[1] < _LEAST_SHARED:
                continue
            shared[name] = sharing = Sharing.equal(own.shape[1], 1).adapt(own)
            for known in (means, self._internal, self._steps, self._directions):
                known[name] = sharing.average(known[name])
        return shared

    def _retreat(self) -> None:
        """Go, after a run that came to nothing, nearer to where the search came from, then to its calm side."""
        self._rejections += 1
        self.rejected += 1
        before, places = dict(self._internal), self._differentiated
        if not places:
            for name in filter(_is_calming, before):
                share = self._first[name] / STEP if self.ranges[name].scale != "linear" else self._first[name]
                self._internal[name] = self._projected(name, before[name] - _FIRST_RETREAT * share)
        elif self._rejections == 1:
            self._approach(places[-1].internal)
        else:
            back = _APPROACH * (self._rejections - 1)
            self._internal = self._calmer(places[-1].internal, back, _is_calming)
        if self._rejections != 1:
            self._shorten()
        if not self.new_seeds and all(torch.equal(x, before[name]) for name, x in self._internal.items()):
            self._rejections = _REJECTIONS  # there is nowhere to go, and no other seed to try it with

    def _approach(self, place: Hyperparameters) -> None:
        """Go most of the way back to a place, and on with shorter steps."""
        self._internal = {name: place[name] + _APPROACH * (x - place[name]) for name, x in self._internal.items()}
        self._shorten()

    def _shorten(self) -> None:
        for name, steps in self._steps.items():
            self._steps[name] = (_SHORTER * steps).clamp(min=_SMALLEST * self._first[name])

    def _is_over(self) -> bool:
        if max(self._rejections, self._failures) >= _REJECTIONS or (
            self.outer_steps is not None and self.outer_step >= self.outer_steps
        ):
            return True
        if self.trainings is not None:
            return not self.affords_outer_step(self.spent)
        return self._since_best >= _PATIENCE and self.ensemble >= _LARGEST_ENSEMBLE

    def affords_outer_step(self, spent: float, run_cost: float = 0.0) -> bool:
        """Whether `trainings` pay for another outer step and the confirmation of what is found.

        Args:
            spent: trainings that have been spent.
            run_cost: what a run may cost, in trainings, where that is known to be more than the search has met with.
        """
        expected = self.ensemble * max(self._run_cost, run_cost)
        return self.trainings is None or expected + self._confirmation_cost <= self.trainings - spent

    @property
    def _run_cost(self) -> float:
        """What a run that is differentiated may cost, in trainings: the most that one has; before there is one, reverse
        mode's cost where nothing is kept."""
        return self._dearest or (GRADIENTS_PER["step"] + GRADIENTS_PER["adjoint_step"]) / GRADIENTS_PER["step"]

    @property
    def _usual_confirmations(self) -> int:
        """Number of confirmations of each candidate: as many as are usual, or as a small budget has a share for; none
        where it pays for an outer step alone."""
        trainings = inf if self.trainings is None else self.trainings
        many = max(n for n in range(1, _CONFIRMATIONS + 1) if n == 1 or n * _CANDIDATES <= _CONFIRMING * trainings)
        affordable = (trainings - self._expected_cost) / (_CANDIDATES + self.polish)
        return many if affordable >= many else int(affordable + 1e-9)

    @property
    def _expected_cost(self) -> float:
        """Expected cost of an outer step that is not rejected, in plain trainings."""
        return self.ensemble * self._run_cost + (len(_LADDERS[0]) if self._ladder is not None else 0)

    @property
    def _confirmation_cost(self) -> float:
        """Cost of the confirmations at the end of the search, in plain trainings."""
        return float(self.confirmations * (_CANDIDATES + self.polish))

    @property
    def _left(self) -> float:
        """Plain trainings that may still be spent; inf where there is no limit."""
        return inf if self.trainings is None else self.trainings - self.spent

    def _begin_confirmation(self) -> None:
        """Confirm the best places, and the start if it must not be lost."""
        standing = self._places.standing
        start = self._start_to_confirm if self.polish else []
        best = sorted(standing, key=self._places.score)[:_CANDIDATES]
        rung = next((place for place in standing if place.outer_step < 0), None)
        if rung is not None and all(rung.val_loss < place.val_loss for place in best):
            best[_CANDIDATES - 1 :] = [rung]  # whether it is as wild as it might be, other seeds tell
        chosen = [*start, *(place for place in best if not start or not self._is_start(place.internal))]
        # several by all confirmations that there are to be, one by as many as can be paid for
        while len(chosen) > 1 and len(chosen) * self.confirmations > self._left:
            chosen.pop()
        chosen = chosen if self._left >= 1 else []
        self._candidates = [replace(place, confirmed=[]) for place in chosen] if self.confirmations else []
        self._ended = not self._candidates

    @property
    def _start_to_confirm(self) -> list[Place]:
        """The place where the search began, as one of the longest runs, however it was run; none where it has
        fallen."""
        starts = [place for place in self._places.tried if self._is_start(place.internal)]
        if any(place.fallen for place in starts):
            return []
        longest = (self._places.longest if self._places.tried else max(self.lengths or (0,))) or None
        ran = next((place for place in starts if place.steps == longest), starts[0] if starts else None)
        # a run that could not be differentiated has left no place
        place = Place(dict(self._start), 0, [self.start_loss]) if ran is None else ran
        return [replace(place, steps=longest)]

    @property
    def _lacking(self) -> list[Place]:
        """Candidates that have been confirmed least often: a trial that failed keeps its candidate among them."""
        least = min((len(c.confirmed) for c in self._candidates), default=0)
        return [c for c in self._candidates if len(c.confirmed) == least]

    def _fall_above(self, candidate: Place) -> float:
        """The loss above which a confirmation speaks against a candidate. The start is what others are measured by,
        however much worse it is."""
        return inf if self.polish and self._is_start(candidate.internal) else self._limit

    def _take_confirmations(self, outcomes: Sequence[Outcome | None]) -> None:
        """Rank the candidates by confirmations alone: their own runs' losses are why they were chosen."""
        lacking, fallen = self._lacking, []
        limits = [self._fall_above(candidate) for candidate in lacking]
        for candidate, outcome, limit in zip(lacking, outcomes, limits, strict=True):
            if outcome is None:
                candidate.failures += 1
            else:
                candidate.confirmed.append(outcome.val_loss)
                if outcome.score is not None:  # the list may be another's, too
                    candidate.confirmed_scores = [*candidate.confirmed_scores, outcome.judged]
            lost = outcome is not None and not (isfinite(outcome.val_loss) and outcome.val_loss <= limit)
            if lost or candidate.failures >= _REJECTIONS:
                fallen.append(candidate)
        start = next((c for c in self._candidates if self.polish and self._is_start(c.internal)), None)
        if start is not None and start.confirmed:
            self.start_loss = start.confirmed_loss
        if self._failures >= _REJECTIONS and len(lacking) == len(self._candidates):  # whatever is trained
            self._choose()
            self._candidates, self._ended = [], True
            return
        self._let_fall(fallen)
        if not self._candidates:
            self._begin_confirmation()  # of the next best
            if self._ended:
                self._go_on()
            self._choose()
            return
        if start is not None and fallen and self._candidates == [start]:
            self._candidates += self._next_best(start)
        self._choose()
        costs = [outcome.cost for outcome in outcomes if outcome is not None]
        lacking = self._lacking
        if len(lacking[0].confirmed) >= self.confirmations or (costs and len(lacking) * max(costs) > self._left):
            self._candidates, self._ended = [], True

    def _next_best(self, start: Place) -> list[Place]:
        """Candidates in place of those that fell beside the start, as many as can be confirmed as often as it."""
        left = self._left - (self.confirmations - len(start.confirmed))
        count = _CANDIDATES if isinf(left) else min(_CANDIDATES, int(left / max(self.confirmations, 1)))
        others = [place for place in self._places.standing if not self._is_start(place.internal)]
        return [replace(place, confirmed=[]) for place in sorted(others, key=self._places.score)[: max(count, 0)]]

    def _let_fall(self, fallen: list[Place]) -> None:
        """Give candidates up, with what is known of them."""
        by_step = {c.outer_step: c.confirmed for c in fallen}
        known = {place.outer_step for place in self._places.tried}
        unknown = [replace(c, fallen=True) for c in fallen if c.outer_step not in known]
        self._places.tried = unknown + [
            replace(p, fallen=True, confirmed=list(by_step[p.outer_step])) if p.outer_step in by_step else p
            for p in self._places.tried
        ]
        self._candidates = [c for c in self._candidates if c.outer_step not in by_step]

    def _go_on(self) -> None:
        """Go on, where all that was to be confirmed has fallen, from the best of it, with what calms training
        lowered."""
        self._falls += 1
        fallen = [place for place in self._places.fallen if place.steps == self._steps_of_runs]
        if not fallen or self._falls >= _REJECTIONS:
            return
        place = min(fallen, key=self._places.score).internal
        lowered = self._calmer(place, self._falls, _is_calming)
        self._rejections = self._since_best = 0
        if self._is_over() or all(torch.equal(x, place[name]) for name, x in lowered.items()):
            return
        self._internal, self._ended = lowered, False
        self._shorten()

    def _choose(self) -> None:
        """Take for the incumbent the best of what has been confirmed most often; where nothing has, the best place that
        stands, by its own runs, else the best that has fallen, by what its confirmations told."""
        most = max((len(c.confirmed) for c in self._candidates), default=0)
        fallen = self._places.fallen
        if most:
            place = min((c for c in self._candidates if len(c.confirmed) == most), key=lambda c: c.confirmed_score)
        elif self._places.standing:
            place = min(self._places.standing, key=self._places.merit)
        elif fallen:
            place = min(fallen, key=lambda p: p.confirmed_loss)
        else:
            return
        confirmed = most > 0 or place.fallen
        loss, runs = (place.confirmed_loss, len(place.confirmed)) if confirmed else (place.val_loss, len(place.losses))
        scores = place.confirmed_scores if confirmed else place.scores
        score = fmean(scores) if scores else None
        self.incumbent = Evaluated(self._values(place.internal), loss, place.outer_step, runs, score)

    @property
    def _steps_of_runs(self) -> int | None:
        """Inner steps of the next outer step's runs; None where all runs have as many."""
        return length_of(self.outer_step, self.lengths)

    @property
    def _differentiated(self) -> list[Place]:
        """Places of outer steps whose runs were as long as the next one's, and that stand."""
        return self._places.differentiated(self._steps_of_runs)

    @property
    def _limit(self) -> float:
        """The validation loss above which the next run is rejected."""
        return self._places.limit(self._steps_of_runs)

    def _values(self, internal: Hyperparameters) -> Hyperparameters:
        """Hyperparameters' values from internal ones, within the ranges; what has not moved is, to the bit, what the
        search began with."""
        return {
            name: torch.where(x == self._start[name], self._start_values[name], self._within(name, x))
            for name, x in internal.items()
        }

    def _within(self, name: str, internal: Tensor) -> Tensor:
        return self.ranges[name].project(self.ranges[name].from_internal(internal))

    def _is_start(self, internal: Hyperparameters) -> bool:
        return _are_same(internal, self._start)

    def _projected(self, name: str, internal: Tensor) -> Tensor:
        return self.ranges[name].to_internal(self._within(name, internal))

    def _by_internal(self, hypergradients: Hyperparameters) -> Hyperparameters:
        """Hypergradients by the internal values: float64 on the CPU."""
        return {
            name: hypergradients[name].to(device="cpu", dtype=torch.float64)
            * self.ranges[name].slope(self._within(name, x))
            for name, x in self._internal.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "incumbent": None if self.incumbent is None else dict(vars(self.incumbent)),
            "tensors": {name: dict(getattr(self, name)) for name in _TENSORS},
            "scalars": {name: getattr(self, name) for name in _SCALARS},
            "places": self._places.state_dict(),
            "candidates": [deepcopy(vars(place)) for place in self._candidates],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.incumbent = None if saved["incumbent"] is None else Evaluated(**saved["incumbent"])
        for name, tensors in saved["tensors"].items():
            setattr(self, name, dict(tensors))
        for name, value in saved["scalars"].items():
            setattr(self, name, value)
        self._places.load_state_dict(saved["places"])
        self._candidates = [Place(**deepcopy(place)) for place in saved["candidates"]]


_TENSORS = ("_internal", "_steps", "_directions", "_signs")
_SCALARS = (
    "outer_step",
    "spent",
    "rejected",
    "start_loss",
    "ensemble",
    "_moves",
    "_rejections",
    "_failures",
    "_ladder",
    "_falls",
    "_since_best",
    "_dearest",
    "_ended",
)


def _smoothed(direction: Tensor) -> Tensor:
    """A direction, shape [N], each element half its own and half its neighbours': what they disagree about is mostly
    noise. At the ends an element is its own neighbour."""
    beside = torch.cat([direction[:1], direction, direction[-1:]])
    return 0.5 * direction + 0.25 * (beside[:-2] + beside[2:])


def _are_same(place: Hyperparameters, other: Hyperparameters) -> bool:
    return all(torch.equal(x, other[name]) for name, x in place.items())


def _is_followable(hypergradients: Hyperparameters) -> bool:
    """Whether any element of hypergradients says a way: those of a dead network are all zero."""
    return any(bool((g.isfinite() & (g != 0)).any()) for g in hypergradients.values())


def _is_calming(name: str, bases: Sequence[str] = ("lr", "momentum")) -> bool:
    """Whether lowering a hyperparameter calms training: values of learning rates and momentum do."""
    base, suffix = split_name(name)
    base = split_group(base)[0]
    return base in bases and (suffix in ("", "knots") or suffix.endswith("/peak")) and "one_minus" not in suffix


def _is_rate(name: str) -> bool:
    """Whether a flat name is that of values of the learning rate."""
    return _is_calming(name, ("lr",))
