"""Learning-rate schedules for one epoch of LeNet on Fashion-MNIST: FDS, greedy, bare sign updates, cosine.

    python benchmarks/fashion_mnist_schedules.py --data-dir DATA --out docs/fashion_mnist

SGD with momentum 0.9, batch 128, 55,000 training and 5,000 validation examples, 10 learning rates that begin at zero
and move by steps of 0.02 at first (the setting of Figure 3 of Micaelli & Storkey 2021, for SVHN and MNIST there). Each
outer step averages over three seeds. Contenders:

- fds: exact hypergradients of the whole epoch, with the outer loop's safeguard (`OuterLoop`);
- bare: the same hypergradients, sign updates without the safeguard;
- greedy: hypergradients of horizon 1, by 500 validation examples each, with the safeguard;
- cosine: from 0.1 to zero, not searched.

A search's schedule is its best by validation loss. Every schedule is trained anew with five other seeds, and only then
is the test split read. Writes `results.json`, `search.png` and `schedules.png` to the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from tune_hypergrad import Problem, problems
from tune_hypergrad.hypergradients import Descent, InnerLoop, OuterLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.space import Range

WINDOWS = 10
STEPS = 429  # one epoch

_PROBLEM: list[Problem] = []
_MOMENTUM: list[float] = []


def prepare(data_dir: str | None, momentum: float) -> None:
    """Set a worker process up."""
    torch.set_num_threads(1)
    _PROBLEM.append(problems.get("fashion_mnist", data_dir=data_dir))
    _MOMENTUM.append(momentum)


class Run(NamedTuple):
    """What one training run of an outer step gave."""

    val_loss: float
    val_accuracy: float
    hypergradient: list[float]
    untrained_loss: float


def inner_loop(seed: int) -> InnerLoop:
    """One epoch."""
    problem = _PROBLEM[0]
    fixed = {"momentum": _MOMENTUM[0]}
    return InnerLoop(problem, TrainingSettings(steps=problem.steps_per_epoch, fixed=fixed, seed=seed))


def train(lr: list[float], seed: int, greedy: bool) -> Run:
    """Train with a seed and differentiate."""
    loop = inner_loop(seed)
    options: dict[str, Any] = {"horizon": 1, "val_examples": 500} if greedy else {}
    run = hypergradient_run(loop, {"lr": torch.tensor(lr, dtype=torch.float64)}, **options)
    with loop.running():
        untrained = loop.evaluate(loop.initial_state()).loss
        run.advance(run.length)
    result = run.result()
    return Run(result.val_loss, result.metrics["accuracy"], result.hypergradients["lr"].tolist(), untrained)


def search(
    name: str, outer_steps: int, ensemble: int, step_size: float, pool: Executor
) -> tuple[list[float], list[dict[str, Any]]]:
    """The best learning rates by mean validation loss over the ensemble's seeds, and what every outer step gave."""
    descent = Descent({"lr": Range(WINDOWS, 0.0, 1.0)}, step_sizes={"lr": step_size})
    outer, history = OuterLoop(descent), []
    best: tuple[float, list[float]] = (math.inf, [])
    for outer_step in range(outer_steps):
        begun, lr = time.perf_counter(), descent.values["lr"].tolist()
        seeds = range(ensemble)
        runs = list(pool.map(train, [lr] * ensemble, seeds, [name == "greedy"] * ensemble))
        val_loss, accuracy = statistics.mean(r.val_loss for r in runs), statistics.mean(r.val_accuracy for r in runs)
        hypergradient = torch.tensor([r.hypergradient for r in runs], dtype=torch.float64).mean(0)
        if val_loss < best[0]:
            best = val_loss, lr
        if name == "bare":
            descent.step({"lr": hypergradient})
        else:
            outer.tell(val_loss, {"lr": hypergradient}, statistics.mean(r.untrained_loss for r in runs))
        row = {
            "outer_step": outer_step,
            "val_loss": val_loss,
            "val_accuracy": accuracy,
            "setbacks": outer.setbacks,
            "lr": [round(value, 5) for value in lr],
            "hypergradient": hypergradient.tolist(),
            "seconds": round(time.perf_counter() - begun, 1),
        }
        history.append(row)
        print(name, {key: value for key, value in row.items() if key != "hypergradient"}, flush=True)
    return best[1], history


def test_accuracy(lr: list[float], seed: int) -> float:
    """Test accuracy in per cent after training with a schedule."""
    loop = inner_loop(seed)
    values = {"lr": torch.tensor(lr, device=loop.device, dtype=loop.dtype)}
    with loop.running():
        return 100 * loop.evaluate(loop.run(values), "test").metrics["accuracy"]


def cosine(steps: int) -> list[float]:
    """From 0.1 to zero, a value for every step."""
    return [0.05 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]


def draw_search(histories: dict[str, list[dict[str, Any]]]) -> Figure:
    """Validation accuracy by outer step."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, history in histories.items():
        axes.plot([100 * row["val_accuracy"] for row in history], "o-", markersize=3, label=name)
    axes.set(xlabel="outer step", ylabel="validation accuracy in per cent", title="Fashion-MNIST, LeNet, one epoch")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def draw_schedules(found: dict[str, list[float]]) -> Figure:
    """Learning rates over the epoch."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, lr in found.items():
        axes.stairs(lr, [step / len(lr) for step in range(len(lr) + 1)], baseline=None, linewidth=1.8, label=name)
    axes.set(xlabel="training progress", ylabel="learning rate", xlim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder that holds FashionMNIST/raw")
    parser.add_argument("--out", type=Path, default=Path("fashion_mnist"))
    parser.add_argument("--outer-steps", type=int, default=8)
    parser.add_argument("--ensemble", type=int, default=3, help="seeds that each outer step averages over")
    parser.add_argument("--step-size", type=float, default=0.02, help="outer step size")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, default=5, help="retrainings of every schedule")
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    parser.add_argument("--only", nargs="*", default=["fds", "bare", "greedy"], help="searches to run")
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    histories: dict[str, list[dict[str, Any]]] = {}
    report: dict[str, Any] = {"histories": histories, "test_accuracy": {}}
    initialise = (options.data_dir, options.momentum)
    with ProcessPoolExecutor(options.processes, get_context("spawn"), prepare, initialise) as pool:
        for name in options.only:
            found[name], histories[name] = search(name, options.outer_steps, options.ensemble, options.step_size, pool)
        found["cosine"] = cosine(STEPS)
        for name, lr in found.items():
            seeds = range(100, 100 + options.seeds)
            accuracies = list(pool.map(test_accuracy, [lr] * options.seeds, seeds))
            report["test_accuracy"][name] = accuracies
            listed = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
            print(f"{name:8s} test accuracy {statistics.mean(accuracies):.2f} ({listed})", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(report))
    draw_search(histories).savefig(options.out / "search.png", dpi=150)
    draw_schedules(found).savefig(options.out / "schedules.png", dpi=150)


if __name__ == "__main__":
    main()
