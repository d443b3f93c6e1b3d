"""What `compare` costs beside Ray Tune with random search: trials of known length that only sleep.

    python benchmarks/compare_overhead.py [--interval 0.1]

Contenders take turns in one Ray session; each runs as many trials of as many results, two at once. `compare` saves a
checkpoint at every result, Ray Tune saves none. The ratio is of seconds from handing the work over to having the last
result (`compare`'s report, which is written after that, is timed apart), median and range over the rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import RunConfig, TuneConfig

from tune_hypergrad import Budget, Method, RandomSearch, Retraining, compare, problems
from tune_hypergrad.comparison.telling.records import Comparison
from tune_hypergrad.comparison.telling.report import write_report
from tune_hypergrad.wording import with_range

SPACE = {"x": tune.uniform(0, 1)}


class Sleeper(tune.Trainable):
    """Sleeps before every result."""

    REPORTS = 10
    SECONDS: float

    def setup(self, config: dict[str, Any]) -> None:
        self.x, self.reports = config["x"], 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        time.sleep(self.SECONDS)
        self.reports += 1
        return {"val_loss": self.x, "cost/gradients": float(self.reports), "done": self.reports == self.REPORTS}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / "reports").write_text(str(self.reports))

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]
        self.reports = int((Path(checkpoint) / "reports").read_text())


def sleeper(seconds: float) -> type[Sleeper]:
    """The trainable, whose results come every so many seconds."""
    return type("Sleeper", (Sleeper,), {"SECONDS": seconds})


def with_ray_tune(trainable: type[Sleeper], trials: int, folder: Path) -> float:
    """Seconds that plain Ray Tune takes."""
    begun = time.perf_counter()
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space=SPACE,
        tune_config=TuneConfig(num_samples=trials, metric="val_loss", mode="min", reuse_actors=True),
        run_config=RunConfig(storage_path=str(folder), verbose=0),
    ).fit()
    return time.perf_counter() - begun


def with_compare(trainable: type[Sleeper], trials: int, folder: Path) -> tuple[float, float]:
    """Seconds that `compare` takes, without its report, and those of the report."""
    asleep = Method("rs", lambda task: RandomSearch(SPACE, "val_loss", "min", seed=task.seed), lambda task: trainable)
    begun = time.perf_counter()
    comparison = compare(
        problems.get("digits_mlp"),
        [asleep],
        budget=Budget(trials * Sleeper.REPORTS),
        space=SPACE,
        retraining=Retraining(seeds=0),
        out=folder / "compare",
        progress="quiet",
    )
    total = time.perf_counter() - begun
    # the last ones may have been cut short as the budget was spent, and others begun for what was left
    if abs(comparison.accounts["results"].sum() - trials * Sleeper.REPORTS) > 1:
        raise RuntimeError(f"{comparison.accounts['results'].sum()} results, not {trials * Sleeper.REPORTS}")
    begun = time.perf_counter()
    write_report(Comparison(comparison.folder))
    report = time.perf_counter() - begun
    return total - report, report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between a trial's results")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ratios, seconds = [], []
    for round_ in range(options.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            trials = options.trials if round_ else 4  # the first is to warm up
            of_ray = with_ray_tune(sleeper(options.interval), trials, Path(folder))
            ours, report = with_compare(sleeper(options.interval), trials, Path(folder))
            if round_:
                ratios.append(ours / of_ray)
                seconds.append((of_ray, ours, report))
    asleep = options.trials * Sleeper.REPORTS * options.interval / 2
    print(f"{options.trials} trials, {asleep:.0f} s asleep, two at once; {options.rounds} rounds")
    for name, values in zip(("Ray Tune", "compare", "its report"), zip(*seconds, strict=True), strict=True):
        print(f"{name}: {with_range(values, '.1f')} s")
    print(f"ratio: {with_range(ratios, '.3f')}")


if __name__ == "__main__":
    main()
