"""The recipe of the error of shared hypergradients: what it runs, resumes, computes and draws."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tune_hypergrad.outer.sharing import Sharing
from tune_hypergrad.recipes import RECIPES, fig2
from tune_hypergrad.recipes.jobs import Place, Stopped
from tune_hypergrad.recipes.recipe import at_scale, reproduce

SMALL = fig2.Settings(problems=("digits",), where_there=(), steps=8, batch_size=16, val_examples=40, seeds=3, pilots=2)


def place(folder: Path, stop_at: float = math.inf) -> Place:
    return Place(None, "cpu", folder / "job.pt", stop_at)


def results_of(by_seed: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What jobs would have given."""
    return {name: {"hypergradient": hypergradient.tolist()} for name, hypergradient in by_seed.items()}


def synthetic(seeds: int, pilots: int = 0, greedy: int = 0, steps: int = 40, first: int = 0) -> dict[str, Any]:
    """White noise about a mean that drops near the end; greedy ones about zero."""
    generator = torch.Generator().manual_seed(first)
    mean = torch.cat([torch.zeros(steps - 8), torch.full((8,), -3.0)]).double()

    def draw() -> torch.Tensor:
        return torch.randn(steps, generator=generator, dtype=torch.float64)

    drawn = {f"digits/exact/{seed}": mean + draw() for seed in (*range(seeds), *range(1000, 1000 + pilots))}
    return results_of({**drawn, **{f"digits/greedy/{seed}": 5 + draw() for seed in range(greedy)}})


class TestJobs:
    def test_at_scale_1_they_are_the_papers(self) -> None:
        jobs = fig2.jobs(fig2.Settings(), {})
        names = [job.name for job in jobs]
        assert len(names) == len(set(names)) == 1 + 2 * (8 + 2 * 100)
        greedy = [job for job in jobs if "/greedy/" in job.name]
        assert {job.arguments["horizon"] for job in greedy} == {1}
        assert {job.arguments["seed"] for job in greedy} == set(range(100))

    @pytest.mark.parametrize("there", [True, False])
    def test_svhn_is_run_where_its_files_are(self, there: bool) -> None:
        names = [job.name for job in fig2.jobs(fig2.Settings(), {"data/svhn": there})]
        assert any(name.startswith("svhn/exact") for name in names) == there
        rows = {row.what: row for row in fig2.rows(fig2.Settings(), {"data/svhn": there})}
        assert rows["svhn: no sharing"].here == ("not run" if there else "no data")
        assert rows["svhn: no sharing"].published == "0.072"

    def test_a_scale_shrinks_the_seeds_alone(self) -> None:
        assert at_scale(fig2.Settings(), 0.1) == replace(fig2.Settings(), seeds=10, pilots=2)

    def test_a_job_that_was_stopped_goes_on_to_the_same_numbers(self, tmp_path: Path) -> None:
        whole = fig2.differentiate(place(tmp_path / "whole"), settings=SMALL, problem="digits", seed=1, horizon=None)
        for _ in range(2):
            with pytest.raises(Stopped):
                fig2.differentiate(place(tmp_path, time.time()), settings=SMALL, problem="digits", seed=1, horizon=None)
        resumed = fig2.differentiate(place(tmp_path), settings=SMALL, problem="digits", seed=1, horizon=None)
        assert resumed["hypergradient"] == whole["hypergradient"] and resumed["val_loss"] == whole["val_loss"]
        assert len(whole["hypergradient"]) == 8

    def test_greedy_hypergradients_are_other_ones_of_the_same_run(self, tmp_path: Path) -> None:
        exact, greedy = (
            fig2.differentiate(place(tmp_path), settings=SMALL, problem="digits", seed=1, horizon=horizon)
            for horizon in (None, 1)
        )
        assert exact["val_loss"] == greedy["val_loss"]
        # the last step's is the same: there is nothing after it to look through
        assert exact["hypergradient"][-1] == pytest.approx(greedy["hypergradient"][-1], rel=1e-4)
        assert exact["hypergradient"][:-1] != pytest.approx(greedy["hypergradient"][:-1], rel=1e-2)

    def test_initial_weights_are_those_of_the_released_code(self) -> None:
        problem = fig2._load("digits", None, False, 16, 40)
        weights = {name: p for name, p in problem.model().named_parameters() if name.endswith("weight")}
        for name, weight in weights.items():
            fan_in, fan_out = weight[0].numel(), weight.numel() // weight.shape[1]
            assert float(weight.detach().std()) == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.3), name
        assert len(problem.val) == 40  # type: ignore[arg-type]

    def test_from_beginning_to_end(self, tmp_path: Path) -> None:
        recipe = replace(RECIPES["fds-fig2"], settings=SMALL)
        assert reproduce(recipe, tmp_path, tell=lambda line: None)
        table = (tmp_path / "table.md").read_text()
        assert "| digits: seeds | - | 3 of 3 |" in table and "Not finished" not in table
        assert (tmp_path / "picture.png").stat().st_size > 10_000
        kept = json.loads((tmp_path / "results.json").read_text())["jobs"]
        assert sorted(kept) == sorted(job.name for job in fig2.jobs(SMALL, {}))


