"""What an experiment found, for people: a table, and pictures of regret against cost and of schedules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
from rich.table import Table

from tune_hypergrad.budget import Budget
from tune_hypergrad.experiment import best_row, incumbents
from tune_hypergrad.schedules import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COST_LABELS = {
    "steps": "inner steps",
    "examples": "training examples",
    "gradients": "gradient evaluations",
    "device_seconds": "device-seconds",
    "wall_seconds": "seconds of work",
}


@dataclass(frozen=True)
class Yardstick:
    """What regret is measured in."""

    column: str
    """The results' column."""
    label: str
    """For axes and headings."""
    sign: float
    """+1 where smaller values are better, -1 where larger ones are."""
    unit: float = 1.0
    """Factor for showing: 100 shows per cent."""


def yardstick(results: pd.DataFrame) -> Yardstick:
    """Test accuracy where it is reported, else test loss, else validation loss."""
    if "test_accuracy" in results:
        return Yardstick("test_accuracy", "test accuracy", -1.0, 100.0)
    if "test_loss" in results:
        return Yardstick("test_loss", "test loss", 1.0)
    return Yardstick("val_loss", "validation loss", 1.0)


def regret(results: pd.DataFrame, measure: Yardstick, reference: float | None = None) -> pd.DataFrame:
    """The incumbents' shortfall from `reference`: columns method, every `spent/...`, regret.

    The incumbent is chosen by validation loss. `reference` is a value of the yardstick; None takes the best that any
    incumbent reached.
    """
    best = incumbents(results)
    values = measure.sign * best[measure.column]
    target = values.min() if reference is None else measure.sign * reference
    spent = [column for column in best if column.startswith("spent/")]
    return best[["method", *spent]].assign(regret=(values - target) * measure.unit)


def plot_regret(results: pd.DataFrame, unit: str = "gradients", reference: float | None = None) -> Figure:
    """Regret of every method's incumbent against what the method had spent, as steps."""
    from matplotlib.figure import Figure

    measure = yardstick(results)
    data, column = regret(results, measure, reference), f"spent/{unit}"
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for position, (method, rows) in enumerate(data.groupby("method", sort=True)):
        ends = results.loc[results["method"] == method, column].max()
        cost, values = [*rows[column], ends], [*rows["regret"], rows["regret"].iloc[-1]]
        axes.step(cost, values, where="post", label=method, color=f"C{position}", linewidth=1.8)
        axes.plot(rows[column], rows["regret"], "o", color=f"C{position}", markersize=3)
    against = "the best incumbent" if reference is None else f"{reference:g}"
    points = " (points)" if measure.unit == 100 else ""
    axes.set(xlabel=f"cost in {COST_LABELS[unit]}", ylabel=f"regret in {measure.label}{points}")
    axes.set_title(f"incumbents by validation loss, against {against}", fontsize="medium")
    if (data["regret"] > 0).sum() >= 2:
        smallest = data.loc[data["regret"] > 0, "regret"].min()
        axes.set_yscale("symlog", linthresh=max(smallest, 1e-3))
    axes.set_ylim(bottom=min(0.0, float(data["regret"].min())))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def plot_schedules(schedules: Mapping[str, Schedule]) -> Figure:
    """Methods' schedules over training progress: one panel per hyperparameter, one line per method."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for schedule in schedules.values() for name in schedule.values))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns + 1, 2.7 * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    handles = {}
    for axes, name in zip(panels, names, strict=False):
        for position, (method, schedule) in enumerate(sorted(schedules.items())):
            if name in schedule.values:
                values = schedule.values[name]
                edges = [window / len(values) for window in range(len(values) + 1)]
                handles[method] = axes.stairs(values, edges, baseline=None, color=f"C{position}", linewidth=1.8)
        axes.set(title=name, xlabel="training progress", xlim=(0, 1))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.remove()
    methods = sorted(handles)
    figure.legend([handles[method] for method in methods], methods, loc="outside right center", frameon=False)
    return figure


def summary_table(results: pd.DataFrame, budget: Budget) -> Table:
    """One row per method: what it spent and what its incumbent reached."""
    measures = [name for name in ("val_loss", "val_accuracy", yardstick(results).column) if name in results]
    measures = list(dict.fromkeys(measures))
    table = Table(title=f"Incumbents by validation loss; spent in {budget.unit}")
    headings = ("method", "trials", "results", "spent", "of budget", *(name.replace("_", " ") for name in measures))
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, rows in results.groupby("method", sort=True):
        spent, best = rows[f"spent/{budget.unit}"].max(), best_row(results, str(method))
        figures = ["none finite"] * len(measures) if best is None else [f"{best[name]:.4f}" for name in measures]
        counts = (str(rows["trial"].nunique()), str(len(rows)))
        table.add_row(str(method), *counts, f"{spent:,.0f}", f"{100 * spent / budget.amount:.0f} %", *figures)
    return table
