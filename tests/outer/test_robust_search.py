"""`RobustSearch` on simulated training: functions of hyperparameters and a seed, with noise, cliffs and chaos."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from engine_problems import double
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runs import assert_same_state, through_a_file
from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.outer import Outcome, Proposal, RobustSearch, SearchSettings
from tune_hypergrad.outer.natural_scales import natural_range, natural_start
from tune_hypergrad.space import Range

NAN, INF = math.nan, math.inf
UNTRAINED = 2.3
TRAINING, DIFFERENTIATED = 1.0, 3.7
"""What runs cost."""

RANGES = {"lr": Range(3, 1e-4, 1.0, "log"), "momentum": Range(1, 0.0, 0.99)}
BEST_LR, BEST_MOMENTUM = 0.05, 0.9
START = {"lr": torch.full((3,), 0.01, dtype=torch.float64)}
"""With which a search begins by an outer step."""

Loss = Callable[[Mapping[str, Tensor]], Tensor]


def bowl(values: Mapping[str, Tensor]) -> Tensor:
    """0.3 at the best learning rate and momentum, more by the squares of the logarithms; 0.9 at the default start."""
    of_lr = (values["lr"].log() - math.log(BEST_LR)).square().mean()
    of_momentum = ((1 - values["momentum"]).log() - math.log(1 - BEST_MOMENTUM)).square().sum()
    return 0.3 + 0.1 * of_lr + 0.1 * of_momentum


def slope(values: Mapping[str, Tensor]) -> Tensor:
    """The better the higher the learning rate."""
    return 1.0 - 0.12 * (values["lr"].log().mean() - math.log(1e-4)) + 0.1 * (bowl(values) - 0.3)


def rate(values: Mapping[str, Tensor]) -> float:
    """The mean learning rate on its logarithmic scale."""
    return float(values["lr"].log().mean().exp())


@dataclass(frozen=True)
class Simulated:
    """Training whose loss and derivatives are known, but for their noise."""

    loss: Loss = bowl
    noise: float = 0.0
    """Of the loss, and of every derivative by the logarithm, as a standard deviation."""
    cliff: float = INF
    """The mean learning rate beyond which nothing is learned."""
    blur: float = 0.0
    """The share of it by which the cliff moves with the seed."""
    edge: float = INF
    """That beyond which training is chaotic: derivatives are random and huge, and the loss somewhat noisier."""
    harm: float = 0.0
    """By how much chaos raises the loss."""
    diverges: float = INF
    """That beyond which the loss is NaN."""
    salt: int = 0

    def run(self, proposal: Proposal) -> Outcome:
        generator = torch.Generator().manual_seed(1_000_003 * self.salt + proposal.seed)
        values = {name: v.clone().requires_grad_() for name, v in proposal.values.items()}
        loss = self.loss(values)
        names = list(values)
        gradients = torch.autograd.grad(loss, [values[name] for name in names], allow_unused=True)
        draws = torch.randn(40, generator=generator, dtype=torch.float64)
        value = float(loss.detach()) + self.noise * float(draws[0])
        noisy: dict[str, Tensor] = {}
        for place, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
            scale = proposal.values[name] if name == "lr" else 1 - proposal.values[name]
            own = draws[1 + 8 * place : 1 + 8 * place + len(scale)]
            exact = torch.zeros_like(scale) if gradient is None else gradient
            noisy[name] = exact + (0 if gradient is None else self.noise) * own / scale
            if rate(proposal.values) > self.edge:
                noisy[name] = 1e4 * own / scale
        if rate(proposal.values) > self.edge:
            value += self.harm + 0.02 * float(draws[-1])
        if rate(proposal.values) > self.cliff * (1 + self.blur * float(draws[-2].clamp(-1, 1))):
            value, noisy = UNTRAINED, {name: torch.zeros_like(g) for name, g in noisy.items()}
        if rate(proposal.values) > self.diverges:
            value, noisy = NAN, {name: torch.full_like(g, NAN) for name, g in noisy.items()}
        rejected = not (math.isfinite(value) and value <= proposal.reject_above)
        return Outcome(value, UNTRAINED, None if rejected else noisy, TRAINING if rejected else DIFFERENTIATED)


@dataclass(frozen=True)
class Unlucky(Simulated):
    """Training that confirms nothing above a mean learning rate."""

    alive: float = INF

    def run(self, proposal: Proposal) -> Outcome:
        if proposal.confirmed is not None and rate(proposal.values) > self.alive:
            return Outcome(UNTRAINED, UNTRAINED, None, TRAINING)
        return super().run(proposal)


Told = list[tuple[tuple[Proposal, ...], list[Outcome | None]]]


def driven(search: RobustSearch, run: Callable[[Proposal], Outcome | None], limit: int = 400) -> Told:
    """Run a search to its end; returns what it asked for and was told."""
    told: Told = []
    while proposals := search.round():
        told.append((proposals, [run(proposal) for proposal in proposals]))
        search.tell(told[-1][1])
        assert len(told) < limit, "the search does not end"
    assert search.finished
    return told


def found(search: RobustSearch) -> Mapping[str, Tensor]:
    assert search.incumbent is not None
    return search.incumbent.values


def confirmations_of(told: Told) -> dict[tuple[float, ...], list[float]]:
    """By values, the losses of the runs that confirm them, in their order."""
    losses: dict[tuple[float, ...], list[float]] = {}
    for proposals, outcomes in told:
        for proposal, outcome in zip(proposals, outcomes, strict=True):
            if proposal.confirmed is not None:
                key = _key(proposal.values)
                assert proposal.confirmed == tuple(losses.get(key, ()))
                losses.setdefault(key, []).append(INF if outcome is None else outcome.val_loss)
    return losses


def _key(values: Mapping[str, Tensor]) -> tuple[float, ...]:
    return tuple(torch.cat(list(values.values())).tolist())


class TestFinding:
    def test_ends_at_the_optimum_of_a_bowl_without_any_limit(self) -> None:
        search = RobustSearch(RANGES)
        told = driven(search, Simulated().run, limit=60)
        assert found(search)["lr"].tolist() == pytest.approx([BEST_LR] * 3, rel=0.05)
        assert float(found(search)["momentum"]) == pytest.approx(BEST_MOMENTUM, abs=0.01)
        assert search.incumbent is not None and search.incumbent.val_loss == pytest.approx(0.3, abs=1e-3)
        assert search.start_loss == told[0][1][0].val_loss  # type: ignore[union-attr]

    @pytest.mark.parametrize("trainings", [20, 40])
    @pytest.mark.parametrize("salt", range(5))
    def test_comes_near_it_within_a_budget_whatever_the_noise(self, salt: int, trainings: float) -> None:
        simulated = Simulated(noise=0.03, salt=salt)
        search = RobustSearch(RANGES, trainings=trainings)
        start = float(bowl(search.values)) - 0.3
        driven(search, simulated.run)
        assert float(bowl(found(search))) - 0.3 < (0.2 if trainings == 20 else 0.05) * start

    def test_windows_find_values_of_their_own(self) -> None:
        targets = double(0.1, 0.1, 0.03, 0.003, 0.003).log()

        def loss(values: Mapping[str, Tensor]) -> Tensor:
            return 0.3 + 0.1 * (values["lr"].log() - targets).square().mean()

        search = RobustSearch({"lr": Range(5, 1e-4, 1.0, "log")}, initial={"lr": double(*[0.01] * 5)})
        driven(search, Simulated(loss).run)
        assert (found(search)["lr"].log() - targets).tolist() == pytest.approx([0] * 5, abs=0.1)

    def test_a_hyperparameter_that_changes_nothing_stays(self) -> None:
        ranges = {**RANGES, "eps": Range(1, 0.0, 1.0), "weight_decay": Range(2, 1e-6, 1e-2, "log")}
        search = RobustSearch(ranges, initial={"eps": double(0.3)}, trainings=40)
        driven(search, Simulated(noise=0.02).run)
        assert found(search)["eps"].tolist() == [0.3]
        assert torch.equal(found(search)["weight_decay"], natural_start("", ranges["weight_decay"]))
        assert float(bowl(found(search))) < 0.35

    def test_one_that_changes_next_to_nothing_moves_next_to_nothing(self) -> None:
        def loss(values: Mapping[str, Tensor]) -> Tensor:
            return bowl(values) + 1e-6 * values["weight_decay"].log().sum()

        search = RobustSearch({**RANGES, "weight_decay": Range(1, 1e-6, 1e-2, "log")}, trainings=40)
        driven(search, Simulated(loss).run)
        assert float(found(search)["weight_decay"]) == pytest.approx(1e-4, rel=0.05)

    def test_a_step_that_would_change_too_much_gets_smaller_until_it_can_be_taken(self) -> None:
        def loss(values: Mapping[str, Tensor]) -> Tensor:
            return bowl(values) + 60 * (values["l2"] - 0.2).square().sum()

        search = RobustSearch({**RANGES, "l2": Range(2, 0.0, 1.0)})
        driven(search, Simulated(loss).run)
        assert found(search)["l2"].tolist() == pytest.approx([0.2, 0.2], abs=0.02)
        assert float(bowl(found(search))) < 0.4

    def test_bounds_hold(self) -> None:
        ranges = {"lr": Range(2, 1e-4, 0.01, "log"), "momentum": Range(1, 0.0, 0.5)}
        search = RobustSearch(ranges)
        for proposals, _ in driven(search, Simulated().run):
            for proposal in proposals:
                assert bool(((proposal.values["lr"] >= 1e-4) & (proposal.values["lr"] <= 0.01)).all())
                assert 0 <= float(proposal.values["momentum"]) <= 0.5
        assert found(search)["lr"].tolist() == [0.01, 0.01] and found(search)["momentum"].tolist() == [0.5]


TROUBLED = {
    "cliff": Simulated(slope, noise=0.02, cliff=0.2),
    "chaos": Simulated(slope, noise=0.02, edge=0.2),
    "chaos before a cliff": Simulated(slope, noise=0.02, edge=0.1, cliff=0.3),
    "divergence": Simulated(slope, noise=0.02, diverges=0.2),
    "cliff before the optimum": Simulated(noise=0.02, cliff=0.03),
    "chaos before the optimum": Simulated(noise=0.02, edge=0.03),
    "harmful chaos": Simulated(slope, noise=0.02, edge=0.2, harm=0.2),
    "harmful chaos before the optimum": Simulated(noise=0.02, edge=0.03, harm=0.2),
}


class TestLadder:
    """Plain trainings over the learning rate, before the first outer step."""

    @pytest.mark.parametrize(
        ("losses", "best", "begun"),
        [
            ((0.5, 0.4, 0.6), 0.04, 0.01),
            ((0.9, 0.5, 0.4), 0.16, 0.04),  # 0.01 has learned less than three quarters of what 0.16 has
            ((2.2, 1.5, 0.4), 0.16, 0.16),
            ((1.5, NAN, UNTRAINED), 0.01, 0.01),
            ((0.87, 0.4, 0.9), 0.04, 0.01),
        ],
    )
    def test_the_first_outer_step_is_at_the_lowest_rung_that_learned_most_of_it(
        self, losses: tuple[float, ...], best: float, begun: float
    ) -> None:
        search = RobustSearch(RANGES, trainings=40)
        rungs = search.round()
        assert all(p.reject_above == -INF and p.confirmed is None for p in rungs) and len({p.seed for p in rungs}) == 1
        search.tell([Outcome(loss, UNTRAINED, None, TRAINING) for loss in losses])
        assert search.spent == 3 and search.outer_step == 0 and search.start_loss == losses[0]
        assert rate(found(search)) == pytest.approx(best) and search.incumbent is not None
        assert search.incumbent.val_loss == min(loss for loss in losses if loss < UNTRAINED)
        (first,) = search.round()
        assert first.values["lr"].tolist() == pytest.approx([begun] * 3)
        assert first.reject_above == INF  # nothing has been differentiated yet

    def test_a_rung_stays_the_incumbent_until_an_outer_step_finds_better(self) -> None:
        search = RobustSearch(RANGES, trainings=40)
        search.tell([Outcome(loss, UNTRAINED, None, TRAINING) for loss in (0.5, 0.4, 0.6)])
        # a single run may have been lucky: what is calm need not be as good
        for loss, incumbent in ((0.5, 0.4), (0.47, 0.47), (0.3, 0.3)):
            (proposal,) = search.round()
            gradients = {name: -0.01 / v for name, v in proposal.values.items()}
            search.tell([Outcome(loss, UNTRAINED, gradients, DIFFERENTIATED)])
            assert search.incumbent is not None and search.incumbent.val_loss == incumbent
        (proposal,) = search.round()
        assert proposal.reject_above == pytest.approx(0.3 + 0.3 * (UNTRAINED - 0.3))

    @pytest.mark.parametrize(("confirmed", "found_rate"), [(0.41, 0.16), (0.58, 0.01)])
    def test_a_rung_that_no_outer_step_has_reached_is_confirmed_with_the_best_of_them(
        self, confirmed: float, found_rate: float
    ) -> None:
        def outcome(proposal: Proposal) -> Outcome:
            high = rate(proposal.values) == pytest.approx(0.16)
            if proposal.confirmed is not None:
                return Outcome(confirmed if high else 0.52, UNTRAINED, None, TRAINING)
            if proposal.reject_above == -INF:
                return Outcome(0.4 if high else 0.6, UNTRAINED, None, TRAINING)
            gradients = {name: torch.zeros_like(v) + 1e-9 for name, v in proposal.values.items()}
            return Outcome(0.45, UNTRAINED, gradients, DIFFERENTIATED)

        search = RobustSearch(RANGES, trainings=40)
        driven(search, outcome)
        assert search.incumbent is not None and search.incumbent.runs == 3
        assert rate(found(search)) == pytest.approx(found_rate, rel=0.1)

    @pytest.mark.parametrize("trouble", ["diverges", "cliff"])
    def test_goes_down_where_nothing_is_learned_above(self, trouble: str) -> None:
        search = RobustSearch(RANGES, trainings=40)
        simulated = replace(Simulated(), **{trouble: 0.005})
        told = driven(search, simulated.run)
        rates = [[rate(p.values) for p in proposals] for proposals, _ in told[:3]]
        assert rates[1] == pytest.approx([0.0025, 0.01 / 16, 0.01 / 64]) and rates[2] == pytest.approx([0.0025])
        assert rate(found(search)) < 0.005

    def test_a_first_outer_step_that_comes_to_nothing_is_calmed_not_taken_to_the_best_rung(self) -> None:
        search = RobustSearch(RANGES, trainings=40)
        search.tell([Simulated().run(p) for p in search.round()])
        (first,) = search.round()
        search.tell([Outcome(NAN, UNTRAINED, None, TRAINING)])
        (second,) = search.round()
        assert rate(second.values) < rate(first.values)

    @pytest.mark.parametrize(
        ("ranges", "arguments", "rungs"),
        [
            (RANGES, {"initial": {"momentum": double(0.9)}}, 1),  # whoever knows something knows better
            (RANGES, {"polish": True}, 1),  # of the start
            (RANGES, {"trainings": 6.6}, 1),
            (RANGES, {"trainings": 6.7}, 3),
            (RANGES, {"trainings": 8.6, "confirmations": 1}, 1),
            (RANGES, {"trainings": 8.7, "confirmations": 1}, 3),
            ({"lr": Range(1, 1e-4, 0.02, "log")}, {}, 3),
            ({"weight_decay": Range(1, 1e-6, 1e-2, "log")}, {}, 1),
            ({"lr": Range(1, 0.0, 1.0)}, {"step_sizes": {"lr": 0.1}}, 1),
            ({"lr/cosine/peak": Range(1, 1e-4, 1.0, "log"), "lr/cosine/warm_up": Range(1, 0.0, 0.5)}, {}, 3),
        ],
    )
    def test_is_climbed_where_nothing_is_known(
        self, ranges: Mapping[str, Range], arguments: dict[str, Any], rungs: int
    ) -> None:
        proposals = RobustSearch(ranges, **arguments).round()
        assert len(proposals) == rungs

    def test_a_rung_that_failed_is_left_out(self) -> None:
        search = RobustSearch(RANGES, trainings=40)
        search.tell([None, None, Simulated().run(search.round()[2])])
        assert rate(found(search)) == pytest.approx(0.16) and math.isnan(search.start_loss)


class TestTrouble:
    @pytest.mark.parametrize("salt", range(6))
    @pytest.mark.parametrize("case", TROUBLED)
    def test_what_is_found_is_calm_and_learns_with_every_seed(self, case: str, salt: int) -> None:
        simulated = replace(TROUBLED[case], salt=salt)
        search = RobustSearch(RANGES, trainings=40)
        start = float(simulated.loss(search.values))
        driven(search, simulated.run)
        assert search.incumbent is not None and search.incumbent.runs == 3
        fresh = [simulated.run(Proposal(found(search), seed)) for seed in range(10**6, 10**6 + 10)]
        assert all(outcome.val_loss < start for outcome in fresh)
        assert rate(found(search)) < simulated.edge or not simulated.harm
        # and something has been found
        assert float(simulated.loss(found(search))) < start - 0.15

    @pytest.mark.parametrize("salt", range(10))
    def test_at_a_cliff_that_moves_with_the_seed_what_is_confirmed_has_not_met_it(self, salt: int) -> None:
        search = RobustSearch(RANGES, trainings=40)
        told = driven(search, replace(TROUBLED["cliff"], blur=0.2, salt=salt).run)
        assert search.incumbent is not None and search.incumbent.val_loss < 0.5
        losses = confirmations_of(told).get(_key(found(search)), [])
        assert len(losses) == search.incumbent.runs and all(loss < 0.5 for loss in losses)

    @pytest.mark.parametrize("salt", range(4))
    @pytest.mark.parametrize("case", ["cliff", "divergence"])
    def test_a_rejected_run_is_not_gone_back_through(self, case: str, salt: int) -> None:
        search = RobustSearch(RANGES, trainings=40)
        told = driven(search, replace(TROUBLED[case], salt=salt).run)
        steps = [(p[0], o[0]) for p, o in told if p[0].confirmed is None and len(p) == 1]
        rejected = [(p, o) for p, o in steps if o is not None and o.hypergradients is None]
        assert search.rejected >= len(rejected) > 0
        for proposal, outcome in rejected:
            assert outcome is not None and outcome.cost == TRAINING
            assert math.isfinite(proposal.reject_above)
            assert not outcome.val_loss <= proposal.reject_above < UNTRAINED

    def test_a_loss_a_little_above_the_best_is_not_rejected(self) -> None:
        search = RobustSearch(RANGES, initial=START)
        (first,) = search.round()
        assert first.reject_above == INF
        search.tell([Simulated().run(first)])
        (second,) = search.round()
        best = float(bowl(first.values))
        assert best < second.reject_above < UNTRAINED
        assert second.reject_above - best == pytest.approx(0.3 * (UNTRAINED - best))

    @pytest.mark.parametrize("salt", range(5))
    def test_a_start_that_has_learned_next_to_nothing_is_left_whatever_the_noise(self, salt: int) -> None:
        """Another seed changes the loss by more than training has."""

        def loss(values: Mapping[str, Tensor]) -> Tensor:
            return UNTRAINED * (1 - torch.exp(-1.5 * bowl(values)))

        def run(proposal: Proposal) -> Outcome:
            generator = torch.Generator().manual_seed(100 * salt + proposal.seed)
            exact = Simulated(loss).run(proposal._replace(reject_above=INF))
            value = exact.val_loss + 0.05 * float(torch.randn((), generator=generator))
            rejected = value > proposal.reject_above
            return exact._replace(val_loss=value, hypergradients=None if rejected else exact.hypergradients)

        search = RobustSearch(RANGES, initial={"lr": double(3e-4, 3e-4, 3e-4), "momentum": double(0.0)}, trainings=60)
        start = float(loss(search.values))
        assert UNTRAINED - start < 0.15
        driven(search, run)
        assert float(loss(found(search))) < 0.6 * UNTRAINED

    @pytest.mark.parametrize("salt", range(3))
    @pytest.mark.parametrize("trouble", ["diverges", "cliff"])
    def test_a_start_that_comes_to_nothing_is_calmed(self, trouble: str, salt: int) -> None:
        simulated = replace(Simulated(noise=0.02, salt=salt), **{trouble: 0.2})
        search = RobustSearch(RANGES, initial={"lr": double(0.9, 0.9, 0.9)}, trainings=40)
        told = driven(search, simulated.run)
        assert search.rejected >= 1 and float(bowl(found(search))) < 0.35
        first, second = told[0][0][0].values, told[1][0][0].values
        assert bool((second["lr"] < first["lr"]).all()) and float(second["momentum"]) < float(first["momentum"])
        assert search.start_loss == UNTRAINED if trouble == "cliff" else math.isnan(search.start_loss)

    def test_a_start_that_cannot_be_calmed_ends_the_search(self) -> None:
        for new_seeds, runs in ((False, 1), (True, 6)):  # another seed may have been luckier
            search = RobustSearch({"weight_decay": Range(1, 1e-6, 1e-2, "log")}, new_seeds=new_seeds)
            told = driven(search, lambda p: Outcome(NAN, UNTRAINED, None, 1.0), limit=7)
            assert search.incumbent is None and search.outer_step == len(told) == search.rejected == runs

    def test_one_bad_seed_does_not_end_a_search_without_anything_that_calms(self) -> None:
        def run(proposal: Proposal) -> Outcome:
            off = proposal.values["weight_decay"].log() - math.log(1e-3)
            if proposal.seed == 0:
                return Outcome(NAN, UNTRAINED, None, 1.0)
            gradient = {"weight_decay": 0.2 * off / proposal.values["weight_decay"]}
            return Outcome(0.5 + 0.1 * float(off**2), UNTRAINED, gradient, DIFFERENTIATED)

        search = RobustSearch({"weight_decay": Range(1, 1e-6, 1e-2, "log")}, trainings=50)
        driven(search, run)
        assert float(found(search)["weight_decay"]) == pytest.approx(1e-3, rel=0.3)

    def test_a_search_that_only_diverges_ends(self) -> None:
        search = RobustSearch(RANGES)
        driven(search, lambda p: Outcome(NAN, UNTRAINED, None, 1.0), limit=9)  # two ladders among them
        assert search.incumbent is None and search.finished

    @pytest.mark.parametrize("arguments", [{}, {"trainings": 40}, {"ensemble": 2}])
    def test_a_search_all_of_whose_runs_fail_ends(self, arguments: dict[str, Any]) -> None:
        search = RobustSearch(RANGES, **arguments)
        told = driven(search, lambda p: None, limit=7)
        assert search.incumbent is None and search.spent == 0
        seeds = [{p.seed for p in proposals} for proposals, _ in told]
        assert len(set().union(*seeds)) == sum(map(len, seeds))  # it may have been the seed's fault

    @pytest.mark.parametrize("failing", [0, 1, 2, 5, 12])
    def test_one_run_that_fails_is_made_up_for(self, failing: int) -> None:
        search, runs = RobustSearch(RANGES, trainings=40, ensemble=2), []

        def run(proposal: Proposal) -> Outcome | None:
            runs.append(proposal)
            return None if len(runs) - 1 == failing else Simulated().run(proposal)

        driven(search, run)
        assert float(bowl(found(search))) < 0.45

    @pytest.mark.parametrize("unknown", [INF, NAN])
    def test_nothing_needs_to_be_known_of_the_untrained_model(self, unknown: float) -> None:
        """Somebody's own trainable may not report it, and some have derivatives that are NaN."""

        def run(proposal: Proposal) -> Outcome:
            outcome = Simulated(noise=0.01).run(proposal)
            gradients = dict(outcome.hypergradients or {})
            if proposal.seed == 8:
                gradients["lr"] = double(NAN, INF, -INF)
            return outcome._replace(untrained_loss=unknown, hypergradients=gradients)

        search = RobustSearch(RANGES, trainings=40)
        for proposals, _ in driven(search, run):
            for proposal in proposals:
                assert all(bool(v.isfinite().all()) for v in proposal.values.values())
                assert proposal.reject_above in (INF, -INF)
        assert float(bowl(found(search))) < 0.35

    def test_a_run_that_ignores_the_limit_is_rejected_all_the_same(self) -> None:
        """Somebody's own trainable differentiates whatever it is told."""
        cliff = replace(TROUBLED["cliff"], salt=1)

        def run(proposal: Proposal) -> Outcome:
            return cliff.run(proposal._replace(reject_above=INF))._replace(cost=DIFFERENTIATED)

        search = RobustSearch(RANGES, trainings=60)
        driven(search, run)
        assert search.rejected > 0 and rate(found(search)) < 0.24

    def test_a_calming_direction_is_taken_where_derivatives_are_chaotic(self) -> None:
        search = RobustSearch(RANGES, initial=START)
        (proposal,) = search.round()
        gradients = {"lr": double(-1e9, -1e9, -1e9), "momentum": double(-1e9)}  # which say: upwards
        search.tell([Outcome(0.5, UNTRAINED, gradients, DIFFERENTIATED)])
        (following,) = search.round()
        for name, values in following.values.items():
            assert bool((values < proposal.values[name]).all())


