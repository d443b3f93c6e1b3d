"""Pictures of a comparison: regret, validation loss, schedules, what the budgets went into, use of the cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tune_hypergrad.comparison.telling import drawing
from tune_hypergrad.comparison.telling.drawing import GREY, INK, WIDE, Look, styled
from tune_hypergrad.comparison.telling.records import Comparison, measure_label
from tune_hypergrad.comparison.telling.series import Curve, Granted, curves, spending_parts
from tune_hypergrad.comparison.telling.verdict import cost_in_words
from tune_hypergrad.errors import InputError
from tune_hypergrad.plotting import draw_values, scale, scale_values
from tune_hypergrad.results import OBJECTIVE
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.wording import percent, shortened

_PARTS = {
    "training": "#7C8DA3",
    "hypergradients": "#2A9D8F",
    "validation": "#E0B84C",
    "spent": "#7C8DA3",
    "in failed trials": "#C8553D",
}
_LOST = "lost: done twice"
_TIMES = 240  # parts of a picture of use
_PANELS = 24  # of a picture of schedules, at the most


@styled
def regret(comparison: Comparison, unit: str = "gradients", *, width: float = WIDE) -> Figure:
    """Regret of every method's incumbents against cost, the mean and the range over seeds; the legend's first has the
    least at the end.

    Args:
        comparison: finished or not.
        unit: of cost.
        width: of the figure, in inches.
    """
    return _regrets(comparison, [unit], width)


@styled
def regrets(comparison: Comparison, units: Sequence[str], *, width: float = WIDE) -> Figure:
    """`regret` in several units, one panel each."""
    return _regrets(comparison, units, width)


@styled
def validation(comparison: Comparison, unit: str = "gradients", *, width: float = WIDE) -> Figure:
    """The objective, by default the validation loss, of every method's incumbents against cost, the mean and the range
    over seeds."""
    figure, (axes,) = drawing.panels(1, width)
    found = curves(comparison.history, OBJECTIVE, unit, comparison.accounts)
    _draw(axes, found, comparison, unit, ticks=round(width))
    drawing.scale_worth(axes, found, log_from=5)
    axes.set_ylabel(measure_label(comparison.criterion.column))
    drawing.heading(axes, _seeds_text(comparison), width)
    look_of(comparison).legend_of_curves(figure, found)
    return figure


@styled
def schedules(comparison: Comparison, *, width: float = WIDE) -> Figure:
    """The best schedule of every method: one panel a hyperparameter, one line a method."""
    best, look = best_schedules(comparison), look_of(comparison)
    names = list(dict.fromkeys(name for found in best.values() for name in found.values))
    ordered = [name for name in comparison.settings.get("space", ()) if name in names]
    names = list(dict.fromkeys([*ordered, *names]))
    if not names:
        return drawing.empty("no method has found a schedule yet", width)
    columns = max(1, round(width / 2.4))
    figure, panels = drawing.panels(len(names[:_PANELS]), width, columns, height=1.9)
    for axes, name in zip(panels, names, strict=False):
        own = {method: found for method, found in best.items() if name in found.values}
        for method, found in own.items():
            draw_values(axes, found, name, linewidth=1.7, label=method, **look.line(method))
        drawing.plain(axes)
        scale_values(axes, np.concatenate([found.span(name) for found in own.values()]))
        axes.set_title(shortened(name, 32), loc="left")
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    for axes in panels[-columns:]:
        axes.set_xlabel("training progress")
    if len(names) > _PANELS:
        figure.supxlabel(f"and {len(names) - _PANELS} more, which the schedules' files have", fontsize=9)
    look.legend(figure, best)
    return figure


@styled
def spending(comparison: Comparison, *, width: float = WIDE) -> Figure:
    """What the budgets went into, one bar a method: the mean over its seeds, against the budget."""
    parts, unit, amount = spending_parts(comparison), comparison.budget.unit, comparison.budget.amount
    largest = max(amount, float(parts.sum(axis=1).max()))
    factor, label = drawing.unit_in_words(unit, largest)
    figure, (axes,) = drawing.panels(1, width, height=0.6 + 0.42 * len(parts) + (0.4 if width < 5 else 0))
    positions, left = np.arange(len(parts))[::-1], np.zeros(len(parts))
    for part in parts:
        values = parts[part].to_numpy(dtype=float) * factor
        style: dict[str, Any] = {"color": _PARTS.get(part), "label": part}
        if part == "lost":
            style = {"facecolor": "none", "edgecolor": GREY, "hatch": "////", "label": _LOST}
        if values.any():
            axes.barh(positions, values, 0.62, left=left, **style)
        left = left + values
    axes.axvline(amount * factor, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label="budget")
    axes.set_yticks(positions, [_bar_label(str(name), row, amount) for name, row in parts.iterrows()])
    axes.set(xlim=(0, 1.03 * largest * factor), ylim=(-0.6, len(parts) - 0.4), xlabel=label)
    drawing.plain(axes, "x")
    scale(axes.xaxis, [0, largest * factor], log_from=math.inf, ticks=round(width))
    axes.tick_params(axis="y", length=0)
    handles, labels = axes.get_legend_handles_labels()
    drawing.place_legend(figure, [*handles[1:], handles[0]], [*labels[1:], labels[0]])  # the line comes before the bars
    return figure


@styled
def utilisation(comparison: Comparison, *, width: float = WIDE) -> Figure:
    """The share of the cluster's CPUs, or GPUs if trials had any, that each method's trials held over time."""
    granted, look = Granted.of(comparison), look_of(comparison)
    if granted is None:
        return drawing.empty("no trial has started yet", width)
    figure, (axes,) = drawing.panels(1, width, height=2.4)
    times, shares = granted.thinned(_TIMES)
    factor, label = drawing.unit_in_words("wall_seconds", float(times[-1]))
    times, below = times * factor, np.zeros(len(times) - 1)
    used = [method for method, values in shares.items() if values.any()]
    for method in used:
        above = below + shares[method]
        axes.stairs(above, times, baseline=below, fill=True, color=look.color(method), label=method, linewidth=0)
        below = above
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
    for gap in granted.gaps:
        axes.axvline(gap * factor, color=INK, linewidth=1, linestyle=":")
    if granted.first_finished is not None:
        axes.axvline(granted.first_finished * factor, color=INK, linewidth=1)
    axes.set(xlim=(0, times[-1] or 1), ylim=(0, 1.05 * max(1.0, float(below.max(initial=0)))))
    axes.set(xlabel=label.replace("work", "running"), ylabel=f"{granted.kind}s granted")
    drawing.plain(axes)
    scale(axes.xaxis, times, log_from=math.inf, ticks=round(width))
    scale(axes.yaxis, [0, 1], log_from=math.inf, ticks=4)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    drawing.heading(axes, granted.text, width)
    look.legend(figure, used, filled=True)
    return figure


def best_schedules(comparison: Comparison) -> dict[str, Schedule]:
    """Every method's best schedule; a method without one, or whose file is missing, is left out."""
    found = {}
    for method in comparison.methods:
        try:
            found[method] = comparison.schedule(method)
        except InputError:
            continue
    return found


