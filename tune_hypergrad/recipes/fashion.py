"""`delta-stn-fashion`: self-tuning networks on Fashion-MNIST, beside random search (Bae & Grosse 2020)."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

from matplotlib.figure import Figure

from tune_hypergrad import problems
from tune_hypergrad.budget import Cost
from tune_hypergrad.data import Split
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.hypergradients.evaluation import Evaluation
from tune_hypergrad.hypergradients.state import State, on_device
from tune_hypergrad.problem import Problem
from tune_hypergrad.problems.networks import simple_cnn
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.recipes.jobs import Job, Place, Results
from tune_hypergrad.recipes.recipe import Recipe, Row, scaled, spread
from tune_hypergrad.stn import VARIANTS, TunedHyperparameter
from tune_hypergrad.stn.self_tuning_run import SelfTuningRun, SelfTuningSettings

DROPOUTS = ("input_dropout", "dropout1", "dropout2", "fc_dropout")
TUNED = (
    *(TunedHyperparameter(name, 0.0, 0.95) for name in DROPOUTS),
    TunedHyperparameter("cutout_length", 2, 25, whole=True),
    TunedHyperparameter("cutout_holes", 0, 6, whole=True),
)
"""The six published hyperparameters with their ranges: dropouts, and cutout of length 2 to 24 with 0 to 5 holes."""

_RANDOM = "random search"


@dataclass(frozen=True)
class Settings:
    """The published settings, and ours for what the paper leaves open."""

    train: int = scaled(51_000, least=1_280)
    """Training images."""
    val: int = scaled(9_000, least=256)
    """Validation images."""
    width: float = scaled(1.0, least=0.1)
    """Of the SimpleCNN: two 5x5 convolutions of 16 and 32 channels, three layers after them."""
    epochs: float = scaled(200.0, least=8)
    """Length of a self-tuning run."""
    random_epochs: float = scaled(32.0, least=1)
    """Length of a training of random search."""
    trainings: int = 20
    """Trainings of random search: together about as many gradients as Delta-STN's run."""
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    variants: tuple[str, ...] = tuple(VARIANTS)
    initial: Mapping[str, float] = field(
        default_factory=lambda: {**dict.fromkeys(DROPOUTS, 0.05), "cutout_length": 4.0, "cutout_holes": 1.0}
    )
    """Where self-tuning begins."""
    seeds: int = 3


def jobs(settings: Settings, results: Results) -> list[Job]:
    """All runs, those of self-tuning first, since they are the longest."""
    found = [
        Job(f"{variant}/{seed}", self_tune, {"settings": settings, "variant": variant, "seed": seed})
        for seed in range(settings.seeds)
        for variant in settings.variants
    ]
    for seed in range(settings.seeds):
        for training in range(settings.trainings):
            values = _drawn(fold_seed(seed, training))
            arguments = {"settings": settings, "values": values, "seed": seed}
            found.append(Job(f"{_RANDOM}/{seed}/{training:02d}", train, arguments))
    return found


def _drawn(seed: int) -> dict[str, float]:
    """Hyperparameters uniformly from their ranges."""
    generator = random.Random(seed)
    values = {each.name: generator.uniform(each.lower, each.upper) for each in TUNED}
    return {
        each.name: min(math.floor(v), each.largest) if each.whole else v for each in TUNED for v in [values[each.name]]
    }


@lru_cache(maxsize=1)
def _problem(data_dir: str | None, download: bool, train: int, val: int, width: float, batch_size: int) -> Problem:
    """The built-in problem with fewer images and a narrower network, read once per process."""
    whole = problems.get("fashion_mnist_cnn", data_dir=data_dir, batch_size=batch_size, download=download)
    assert isinstance(whole.train, Split) and isinstance(whole.val, Split)
    # any first images of a split hold each class nearly in its share
    parts = {"train": whole.train.batch(slice(0, train)), "val": whole.val.batch(slice(0, val))}
    return whole.replace(model=partial(simple_cnn, width), **parts)


