"""`delta-stn-toy`: ridge regression tuned by STN, centred STN and Delta-STN (Bae & Grosse 2020).

STN's weights respond to the hyperparameter itself, so that its path depends on the unit that the hyperparameter is
measured in; those of the centred methods respond to its perturbation, and the unit is all the same to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.problem import Problem
from tune_hypergrad.recipes.jobs import Job, Place, Results
from tune_hypergrad.recipes.recipe import Recipe, Row, scaled, spread
from tune_hypergrad.stn import VARIANTS, TunedHyperparameter
from tune_hypergrad.stn.self_tuning_run import SelfTuningRun, SelfTuningSettings

FEATURES = 10
_KEPT_EVERY = 10  # steps between two points of a path in the results


class Ridge:
    """Linear regression with the penalty exp(log_l2) / 2 ||w||^2, and what is best, by the normal equations.

    Args:
        log_unit: what is tuned is `u = log_l2 - log_unit`, the logarithm of the penalty in this unit.
        seed: draws the data.
    """

    tuned = (TunedHyperparameter("u", -math.inf, math.inf, per_example=False),)

    def __init__(self, log_unit: float = 0.0, seed: int = 0) -> None:
        self.log_unit = log_unit
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weights, scales = normal(FEATURES), torch.linspace(0.3, 1.5, FEATURES, dtype=torch.float64)

        def examples(count: int) -> tuple[Tensor, Tensor]:
            x = normal(count, FEATURES) * scales
            return x, x @ weights + 3 * normal(count)

        self.train, self.val = examples(30), examples(200)
        self.optimum = float(minimize_scalar(self.outer_loss, bounds=(-8, 4), method="bounded").x)

    def best_response(self, log_l2: float) -> Tensor:
        """The weights that minimise the training loss."""
        x, y = self.train
        penalty = math.exp(log_l2) * torch.eye(FEATURES, dtype=x.dtype)
        weights: Tensor = torch.linalg.solve(x.T @ x / len(x) + penalty, x.T @ y / len(x))
        return weights

    def outer_loss(self, log_l2: float) -> float:
        """The exact bilevel objective."""
        x, y = self.val
        return float(self.loss((x @ self.best_response(log_l2))[:, None], y))

    @staticmethod
    def loss(output: Tensor, target: Tensor) -> Tensor:
        """Half the mean squared error."""
        return (output.squeeze(-1) - target).square().mean() / 2

    def train_loss(self, output: Tensor, target: Tensor, *, params: dict[str, Tensor], u: Tensor) -> Tensor:
        """The loss with its penalty."""
        return self.loss(output, target) + (u + self.log_unit).exp() / 2 * params["weight"].square().sum()

    @staticmethod
    def model() -> nn.Module:
        """One linear layer."""
        return nn.Linear(FEATURES, 1, bias=False, dtype=torch.float64)

    def run(self, variant: str, start: float, steps: int, seed: int = 0) -> SelfTuningRun:
        """A whole run, as `begin` makes it."""
        run = self.begin(variant, start, steps, seed)
        with run.loop.running():
            run.advance(steps)
        return run

    def begin(self, variant: str, start: float, steps: int, seed: int = 0) -> SelfTuningRun:
        """A run from `start` of log L2; everything but the variant is the same for the three methods."""
        problem = Problem(self.model, self.train, self.val, loss=self.loss, train_loss=self.train_loss, batch_size=30)
        loop = InnerLoop(problem, TrainingSettings(steps, fixed={"lr": 0.01, "momentum": 0.9}, seed=seed))
        how: dict[str, Any] = {"scale": 0.5, "train_steps": 1, "warm_up": 300, "val_batch_size": 200}
        how |= {"hyper_optimizer": "sgd", "hyper_lr": 0.05, "entropy_weight": 0.003}
        initial = {"u": start - self.log_unit}
        settings = SelfTuningSettings(variant, initial, **how)
        return SelfTuningRun(loop, self.tuned, settings)

    def path(self, run: SelfTuningRun) -> Tensor:
        """log L2 at every step of a run."""
        return torch.tensor(run.history["u"], dtype=torch.float64) + self.log_unit


@dataclass(frozen=True)
class Settings:
    """Ours: the paper's regression is described without its numbers."""

    log_units: tuple[float, ...] = (0.0, -4.0)
    """Logarithms of the units that the penalty is measured in."""
    starts: tuple[float, ...] = (-3.0, 1.2)
    """Where log L2 begins."""
    steps: int = scaled(1800, least=400)
    """Training steps; the first 300 are before any step on the hyperparameter."""
    seeds: int = 1
    """Runs from every start, by other initial weights and perturbations."""


