"""The driver of `tune-hypergrad compare` is killed with SIGKILL at random moments, then the comparison is resumed.

    python benchmarks/compare_kills.py

Every resumed comparison must end with a complete report whose parts agree: the ledger replayed, the results, of which
none may be missing, what Ray's own logs of the trials say; no budget may be exceeded by more than a result. What was
done twice is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tune_hypergrad.comparison.telling.records import Comparison
from tune_hypergrad.wording import markdown_row, markdown_table

METHODS = ("fds", "delta-stn", "rs", "bohb", "cosine")


def command(*arguments: str) -> list[str]:
    """The command line, with this interpreter."""
    return [sys.executable, "-c", "from tune_hypergrad.cli import main; main()", "compare", *arguments]


def main() -> None:
    """Kill, resume, check and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--budget", default="40e")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    methods = [part for name in METHODS for part in ("--method", name)]
    head = ("killed after, s", "results then", "gradients lost", "share of the budget", "largest overrun", "retrained")
    print(markdown_table(head, []))
    for _ in range(options.kills):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "run"
            size = ("digits", *methods, "--budget", options.budget, "--retrain-seeds", "1")
            driver = subprocess.Popen(
                command(*size, "--out", str(folder), "--progress", "quiet"), start_new_session=True
            )
            begun, after = time.monotonic(), moments.uniform(10, 60)
            while time.monotonic() - begun < after and driver.poll() is None:
                time.sleep(0.05)
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            results = len(Comparison(folder).results)
            time.sleep(3)  # Ray's processes notice
            subprocess.run(
                command("--resume", str(folder), "--progress", "quiet"), check=True, stdout=subprocess.DEVNULL
            )
            lost, shares, overrun, retrained = checked(folder)
            spent = f"{min(shares):.3f} to {max(shares):.3f}"
            cells = (f"{after:.0f}", str(results), f"{lost:.0f}", spent, f"{overrun:.3f}", str(retrained))
            print(markdown_row(cells), flush=True)


def checked(folder: Path) -> tuple[float, list[float], float, int]:
    """Gradients lost, shares of the budget spent, the largest overrun as a share, and retrainings.

    Raises:
        RuntimeError: parts of the comparison do not agree.
    """
    comparison = Comparison(folder)
    unit, accounts = comparison.budget.unit, comparison.accounts
    if not set(accounts["reason"]) <= {"budget spent"}:
        raise RuntimeError(f"not complete: {list(accounts['reason'])}")
    counted = comparison.results[~comparison.results["lost"]]
    for row in accounts.to_dict("records"):
        own = counted[counted["method"] == row["method"]]
        by_trial = own.groupby("id")[f"cost/{unit}"].max().sum()
        if abs(by_trial - row[f"spent/{unit}"]) > 1e-6 * by_trial or own[["id", "iteration"]].duplicated().any():
            raise RuntimeError(f"{row['method']}: its results cost {by_trial}, the ledger says {row[f'spent/{unit}']}")
        largest = own.groupby("id")[f"cost/{unit}"].diff().fillna(own[f"cost/{unit}"]).max()
        if row[f"spent/{unit}"] > comparison.budget.amount + largest:
            raise RuntimeError(f"{row['method']} is over its budget by more than one result")
    for trial_id, own in counted.groupby("id"):
        if list(own["iteration"]) != list(range(1, len(own) + 1)):
            raise RuntimeError(f"{own['trial'].iloc[0]}: a result is missing")
        (log,) = (folder / "trials").glob(f"*_{trial_id}_*/result.json")
        # what Ray had not brought to the storage is not there
        lines = map(json.loads, log.read_text().splitlines())
        logged = {line["training_iteration"]: str(line["val_loss"]) for line in lines}
        if not logged.items() <= dict(zip(own["iteration"], map(str, own["val_loss"]), strict=True)).items():
            raise RuntimeError(f"{own['trial'].iloc[0]}: the ledger's results are not those in Ray's log")
    if not (folder / "report.html").exists() or comparison.retrained.groupby("method").ngroups < len(METHODS):
        raise RuntimeError("the report is not complete")
    shares = [float(share) for share in accounts["share"]]
    return float(accounts[f"lost/{unit}"].sum()), shares, max(shares) - 1, len(comparison.retrained)


if __name__ == "__main__":
    main()
