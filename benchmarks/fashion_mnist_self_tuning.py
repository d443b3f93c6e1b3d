"""Self-tuning networks against black-box search on Fashion-MNIST, at one budget.

    python benchmarks/fashion_mnist_self_tuning.py --data-dir DATA --run RUN --out docs/self_tuning

A fixed subset of 10,000 training images (and 2,000 others to validate on), SimpleCNN at a quarter of its width, SGD
with momentum 0.9 and batches of 128, after the Fashion-MNIST experiment of Bae and Grosse (2020). The learning rate is
the one of 0.01, 0.03, 0.06 and 0.1 with which 10 epochs without regularisation reach the lowest validation loss. Six
hyperparameters: the rates of four dropouts, and cutout's length and number of holes. Every method may spend as much
as 20 plain trainings of 10 epochs, in gradient evaluations with everything counted (`tune_hypergrad.budget`):

- rs: random search, each configuration trained for 10 epochs;
- bohb: BOHB with budgets of 10/9, 10/3 and 10 epochs;
- stn, centered-stn, delta-stn: one training run, as long as the budget lasts, with Delta-STN's published settings; it
  begins with little regularisation (dropout 0.05, one hole of 4 pixels).

Black-box trainings are judged after every epoch too, so that each counts with its best epoch. The figure of merit is
the lowest validation loss within the budget; the test accuracy printed beside it belongs to the same weights. Writes
`results.json`, `table.md`, `loss.png` and `hyperparameters.png` to the output folder. A run that was interrupted goes
on when the same command is given again.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from ray import tune

from tune_hypergrad import (
    STN,
    BOHBSearch,
    Budget,
    CenteredSTN,
    Comparison,
    DeltaSTN,
    FixedSchedule,
    Method,
    Problem,
    RandomSearch,
    Retraining,
    problems,
)
from tune_hypergrad.comparison.plan import Plan
from tune_hypergrad.comparison.run import run_plan
from tune_hypergrad.ledger import Account
from tune_hypergrad.methods import Task
from tune_hypergrad.problems.networks import simple_cnn
from tune_hypergrad.regularisers import Cutout, Dropout
from tune_hypergrad.searchers.queue import QueueSearch

SPACE = {
    "input_dropout": tune.uniform(0, 0.95),
    "dropout1": tune.uniform(0, 0.95),
    "dropout2": tune.uniform(0, 0.95),
    "fc_dropout": tune.uniform(0, 0.95),
    "cutout_length": tune.randint(2, 25),
    "cutout_holes": tune.randint(0, 6),
}
INITIAL = {
    **dict.fromkeys(("input_dropout", "dropout1", "dropout2", "fc_dropout"), 0.05),
    "cutout_length": 4,
    "cutout_holes": 1,
}
FIXED = {"lr": 0.03, "momentum": 0.9}
EPOCHS = 10
TRAININGS = 20
SELF_TUNING = {"stn": STN, "centered-stn": CenteredSTN, "delta-stn": DeltaSTN}
METHODS = ("rs", "bohb", *SELF_TUNING)


def subset(data_dir: str | None) -> Problem:
    """The problem: always the same images."""
    whole = problems.get("fashion_mnist", data_dir=data_dir, seed=0)
    chosen = torch.randperm(len(whole.train), generator=torch.Generator().manual_seed(0))[:12_000]
    images, labels = whole.train.tensors
    return whole.replace(
        model=partial(simple_cnn, width=0.25),
        train=(images[chosen[:10_000]], labels[chosen[:10_000]]),
        val=(images[chosen[10_000:]], labels[chosen[10_000:]]),
        regularisers=[
            *(Dropout(name, name) for name in ("input_dropout", "dropout1", "dropout2", "fc_dropout")),
            Cutout(),
        ],
    )


def method(name: str) -> Method:
    """What chooses a method's configurations, and what its trials run."""
    if name in SELF_TUNING:
        return Method(name, lambda task: QueueSearch([{}]), partial(self_tuning, SELF_TUNING[name]), concurrent=1)
    searches = {
        "rs": lambda task: RandomSearch(SPACE, "val_loss", "min", EPOCHS, task.seed),
        "bohb": lambda task: BOHBSearch(SPACE, "val_loss", "min", EPOCHS / 9, EPOCHS, 3, task.seed),
    }
    return Method(name, searches[name], plain)


def plain(task: Task) -> type[tune.Trainable]:
    """A training run, judged after every epoch."""
    return FixedSchedule.from_problem(task.problem, steps=task.steps, fixed=FIXED, reports=EPOCHS)


