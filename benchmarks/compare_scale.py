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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from figures import figure, with_json, write
from ray import tune

from tune_hypergrad import BOHBSearch, Budget, Method, RandomSearch, Retraining, compare, problems
from tune_hypergrad.comparison.running.callback import ComparisonCallback
from tune_hypergrad.comparison.running.fair_share import FairShare
from tune_hypergrad.comparison.running.portfolio import SNAPSHOT_FILE, PortfolioSearch
from tune_hypergrad.comparison.running.profiling import Phases, Stopwatch
from tune_hypergrad.comparison.telling.records import Comparison
from tune_hypergrad.comparison.telling.report import write_report
from tune_hypergrad.wording import markdown_table

SPACE = {"x": tune.uniform(0, 1), "y": tune.loguniform(1e-4, 1), "z": tune.uniform(0, 1)}
REPORTS = 10
METHODS: dict[str, Callable[[Any], Any]] = {
    "rs": lambda task: RandomSearch(SPACE, "val_loss", "min", seed=task.seed),
    "bohb": lambda task: BOHBSearch(SPACE, "val_loss", "min", seed=task.seed, max_budget=9),
}
OURS: Phases = {
    "suggestions": ((PortfolioSearch, "suggest"),),
    "results to searchers": ((PortfolioSearch, "on_trial_result"),),
    "ends to searchers": ((PortfolioSearch, "on_trial_complete"),),
    "results to the ledger": ((PortfolioSearch, "charge"),),
    "beginnings and ends to the ledger": ((PortfolioSearch, "started"), (PortfolioSearch, "ended")),
    "snapshots": ((PortfolioSearch, "save"),),
    "progress": ((ComparisonCallback, "show"),),
    "decisions": ((FairShare, "turns"),),
}


class Counting(Stopwatch):
    """Counts phases, too."""

    def __init__(self) -> None:
        super().__init__(time.thread_time)
        self.calls: Counter[str] = Counter()

    @contextmanager
    def phase(self, label: str) -> Iterator[None]:
        self.calls[label] += 1
        with super().phase(label):
            yield


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


def megabytes() -> float:
    """This process's largest memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(results: int, accounts: int) -> dict[str, Any]:
    """One comparison."""
    stopwatch = Counting()
    seeds = accounts // len(METHODS)
    methods = [Method(name, searcher, lambda task: Nothing) for name, searcher in METHODS.items()]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        before, begun, by_clock = megabytes(), time.thread_time(), time.perf_counter()
        with stopwatch.watching(OURS):
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
        seconds, calls = stopwatch.taken(), stopwatch.calls
        found = int(comparison.accounts["results"].sum())
        return {
            "results": found,
            "trials": int(comparison.accounts["trials"].sum()),
            "accounts": accounts,
            "a result, ours (ms)": 1e3 * sum(seconds.values()) / found,
            "a result, the driver (ms)": 1e3 * (driver - report) / found,
            "a result, by the clock (ms)": 1e3 * clock / found,
            "a decision (ms)": 1e3 * seconds["decisions"] / calls["decisions"],
            "a snapshot (ms)": 1e3 * seconds["snapshots"] / max(calls["snapshots"], 1),
            "snapshot (MB)": (out / SNAPSHOT_FILE).stat().st_size / 1e6,
            "ledger (MB)": (out / "ledger.jsonl").stat().st_size / 1e6,
            "memory of the driver (MB)": grown,
            "report (s)": report,
            "seconds": seconds,
            "calls": dict(calls),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accounts", type=int, default=100)
    parser.add_argument("--results", type=int, nargs="+", default=[2500, 5000, 10_000])
    with_json(parser)
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
        print(done.stdout.splitlines()[-1], file=sys.stderr)  # should a larger one not end
    names = [name for name in rows[0] if name not in ("seconds", "calls")]
    headings = ["", *(f"{row['results']:,} results" for row in rows)]
    print(markdown_table(headings, ([name, *(f"{row[name]:.3g}" for row in rows)] for name in names[1:])))
    write(
        options.json,
        (figure(f"{row['results']:,} results: {name}", row[name], "") for row in rows for name in names[1:]),
    )
    for row in rows:
        print(f"{row['results']:,} results, seconds (calls): ", end="")
        print(", ".join(f"{label} {s:.2f} ({row['calls'][label]:,})" for label, s in row["seconds"].items()))


if __name__ == "__main__":
    main()
