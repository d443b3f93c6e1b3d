"""What a self-tuning network's training step costs, as a ratio to a plain step of the same network.

python benchmarks/self_tuning_cost.py [--repetitions 30]

An MLP (784-1200-1200-10) on random data, batch 128, SGD with momentum, 6 hyperparameters with a perturbation for every
example. Process time on one CPU thread, contenders taking turns in one process: median (range) over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_hypergrad.stn import VARIANTS, TunedHyperparameter, TunedHyperparameters, self_tuning, training_gradients

BATCH = 128
HYPERPARAMETERS = 6


def mlp() -> nn.Module:
    """The network."""
    return nn.Sequential(nn.Linear(784, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 10))


def plain_step(batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """A training step without hyperparameters."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def self_tuning_step(variant: str, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """A training step of general weights and responses."""
    network = self_tuning(mlp(), HYPERPARAMETERS)
    tuned = TunedHyperparameters([TunedHyperparameter(str(index), 0, 1) for index in range(HYPERPARAMETERS)])
    parameters = {**network.general_parameters(), **network.response_parameters()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        for gradients in training_gradients(
            network,
            tuned,
            VARIANTS[variant],
            lambda output, target, weights, values: F.cross_entropy(output, target),
            batch,
            tuned.perturbations(BATCH, generator),
        ):
            for name, gradient in gradients.items():
                parameters[name].grad = gradient
        optimizer.step()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=30)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = torch.randn(BATCH, 784), torch.randint(10, (BATCH,))
    contenders = {"plain": plain_step(batch), **{name: self_tuning_step(name, batch) for name in VARIANTS}}
    seconds = defaultdict(list)
    for _ in range(repetitions):
        for name, step in contenders.items():
            begun = time.process_time()
            step()
            seconds[name].append(time.process_time() - begun)
    plain = statistics.median(seconds["plain"])
    for name, times in seconds.items():
        low, middle, high = (choose(times) / plain for choose in (min, statistics.median, max))
        print(f"{name:13} {middle:5.2f} ({low:.2f} to {high:.2f}) plain steps")


if __name__ == "__main__":
    main()