def jobs(settings: Settings, results: Results) -> list[Job]:
    """All runs."""
    of_run = ("log_unit", "variant", "start", "seed")
    return [
        Job(_name(*run), tune, {**dict(zip(of_run, run, strict=True)), "steps": settings.steps})
        for run in _runs(settings)
    ]


def _runs(settings: Settings) -> Iterator[tuple[float, str, float, int]]:
    for log_unit in settings.log_units:
        for variant in VARIANTS:
            for start in settings.starts:
                for seed in range(settings.seeds):
                    yield log_unit, variant, start, seed


def _name(log_unit: float, variant: str, start: float, seed: int) -> str:
    return f"{variant}/unit{log_unit:g}/from{start:g}/{seed}"


def tune(place: Place, *, log_unit: float, variant: str, start: float, seed: int, steps: int) -> dict[str, Any]:
    """Tune log L2 in a unit; gives `path`, its value at every tenth step, and `last`."""
    ridge = Ridge(log_unit)
    run = ridge.begin(variant, start, steps, seed)
    saved = place.load()
    if saved is not None:
        run.load_state_dict(saved)
    with run.loop.running():
        place.in_pieces(lambda: run.done, lambda: run.advance(1), run.state_dict)
    path = ridge.path(run).tolist()
    return {"path": path[::_KEPT_EVERY], "last": path[-1]}


def rows(settings: Settings, results: Results) -> list[Row]:
    """Where every method ends, by unit."""
    lines = [Row("best log L2, by the normal equations", "-", f"{Ridge().optimum:.3f}")]
    for log_unit in settings.log_units:
        for variant in VARIANTS:
            ends = []
            for start in settings.starts:
                names = [_name(log_unit, variant, start, seed) for seed in range(settings.seeds)]
                last = [results[name]["last"] for name in names if name in results]
                ends.append(f"from {start:g}: to {spread(last, 3)}")
            lines.append(Row(f"L2 in units of exp({log_unit:g}), {variant}", "-", "; ".join(ends)))
    return lines


def draw(settings: Settings, results: Results) -> Figure:
    """The exact objective, and the paths in every unit."""
    figure = Figure(figsize=(4 * (1 + len(settings.log_units)), 3.8), layout="constrained")
    left, *panels = figure.subplots(1, 1 + len(settings.log_units))
    grid = torch.linspace(-3.0, 2.0, 121).tolist()
    left.plot(grid, [Ridge().outer_loss(log_l2) for log_l2 in grid], color="0.6")
    left.axvline(Ridge().optimum, color="black", linestyle=":")
    left.set(xlabel="log L2", ylabel="validation loss", title="The exact bilevel objective")
    colours = dict(zip(VARIANTS, ("C3", "C1", "C0"), strict=True))
    lines = dict(zip(settings.starts, ("-", "--"), strict=True))
    for log_unit, panel in zip(settings.log_units, panels, strict=True):
        panel.axhline(Ridge().optimum, color="black", linestyle=":", label="optimum")
        for run in _runs(settings):
            unit, variant, start, seed = run
            if unit == log_unit and _name(*run) in results:
                path = results[_name(*run)]["path"]
                label = variant if start == settings.starts[0] and seed == 0 else None
                steps = [_KEPT_EVERY * point for point in range(len(path))]
                panel.plot(steps, path, lines[start], color=colours[variant], linewidth=1, label=label)
        title = f"L2 in units of exp({log_unit:g}), from two starts"
        panel.set(xlabel="training steps", ylabel="log L2", title=title)
    panels[0].legend(frameon=False)
    return figure


RECIPE = Recipe(
    name="delta-stn-toy",
    source="Bae & Grosse 2020, linear regression; paths are drawn there, without figures to compare",
    description="ridge regression, where all is known in closed form: STN, centred STN and Delta-STN in two units",
    cost="12 runs of 1,800 steps: a minute of two cores; no data",
    settings=Settings(),
    jobs=jobs,
    rows=rows,
    draw=draw,
    notes=("The regression, its sizes and noise are ours: the paper's are not known here.",),
)