def self_tuning(trainable: type[DeltaSTN], task: Task) -> type[tune.Trainable]:
    """One run, longer than the budget lets it be."""
    steps = TRAININGS * task.steps
    return trainable.from_problem(task.problem, space=SPACE, initial=INITIAL, steps=steps, fixed=FIXED)


def measure(names: list[str], seeds: list[int], data_dir: str | None, out: Path) -> Comparison:
    """Run all side by side; the test split is reported with every result."""
    problem = subset(data_dir)
    steps = EPOCHS * problem.steps_per_epoch
    plan = Plan(
        problem=problem,
        task=Task(problem, SPACE, steps),
        methods=tuple(map(method, names)),
        budget=Budget(TRAININGS * steps, "gradients"),
        seeds=tuple(seeds),
        resources={"cpu": 1},
        retraining=Retraining(seeds=0),
    )
    return run_plan(plan, out, resume=out.exists())


def outcomes(comparison: Comparison) -> pd.DataFrame:
    """The best result of every method and seed."""
    rows = []
    for account in comparison.accounts.itertuples():
        found = comparison.incumbents(Account(account.method, account.seed))
        row = {"method": account.method, "seed": account.seed, "diverged": found.empty}
        if not found.empty:
            best = found.iloc[-1]
            row |= {key: float(best[key]) for key in ("val_loss", "val_accuracy", "test_loss", "test_accuracy")}
        rows.append(row)
    return pd.DataFrame(rows)


def report(comparison: Comparison, out: Path) -> None:
    """Write the table and the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    best = outcomes(comparison)
    best.to_json(out / "results.json", orient="records", indent=1)
    lines = [
        "| method | validation loss: mean (range) | validation accuracy | test accuracy | seeds that did not diverge |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in comparison.methods:
        own = best[best["method"] == name]
        rows = own[~own["diverged"]]
        cells = [
            _spread(rows["val_loss"], 1, 4),
            *(_spread(rows[k], 100, 1) for k in ("val_accuracy", "test_accuracy")),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(rows)} of {len(own)} |")
    table = "\n".join(lines) + "\n"
    (out / "table.md").write_text(table)
    print(table)
    draw_losses(comparison).savefig(out / "loss.png", dpi=120)
    draw_hyperparameters(comparison).savefig(out / "hyperparameters.png", dpi=120)


def _spread(values: pd.Series, factor: float, digits: int) -> str:
    scaled = [factor * value for value in values]
    middle, low, high = statistics.mean(scaled), min(scaled), max(scaled)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def draw_losses(comparison: Comparison) -> Figure:
    """Lowest validation loss so far against the share of the budget, a line for every seed."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(comparison.methods):
        for seed in comparison.settings["seeds"]:
            own = comparison.incumbents(Account(name, seed))
            share = [*(own[f"spent/{comparison.budget.unit}"] / comparison.budget.amount), 1]
            losses = [*own["val_loss"], *own["val_loss"].tail(1)] or [float("nan")]
            label = name if seed == comparison.settings["seeds"][0] else None
            axes.step(share, losses, where="post", color=f"C{index}", label=label, linewidth=1.2)
    axes.set(xlabel="share of the budget spent", ylabel="lowest validation loss so far", ylim=(None, 1.0))
    axes.set_title("Fashion-MNIST, 10,000 images, SimpleCNN at a quarter of its width", fontsize=10)
    axes.legend(frameon=False)
    return figure


def draw_hyperparameters(comparison: Comparison) -> Figure:
    """Hyperparameters of the self-tuning networks over their training, a line for every seed."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels: Any = figure.subplots(2, 3, sharex=True)
    results = comparison.results
    for axes, key in zip(panels.flat, SPACE, strict=True):
        for index, name in enumerate(comparison.methods):
            for seed in comparison.settings["seeds"] if name in SELF_TUNING else ():
                own = results[(results["method"] == name) & (results["seed"] == seed) & ~results["lost"]]
                label = name if seed == comparison.settings["seeds"][0] else None
                axes.plot(own["cost/steps"], own[f"schedule/{key}"], color=f"C{index}", label=label, linewidth=1)
        axes.set_title(key, fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("training steps")
    panels[0, 0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--run", type=Path, default=Path("self_tuning"), help="folder of the comparison itself")
    parser.add_argument("--out", type=Path, default=Path("self_tuning/tables"))
    parser.add_argument("--methods", nargs="+", default=["rs", "bohb", "stn", "delta-stn"], choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    report(measure(options.methods, options.seeds, options.data_dir, options.run), options.out)


if __name__ == "__main__":
    main()
