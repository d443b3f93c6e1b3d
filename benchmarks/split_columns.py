"""What an outer step takes when the columns of its run are divided among trials: `HypergradientSearch(parts=...)`.

    python benchmarks/split_columns.py [--parts 1 2] [--steps 24] [--rounds 3]

LeNet at batch 128 on synthetic images, eight numbers tuned (four windows of the learning rate, two each of momentum and
weight decay), in one Ray session with as many CPUs as the most parts, one for each trial, and reused actors. Contenders
take turns; of each turn's two outer steps the second one counts, since the first waits for all actors to start: Ray
keeps one of them for the second, and starts those of further parts anew. "reverse" is one trial by reverse mode, which
is what `parts=1` takes unless forward mode is asked for.

- seconds: from the end of the first outer step to that of the second, as the driver sees them: Ray's own part included,
  and whatever else the machine does;
- CPU seconds: of the trial that takes longest, without the start of its process;
- gradients: what all trials of the outer step together are charged, per inner step.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections import defaultdict
from statistics import median
from typing import Any, NamedTuple

import ray
import torch
from ray import tune
from ray.tune import Callback, RunConfig, TuneConfig
from rich.console import Console
from rich.table import Table

from tune_hypergrad import HypergradientSearch, InnerRun, Problem, schedule
from tune_hypergrad.problems.models import lenet5_grey
from tune_hypergrad.wording import with_range

SPACE = {
    "lr": schedule(tune.loguniform(1e-3, 0.1), windows=4),
    "momentum": schedule(tune.uniform(0, 0.9), windows=2),
    "weight_decay": schedule(tune.loguniform(1e-6, 1e-3), windows=2),
}
BATCH = 128
REVERSE = "reverse, one trial"


class Timed(InnerRun):
    """Reports the CPU seconds of its trial."""

    def begin(self, settings: Any, hyperparameters: dict[str, Any]) -> None:
        self.begun = time.process_time()
        super().begin(settings, hyperparameters)

    def work(self) -> dict[str, Any]:
        return {**super().work(), "cpu_seconds": time.process_time() - self.begun}


class OuterStep(NamedTuple):
    """What the second outer step of a search took."""

    seconds: float
    cpu_seconds: float
    gradients: float


class Clock(Callback):
    """When trials ended, with their last results, by the seed of their outer step."""

    def __init__(self) -> None:
        self.ended: dict[int, list[tuple[float, dict[str, Any]]]] = defaultdict(list)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.ended[trial.config["seed"]].append((time.perf_counter(), trial.last_result))


def measure(problem: Problem, contender: str, parts: int, steps: int) -> OuterStep:
    mode = "reverse" if contender == REVERSE else "forward"
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            Timed.from_problem(problem, steps=steps, reports=1, differentiation=mode, check=False),
            param_space=SPACE,
            tune_config=TuneConfig(
                search_alg=HypergradientSearch(rule="paper", outer_steps=2, parts=parts),
                metric="val_loss",
                mode="min",
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=RunConfig(storage_path=folder, verbose=0, callbacks=[clock]),
        )
        grid = tuner.fit()
    assert not grid.errors
    clock = tuner._local_tuner._run_config.callbacks[0]  # the Tuner works on a copy
    first, second = clock.ended.values()
    return OuterStep(
        max(end for end, _ in second) - max(end for end, _ in first),
        max(result["cpu_seconds"] for _, result in second),
        sum(result["cost/gradients"] for _, result in second) / steps,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=24, help="inner steps of a run")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    draws = torch.Generator().manual_seed(0)

    def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(count, 1, 28, 28, generator=draws), torch.randint(10, (count,), generator=draws)

    problem = Problem(lenet5_grey, images(8 * BATCH), images(BATCH), batch_size=BATCH)
    contenders = {f"forward, parts={parts}": parts for parts in options.parts} | {REVERSE: 1}
    measured: dict[str, list[OuterStep]] = defaultdict(list)
    ray.init(num_cpus=max(options.parts), include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    for _ in range(options.rounds):
        for contender, parts in contenders.items():
            measured[contender].append(measure(problem, contender, parts, options.steps))
            print(contender, measured[contender][-1])
    ray.shutdown()
    table = Table("contender", "seconds", "ratio", "CPU seconds", "ratio", "gradients a step")
    base = next(iter(measured.values()))
    for contender, found in measured.items():
        columns = []
        for name in ("seconds", "cpu_seconds"):
            own, others = ([getattr(one, name) for one in each] for each in (found, base))
            columns += [own, [value / other for value, other in zip(own, others, strict=True)]]
        gradients = median(one.gradients for one in found)
        table.add_row(contender, *(with_range(column, ".2f") for column in columns), f"{gradients:.2f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
