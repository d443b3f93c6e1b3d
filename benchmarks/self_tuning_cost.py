"""What a self-tuning network's training and validation steps cost, as ratios to a plain step of the same network.

python benchmarks/self_tuning_cost.py [--repetitions 30] [--network mlp]

An MLP (784-1200-1200-10) or a CNN (SimpleCNN at a quarter of its width) on random data, batch 128, SGD with momentum, 6
hyperparameters with a perturbation for every example. Process time on one CPU thread, contenders taking turns in one
process: median (range) over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from figures import figure, with_json, write
from torch import Tensor, nn

from tune_hypergrad.objective import Objective
from tune_hypergrad.problems.networks import simple_cnn
from tune_hypergrad.stn import (
    VARIANTS,
    TunedHyperparameter,
    TunedHyperparameters,
    self_tuning,
    training_gradients,
    validation_gradients,
)

BATCH = 128
HYPERPARAMETERS = 6


def mlp() -> nn.Module:
    """784-1200-1200-10."""
    hidden = [nn.Linear(784, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(1200, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": partial(simple_cnn, width=0.25)}


def plain_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """A training step without hyperparameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def validation_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """A step of hyperparameters and scales."""
    network = self_tuning(model, HYPERPARAMETERS).eval()
    tuned = some_hyperparameters()
    optimizer = torch.optim.RMSprop([tuned.unconstrained, tuned.log_scales], lr=0.01)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        perturbations = tuned.perturbations(BATCH, generator)
        _, *gradients = validation_gradients(
            network, tuned, VARIANTS["delta-stn"], F.cross_entropy, batch, perturbations, entropy_weight=1e-3
        )
        tuned.unconstrained.grad, tuned.log_scales.grad = gradients
        optimizer.step()

    return step


def some_hyperparameters() -> TunedHyperparameters:
    """Hyperparameters that nothing uses."""
    return TunedHyperparameters([TunedHyperparameter(str(index), 0, 1) for index in range(HYPERPARAMETERS)])


def training_step(variant: str, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """A step of general weights and responses."""
    objective = Objective(lambda output, target, weights, values: F.cross_entropy(output, target), (), model)
    network = self_tuning(model, HYPERPARAMETERS)
    tuned = some_hyperparameters()
    parameters = {**network.general_parameters(), **network.response_parameters()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        for gradients in training_gradients(
            network,
            tuned,
            VARIANTS[variant],
            objective,
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
    parser.add_argument("--network", choices=NETWORKS, default="mlp")
    with_json(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make = NETWORKS[options.network]
    batch = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    contenders = {
        "plain": plain_step(make(), batch),
        **{name: training_step(name, make(), batch) for name in VARIANTS},
        "validation": validation_step(make(), batch),
    }
    seconds = defaultdict(list)
    for _ in range(options.repetitions):
        for name, step in contenders.items():
            begun = time.process_time()
            step()
            seconds[name].append(time.process_time() - begun)
    plain = statistics.median(seconds["plain"])
    for name, times in seconds.items():
        low, middle, high = (choose(times) / plain for choose in (min, statistics.median, max))
        print(f"{name:13} {middle:5.2f} ({low:.2f} to {high:.2f}) plain steps")
    ratios = {name: [each / plain for each in times] for name, times in seconds.items()}
    write(options.json, (figure(f"{options.network}, {name}", each, "plain steps") for name, each in ratios.items()))


if __name__ == "__main__":
    main()