def _loop(place: Place, settings: Settings, epochs: float, seed: int, fixed: Mapping[str, float]) -> InnerLoop:
    size = (settings.train, settings.val, settings.width, settings.batch_size)
    problem = _problem(place.data_dir, place.download, *size)
    fixed = {"lr": settings.lr, "momentum": settings.momentum, **fixed}
    steps = max(1, round(epochs * problem.steps_per_epoch))
    return InnerLoop(problem, TrainingSettings(steps, fixed=fixed, seed=seed, device=place.device))


@dataclass
class _Record:
    """What a run's results are made of: a point for every epoch, and the best of them by validation."""

    points: list[dict[str, Any]]
    best: dict[str, float]

    @classmethod
    def of(cls, saved: Mapping[str, Any] | None) -> _Record:
        """As it was saved, or empty."""
        return cls([], {}) if saved is None else cls(**saved["record"])

    def add(self, judged: Evaluation, cost: Cost, values: Mapping[str, float], test: Callable[[], Evaluation]) -> None:
        """Take the weights at the end of an epoch into account; they are tested only if they are the best so far."""
        self.points.append({"gradients": cost.gradients, "val_loss": judged.loss, "values": dict(values)})
        if math.isfinite(judged.loss) and judged.loss < self.best.get("val_loss", math.inf):
            tested = test()
            self.best = {
                "val_loss": judged.loss,
                "val_accuracy": judged.metrics["accuracy"],
                "test_loss": tested.loss,
                "test_accuracy": tested.metrics["accuracy"],
            }


def self_tune(place: Place, *, settings: Settings, variant: str, seed: int) -> dict[str, Any]:
    """A self-tuning run, judged after every epoch: `points`, `best` and `seconds`."""
    loop = _loop(place, settings, settings.epochs, seed, {})
    run = SelfTuningRun(loop, TUNED, SelfTuningSettings(variant, settings.initial))
    saved = place.load()
    if saved is not None:
        run.load_state_dict(saved["run"])
    record = _Record.of(saved)

    def work() -> None:
        run.advance(1)
        if run.position % loop.problem.steps_per_epoch == 0 or run.done:
            record.add(run.judge(), run.cost, run.values, lambda: loop.evaluate(run.state, "test"))

    with loop.running():
        place.in_pieces(lambda: run.done, work, lambda: {"run": run.state_dict(), "record": dict(vars(record))})
    return {**vars(record), "seconds": place.seconds}


def train(place: Place, *, settings: Settings, values: Mapping[str, float], seed: int) -> dict[str, Any]:
    """A training with fixed hyperparameters, judged after every epoch: `points`, `best` and `seconds`."""
    loop = _loop(place, settings, settings.random_epochs, seed, values)
    loop.values.check_names({})
    saved = place.load()
    record = _Record.of(saved)
    state, step, cost = (
        (loop.initial_state(), 0, Cost())
        if saved is None
        else (State(*on_device(saved["state"], loop.device)), saved["step"], Cost(**saved["cost"]))
    )

    def work() -> None:
        nonlocal state, step, cost
        state = loop.step(state, {}, step)
        step, cost = step + 1, cost + loop.costs.step(step)
        if step % loop.problem.steps_per_epoch == 0 or step == loop.steps:
            judged = loop.evaluate(state)
            cost += loop.costs.evaluation("val")
            record.add(judged, cost, values, lambda: loop.evaluate(state, "test"))

    def keep() -> dict[str, Any]:
        return {"state": tuple(state), "step": step, "cost": dict(vars(cost)), "record": dict(vars(record))}

    with loop.running():
        place.in_pieces(lambda: step == loop.steps, work, keep)
    return {**vars(record), "seconds": place.seconds}