class TestBudget:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        trainings=st.floats(9.7, 60),
        noise=st.floats(0, 0.2),
        salt=st.integers(0, 10**6),
        edge=st.sampled_from([INF, 0.05, 0.2]),
        cliff=st.sampled_from([INF, 0.02, 0.2]),
        ensemble=st.integers(1, 3),
        confirmations=st.integers(0, 3),
        failing=st.sampled_from([0, 5, 3]),
        alive=st.sampled_from([INF, 0.1, 0.005]),
        polish=st.booleans(),
    )
    def test_is_never_exceeded(
        self,
        trainings: float,
        noise: float,
        salt: int,
        edge: float,
        cliff: float,
        ensemble: int,
        confirmations: int,
        failing: int,
        alive: float,
        polish: bool,
    ) -> None:
        simulated = Unlucky(noise=noise, salt=salt, edge=edge, cliff=cliff, alive=alive)
        given: dict[str, Any] = {"ensemble": ensemble, "confirmations": confirmations, "polish": polish}
        try:
            search = RobustSearch(RANGES, trainings=trainings, **given)
        except InputError:
            assert trainings < ensemble * DIFFERENTIATED + (2 + polish) * confirmations
            return
        count = 0

        def run(proposal: Proposal) -> Outcome | None:
            nonlocal count
            count += 1
            return None if failing and count % failing == 0 else simulated.run(proposal)

        told = driven(search, run)
        spent = sum(outcome.cost for _, outcomes in told for outcome in outcomes if outcome is not None)
        assert search.spent == pytest.approx(spent) and spent <= trainings + 1e-9

    def test_runs_that_cost_more_than_expected_are_counted_on_from_the_first_on(self) -> None:
        search = RobustSearch(RANGES, trainings=60)
        told = driven(search, lambda p: Simulated(noise=0.1).run(p)._replace(cost=6.5 if p.confirmed is None else 1.3))
        assert search.spent <= 60 and len(told) >= 8

    def test_outer_steps_are_a_limit(self) -> None:
        search = RobustSearch(RANGES, outer_steps=4, confirmations=2, initial=START)
        told = driven(search, Simulated().run)
        assert search.outer_step == 4 and len(told) == 4 + 2
        assert [proposals[0].confirmed is None for proposals, _ in told] == [True] * 4 + [False] * 2

    def test_more_seeds_are_averaged_where_nothing_gets_better(self) -> None:
        for ensemble, sizes in ((1, [1, 2, 4]), (3, [3, 4]), (6, [6])):
            search = RobustSearch(RANGES, ensemble=ensemble, initial=START)
            told = driven(search, lambda p: Outcome(0.5, UNTRAINED, {"lr": double(1, 1, 1), "momentum": double(1)}))
            rounds = [[p.seed for p in proposals] for proposals, _ in told if proposals[0].confirmed is None]
            assert list(dict.fromkeys(map(len, rounds))) == sizes
            assert len({seed for seeds in rounds for seed in seeds}) == sum(map(len, rounds))  # all of them new

    def test_the_same_seeds_where_that_is_asked_for(self) -> None:
        search = RobustSearch(RANGES, new_seeds=False, outer_steps=4, ensemble=2, confirmations=2, initial=START)
        told = driven(search, Simulated().run)
        assert [[p.seed for p in proposals] for proposals, _ in told[:4]] == [[0, 1]] * 4
        assert {p.seed for proposals, _ in told[4:] for p in proposals}.isdisjoint({0, 1})