def look_of(comparison: Comparison) -> Look:
    """Its methods' colours."""
    return Look(comparison.methods, len(comparison.settings["seeds"]))


def _regrets(comparison: Comparison, units: Sequence[str], width: float) -> Figure:
    columns = 1 if width < 5 else min(3, len(units))
    figure, panels = drawing.panels(len(units), width, columns, height=3.0 if len(units) == 1 else 2.6)
    found: list[Curve] = []
    for axes, unit in zip(panels, units, strict=True):
        found = curves(comparison.regret, "regret", unit, comparison.accounts)
        _draw(axes, found, comparison, unit, ticks=round(width / columns))
        drawing.mark_reference(axes)
        drawing.scale_worth(axes, found, log_from=20, reference=[0])
    measure = comparison.yardstick
    for axes in panels[::columns]:
        axes.set_ylabel(measure.heading)
    if len(units) == 1:
        zero = "nothing to measure regret by yet"
        if math.isfinite(measure.reference):
            zero = f"0 is {measure.origin}: {measure.label} {measure.shown}"
        drawing.heading(panels[0], f"{zero}; {_seeds_text(comparison)}", width)
    look_of(comparison).legend_of_curves(figure, found)
    return figure


def _draw(axes: Axes, found: Sequence[Curve], comparison: Comparison, unit: str, ticks: int) -> None:
    budget = comparison.budget.amount if comparison.budget.unit == unit else 0.0
    end = max([float(curve.cost[-1]) for curve in found] + [budget]) or 1.0
    factor, label = cost_in_words(comparison, unit, end)
    drawing.plain(axes)
    drawing.draw_curves(axes, found, look_of(comparison), factor)
    begin = min((float(curve.cost[0]) for curve in found), default=0.0)
    if budget:
        drawing.mark_budget(axes, budget * factor)
    drawing.scale_cost(axes, begin * factor, end * factor, ticks)
    axes.set_xlabel(f"cost in {label}")


def _seeds_text(comparison: Comparison) -> str:
    count = len(comparison.settings["seeds"])
    return "one seed" if count == 1 else f"mean and range of {count} seeds"


def _bar_label(method: str, row: Any, budget: float) -> str:
    lost = row["lost"] / budget
    spent = row.sum() / budget - lost
    return f"{shortened(method, 20)}\n{percent(spent)}{f' + {percent(lost)}' if lost else ''}"
