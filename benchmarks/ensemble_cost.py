"""What an ensemble of several seeds costs beside one run, where its runs take their steps at once.

    python benchmarks/ensemble_cost.py [--repetitions 5] [--seeds 2 4 8] [--networks "digits MLP" LeNet]

Measured on synthetic data, on the CPU in one thread, as process time: reverse runs of a few steps, there and back, with
the last validation gradient, which every run computes by itself. Contenders take turns in one process; a figure is the
median (and the range) over the turns of the ratio to one run in the same turn. One run after another costs as many
runs. "MFLOP" is the arithmetic of one run's training step, by which the package decides whether its runs go together;
"difference" is the largest relative difference of a member's hypergradients from its own run's, in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from figures import Figure, figure, with_json, write
from rich.console import Console
from rich.table import Table
from torch import nn

from tune_hypergrad import Problem
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.hypergradients.ensemble import arithmetic, why_in_turn
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.run import HypergradientResult
from tune_hypergrad.problems.models import digits_cnn, digits_mlp, lenet5_grey
from tune_hypergrad.problems.wide_resnet import wrn_16_1
from tune_hypergrad.wording import with_range


class Network(NamedTuple):
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    steps: int


def wide_mlp() -> nn.Module:
    """A network of 407,050 weights whose arithmetic is matrix products."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 10))


def wide_cnn() -> nn.Module:
    """The digits CNN with four times the channels."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 10),
    )


NETWORKS = {
    "digits MLP": Network(digits_mlp, (1, 8, 8), 64, 60),
    "digits CNN": Network(digits_cnn, (1, 8, 8), 64, 30),
    "digits CNN, batch 256": Network(digits_cnn, (1, 8, 8), 256, 12),
    "wide digits CNN": Network(wide_cnn, (1, 8, 8), 64, 12),
    "wide MLP": Network(wide_mlp, (1, 28, 28), 128, 12),
    "LeNet, batch 8": Network(lenet5_grey, (1, 28, 28), 8, 16),
    "LeNet": Network(lenet5_grey, (1, 28, 28), 128, 6),
    "WRN-16-1": Network(wrn_16_1, (3, 32, 32), 64, 2),
}
VALUES = {"lr": torch.tensor([0.05, 0.02]), "momentum": torch.tensor([0.9]), "weight_decay": torch.tensor([1e-4])}


def make_problem(network: Network, dtype: torch.dtype = torch.float32) -> Problem:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * network.batch, *network.shape, generator=generator)
    data = inputs, torch.randint(0, 10, (len(inputs),), generator=generator)
    return Problem(
        model=lambda: network.model().to(dtype),
        train=data,
        val=tuple(leaf[: network.batch] for leaf in data),
        batch_size=network.batch,
    )


def finished(loop: InnerLoop, together: bool | None = None) -> HypergradientResult:
    """A whole run's result."""
    run = hypergradient_run(loop, VALUES, differentiation="reverse", together=together)
    with loop.running():
        run.advance(run.length)
    return run.result()


def difference(network: Network) -> float:
    """The largest relative difference of a member's hypergradients from its own run's, in float64."""
    network = network._replace(batch=min(network.batch, 8))
    settings, seeds = TrainingSettings(steps=3), (0, 1)
    problem = make_problem(network, torch.float64)
    together = finished(EnsembleLoop(problem, settings, seeds), True)
    found = [0.0]
    for seed, member in zip(seeds, together.members, strict=True):
        alone = finished(InnerLoop(problem, TrainingSettings(steps=3, seed=seed)))
        for name, value in alone.hypergradients.items():
            found.append(float((member.hypergradients[name] - value).abs().max() / value.abs().max()))
    return max(found)


def take_turns(contenders: dict[int, Callable[[], object]], repetitions: int) -> dict[int, list[float]]:
    """Process times by number of seeds; the first turn is warm-up."""
    times: dict[int, list[float]] = {count: [] for count in contenders}
    for repetition in range(repetitions + 1):
        for count, work in contenders.items():
            start = time.process_time()
            work()
            if repetition > 0:
                times[count].append(time.process_time() - start)
    return times


def measure(name: str, seeds: list[int], repetitions: int, figures: list[Figure]) -> list[str]:
    network = NETWORKS[name]
    problem, settings = make_problem(network), TrainingSettings(steps=network.steps)
    loops = {count: EnsembleLoop(problem, settings, range(count)) for count in seeds}
    contenders: dict[int, Callable[[], object]] = {1: partial(finished, InnerLoop(problem, settings))}
    contenders |= {count: partial(finished, loop, True) for count, loop in loops.items()}
    times = take_turns(contenders, repetitions)
    cells = []
    for count in seeds:
        ratios = [many / one for many, one in zip(times[count], times[1], strict=True)]
        cells.append(with_range(ratios, ".2f"))
        figures.append(figure(f"{name}, {count} seeds", ratios, "runs"))
    loop = loops[seeds[0]]
    together = why_in_turn(loop, VALUES) is None
    milliseconds = 1000 * statistics.median(times[1]) / network.steps
    flops = arithmetic(loop, VALUES) / 1e6
    chosen = "yes" if together else "no"
    return [name, f"{flops:,.1f}", f"{milliseconds:.1f}", *cells, chosen, f"{difference(network):.0e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Costs of ensembles beside one run.")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of every contender")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 4, 8], help="numbers of seeds")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="which networks")
    with_json(parser)
    arguments = parser.parse_args()
    figures: list[Figure] = []
    torch.set_num_threads(1)
    columns = [f"{count} seeds / one run" for count in arguments.seeds]
    table = Table("network", "MFLOP a step", "ms a step, there and back", *columns, "goes together", "difference")
    for name in arguments.networks:
        table.add_row(*measure(name, arguments.seeds, arguments.repetitions, figures))
    Console(width=150).print(table)
    write(arguments.json, figures)


if __name__ == "__main__":
    main()