class TestConfirmation:
    @pytest.mark.parametrize("salt", range(5))
    def test_the_incumbent_is_the_best_by_confirmations_alone(self, salt: int) -> None:
        search = RobustSearch(RANGES, trainings=40)
        told = driven(search, Simulated(noise=0.05, salt=salt).run)
        confirmed = confirmations_of(told)
        assert 1 <= len(confirmed) <= 2 and search.incumbent is not None
        means = {key: sum(losses) / 3 for key, losses in confirmed.items() if len(losses) == 3}
        assert search.incumbent.val_loss == pytest.approx(means[_key(search.incumbent.values)])
        assert search.incumbent.val_loss == pytest.approx(min(means.values())) and search.incumbent.runs == 3

    def test_candidates_have_the_same_seeds_one_after_the_other(self) -> None:
        search = RobustSearch(RANGES, outer_steps=5)
        rounds = [p for p, _ in driven(search, Simulated(noise=0.05).run) if p[0].confirmed is not None]
        assert [len({p.seed for p in proposals}) for proposals in rounds] == [1, 1, 1]
        assert len({proposals[0].seed for proposals in rounds}) == 3
        assert all(p.reject_above == -INF for proposals in rounds for p in proposals)

    def confirmed_with(self, outcome: Callable[[int, Proposal], Outcome | None], **arguments: Any) -> RobustSearch:
        """A search whose confirmations give what `outcome` says of the candidate's place in the ranking by own runs."""
        search, own = RobustSearch(RANGES, **{"outer_steps": 5, **arguments}), {}

        def run(proposal: Proposal) -> Outcome | None:
            if proposal.confirmed is None:
                own[_key(proposal.values)] = float(bowl(proposal.values))
                return Simulated().run(proposal)
            return outcome(sorted(own, key=own.__getitem__).index(_key(proposal.values)), proposal)

        driven(search, run)
        self.ranking = sorted(own, key=own.__getitem__)
        return search

    @pytest.mark.parametrize("lost", [Outcome(NAN, UNTRAINED, None), Outcome(2.29, UNTRAINED, None)])
    def test_a_candidate_that_dies_is_none_any_more(self, lost: Outcome | None) -> None:
        for seed in range(3):

            def outcome(place: int, proposal: Proposal, seed: int = seed) -> Outcome | None:
                return lost if place == 0 and len(proposal.confirmed or ()) == seed else Outcome(0.4, UNTRAINED, None)

            search = self.confirmed_with(outcome)
            assert _key(found(search)) == self.ranking[1] and search.incumbent is not None
            assert search.incumbent.runs == 3 and search.incumbent.val_loss == pytest.approx(0.4)

    @pytest.mark.parametrize("failures", [1, 3, 5])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_a_trial_that_fails_says_nothing_against_its_candidate(self, seed: int, failures: int) -> None:
        tried: list[tuple[int, Proposal]] = []

        def outcome(place: int, proposal: Proposal) -> Outcome | None:
            tried.append((place, proposal))
            here = [p for number, p in tried if number == 0 and len(p.confirmed or ()) == seed]
            fails = place == 0 and len(proposal.confirmed or ()) == seed and len(here) <= failures
            return None if fails else Outcome(0.4 + 0.01 * place, UNTRAINED, None)

        search = self.confirmed_with(outcome)
        assert _key(found(search)) == self.ranking[0] and search.incumbent is not None
        assert search.incumbent.runs == 3 and search.incumbent.val_loss == pytest.approx(0.4)
        # the other candidate is not trained again meanwhile, and each seed is the one that had been lacking
        assert len(tried) == 6 + failures
        assert [len(p.confirmed or ()) for place, p in tried if place == 1] == [0, 1, 2]

    def test_one_whose_trials_always_fail_is_none_any_more(self) -> None:
        tried = []

        def outcome(place: int, proposal: Proposal) -> Outcome | None:
            tried.append(place)
            return None if place == 0 else Outcome(0.4, UNTRAINED, None)

        search = self.confirmed_with(outcome)
        assert _key(found(search)) == self.ranking[1] and search.incumbent is not None and search.incumbent.runs == 3
        assert tried.count(0) == 6

    def test_runs_are_told_above_what_loss_they_speak_against_their_candidate(self) -> None:
        for polish in (False, True):
            initial = {"lr": double(1e-4, 1e-4, 1e-4), "momentum": double(0.0)}
            search = RobustSearch(RANGES, outer_steps=5, polish=polish, initial=initial)
            limits: dict[bool, set[float]] = {True: set(), False: set()}
            for proposals, _ in driven(search, Simulated().run):
                for proposal in proposals:
                    if proposal.confirmed is None:
                        assert proposal.fall_above == INF
                    else:
                        limits[_key(proposal.values) == _key(initial)].add(proposal.fall_above)
            best = min(float(bowl(place)) for place in self.places_of(search))
            assert list(limits[False]) == pytest.approx([best + 0.3 * (UNTRAINED - best)])
            assert limits[True] == ({INF} if polish else set())

    def places_of(self, search: RobustSearch) -> list[Mapping[str, Tensor]]:
        return [search._values(place.internal) for place in search._places.tried]

    @pytest.mark.parametrize("limits", [{"trainings": 60}, {}])
    def test_where_none_stands_the_search_goes_on_from_there_calmed(self, limits: dict[str, Any]) -> None:
        """Every run that is differentiated has luck; with other seeds nothing above a rate learns."""
        dead, asked = 0.008, []

        def run(proposal: Proposal) -> Outcome:
            asked.append(proposal)
            confirming = [p for p in asked if p.confirmed is not None]
            dies = rate(proposal.values) > dead if proposal.confirmed is not None else not confirming and len(asked) > 4
            return Outcome(UNTRAINED, UNTRAINED, None, TRAINING) if dies else Simulated().run(proposal)

        search = RobustSearch(RANGES, initial=START, **limits)
        told = driven(search, run)
        first = next(i for i, (proposals, _) in enumerate(told) if proposals[0].confirmed is not None)
        assert any(proposals[0].confirmed is None for proposals, _ in told[first:])
        again = next(i for i in range(first, len(told)) if told[i][0][0].confirmed is None)
        assert told[again][0][0].reject_above == INF  # what has fallen is no measure
        assert search.incumbent is not None and search.spent <= limits.get("trainings", INF)
        if rate(found(search)) <= dead:
            assert search.incumbent.runs == 3 and search.incumbent.val_loss < 1
        else:
            assert search.incumbent.val_loss == UNTRAINED

    @pytest.mark.parametrize("loss", [NAN, UNTRAINED])
    @pytest.mark.parametrize("limits", [{"outer_steps": 3}, {"trainings": 20}, {}])
    def test_where_everything_falls_luck_is_not_taken_for_the_outcome(
        self, loss: float, limits: dict[str, Any]
    ) -> None:
        def run(proposal: Proposal) -> Outcome:
            return Simulated().run(proposal) if proposal.confirmed is None else Outcome(loss, UNTRAINED, None, TRAINING)

        search = RobustSearch(RANGES, **limits)
        driven(search, run)
        assert search.incumbent is not None
        standing = [place for place in search._places.tried if not place.fallen]
        if standing:  # which there was nothing left to confirm with
            assert _key(found(search)) in {_key(search._values(place.internal)) for place in standing}
        else:
            assert search.incumbent.val_loss == (INF if math.isnan(loss) else loss)

    def test_where_all_die_the_next_best_are_confirmed(self) -> None:
        def outcome(place: int, proposal: Proposal) -> Outcome:
            return Outcome(2.29 if place < 3 and len(proposal.confirmed or ()) == 1 else 0.4, UNTRAINED, None)

        search = self.confirmed_with(outcome)
        assert _key(found(search)) == self.ranking[3] and search.incumbent is not None and search.incumbent.runs == 3

    def test_within_the_budget_that_is_left(self) -> None:
        def outcome(place: int, proposal: Proposal) -> Outcome:
            return Outcome(2.29 if place < 2 else 0.4, UNTRAINED, None)

        search = self.confirmed_with(outcome, outer_steps=None, trainings=5 * 3.7 + 6)
        assert search.spent <= 5 * 3.7 + 6
        assert _key(found(search)) not in self.ranking[:2]

    def test_a_round_that_failed_altogether_is_run_again(self) -> None:
        failed = []

        def outcome(place: int, proposal: Proposal) -> Outcome | None:
            if len(failed) < 4:
                failed.append(proposal)
                return None
            return Outcome(0.4, UNTRAINED, None)

        search = self.confirmed_with(outcome)
        assert search.incumbent is not None and search.incumbent.runs == 3
        assert len({p.seed for p in failed}) == 1

    def test_where_they_always_fail_the_search_ends(self) -> None:
        search = self.confirmed_with(lambda place, proposal: None)
        assert search.finished and search.incumbent is not None and search.incumbent.runs == 1

    def test_none_are_asked_for(self) -> None:
        search = RobustSearch(RANGES, outer_steps=5, confirmations=0, initial=START)
        told = driven(search, Simulated(noise=0.05).run)
        best = min((o[0].val_loss, i) for i, (_, o) in enumerate(told) if o[0] is not None)
        assert search.incumbent is not None
        assert (search.incumbent.val_loss, search.incumbent.outer_step) == best


