"""The pictures of the pages in docs/concepts, computed by the package; some two minutes.

    python benchmarks/concept_pictures.py [--only NAME ...] [--out docs/concepts]

Every picture is a function of its name. They train the built-in problem
`digits_mlp` with SGD and momentum 0.9, or a quadratic.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from tune_hypergrad import HypergradientResult, Problem, hypergradient, problems
from tune_hypergrad.outer import Sharing

PROBLEM = problems.get("digits_mlp")
MOMENTUM = {"momentum": 0.9}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def differentiate(rates: Tensor, steps: int, seed: int | range = 0) -> HypergradientResult:
    """Train with these learning rates, one a window, and differentiate by them."""
    seeds = tuple(seed) if isinstance(seed, range) else seed
    return hypergradient(PROBLEM, {"lr": rates}, steps=steps, fixed=MOMENTUM, seed=seeds)


def by_logarithm(rates: Tensor, result: HypergradientResult) -> Tensor:
    """Derivatives by the logarithm of the learning rates."""
    return result.hypergradients["lr"] * rates


def horizons() -> Figure:
    """The validation loss after runs of three lengths against one learning rate, with hypergradients as tangents."""
    figure, axes = plt.subplots(figsize=(7, 4))
    grid = np.geomspace(1e-3, 1, 21)
    for steps, colour in zip((5, 20, 100), COLOURS, strict=False):
        results = [differentiate(torch.tensor([rate], dtype=torch.float32), steps) for rate in grid]
        losses = np.array([result.val_loss for result in results])
        axes.plot(grid, losses, color=colour, linewidth=1, label=f"{steps} steps")
        for rate, result in list(zip(grid, results, strict=True))[::2]:
            slope, reach = float(result.hypergradients["lr"]) * rate, 0.16  # by the logarithm
            if abs(slope) > 3:
                continue  # chaos
            ends = rate * np.exp(np.array([-reach, reach]))
            axes.plot(ends, result.val_loss + slope * np.array([-reach, reach]), color=colour, linewidth=3)
        best = int(np.nanargmin(losses))
        axes.plot(grid[best], losses[best], "o", color=colour, markerfacecolor="white", markersize=8)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss", ylim=(0, 2.6))
    axes.legend(title="after", frameon=False)
    return figure


def sharing() -> Figure:
    """Hypergradients of every step's own learning rate, and shared by windows of 5 and 25 steps; eight seeds."""
    steps, seeds = 100, range(8)
    rates = torch.full((steps,), 0.02)
    by_step = torch.stack([by_logarithm(rates, member) for member in differentiate(rates, steps, seeds).members])
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True)
    for axes, length in zip(panels, (1, 5, 25), strict=True):
        shared = Sharing.equal(steps, length).average(by_step)
        for member in shared:
            axes.step(range(steps), member, where="mid", color=COLOURS[0], linewidth=0.6, alpha=0.5)
        axes.step(range(steps), shared.mean(0), where="mid", color=COLOURS[1], linewidth=2)
        axes.axhline(0, color="#888888", linewidth=0.6)
        axes.set(xlabel="inner step", title="every step its own" if length == 1 else f"windows of {length} steps")
    panels[0].set_ylabel("hypergradient of log lr")
    return figure


