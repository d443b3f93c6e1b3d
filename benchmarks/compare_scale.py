"""What a comparison costs as it grows: trials that do nothing, of many accounts, to ten thousand results.

    python benchmarks/compare_scale.py [--accounts 100] [--results 2500 5000 10000]

Every size is a comparison of its own, in a process of its own: half of the accounts are random search's, half BOHB's,
and every trial has ten results, unless the budget ends it. Seconds are CPU seconds of the driver's thread in which
Ray's loop runs, by what it did: ours are the searcher's, the stopper's and the callback's calls; a decision is whose
trial is next, as often as it was asked.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune

from tune_hypergrad import BOHBSearch, Budget, Method, RandomSearch, Retraining, compare, problems
from tune_hypergrad.comparison.running.callback import ComparisonCallback
from tune_hypergrad.comparison.running.fair_share import FairShare
from tune_hypergrad.comparison.running.portfolio import SNAPSHOT_FILE, PortfolioSearch
from tune_hypergrad.comparison.telling.records import Comparison
from tune_hypergrad.comparison.telling.report import write_report

SPACE = {"x": tune.uniform(0, 1), "y": tune.loguniform(1e-4, 1), "z": tune.uniform(0, 1)}
REPORTS = 10
METHODS: dict[str, Callable[[Any], Any]] = {
    "rs": lambda task: RandomSearch(SPACE, "val_loss", "min", seed=task.seed),
    "bohb": lambda task: BOHBSearch(SPACE, "val_loss", "min", seed=task.seed, max_budget=9),
}
OURS = {
    "suggestions": (PortfolioSearch, "suggest"),
    "results to searchers": (PortfolioSearch, "on_trial_result"),
    "ends to searchers": (PortfolioSearch, "on_trial_complete"),
    "results to the ledger": (PortfolioSearch, "charge"),
    "ends to the ledger": (PortfolioSearch, "ended"),
    "beginnings to the ledger": (PortfolioSearch, "started"),
    "snapshots": (PortfolioSearch, "save"),
    "progress": (ComparisonCallback, "show"),
    "decisions": (FairShare, "turns"),
}


class Nothing(tune.Trainable):
    """Reports at once."""

    def setup(self, config: dict[str, Any]) -> None:
        self.x, self.reports = config["x"], 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        self.reports += 1
        loss = (self.x - 0.3) ** 2 + 1 / self.reports
        return {"val_loss": loss, "cost/gradients": float(self.reports), "done": self.reports == REPORTS}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / "reports").write_text(str(self.reports))

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]
        self.reports = int((Path(checkpoint) / "reports").read_text())


def timed(cls: type, name: str, seconds: Counter[str], calls: Counter[str], label: str) -> None:
    """Let a method note what it takes."""
    method = getattr(cls, name)

    def wrapper(*arguments: Any, **named: Any) -> Any:
        begun = time.thread_time()
        try:
            return method(*arguments, **named)
        finally:
            seconds[label] += time.thread_time() - begun
            calls[label] += 1

    setattr(cls, name, wrapper)


def megabytes() -> float:
    """This process's largest memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(results: int, accounts: int) -> dict[str, Any]:
    """One comparison."""
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for label, (cls, name) in OURS.items():
        timed(cls, name, seconds, calls, label)
    seeds = accounts // len(METHODS)
    methods = [Method(name, searcher, lambda task: Nothing) for name, searcher in METHODS.items()]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        before, begun, by_clock = megabytes(), time.thread_time(), time.perf_counter()
        comparison = compare(
            problems.get("digits_mlp"),
            methods,
            budget=Budget(results // accounts),
            space=SPACE,
            seeds=seeds,
            retraining=Retraining(seeds=0),
            out=out,
            resources={"cpu": 0.25},
            progress="quiet",
            check=False,
        )
        driver, clock, grown = time.thread_time() - begun, time.perf_counter() - by_clock, megabytes() - before
        report_begun = time.thread_time()
        write_report(Comparison(comparison.folder))
        report = time.thread_time() - report_begun
        found = int(comparison.accounts["results"].sum())
        return {
            "results": found,
            "trials": int(comparison.accounts["trials"].sum()),
            "accounts": accounts,
            "a result, ours (ms)": 1e3 * sum(s for label, s in seconds.items() if label != "decisions") / found,
            "a result, the driver (ms)": 1e3 * (driver - report) / found,
            "a result, by the clock (ms)": 1e3 * clock / found,
            "a decision (ms)": 1e3 * seconds["decisions"] / calls["decisions"],
            "a snapshot (ms)": 1e3 * seconds["snapshots"] / max(calls["snapshots"], 1),
            "snapshot (MB)": (out / SNAPSHOT_FILE).stat().st_size / 1e6,
            "ledger (MB)": (out / "ledger.jsonl").stat().st_size / 1e6,
            "memory of the driver (MB)": grown,
            "report (s)": report,
            "seconds": dict(seconds),
            "calls": dict(calls),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accounts", type=int, default=100)
    parser.add_argument("--results", type=int, nargs="+", default=[2500, 5000, 10_000])
    parser.add_argument("--here", action="store_true", help="measure one size in this process, and print JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.results[0], options.accounts)))
        return
    rows = []
    for results in options.results:
        command = [sys.executable, __file__, "--here", "--accounts", str(options.accounts), "--results", str(results)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    names = [name for name in rows[0] if name not in ("seconds", "calls")]
    print("| " + " | ".join(["", *(f"{row['results']:,} results" for row in rows)]) + " |")
    print("| --- " * (len(rows) + 1) + "|")
    for name in names[1:]:
        print("| " + " | ".join([name, *(f"{row[name]:.3g}" for row in rows)]) + " |")
    for row in rows:
        print(f"{row['results']:,} results, seconds (calls): ", end="")
        print(", ".join(f"{label} {s:.2f} ({row['calls'][label]:,})" for label, s in row["seconds"].items()))


if __name__ == "__main__":
    main()