class TestPolish:
    @pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
    @pytest.mark.parametrize("salt", range(5))
    def test_the_outcome_is_not_worse_than_the_start_on_the_same_seeds(self, salt: int, noise: float) -> None:
        initial = {"lr": double(0.06, 0.05, 0.04), "momentum": double(0.9)}  # next to nothing is to be gained
        search = RobustSearch(RANGES, initial=initial, polish=True, trainings=40)
        told = driven(search, Simulated(noise=noise, salt=salt).run)
        assert all(torch.equal(told[0][0][0].values[name], v) for name, v in initial.items())  # to the bit
        confirmed = confirmations_of(told)
        start, outcome = confirmed[_key(initial)], confirmed[_key(found(search))]
        assert len(start) == len(outcome) == 3 and sum(outcome) <= sum(start)
        assert search.start_loss == pytest.approx(sum(start) / 3) and search.incumbent is not None
        assert search.incumbent.val_loss <= search.start_loss

    def test_a_start_that_is_one_of_the_best_is_confirmed_once(self) -> None:
        initial = {"lr": double(0.05, 0.051, 0.05), "momentum": double(0.9)}
        search = RobustSearch(RANGES, initial=initial, polish=True, outer_steps=3)
        told = driven(search, Simulated(lambda values: 1.0 + bowl(values)).run)
        for proposals, _ in told[3:]:
            assert len(proposals) == 2 and len({_key(p.values) for p in proposals}) == 2
        assert _key(found(search)) == _key(initial) and search.incumbent is not None
        assert search.start_loss == search.incumbent.val_loss

    def test_a_start_far_from_the_best_is_measured_to_the_end(self) -> None:
        initial = {"lr": double(1e-4, 1e-4, 1e-4), "momentum": double(0.0)}
        search = RobustSearch(RANGES, initial=initial, polish=True, trainings=60)
        told = driven(search, Simulated().run)
        assert len(confirmations_of(told)[_key(initial)]) == 3
        assert search.start_loss == pytest.approx(float(bowl(initial)))
        assert search.incumbent is not None and search.incumbent.val_loss < 0.5 * search.start_loss

    def test_a_start_whose_run_was_shorter_is_confirmed_at_full_length(self) -> None:
        initial = {"lr": double(0.05, 0.051, 0.05), "momentum": double(0.9)}
        search = RobustSearch(RANGES, initial=initial, polish=True, outer_steps=4, lengths=[10, 100])
        told = driven(search, Simulated(noise=0.1).run)
        assert [proposals[0].steps for proposals, _ in told[:3]] == [10, 100, 100]
        assert all(p.steps == 100 for proposals, _ in told[4:] for p in proposals)
        start = confirmations_of(told)[_key(initial)]
        assert len(start) == 3 and search.incumbent is not None and search.incumbent.val_loss <= sum(start) / 3

    def test_a_bad_seed_does_not_make_a_start_worse_than_it_is(self) -> None:
        """One loss of the start's is far above the limit, and its mean still the lowest."""
        initial = {"lr": double(0.05, 0.051, 0.05), "momentum": double(0.9)}

        def run(proposal: Proposal) -> Outcome:
            if proposal.confirmed is None:
                return Simulated().run(proposal)
            is_start = _key(proposal.values) == _key(initial)
            return Outcome((0.0, 0.95, 0.0)[len(proposal.confirmed)] if is_start else 0.7, UNTRAINED, None)

        search = RobustSearch(RANGES, initial=initial, polish=True, outer_steps=3)
        driven(search, run)
        assert _key(found(search)) == _key(initial)

    @pytest.mark.parametrize("limits", [{"outer_steps": 6}, {"outer_steps": 6, "trainings": 60}])
    @pytest.mark.parametrize("dying", [2, 3])
    def test_where_all_but_the_start_die_the_next_best_are_measured_by_it(
        self, dying: int, limits: dict[str, Any]
    ) -> None:
        own: dict[tuple[float, ...], float] = {}

        def run(proposal: Proposal) -> Outcome:
            if proposal.confirmed is None:
                own[_key(proposal.values)] = float(bowl(proposal.values))
                return Simulated().run(proposal)
            place = sorted(own, key=own.__getitem__).index(_key(proposal.values))
            dies = place < dying and len(proposal.confirmed) == 1
            return Outcome(UNTRAINED if dies else float(bowl(proposal.values)), UNTRAINED, None, TRAINING)

        search = RobustSearch(RANGES, polish=True, **limits)
        told = driven(search, run)
        first = _key(told[0][0][0].values)
        assert _key(found(search)) == sorted(own, key=own.__getitem__)[dying] != first
        assert search.incumbent is not None and search.incumbent.runs == 3
        assert len(confirmations_of(told)[first]) == 3

    @pytest.mark.parametrize("others", [0.7, 0.4])
    def test_a_start_that_could_not_be_differentiated_is_confirmed_all_the_same(self, others: float) -> None:
        """It trains well, and its derivatives are NaN."""
        initial = {"lr": double(0.3, 0.3, 0.3), "momentum": double(0.9)}

        def run(proposal: Proposal) -> Outcome:
            is_start = _key(proposal.values) == _key(initial)
            if proposal.confirmed is not None:
                return Outcome(0.5 if is_start else others, UNTRAINED, None, TRAINING)
            if is_start:
                nans = {name: torch.full_like(v, NAN) for name, v in proposal.values.items()}
                return Outcome(0.5, UNTRAINED, nans, DIFFERENTIATED)
            return Simulated().run(proposal)

        search = RobustSearch(RANGES, initial=initial, polish=True, trainings=40)
        told = driven(search, run)
        assert search.rejected > 0 and len(confirmations_of(told)[_key(initial)]) == 3
        assert search.start_loss == pytest.approx(0.5) and search.incumbent is not None
        assert (_key(found(search)) == _key(initial)) == (others > 0.5)
        assert search.incumbent.val_loss == pytest.approx(min(others, 0.5)) and search.incumbent.runs == 3

    def test_a_start_is_confirmed_where_nothing_was_differentiated(self) -> None:
        def run(proposal: Proposal) -> Outcome:
            return Outcome(0.5, UNTRAINED, {n: torch.zeros_like(v) for n, v in proposal.values.items()}, 1.0)

        search = RobustSearch(RANGES, polish=True, lengths=[10, 100])
        told = driven(search, run)
        assert search.incumbent is not None and search.incumbent.runs == 3
        assert _key(found(search)) == _key(told[0][0][0].values)
        assert all(p.steps == 100 for proposals, _ in told for p in proposals if p.confirmed is not None)

    def test_a_start_that_diverges_whatever_the_seed_is_given_up(self) -> None:
        initial = {"lr": double(0.9, 0.9, 0.9), "momentum": double(0.9)}
        search = RobustSearch(RANGES, initial=initial, polish=True, trainings=40)
        driven(search, Simulated(diverges=0.5).run)
        assert search.incumbent is not None and search.incumbent.val_loss < 1 and search.start_loss == INF
        only = RobustSearch(RANGES, initial=initial, polish=True)
        driven(only, lambda p: Outcome(NAN, UNTRAINED, None, 1.0), limit=8)
        assert only.incumbent is None

    def test_a_start_below_the_floor_of_the_search_is_trained_as_it_is(self) -> None:
        ranges = {"lr": Range(2, 0.0, 1.0), "momentum": Range(1, 0.0, 0.99)}
        initial = {"lr": double(0.0, 0.1), "momentum": double(0.9)}
        (proposal,) = RobustSearch(ranges, initial=initial, polish=True).round()
        assert all(torch.equal(proposal.values[name], v) for name, v in initial.items())