class Bowl(nn.Module):
    """Two weights: one that is right from the start, in a steep direction, and one that is not, in a flat one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight - x


def bowl() -> Problem:
    """A quadratic whose examples disagree on where its lowest point is; of the validation split it is zero."""
    noise = 0.4 * torch.randn(4096, 2, generator=torch.Generator().manual_seed(0))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output**2 @ torch.tensor([0.5, 0.01])).mean()

    return Problem(
        model=Bowl, train=(noise, noise), val=(torch.zeros(1, 2), torch.zeros(1, 2)), loss=loss, batch_size=16
    )


def greediness() -> Figure:
    """Which learning rate derivatives of three horizons ask for, in the same runs of 100 steps of a quadratic."""
    steps, seeds = 100, tuple(range(16))
    problem, grid = bowl(), np.geomspace(0.01, 1, 13)
    figure, axes = plt.subplots(figsize=(7, 4))
    for horizon, colour in zip((1, 10, steps), COLOURS, strict=False):
        results = [
            hypergradient(problem, {"lr": torch.full((1,), rate)}, steps=steps, seed=seeds, horizon=horizon)
            for rate in grid
        ]
        slopes = np.array([float(result.hypergradients["lr"]) for result in results]) * grid
        label = f"{horizon} step{'s' * (horizon > 1)}" + (" (greedy)" if horizon == 1 else "")
        axes.plot(grid, slopes / -slopes.min(), color=colour, label=label)
        for i in range(len(grid) - 1):
            if slopes[i] < 0 <= slopes[i + 1]:
                share = slopes[i] / (slopes[i] - slopes[i + 1])
                axes.plot(grid[i] * (grid[i + 1] / grid[i]) ** share, 0, "o", color=colour, markersize=8)
    axes.axhline(0, color="#888888", linewidth=0.6)
    axes.set(xscale="log", xlabel="learning rate", ylabel="derivative, as a share of its lowest", ylim=(-1.1, 1.1))
    axes.legend(title="horizon", frameon=False)
    return figure


def chaos() -> Figure:
    """Losses and derivatives by the learning rate, of eight seeds, up to beyond the edge of stability."""
    grid, seeds = np.geomspace(3e-3, 0.6, 23), range(8)
    losses, slopes = [], []
    for rate in grid:
        rates = torch.tensor([rate], dtype=torch.float32)
        members = [differentiate(rates, 100, seed) for seed in seeds]
        losses.append([member.val_loss for member in members])
        slopes.append([float(by_logarithm(rates, member)) for member in members])
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
    for axes, values in zip(panels, (losses, slopes), strict=True):
        axes.plot(grid, values, color=COLOURS[0], linewidth=0.6, marker=".", markersize=3)
        axes.set(xscale="log", xlabel="learning rate")
    panels[0].set(ylabel="validation loss", ylim=(0, 1))
    panels[1].set_yscale("symlog", linthresh=1, linscale=2)
    panels[1].set(ylabel="derivative by log lr", ylim=(-1e4, 1e4), yticks=(-1e4, -1e2, -1, 0, 1, 1e2, 1e4))
    panels[1].axhline(0, color="#888888", linewidth=0.6)
    return figure


def responses() -> Figure:
    """The best response of a ridge regression's weight to its penalty, and what a self-tuning network knows of it."""
    penalties = np.linspace(-4, 4, 200)

    def response(penalty: np.ndarray | float) -> np.ndarray | float:
        return 2 / (1 + np.exp(penalty))

    here, width = -0.5, 1.0
    slope = -2 * np.exp(here) / (1 + np.exp(here)) ** 2
    figure, axes = plt.subplots(figsize=(7, 3.6))
    axes.plot(penalties, response(penalties), color=COLOURS[0], label="best response of the weight")
    near = np.linspace(here - 1.6 * width, here + 1.6 * width, 2)
    axes.plot(near, response(here) + slope * (near - here), color=COLOURS[1], label="its linear model")
    axes.axvspan(here - width, here + width, color=COLOURS[1], alpha=0.12, label="perturbations while training")
    axes.plot(here, response(here), "o", color=COLOURS[1])
    axes.set(xlabel="logarithm of the penalty", ylabel="weight")
    axes.legend(frameon=False)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    drawn.__name__: drawn for drawn in (horizons, sharing, greediness, chaos, responses)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    parser.add_argument("--out", type=Path, default=Path("docs/concepts"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110})
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        figure = PICTURES[name]()
        figure.tight_layout()
        figure.savefig(options.out / f"{name}.png", metadata={"Software": None})
        print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
