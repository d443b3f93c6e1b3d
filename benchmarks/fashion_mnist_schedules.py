"""Learning-rate schedules for one epoch of LeNet on Fashion-MNIST: FDS, greedy, bare sign updates, cosine.

    python benchmarks/fashion_mnist_schedules.py --data-dir DATA --out docs/fashion_mnist

SGD with momentum 0.9, batch 128, 55,000 training and 5,000 validation examples, 10 learning rates that begin at zero
and move by steps of 0.05 (as Figure 3 of Micaelli & Storkey 2021 does on SVHN and MNIST). Contenders:

- fds: exact hypergradients of the whole epoch, with the outer loop's safeguard (`OuterLoop`);
- bare: the same hypergradients, sign updates without the safeguard;
- greedy: hypergradients of horizon 1, by 500 validation examples each, with the safeguard;
- cosine: from 0.1 to zero, not searched.

A search's schedule is its best by validation loss. Every schedule found is trained anew with other seeds, and only then
is the test split read. Writes `results.json`, `search.png` and `schedules.png` to the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from tune_hypergrad import Problem, Schedule, problems
from tune_hypergrad.hypergradients import Descent, InnerLoop, OuterLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.hypergradients.inner_loop import Hyperparameters
from tune_hypergrad.report import plot_schedules
from tune_hypergrad.space import Range

WINDOWS, MOMENTUM, STEP_SIZE = 10, 0.9, 0.05


def settings(problem: Problem, seed: int) -> TrainingSettings:
    """One epoch."""
    return TrainingSettings(steps=problem.steps_per_epoch, fixed={"momentum": MOMENTUM}, seed=seed)


def search(problem: Problem, name: str, outer_steps: int) -> tuple[Hyperparameters, list[dict[str, Any]]]:
    """The best learning rates by validation loss, and what every outer step gave."""
    loop = InnerLoop(problem, settings(problem, seed=0))
    descent = Descent({"lr": Range(WINDOWS, 0.0, 1.0)}, step_sizes={"lr": STEP_SIZE})
    outer, history = OuterLoop(descent), []
    best: tuple[float, Hyperparameters] = (math.inf, dict(descent.values))
    with loop.running():
        untrained = loop.evaluate(loop.initial_state()).loss
        for outer_step in range(outer_steps):
            begun, values = time.perf_counter(), dict(descent.values)
            greedy: dict[str, Any] = {"horizon": 1, "val_examples": 500} if name == "greedy" else {}
            run = hypergradient_run(loop, values, **greedy)
            run.advance(run.length)
            result = run.result()
            if result.val_loss < best[0]:
                best = result.val_loss, values
            if name == "bare":
                descent.step(result.hypergradients)
            else:
                outer.tell(result.val_loss, result.hypergradients, untrained)
            row = {
                "outer_step": outer_step,
                "lr": values["lr"].tolist(),
                "val_loss": result.val_loss,
                "val_accuracy": result.metrics["accuracy"],
                "hypergradient": result.hypergradients["lr"].tolist(),
                "differentiation": result.differentiation,
                "seconds": time.perf_counter() - begun,
                "setbacks": outer.setbacks,
            }
            history.append(row)
            print(name, {key: value for key, value in row.items() if key != "hypergradient"}, flush=True)
    return best[1], history


def retrain(problem: Problem, values: Hyperparameters, seeds: range) -> list[float]:
    """Test accuracy of the schedule in per cent, by seed."""
    accuracies = []
    for seed in seeds:
        loop = InnerLoop(problem, settings(problem, seed))
        moved = {name: value.to(loop.device, loop.dtype) for name, value in values.items()}
        with loop.running():
            accuracies.append(100 * loop.evaluate(loop.run(moved), "test").metrics["accuracy"])
    return accuracies


def cosine(steps: int) -> Hyperparameters:
    """From 0.1 to zero, a value for every step."""
    return {"lr": torch.tensor([0.05 * (1 + math.cos(math.pi * t / steps)) for t in range(steps)], dtype=torch.float64)}


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


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder that holds FashionMNIST/raw")
    parser.add_argument("--out", type=Path, default=Path("fashion_mnist"))
    parser.add_argument("--outer-steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="retrainings of every schedule")
    parser.add_argument("--only", nargs="*", default=["fds", "bare", "greedy"], help="searches to run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = problems.get("fashion_mnist", data_dir=options.data_dir)
    found, histories = {}, {}
    for name in options.only:
        found[name], histories[name] = search(problem, name, options.outer_steps)
    found["cosine"] = cosine(problem.steps_per_epoch)
    report: dict[str, Any] = {"histories": histories, "test_accuracy": {}}
    for name, values in found.items():
        accuracies = retrain(problem, values, range(100, 100 + options.seeds))
        report["test_accuracy"][name] = accuracies
        print(
            f"{name:8s} test accuracy {statistics.mean(accuracies):.2f} +- {statistics.pstdev(accuracies):.2f}",
            flush=True,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(report))
    draw_search(histories).savefig(options.out / "search.png", dpi=150)
    schedules = {name: Schedule({n: tuple(v.tolist()) for n, v in values.items()}) for name, values in found.items()}
    plot_schedules(schedules).savefig(options.out / "schedules.png", dpi=150)


if __name__ == "__main__":
    main()
