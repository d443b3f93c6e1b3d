"""Self-tuning networks against black-box search on Fashion-MNIST, at one budget.

    python benchmarks/fashion_mnist_self_tuning.py --data-dir DATA --out docs/self_tuning

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
`results.json`, `table.md`, `loss.png` and `hyperparameters.png` to the output folder; `--report` does so from the
results there are, so that methods and seeds may be run one by one.
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
from ray.tune.search import Searcher

from tune_hypergrad import (
    STN,
    BOHBSearch,
    Budget,
    CenteredSTN,
    DeltaSTN,
    FixedSchedule,
    Problem,
    RandomSearch,
    problems,
)
from tune_hypergrad.experiment import ray_session, read_results, run_method, within
from tune_hypergrad.problems.networks import simple_cnn
from tune_hypergrad.regularisers import Cutout, Dropout

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


def contender(name: str, problem: Problem, seed: int, steps: int) -> tuple[type[tune.Trainable], Searcher]:
    """What a method's trials run, and what chooses their hyperparameters."""
    if name in SELF_TUNING:
        trainable = SELF_TUNING[name].from_problem(problem, space=SPACE, initial=INITIAL, steps=steps, fixed=FIXED)
        # one trial; its length is more than the budget lets it have
        return trainable, RandomSearch(
            {"seed": tune.randint(0, 2**16)}, "val_loss", "min", seed=seed, points_to_evaluate=[{"seed": seed}]
        )
    plain = FixedSchedule.from_problem(
        problem, steps=EPOCHS * problem.steps_per_epoch, fixed=FIXED, seed=seed, reports=EPOCHS
    )
    if name == "rs":
        return plain, RandomSearch(SPACE, "val_loss", "min", EPOCHS, seed)
    return plain, BOHBSearch(SPACE, "val_loss", "min", EPOCHS / 9, EPOCHS, 3, seed)


def measure(names: list[str], seeds: list[int], data_dir: str | None, out: Path) -> None:
    """Run what has not been run yet."""
    problem = subset(data_dir)
    budget = budget_of(problem)
    with ray_session():
        for seed in seeds:
            for name in names:
                folder = out / f"seed{seed}" / name
                if not folder.exists():
                    trainable, searcher = contender(name, problem, seed, int(budget.amount))
                    concurrent = 1 if name in SELF_TUNING else None
                    run_method(name, trainable, searcher, budget, folder, concurrent=concurrent)


def budget_of(problem: Problem) -> Budget:
    """What every method may spend."""
    return Budget(TRAININGS * EPOCHS * problem.steps_per_epoch, "gradients")


def outcomes(out: Path, budget: Budget) -> pd.DataFrame:
    """The best result of every method and seed."""
    rows = []
    for folder in sorted(out.glob("seed*")):
        results = within(read_results(folder), budget)
        for name, found in results.groupby("method"):
            alive = found[found["val_loss"].notna()]
            row = {"method": name, "seed": int(folder.name[4:]), "diverged": alive.empty}
            if not alive.empty:
                best = alive.loc[alive["val_loss"].idxmin()]
                row |= {key: float(best[key]) for key in ("val_loss", "val_accuracy", "test_loss", "test_accuracy")}
            rows.append(row)
    return pd.DataFrame(rows)


def report(out: Path, budget: Budget) -> None:
    """Write the table and the pictures."""
    best = outcomes(out, budget)
    best.to_json(out / "results.json", orient="records", indent=1)
    lines = [
        "| method | validation loss: mean (range) | validation accuracy | test accuracy | seeds that did not diverge |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in (name for name in METHODS if name in set(best["method"])):
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
    draw_losses(out, budget).savefig(out / "loss.png", dpi=120)
    draw_hyperparameters(out, budget).savefig(out / "hyperparameters.png", dpi=120)


def _spread(values: pd.Series, factor: float, digits: int) -> str:
    scaled = [factor * value for value in values]
    middle, low, high = statistics.mean(scaled), min(scaled), max(scaled)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def draw_losses(out: Path, budget: Budget) -> Figure:
    """Lowest validation loss so far against the share of the budget, a line for every seed."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(METHODS):
        label: str | None = name
        for folder in sorted(out.glob(f"seed*/{name}")):
            results = within(read_results(folder.parent), budget)
            own = results[results["method"] == name]
            share = own[f"spent/{budget.unit}"] / budget.amount
            axes.step(share, own["val_loss"].cummin(), where="post", color=f"C{index}", label=label, linewidth=1.2)
            label = None
    axes.set(xlabel="share of the budget spent", ylabel="lowest validation loss so far", ylim=(None, 1.0))
    axes.set_title("Fashion-MNIST, 10,000 images, SimpleCNN at a quarter of its width", fontsize=10)
    axes.legend(frameon=False)
    return figure


def draw_hyperparameters(out: Path, budget: Budget) -> Figure:
    """Hyperparameters of the self-tuning networks over their training, a line for every seed."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels: Any = figure.subplots(2, 3, sharex=True)
    for axes, key in zip(panels.flat, SPACE, strict=True):
        for index, name in enumerate(METHODS):
            label: str | None = name
            for folder in sorted(out.glob(f"seed*/{name}")) if name in SELF_TUNING else ():
                results = within(read_results(folder.parent), budget)
                own = results[results["method"] == name]
                axes.plot(own["cost/steps"], own[f"schedule/{key}"], color=f"C{index}", label=label, linewidth=1)
                label = None
        axes.set_title(key, fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("training steps")
    panels[0, 0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("self_tuning"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="only draw what there is")
    options = parser.parse_args()
    if not options.report:
        measure(options.methods, options.seeds, options.data_dir, options.out)
    report(options.out, budget_of(subset(options.data_dir)))


if __name__ == "__main__":
    main()
