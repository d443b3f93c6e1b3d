"""The recipes of self-tuning networks: runs stopped anywhere come to the same, and what their results are told as."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tune_hypergrad.losses import accuracy
from tune_hypergrad.problem import Problem
from tune_hypergrad.problems import registry
from tune_hypergrad.recipes import fashion, toy
from tune_hypergrad.recipes.jobs import Place, Stopped

SMALL = fashion.Settings(train=24, val=8, width=0.05, epochs=1.5, random_epochs=1.5, trainings=2, batch_size=8, seeds=2)
VALUES = {**dict.fromkeys(fashion.DROPOUTS, 0.1), "cutout_length": 4.0, "cutout_holes": 1.0}


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Noise in place of Fashion-MNIST."""

    def noise(examples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(10, (examples,), generator=generator)
        return torch.randn(examples, 1, 28, 28, generator=generator), labels

    def made(name: str, batch_size: int, **_: Any) -> Problem:
        own = registry._ENTRIES[name]
        splits = (noise(examples, seed) for seed, examples in enumerate((32, 16, 8)))
        given = {"regularisers": own.regularisers, "metrics": {"accuracy": accuracy}, "batch_size": batch_size}
        return Problem(own.make_model, *splits, **given)

    monkeypatch.setattr(fashion.problems, "get", made)
    fashion._problem.cache_clear()
    yield
    fashion._problem.cache_clear()


def whole_and_in_pieces(run: Callable[[Place], dict[str, Any]], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a job gives in one call, and in calls each of which is stopped after a step."""
    whole = run(Place(None, "cpu", folder / "whole.pt", math.inf))
    for _ in range(50):
        try:
            return whole, run(Place(None, "cpu", folder / "pieces.pt", 0.0))
        except Stopped:
            pass
    raise AssertionError("it does not end")


JOBS = {
    "Delta-STN": partial(fashion.self_tune, settings=SMALL, variant="delta-stn", seed=1),
    "random search": partial(fashion.train, settings=SMALL, values=VALUES, seed=1),
}


@pytest.mark.parametrize("job", JOBS)
def test_runs_on_images_that_are_stopped_at_every_step_come_to_the_same(images: None, job: str, tmp_path: Path) -> None:
    whole, pieces = whole_and_in_pieces(JOBS[job], tmp_path)
    assert len(whole["points"]) == 2, "after the epoch, and at the end"
    assert pieces["points"] == whole["points"] and pieces["best"] == whole["best"]
    assert whole["best"]["val_loss"] == min(point["val_loss"] for point in whole["points"])
    assert pieces["seconds"] > 0 and (tmp_path / "pieces.pt").exists() and not (tmp_path / "whole.pt").exists()


def test_a_run_of_the_regression_that_was_stopped_comes_to_the_same(tmp_path: Path) -> None:
    job = partial(toy.tune, log_unit=-4.0, variant="delta-stn", start=1.2, seed=0, steps=320)
    whole = job(Place(None, "cpu", tmp_path / "whole.pt", math.inf))
    with pytest.raises(Stopped):
        job(Place(None, "cpu", tmp_path / "pieces.pt", 0.0))
    assert job(Place(None, "cpu", tmp_path / "pieces.pt", math.inf)) == whole
    assert whole["path"][0] == pytest.approx(1.2) and abs(whole["last"] - 1.2) > 0.01, "it has begun to tune"


def result(*points: tuple[float, float]) -> dict[str, Any]:
    """A run's, of gradients and validation losses."""
    finite = [loss for _, loss in points if math.isfinite(loss)]
    best = {"val_loss": min(finite), "test_accuracy": 1 - min(finite)} if finite else {}
    return {"points": [{"gradients": g, "val_loss": loss, "values": VALUES} for g, loss in points], "best": best}


def test_random_search_counts_with_its_best_training_and_the_cost_of_all() -> None:
    results = {
        "random search/0/00": result((3.0, 0.9), (6.0, 0.5)),
        "random search/0/01": result((3.0, 0.7), (6.0, math.nan)),
        "random search/1/00": result((3.0, math.nan)),
        "delta-stn/0": result((9.0, 0.4)),
    }
    rows = {row.what: row.here for row in fashion.rows(SMALL, results)}  # an epoch has 3 steps
    assert rows["random search: lowest validation loss"] == "0.5000 (one seed)"
    assert rows["random search: its test accuracy in per cent"] == "50.00 (one seed)"
    assert rows["random search: cost in epochs of plain training"] == "2.5"
    assert rows["random search: runs that diverged"] == "1 of 2"
    assert rows["delta-stn: lowest validation loss"] == "0.4000 (one seed)"
    assert rows["stn: lowest validation loss"] == "not run" and "stn: runs that diverged" not in rows
    costs, losses = fashion._progress([results["random search/0/00"], results["random search/0/01"]])
    assert costs == [3.0, 6.0, 9.0, 12.0] and losses == [0.9, 0.5, 0.5, 0.5]
    line = fashion.draw(SMALL, results).axes[0].lines
    assert [max(each.get_xdata()) for each in line if len(each.get_xdata())] == [3.0, 4.0, 1.0]