@pytest.mark.parametrize(
    ("arguments", "simulated"),
    [
        ({"trainings": 40}, Simulated(slope, noise=0.02, cliff=0.2)),
        ({"outer_steps": 6, "ensemble": 2, "new_seeds": False}, Simulated(noise=0.02, edge=0.05)),
        ({"trainings": 40, "polish": True, "initial": {"lr": double(0.1, 0.2, 0.05)}}, Simulated(noise=0.05)),
        ({"initial": {"lr": double(0.9, 0.9, 0.9)}, "trainings": 30}, Simulated(noise=0.05, diverges=0.3)),
        (
            {"initial": {"lr": double(0.9, 0.9, 0.9)}, "trainings": 40, "polish": True},
            Simulated(noise=0.05, diverges=0.3),
        ),
        ({"outer_steps": 9}, Unlucky(noise=0.02, alive=0.01)),
        ({"ensemble": 4, "outer_steps": 20}, Unlucky(alive=0.004)),
    ],
    ids=["cliff", "ensemble", "polish", "divergence", "polished divergence", "falls", "going on"],
)
def test_saved_and_restored_at_every_tell(arguments: dict[str, Any], simulated: Simulated) -> None:
    """A search that goes on from a file asks for the same runs, to the bit."""

    def fresh() -> RobustSearch:
        return RobustSearch(RANGES, **arguments)

    def step(search: RobustSearch) -> None:
        outcomes: list[Outcome | None] = [simulated.run(proposal) for proposal in search.round()]
        if search.outer_step == 2 and not search.rejected:
            outcomes = [None] * len(outcomes)
        confirming = [candidate for candidate in search._candidates if len(candidate.confirmed) == 1]
        if confirming and not any(candidate.failures for candidate in confirming):
            outcomes[-1] = None
        search.tell(outcomes)
        states.append(search.state_dict())

    states: list[dict[str, Any]] = []
    asked, search = [], fresh()
    start = search.state_dict()
    while not search.finished:
        asked.append([tuple(proposal) for proposal in search.round()])
        step(search)
        assert len(asked) < 120
    final = through_a_file(states[-1])
    for begun, state in enumerate([start, *states][: len(asked)]):
        before = through_a_file(state)
        for form in (before, state):
            resumed, later = fresh(), []
            resumed.load_state_dict(form)
            assert resumed.outer_step == state["scalars"]["outer_step"]
            while not resumed.finished:
                later.append([tuple(proposal) for proposal in resumed.round()])
                step(resumed)
            assert_same_state(later, asked[begun:])
            assert repr(resumed.state_dict()) == repr(final)  # NaN equals itself
        assert repr(state) == repr(through_a_file(state))
    assert len(final["places"]["tried"]) > 1
    if isinstance(simulated, Unlucky):
        assert any(place["fallen"] for place in final["places"]["tried"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial": {"lrr": double(0.1)}}, "'lrr' is not among the tuned hyperparameters: lr, momentum"),
        ({"step_sizes": {"beta1": 0.1}}, "'beta1' is not among the tuned hyperparameters: lr, momentum"),
        ({"initial": {"lr": double(0.1)}}, r"initial 'lr' has shape \[1\]: it has 3 windows"),
        ({"initial": {"lr": double(0.1, 0.1, 2.0)}}, r"it must lie in \[0.0001, 1\]"),
        ({"step_sizes": {"lr": 0.0}}, "'lr' needs a finite step size above 0: pass it in step_sizes"),
        ({"step_sizes": {"lr": INF}}, "'lr' needs a finite step size above 0"),
        ({"step_sizes": {"momentum": NAN}}, "'momentum' needs a finite step size above 0"),
        (
            {"trainings": 9, "confirmations": 3},
            "trainings is 9: one outer step and its confirmation cost about 9.7; raise it, or lower",
        ),
        ({"trainings": 13, "ensemble": 2, "confirmations": 3}, "cost about 13.4"),
        ({"trainings": 10, "polish": True, "confirmations": 3}, "cost about 12.7"),
        ({"trainings": 3.6}, "trainings is 3.6: one outer step costs about 3.7; raise it, or lower ensemble"),
        ({"trainings": 7, "ensemble": 2}, "one outer step costs about 7.4"),
        ({"trainings": NAN}, "trainings is nan"),
        ({"trainings": -INF}, "trainings is -inf"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        RobustSearch(RANGES, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "confirmations"),
    [
        ({}, 3),
        ({"trainings": 30}, 3),
        ({"trainings": 29}, 2),
        ({"trainings": 19}, 1),
        ({"trainings": 5.7}, 1),
        ({"trainings": 3.7}, 0),
        ({"trainings": 6.7, "polish": True}, 1),
        ({"trainings": 6.6, "polish": True}, 0),
        ({"trainings": 9.7, "ensemble": 2}, 1),
        ({"trainings": 50, "confirmations": 5}, 5),
    ],
)
def test_as_many_confirmations_as_can_be_paid_for(arguments: dict[str, Any], confirmations: int) -> None:
    search = RobustSearch(RANGES, **arguments)
    assert search.confirmations == confirmations
    if "trainings" in arguments:
        driven(search, Simulated().run)
        assert search.spent <= arguments["trainings"] and search.incumbent is not None


def test_a_range_without_bounds_needs_a_step_size() -> None:
    with pytest.raises(InputError, match="'h' needs a finite step size above 0: pass it in step_sizes"):
        RobustSearch({"h": Range(1, -INF, INF)})

    def loss(values: Mapping[str, Tensor]) -> Tensor:
        return 0.3 + 0.1 * (values["h"] - 3).square().sum()

    search = RobustSearch({"h": Range(1, -INF, INF)}, step_sizes={"h": 1.0})
    while proposals := search.round():
        search.tell(
            [Outcome(float(loss(p.values)), UNTRAINED, {"h": 0.2 * (p.values["h"] - 3)}, 3.7) for p in proposals]
        )
    assert float(found(search)["h"]) == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "robus"}, "unknown rule 'robus': choose one of robust, line-search, paper; did you mean 'robust'"),
        ({"update": "sign"}, "update belongs to rule='paper': drop it, or set the rule"),
        ({"rule": "paper", "trainings": 40}, "trainings belongs to rule='robust'"),
        ({"rule": "paper", "polish": False}, "polish belongs to rule='robust'"),
        ({"ensemble": 0}, "ensemble is 0: it must be a whole number of at least 1"),
        ({"ensemble": None}, "ensemble is None"),
        ({"ensemble": True}, "ensemble is True"),
        ({"outer_steps": 1.5}, "outer_steps is 1.5"),
        ({"confirmations": -1}, "confirmations is -1: it must be a whole number of at least 0"),
        ({"trainings": "40"}, "trainings is '40': give a number"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        SearchSettings(**settings)
    assert "\n" not in str(caught.value)


def test_settings_make_the_search_of_their_rule() -> None:
    assert isinstance(SearchSettings().search(RANGES), RobustSearch)
    paper = SearchSettings(rule="paper", update="adam", outer_steps=3).search(RANGES)
    assert not isinstance(paper, RobustSearch) and paper.values["momentum"].tolist() == [0]
    polished = SearchSettings(confirmations=1, polish=False).search(RANGES, polish=True)
    assert isinstance(polished, RobustSearch) and polished.polish and polished.confirmations == 1


LINEAR, WIDE = Range(2, 0.0, 1.0), Range(1, 0.0, 0.99)


class TestScales:
    @pytest.mark.parametrize("name", ["lr", "lr/knots", "lr/cosine/peak", "lr/wsd/peak", "weight_decay"])
    def test_rates_are_searched_by_their_logarithm(self, name: str) -> None:
        assert natural_range(name, LINEAR) == Range(2, 1e-4, 1.0, "log")
        assert natural_range(name, Range(1, 0.01, 10.0)) == Range(1, 0.01, 10.0, "log")
        assert natural_range(name, Range(1, 1e-6, 10.0, "log")) == Range(1, 1e-6, 10.0, "log")
        for other in (Range(1, -1.0, 1.0), Range(1, 0.0, INF)):
            assert natural_range(name, other) == other

    @pytest.mark.parametrize("name", ["momentum", "momentum/knots", "momentum/cosine/peak", "beta1", "beta2"])
    def test_momenta_by_that_of_their_complement(self, name: str) -> None:
        assert natural_range(name, WIDE) == Range(1, 0.0, 0.99, "complement")
        for other in (LINEAR, Range(1, 0.0, 0.9, "complement"), Range(1, 0.1, 0.9, "log"), Range(1, -INF, 0.9)):
            assert natural_range(name, other) == other

    @pytest.mark.parametrize(
        "name",
        [
            *("lr/cosine/warm_up", "lr/cosine/floor", "momentum/cosine/warm_up", "momentum/one_minus/cosine/peak"),
            *("momentum/one_minus/knots", "momentum/one_minus", "eps", "l2", "dropout/cosine/peak"),
        ],
    )
    def test_others_on_that_of_their_domain(self, name: str) -> None:
        for limits in (LINEAR, WIDE):
            assert natural_range(name, limits) == limits

    def test_a_given_step_size_is_on_the_scale_of_the_domain(self) -> None:
        search = RobustSearch({"lr": Range(1, 0.0, 1.0)}, step_sizes={"lr": 0.05}, initial={"lr": double(0.5)})
        search.tell([Outcome(0.5, UNTRAINED, {"lr": double(-0.3)}, 3.7)])
        assert 0.5 < float(search.values["lr"]) < 0.55

    def test_where_a_search_begins(self) -> None:
        ranges = {"lr": LINEAR, "momentum": WIDE, "beta1": Range(1, 0.5, 0.99, "complement"), "h": Range(2, 0.3, 1.0)}
        proposal, *others = RobustSearch({**ranges, "l2": Range(1, -1.0, 1.0)}).round()
        assert proposal.values["lr"].tolist() == pytest.approx([0.01, 0.01])  # of (1e-4, 1)
        assert proposal.values["momentum"].tolist() == pytest.approx([1 - 0.01**0.15])
        assert 1 - float(proposal.values["beta1"]) == pytest.approx(0.5**0.85 * 0.01**0.15)
        assert proposal.values["h"].tolist() == [0.3, 0.3] and proposal.values["l2"].tolist() == [0]
        for other, factor in zip(others, (4, 16), strict=True):
            assert other.values["lr"].tolist() == pytest.approx([0.01 * factor] * 2)
            assert all(torch.equal(other.values[name], v) for name, v in proposal.values.items() if name != "lr")

    def test_first_steps_are_at_most_those_that_the_class_tells(self) -> None:
        ranges = {"lr": Range(1, 1e-4, 1.0, "log"), "momentum": WIDE, "l2": Range(1, -1.0, 1.0)}
        search = RobustSearch(ranges, initial={"lr": double(0.01)})
        (before,) = search.round()
        slopes = {"lr": before.values["lr"], "momentum": 1 - before.values["momentum"], "l2": double(1.0)}
        search.tell([Outcome(0.5, UNTRAINED, {name: -0.2 / own for name, own in slopes.items()}, 3.7)])
        (after,) = search.round()
        assert 1.5 < float(after.values["lr"] / before.values["lr"]) <= 2
        shrunk = float((1 - before.values["momentum"]) / (1 - after.values["momentum"]))
        assert 1.2 < shrunk <= 1.5
        assert 0.1 < float(after.values["l2"]) <= 0.2

    def test_values_are_double_precision_whatever_the_hypergradients(self) -> None:
        search = RobustSearch(RANGES, initial=START)
        search.tell([Outcome(0.5, UNTRAINED, {n: torch.full((r.windows,), 0.1) for n, r in RANGES.items()}, 3.7)])
        assert all(v.dtype == torch.float64 for v in search.values.values())