class TestFindings:
    SETTINGS = fig2.Settings(problems=("digits",), steps=40, seeds=30, pilots=4)

    def test_they_need_two_seeds(self) -> None:
        assert fig2.findings(self.SETTINGS, {}, "digits") is None
        assert fig2.findings(self.SETTINGS, synthetic(1, pilots=4), "digits") is None

    def test_errors_are_those_of_a_loop(self) -> None:
        results = synthetic(30, pilots=4, greedy=2)
        found = fig2.findings(self.SETTINGS, results, "digits")
        assert found is not None and list(found.shared) == [1, 2, 4, 5, 8, 10, 20, 40]
        by_seed = [results[f"digits/exact/{seed}"]["hypergradient"] for seed in range(30)]
        truth = [sum(g[step] for g in by_seed) / 30 for step in range(40)]
        variance = statistics.mean(statistics.variance(g[step] for g in by_seed) for step in range(40))
        for length in (1, 8, 40):
            shared = [[sum(g[t // length * length :][:length]) / length for t in range(40)] for g in by_seed]
            error = statistics.mean((g[t] - truth[t]) ** 2 for g in shared for t in range(40))
            left = statistics.mean(statistics.variance(g[t] for g in shared) for t in range(40))
            assert found.shared[length][0] == pytest.approx(error + (2 * left - variance) / 30)
        assert found.greedy is not None
        squares = [
            (results[f"digits/greedy/{s}"]["hypergradient"][t] - truth[t]) ** 2 for s in range(2) for t in range(40)
        ]
        assert found.greedy[0] == pytest.approx(sum(squares) / 80)

    @pytest.mark.parametrize("seeds", [2, 5])
    def test_errors_are_right_in_the_mean_whatever_the_number_of_seeds(self, seeds: int) -> None:
        """White noise of variance 1 about a mean that drops by 3 in the last fifth."""
        settings = replace(self.SETTINGS, seeds=seeds)
        every = [synthetic(seeds, first=first) for first in range(100)]
        found = [fig2.findings(settings, results, "digits") for results in every]
        for length, expected in ((1, 1.0), (8, 1 / 8), (40, 1 / 40 + 9 * 0.2 * 0.8)):
            errors = [each.shared[length][0] for each in found if each is not None]
            assert statistics.mean(errors) == pytest.approx(expected, abs=0.04)

    def test_a_window_in_between_is_best_and_the_bound_is_above(self) -> None:
        found = fig2.findings(self.SETTINGS, synthetic(30, pilots=4), "digits")
        assert found is not None
        assert found.best == 8
        for length, (error, _) in found.shared.items():
            assert error <= found.theory.bound(length)

    def test_windows_are_adapted_with_the_pilots_alone(self) -> None:
        results = synthetic(30, pilots=4)
        found = fig2.findings(self.SETTINGS, results, "digits")
        assert found is not None and list(found.adapted) == [1, 2, 4, 15]
        assert [len(every) for every in found.adapted.values()] == [4, 2, 1, 2]
        ((sharing, error),) = found.adapted[4]
        assert 32 in sharing.boundaries and error < found.shared[found.best][0]
        pilots = torch.tensor([results[f"digits/exact/{1000 + pilot}"]["hypergradient"] for pilot in range(4)])
        assert sharing == Sharing.equal(40, 40).adapt(pilots, averaged=1)
        seeds = torch.tensor([results[f"digits/exact/{seed}"]["hypergradient"] for seed in range(30)])
        whole = Sharing.equal(40, 40)
        assert [half for half, _ in found.adapted[15]] == [whole.adapt(h, averaged=1) for h in (seeds[:15], seeds[15:])]
        assert found.adapted[2][1][0] == Sharing.equal(40, 40).adapt(pilots[2:], averaged=1)

    @pytest.mark.parametrize(("seeds", "pilots", "greedy"), [(0, 0, 0), (0, 1, 0), (2, 0, 0), (3, 4, 1), (30, 4, 30)])
    def test_table_and_picture_show_what_there_is(self, seeds: int, pilots: int, greedy: int) -> None:
        results = synthetic(seeds, pilots, greedy)
        rows = {row.what: row for row in fig2.rows(self.SETTINGS, results)}
        figure = fig2.draw(self.SETTINGS, results)
        labels = figure.axes[0].get_legend_handles_labels()[1]
        assert ("equal windows" in labels) == (seeds >= 2)
        assert ("greedy" in labels) == (seeds >= 2 and greedy > 0)
        if seeds >= 2:
            assert rows["digits: seeds"].here == f"{seeds} of 30"
            assert (rows["digits: greedy"].here == "not run") == (greedy == 0)
            assert ("digits: adaptive sharing, estimated with 4 other seeds" in rows) == (pilots >= 4)

    def test_the_papers_figures_stand_beside_those_of_the_same_data(self) -> None:
        settings = replace(self.SETTINGS, steps=50)
        on_svhn = {name.replace("digits", "svhn"): given for name, given in synthetic(3, steps=50).items()}
        rows = {row.what: row.published for row in fig2.rows(settings, {**synthetic(3, steps=50), **on_svhn})}
        assert rows["svhn: no sharing"] == "0.072" and rows["svhn: windows of 50 steps"] == "0.0376"
        assert rows["svhn: greedy"] == "0.393" and rows["svhn: windows of 25 steps"] == "-"
        assert {published for what, published in rows.items() if what.startswith("digits")} == {"-"}
