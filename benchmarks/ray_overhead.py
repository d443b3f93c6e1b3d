"""What our trainables add to Ray's own time per trial and per report, on a problem that takes no time.

    python benchmarks/ray_overhead.py [--trials 20] [--reports 20] [--rounds 3]

`FixedSchedule` takes one step on two examples per report; the bare trainable reports as many numbers and does nothing.
Both run in one Ray session of one CPU with reused actors, by turns. Figures are medians of the time between two results
that the driver sees: of one trial (a report), and the last of one trial and the first of the next (a trial).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import ray
import torch
from figures import figure, with_json, write
from ray import tune
from ray.tune import Callback, RunConfig, TuneConfig
from torch import nn

from tune_hypergrad import FixedSchedule, Problem, schedule


class Bare(tune.Trainable):
    """Reports as many numbers as `FixedSchedule` does."""

    def setup(self, config: dict[str, Any]) -> None:
        self.done_reports = 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.done_reports = 0
        return True

    def step(self) -> dict[str, Any]:
        self.done_reports += 1
        numbers = {f"number/{i}": float(i) for i in range(self.config["numbers"] - 2)}
        return {**numbers, "val_loss": 1.0, "done": self.done_reports == self.config["reports"]}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / "state").write_text(str(self.done_reports))


class Clock(Callback):
    """When the driver saw each result."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, float]] = []

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.seen.append((trial.trial_id, time.perf_counter(), result["time_this_iter_s"]))


def measure(trainable: type[tune.Trainable], space: dict[str, Any], trials: int) -> dict[str, float]:
    """Milliseconds per report, per trial, and in the trainable's own `step`."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=TuneConfig(metric="val_loss", mode="min", num_samples=trials, reuse_actors=True),
            run_config=RunConfig(storage_path=folder, verbose=0, callbacks=[clock]),
        )
        tuner.fit()
    clock = tuner._local_tuner._run_config.callbacks[0]  # the Tuner works on a copy
    gaps: dict[str, list[float]] = defaultdict(list)
    for (before, begun, _), (after, ended, _) in zip(clock.seen, clock.seen[1:], strict=False):
        gaps["report" if before == after else "trial"].append(ended - begun)
    gaps["step"] = [seconds for *_, seconds in clock.seen]
    return {name: 1000 * statistics.median(values) for name, values in gaps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--reports", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    with_json(parser)
    options = parser.parse_args()
    x, y = torch.randn(2, 2), torch.tensor([0, 1])
    problem = Problem(model=lambda: nn.Linear(2, 2), train=(x, y), val=(x, y), batch_size=2)
    ours = FixedSchedule.from_problem(problem, steps=options.reports, reports=options.reports)
    space = {"lr": schedule(tune.uniform(0, 1), windows=4), "momentum": tune.uniform(0, 1)}
    numbers = len(ours(config={"lr": [0.1] * 4, "momentum": 0.1}).step())
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    kinds = {
        "FixedSchedule": (ours, space),
        "bare": (Bare, {**space, "numbers": numbers, "reports": options.reports}),
    }
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for _ in range(options.rounds):
        for name, (trainable, config) in kinds.items():
            rounds[name].append(measure(trainable, config, options.trials))
    ray.shutdown()
    print(f"\n{numbers} numbers a report; milliseconds, each round's median")
    for name, measured in rounds.items():
        for what in ("report", "trial", "step"):
            print(f"{name:14} {what:7}", "  ".join(f"{figures[what]:7.2f}" for figures in measured))
    write(
        options.json,
        (
            figure(f"{name}, a {what}", [round_[what] for round_ in measured], "ms")
            for name, measured in rounds.items()
            for what in ("report", "trial", "step")
        ),
    )


if __name__ == "__main__":
    main()
