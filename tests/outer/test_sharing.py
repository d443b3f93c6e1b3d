"""Sharing: Theorem 4.1 on processes that are known, windows against brute force, and what tied steps do."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from engine_problems import assert_close, differentiate, double, make_loop
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.outer import Descent
from tune_hypergrad.outer.sharing import (
    NoiseAndDrift,
    Sharing,
    error_covariance,
    least_error,
    noise_and_drift,
    window_errors,
)
from tune_hypergrad.space import Range

partitions = st.lists(st.integers(1, 6), min_size=1, max_size=8).map(
    lambda lengths: Sharing((0, *torch.tensor(lengths).cumsum(0).tolist()))
)


def autoregressive(steps: int, variance: float, correlation: float) -> Tensor:
    """Covariance of neighbours' errors that forget: [steps, steps]."""
    step = torch.arange(steps)
    return variance * correlation ** (step - step[:, None]).abs().double()


def draws(mean: Tensor, covariance: Tensor, seeds: int, seed: int = 0) -> Tensor:
    """Hypergradients of some seeds: [seeds, T]."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(seeds, len(mean), generator=generator, dtype=torch.float64)
    return mean + normal @ torch.linalg.cholesky(covariance).T


def expected_error(sharing: Sharing, mean: Tensor, covariance: Tensor) -> float:
    """Mean squared error of shared hypergradients, by writing averaging as a matrix."""
    averaging = torch.block_diag(*(torch.full((n, n), 1 / n, dtype=torch.float64) for n in sharing.lengths))
    noise = (averaging @ covariance @ averaging.T).trace()
    return float(noise + ((averaging @ mean - mean) ** 2).sum()) / len(mean)


class TestTheorem:
    @pytest.mark.parametrize("length", [1, 2, 4, 5, 10, 20])
    def test_the_bound_is_met_by_even_drift_and_even_correlation(self, length: int) -> None:
        variance, c, drift, steps = 2.0, 0.3, 0.05, 20
        covariance = variance * (c + (1 - c) * torch.eye(steps, dtype=torch.float64))
        mean = drift * torch.arange(steps, dtype=torch.float64)
        theory = NoiseAndDrift(variance, torch.tensor([0.0] + [c] * (steps - 1), dtype=torch.float64), drift)
        error = expected_error(Sharing.equal(steps, length), mean, covariance)
        assert theory.bound(length) == pytest.approx(error, rel=1e-12)
        by_hand = (1 + c * (length - 1)) / length * variance + drift**2 * (length**2 - 1) / 12
        assert theory.bound(length) == pytest.approx(by_hand, rel=1e-12)

    @settings(deadline=None)
    @given(
        st.sampled_from([1, 2, 3, 4, 6, 12]),
        st.floats(0, 0.95),
        st.lists(st.floats(0, 2), min_size=12, max_size=12),
        st.lists(st.floats(-1, 1), min_size=11, max_size=11),
    )
    def test_no_drift_and_no_variances_exceed_the_bound(
        self, length: int, c: float, deviations: list[float], drifts: list[float]
    ) -> None:
        mean = torch.tensor([0.0, *drifts], dtype=torch.float64).cumsum(0)
        scale = torch.tensor(deviations, dtype=torch.float64)
        covariance = scale[:, None] * scale * (c + (1 - c) * torch.eye(12, dtype=torch.float64))
        correlation = torch.tensor([0.0] + [c] * 11, dtype=torch.float64)
        theory = NoiseAndDrift(float((scale**2).mean()), correlation, max(map(abs, drifts)))
        error = expected_error(Sharing.equal(12, length), mean, covariance)
        assert error <= theory.bound(length) * (1 + 1e-9) + 1e-12

    def test_the_best_window_without_correlation_is_the_one_of_calculus(self) -> None:
        variance, drift = 1.0, 0.01
        theory = NoiseAndDrift(variance, torch.zeros(200, dtype=torch.float64), drift)
        assert abs(theory.best_window() - (6 * variance / drift**2) ** (1 / 3)) < 1

    def test_without_drift_all_steps_share_and_without_noise_none(self) -> None:
        correlation = torch.zeros(30, dtype=torch.float64)
        assert NoiseAndDrift(1.0, correlation, 0.0).best_window() == 30
        assert NoiseAndDrift(0.0, correlation, 1.0).best_window() == 1


class TestEstimates:
    def test_they_converge(self) -> None:
        variance, correlation, drift, steps = 2.0, 0.7, 0.3, 24
        mean = drift * torch.arange(steps, dtype=torch.float64)
        found = noise_and_drift(draws(mean, autoregressive(steps, variance, correlation), 40_000))
        assert found.variance == pytest.approx(variance, rel=0.02)
        assert found.drift == pytest.approx(drift, rel=0.05)
        lags = torch.tensor([1, 1, 1, 2, 2, 3], dtype=torch.float64)  # of pairs in a window of 4
        assert float(found.correlation[3]) == pytest.approx(float((correlation**lags).mean()), abs=0.02)
        assert found.correlation[0] == 0

    @pytest.mark.parametrize("length", [1, 2, 3, 4, 6, 12])
    def test_the_bound_without_drift_is_the_noise_of_windows(self, length: int) -> None:
        scale = torch.linspace(0.5, 3, 12, dtype=torch.float64)
        covariance = scale[:, None] * scale * autoregressive(12, 1.0, 0.6)
        by_step = draws(torch.zeros(12, dtype=torch.float64), covariance, 20)
        left = Sharing.equal(12, length).average(by_step).var(0).mean()
        theory = noise_and_drift(by_step)
        assert replace(theory, drift=0.0).bound(length) == pytest.approx(float(left), rel=1e-9)

    def test_noise_in_the_mean_of_few_seeds_is_little_drift(self) -> None:
        mean = 0.2 * torch.arange(200, dtype=torch.float64)
        by_step = [draws(mean, autoregressive(200, 0.25, 0.5), 8, seed) for seed in range(20)]
        drifts = [noise_and_drift(g).drift for g in by_step]
        assert 0.2 < sum(drifts) / 20 < 0.35
        assert sum(float(g.mean(0).diff().abs().max()) for g in by_step) / 20 > 0.6  # what noise makes of the largest

    def test_a_region_has_its_own(self) -> None:
        mean = torch.cat([torch.zeros(40), 0.5 * torch.arange(40)]).double()
        by_step = draws(mean, torch.diag(torch.cat([torch.full((40,), 4.0), torch.full((40,), 0.01)]).double()), 500)
        noisy, drifting = noise_and_drift(by_step[:, :40]), noise_and_drift(by_step[:, 40:])
        assert noisy.variance == pytest.approx(4, rel=0.1) and noisy.drift < 0.2
        assert drifting.variance == pytest.approx(0.01, rel=0.1) and drifting.drift == pytest.approx(0.5, rel=0.05)

    def test_the_covariance_of_many_seeds_is_what_it_is(self) -> None:
        scale = torch.linspace(0.5, 2, 30, dtype=torch.float64)
        covariance = scale[:, None] * scale * autoregressive(30, 1.0, 0.6)
        found = error_covariance(draws(torch.zeros(30, dtype=torch.float64), covariance, 20_000))
        assert torch.allclose(found, covariance, atol=0.15)

    @pytest.mark.parametrize("seeds", [2, 4, 8])
    def test_the_covariance_of_few_seeds_is_nearer_the_truth_than_theirs(self, seeds: int) -> None:
        covariance = autoregressive(60, 1.0, 0.6)
        for seed in range(5):
            by_step = draws(torch.zeros(60, dtype=torch.float64), covariance, seeds, seed)
            theirs = torch.cov(by_step.T)
            assert (error_covariance(by_step) - covariance).norm() < 0.9 * (theirs - covariance).norm()

    def test_one_seed_tells_fast_errors_from_slow_drift(self) -> None:
        slow = torch.sin(torch.linspace(0, math.pi, 400, dtype=torch.float64))
        found = error_covariance(draws(slow, autoregressive(400, 0.25, 0.0), 1))
        assert float(found.diagonal().mean()) == pytest.approx(0.25, rel=0.15)
        assert float(found.diagonal(1).mean()) == pytest.approx(0, abs=0.04)

    def test_seeds_that_agree_have_no_errors(self) -> None:
        by_step = torch.arange(6, dtype=torch.float64).expand(3, 6)
        assert torch.equal(error_covariance(by_step), torch.zeros(6, 6, dtype=torch.float64))
        found = noise_and_drift(by_step)
        assert (found.variance, found.drift, float(found.correlation[2])) == (0.0, pytest.approx(1.0), 0.0)

    @pytest.mark.parametrize("averaged", [1, 4])
    def test_errors_of_windows_are_what_sharing_costs(self, averaged: int) -> None:
        mean = torch.sin(torch.arange(12, dtype=torch.float64))
        covariance = autoregressive(12, 0.5, 0.4)
        errors = window_errors(draws(mean, covariance, 50_000), averaged)
        for boundaries in [(0, 12), (0, 5, 12), tuple(range(13))]:
            estimated = sum(float(errors[a, b]) for a, b in pairwise(boundaries)) / 12
            expected = expected_error(Sharing(boundaries), mean, covariance / averaged)
            assert estimated == pytest.approx(expected, rel=0.02)

    def test_errors_of_windows_are_right_in_the_mean_over_ensembles_of_few(self) -> None:
        mean = double(0.0, 1.0, 0.5, 0.5, 2.0)
        covariance = torch.diag(double(1.0, 0.5, 2.0, 0.1, 1.0))
        seeds, ensembles = 3, 4000
        by_step = draws(mean, covariance, seeds * ensembles).reshape(ensembles, seeds, 5)
        found = sum(window_errors(ensemble, 1) for ensemble in by_step) / ensembles
        for a, b in combinations(range(6), 2):
            noise = float(covariance[a:b, a:b].sum()) / (b - a)
            price = 3 / seeds * noise
            drift = float(((mean[a:b] - mean[a:b].mean()) ** 2).sum())
            assert float(found[a, b]) == pytest.approx(noise + price + drift, rel=0.05, abs=0.02)


class TestWindows:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(1, 8), st.integers(0, 1000))
    def test_the_least_error_is_that_of_brute_force(self, steps: int, seed: int) -> None:
        errors = torch.randn(steps + 1, steps + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        every = [(0, *inner, steps) for count in range(steps) for inner in combinations(range(1, steps), count)]
        best = min(every, key=lambda boundaries: sum(float(errors[a, b]) for a, b in pairwise(boundaries)))
        assert least_error(errors) == best

    @settings(deadline=None, max_examples=30)
    @given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 1000))
    def test_windows_cover_every_step_once(self, steps: int, seeds: int, seed: int) -> None:
        by_step = torch.randn(seeds, steps, generator=torch.Generator().manual_seed(seed))
        found = Sharing.equal(steps, 1).adapt(by_step)
        assert sum(found.lengths) == found.steps == steps and min(found.lengths) >= 1
        assert found == Sharing.equal(steps, steps).adapt(by_step)

    @pytest.mark.parametrize("seeds", [2, 4, 8])
    def test_a_step_in_the_mean_is_found(self, seeds: int) -> None:
        mean = torch.cat([torch.zeros(70), torch.full((30,), 5.0)]).double()
        by_step = draws(mean, autoregressive(100, 0.5, 0.3), seeds)
        assert 70 in Sharing.equal(100, 10).adapt(by_step).boundaries

    def test_noise_alone_is_shared_by_all_and_drift_alone_by_none(self) -> None:
        noise = draws(torch.zeros(60, dtype=torch.float64), autoregressive(60, 1.0, 0.0), 8)
        assert Sharing.equal(60, 1).adapt(noise).boundaries == (0, 60)
        drift = torch.arange(60, dtype=torch.float64).expand(3, 60)
        assert Sharing.equal(60, 60).adapt(drift) == Sharing.equal(60, 1)

    def test_a_larger_ensemble_affords_shorter_windows(self) -> None:
        mean = 0.05 * torch.arange(120, dtype=torch.float64)
        by_step = draws(mean, autoregressive(120, 1.0, 0.3), 200)
        one, many = (Sharing.equal(120, 120).adapt(by_step, averaged) for averaged in (1, None))
        assert len(one.lengths) < len(many.lengths)

    @pytest.mark.parametrize("seeds", [1, 2, 4, 8])
    def test_adapted_windows_err_less_than_equal_ones(self, seeds: int) -> None:
        """Long calm, then a short end with large hypergradients: no length fits both. Each judged with other seeds."""
        mean = torch.cat([torch.full((175,), -0.1), -2.0 - 0.05 * torch.arange(25)]).double()
        covariance = autoregressive(200, 0.5, 0.6)
        fresh = draws(mean, covariance, 100, seed=99)
        equal = {n: float(Sharing.equal(200, n).error(fresh, mean).mean()) for n in (1, 2, 5, 10, 20, 40, 50, 100, 200)}
        found = [Sharing.equal(200, 200).adapt(draws(mean, covariance, seeds, seed), averaged=1) for seed in range(10)]
        errors = [float(sharing.error(fresh, mean).mean()) for sharing in found]
        assert sum(errors) / len(errors) < min(equal.values())

    @pytest.mark.parametrize("scale", [1e-200, 1e-3, 1e200])
    def test_the_unit_of_the_loss_does_not_matter(self, scale: float) -> None:
        mean = torch.cat([torch.zeros(30), torch.ones(10)]).double()
        by_step = draws(mean, autoregressive(40, 0.2, 0.5), 4)
        assert Sharing.equal(40, 1).adapt(scale * by_step) == Sharing.equal(40, 1).adapt(by_step)

    def test_hypergradients_of_zero_are_shared(self) -> None:
        assert Sharing.equal(20, 1).adapt(torch.zeros(3, 20)) == Sharing.equal(20, 20)

    def test_an_ensemble_of_nothing_is_refused(self) -> None:
        with pytest.raises(InputError, match="averaged is 0: hypergradients are averaged over at least 1 seed"):
            Sharing.equal(20, 1).adapt(torch.zeros(3, 20), averaged=0)

    def test_runs_that_diverged_tell_nothing(self) -> None:
        by_step = draws(torch.zeros(50, dtype=torch.float64), autoregressive(50, 1.0, 0.2), 3)
        diverged = torch.cat([by_step, torch.full((1, 50), torch.nan, dtype=torch.float64)])
        present = Sharing.equal(50, 5)
        assert present.adapt(diverged) == present.adapt(by_step)
        assert present.adapt(diverged[3:]) == present


class TestPooling:
    @given(partitions)
    def test_the_sum_is_kept(self, sharing: Sharing) -> None:
        by_step = torch.randint(-9, 9, (2, sharing.steps), generator=torch.Generator().manual_seed(0)).double()
        assert torch.equal(sharing.pool(by_step).sum(-1), by_step.sum(-1))
        averaged = sharing.average(by_step)
        assert torch.allclose(averaged.sum(-1), by_step.sum(-1), atol=1e-9)
        assert torch.allclose(sharing.average(averaged), averaged)

    def test_by_hand(self) -> None:
        sharing = Sharing((0, 2, 3))
        by_step = double(1.0, 3.0, 5.0)
        assert sharing.pool(by_step).tolist() == [4, 5]
        assert sharing.average(by_step).tolist() == [2, 2, 5]
        errors = sharing.error(torch.stack([by_step, 2 * by_step]), double(1.0, 2.0, 5.0))
        assert errors.tolist() == pytest.approx([1 / 3, (9 + 4 + 25) / 3])

    def test_it_takes_the_type_and_the_device_of_what_it_is_given(self) -> None:
        by_step = torch.ones(4, dtype=torch.float32)
        assert Sharing.equal(4, 3).pool(by_step).dtype == torch.float32
        assert Sharing.equal(4, 3).average(by_step.to("meta")).device.type == "meta"

    def test_lengths(self) -> None:
        assert Sharing.equal(10, 4).lengths == (4, 4, 2)
        assert Sharing([0, 3, 4]).boundaries == (0, 3, 4)  # type: ignore[arg-type]

    @pytest.mark.parametrize("boundaries", [(), (0,), (1, 3), (0, 2, 2), (0, 3, 1)])
    def test_boundaries_that_do_not_rise_are_refused(self, boundaries: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match="must rise from 0"):
            Sharing(boundaries)

    def test_other_lengths_are_refused(self) -> None:
        sharing = Sharing.equal(4, 2)
        for use in (sharing.pool, sharing.average, sharing.adapt, lambda v: sharing.tie(v, Range(5, 0, 1))):
            with pytest.raises(InputError, match=r"the last dimension is 4"):
                use(torch.ones(5))
        with pytest.raises(InputError, match="both must be at least 1"):
            Sharing.equal(4, 0)


class TestTying:
    @pytest.mark.parametrize(
        ("limits", "values", "expected"),
        [
            (Range(3, 0.0, 1.0), (0.1, 0.3, 0.7), (0.2, 0.2, 0.7)),
            (Range(3, 1e-4, 1.0, "log"), (0.001, 0.1, 0.7), (0.01, 0.01, 0.7)),
            (Range(3, 0.0, 0.9999, "complement"), (0.9, 0.999, 0.3), (0.99, 0.99, 0.3)),
        ],
    )
    def test_values_are_averaged_on_the_scale_that_is_tuned(
        self, limits: Range, values: tuple[float, ...], expected: tuple[float, ...]
    ) -> None:
        assert Sharing((0, 2, 3)).tie(double(*values), limits).tolist() == pytest.approx(list(expected), rel=1e-12)

    @given(partitions, st.floats(1e-4, 1.0))
    def test_what_is_tied_stays_as_it_is(self, sharing: Sharing, value: float) -> None:
        limits = Range(sharing.steps, 1e-4, 1.0, "log")
        values = torch.linspace(value, 1.0, len(sharing.lengths), dtype=torch.float64)
        tied = values.repeat_interleave(torch.tensor(sharing.lengths))
        assert torch.equal(sharing.tie(tied, limits), tied)

    @given(partitions, partitions)
    def test_new_windows_are_tied_whatever_the_old_ones_were(self, old: Sharing, new: Sharing) -> None:
        steps = new.steps
        old = Sharing((*(b for b in old.boundaries if b < steps), steps))
        limits = Range(steps, 0.01, 1.0, "log")
        values = old.tie(torch.linspace(0.01, 1.0, steps, dtype=torch.float64), limits)
        moved = new.tie(values, limits)
        assert torch.equal(moved, limits.project(moved))
        for a, b in pairwise(new.boundaries):
            assert len(set(moved[a:b].tolist())) == 1

    @pytest.mark.parametrize("scale", ["linear", "log"])
    @pytest.mark.parametrize("update", ["sign", "sgd", "adam"])
    def test_a_search_with_all_windows_tied_is_one_with_one_window(self, update: str, scale: str) -> None:
        loop = make_loop(steps=6)
        grid, single = Range(6, 1e-3, 1.0, scale), Range(1, 1e-3, 1.0, scale)  # type: ignore[arg-type]
        options = {"step_sizes": {"lr": 0.05}, "update": update}
        tied = Descent({"lr": grid}, initial={"lr": double(*[0.1] * 6)}, **options)
        alone = Descent({"lr": single}, initial={"lr": double(0.1)}, **options)
        together = Sharing.equal(6, 6)
        for _ in range(4):
            by_step = differentiate(loop, tied.values, "reverse").hypergradients["lr"]
            shared = differentiate(loop, alone.values, "reverse").hypergradients["lr"]
            assert_close({"lr": together.pool(by_step)}, {"lr": shared}, 1e-9)
            # a mean is 1/6 of the sum: plain descent alone, which steps by its size, is told
            alone.step({"lr": shared / 6})
            tied.step({"lr": together.average(by_step)})
            assert len(set(tied.values["lr"].tolist())) == 1
            assert tied.values["lr"][0] == pytest.approx(float(alone.values["lr"]), rel=1e-9)
        assert float(alone.values["lr"]) != 0.1

    def test_windows_sum_what_their_steps_give(self) -> None:
        loop = make_loop(steps=6)
        windows = differentiate(loop, {"lr": double(0.1, 0.1, 0.1)}, "forward").hypergradients["lr"]
        by_step = differentiate(loop, {"lr": double(*[0.1] * 6)}, "reverse").hypergradients["lr"]
        assert_close({"lr": Sharing.equal(6, 2).pool(by_step)}, {"lr": windows}, 1e-9)
