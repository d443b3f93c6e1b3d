"""All methods at once on a simulated cluster of three nodes with pretended GPUs, one of which dies in the middle.

    python benchmarks/compare_cluster.py

Trials ask for half a pretended GPU each and train on the CPU. Prints the share of the GPUs that trials held, what was
lost, and whether the ledger agrees with Ray's own logs of the trials.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from tune_hypergrad import Comparison, Method, Retraining, compare, problems
from tune_hypergrad.comparison.ledger import LEDGER_FILE
from tune_hypergrad.comparison.methods import BY_DEFAULT, METHODS
from tune_hypergrad.comparison.telling.series import Granted

NODES, GPUS = 3, 1


def pretending(method: Method) -> Method:
    """The method with trials that are granted half a GPU and do not look for it."""

    def trainable(task: Any) -> Any:
        made = method.trainable(task)
        return type(made.__name__, (made,), {"trial_resources": property(lambda self: None)})

    return replace(method, trainable=trainable, resources={"cpu": 1, "gpu": 0.5})


def kill_a_node(cluster: Cluster, node: Any, folder: Path, results: int) -> None:
    """Take a node away once there are so many results."""
    while not (folder / LEDGER_FILE).exists() or (folder / LEDGER_FILE).read_text().count('"result"') < results:
        time.sleep(0.2)
    cluster.remove_node(node, allow_graceful=False)
    print("a node was killed", flush=True)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="100e")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep-nodes", action="store_true", help="let no node die")
    options = parser.parse_args()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    nodes = [cluster.add_node(num_cpus=2 * GPUS, num_gpus=GPUS) for _ in range(NODES)]
    ray.init(address=cluster.address, log_to_driver=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary) / "run"
        if not options.keep_nodes:
            killer = threading.Thread(target=kill_a_node, args=(cluster, nodes[-1], folder, 60), daemon=True)
            killer.start()
        comparison = compare(
            problems.get("digits"),
            [pretending(METHODS[name]) for name in BY_DEFAULT],
            budget=options.budget,
            retraining=Retraining(seeds=0),
            out=folder,
            progress="auto",
        )
        tell(comparison)
    ray.shutdown()
    cluster.shutdown()


def tell(comparison: Comparison) -> None:
    """Print what was measured; raise where the ledger and Ray's logs differ."""
    unit, accounts = comparison.budget.unit, comparison.accounts
    print(accounts[["method", "trials", "share", f"spent/{unit}", f"lost/{unit}", "reason"]].to_string(index=False))
    logged = 0.0
    for log in (comparison.folder / "trials").glob("*/result.json"):
        before, said = {0: 0.0}, set()
        for line in map(json.loads, log.read_text().splitlines()):
            iteration, cost = line["training_iteration"], line[f"cost/{unit}"]
            again = (iteration, line["cost/wall_seconds"])
            if again not in said:  # which a trial says that goes on from a checkpoint
                logged += cost - before[iteration - 1]
            before[iteration] = cost
            said.add(again)
    ledger = float(accounts[f"spent/{unit}"].sum() + accounts[f"lost/{unit}"].sum())
    print(f"sum over trials' reports {logged:.4f}, over the ledger {ledger:.4f}")
    if abs(logged - ledger) > 1e-6 * logged:
        raise RuntimeError("costs are not conserved")
    granted = Granted.of(comparison)
    assert granted is not None
    held, lengths = sum(granted.shares.values()), np.diff(granted.times)
    begun = comparison.events[0]["time"]
    print("share of the GPUs, of three nodes, that trials held until so many methods had spent their budgets:")
    stops = [e for e in comparison.events if e["event"] == "stop" and e["method"] in comparison.methods]
    for number, stop in enumerate(stops, start=1):
        until = granted.times[:-1] < stop["time"] - begun
        share = float((held * lengths)[until].sum() / lengths[until].sum())
        print(f"{number}: {100 * share:.0f} %, {stop['time'] - begun:.0f} s ({stop['method']})")


if __name__ == "__main__":
    main()