def rows(settings: Settings, results: Results) -> list[Row]:
    """The best weights by validation of every contender, and what it spent."""
    lines = []
    epoch = settings.train // settings.batch_size
    for method in (*settings.variants, _RANDOM):
        runs = [found for seed in range(settings.seeds) if (found := _runs(settings, results, method, seed))]
        best = [_best(found) for found in runs]
        alive = [each for each in best if each]
        spent = [sum(run["points"][-1]["gradients"] for run in found) / epoch for found in runs]
        cells = {
            "lowest validation loss": spread([each["val_loss"] for each in alive], 4),
            "its test accuracy in per cent": spread([each["test_accuracy"] for each in alive], 2, 100),
            "cost in epochs of plain training": f"{statistics.mean(spent):.1f}" if spent else "not run",
        }
        if len(alive) < len(best):
            cells["runs that diverged"] = f"{len(best) - len(alive)} of {len(best)}"
        lines += [Row(f"{method}: {what}", "-", here) for what, here in cells.items()]
    return lines


def _runs(settings: Settings, results: Results, method: str, seed: int) -> list[dict[str, Any]]:
    """A contender's runs of a seed in the order in which they count."""
    names = [f"{_RANDOM}/{seed}/{training:02d}" for training in range(settings.trainings)]
    names = names if method == _RANDOM else [f"{method}/{seed}"]
    return [results[name] for name in names if name in results]


def _best(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The best of some runs by validation; empty where all diverged."""
    alive = [run["best"] for run in runs if run["best"]]
    return dict(min(alive, key=lambda best: float(best["val_loss"]))) if alive else {}


def draw(settings: Settings, results: Results) -> Figure:
    """Lowest validation loss so far against cost, and hyperparameters over their training, a line for every seed."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    names = [each.name for each in TUNED]
    panels = figure.subplot_mosaic([["loss", "loss", *names[:3]], ["loss", "loss", *names[3:]]])
    epoch = settings.train // settings.batch_size
    for index, method in enumerate((*settings.variants, _RANDOM)):
        for seed in range(settings.seeds):
            style: dict[str, Any] = {"color": f"C{index}", "linewidth": 1.1, "label": method if seed == 0 else None}
            costs, losses = _progress(_runs(settings, results, method, seed))
            panels["loss"].step([cost / epoch for cost in costs], losses, where="post", **style)
            for name in names if method != _RANDOM else ():
                for run in _runs(settings, results, method, seed):
                    panels[name].plot([point["values"][name] for point in run["points"]], **style)
    panels["loss"].set(xlabel="cost in epochs of plain training", ylabel="lowest validation loss so far")
    panels["loss"].legend(frameon=False)
    for name in names:
        panels[name].set_title(name.replace("_", " "), fontsize=9)
        panels[name].set_xlabel("epoch", fontsize=8)
    return figure


def _progress(runs: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Gradients spent by runs one after another, and the lowest validation loss until then."""
    costs, losses, before = [], [], 0.0
    for run in runs:
        costs += [before + point["gradients"] for point in run["points"]]
        losses += [point["val_loss"] if math.isfinite(point["val_loss"]) else math.inf for point in run["points"]]
        before = costs[-1]
    return costs, list(accumulate(losses, min))


RECIPE = Recipe(
    name="delta-stn-fashion",
    source="Bae & Grosse 2020, Fashion-MNIST with a SimpleCNN; settings from the released code, its figures are curves",
    description="Fashion-MNIST, SimpleCNN, 6 hyperparameters of dropout and cutout: STN, Delta-STN, random search",
    cost="not measured in full; with --scale 0.2 about an hour of two cores",
    settings=Settings(),
    jobs=jobs,
    rows=rows,
    draw=draw,
    notes=(
        "The width of the network and the numbers of images shrink with the scale, as do the lengths of the runs.",
        "Random search draws uniformly from the ranges; every training is judged after each epoch and counts with its "
        "best one, as self-tuning runs do. It has about as many gradients as Delta-STN's run.",
        "BOHB in the same space: `tune-hypergrad compare fashion_mnist_cnn --method bohb`.",
    ),
)
