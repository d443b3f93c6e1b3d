"""Two trials on two cores: pinned to the CPU that each was granted, or with torch's default of all cores.

    python benchmarks/compare_threads.py

Each contender is two processes at once that take LeNet's training steps, by the clock; median and range over the rounds
(contenders take turns). `compare` pins its trials as the first does.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from tune_hypergrad import Problem
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.problems.models import lenet5_grey
from tune_hypergrad.wording import with_range


def train(threads: int, steps: int) -> float:
    """Seconds that so many training steps take."""
    torch.set_num_threads(threads)
    x, y = torch.randn(512, 1, 28, 28), torch.randint(10, (512,))
    problem = Problem(lenet5_grey, (x, y), (x, y), batch_size=128)
    loop = InnerLoop(problem, TrainingSettings(steps=steps + 5, fixed={"lr": 0.01}))
    state, begun = loop.initial_state(), 0.0
    with loop.running():
        for step in range(steps + 5):
            if step == 5:
                begun = time.perf_counter()
            state = loop.step(state, {}, step)
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    cores = torch.get_num_threads()
    seconds: dict[int, list[float]] = {1: [], cores: []}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for _ in range(options.rounds):
            for threads, measured in seconds.items():
                measured.append(max(pool.map(train, [threads] * 2, [options.steps] * 2)))
    for threads, measured in seconds.items():
        per_step = [1000 * value / options.steps for value in measured]
        print(f"two trials at once, {threads} threads each, ms a step: {with_range(per_step, '.1f')}")
    ratios = [other / pinned for pinned, other in zip(seconds[1], seconds[cores], strict=True)]
    print(f"ratio: {with_range(ratios, '.2f')}")


if __name__ == "__main__":
    main()
