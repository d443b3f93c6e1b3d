"""How a comparison's pictures look: colours, panels, scales that hide no differences, plain ticks, legends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import cycle
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.rcsetup import cycler

from tune_hypergrad.comparison.ledger import GRID, START
from tune_hypergrad.comparison.telling.series import Curve
from tune_hypergrad.plotting import scale
from tune_hypergrad.wording import shortened

COST_LABELS = {
    "steps": "inner steps",
    "examples": "training examples",
    "gradients": "gradient evaluations",
    "device_seconds": "device-seconds",
    "wall_seconds": "seconds of work",
}
"""Units of cost, for axes and headings."""

WIDE, NARROW = 7.2, 3.7
"""Widths of figures in inches: a page's and a phone's."""

INK = "#2b2f36"
"""Text and axes, and nothing else: a page with a dark scheme puts its own colour in its place."""
GREY = "#8a8f98"
"""What belongs to no method."""
_LIGHTER = {GRID: "#bcc1c9", START: "#d8dbe0"}  # of that, what is beside retrainings

# The first six are Okabe and Ito's. Each further one is as far as can be from those before, to normal, red-, green- and
# blue-blind sight, among colours that stand out from white and from near-black.
_PALETTE = [
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"),
    *("#8C19FF", "#734C26", "#957FFF", "#9C1670", "#FF0055", "#5540BF"),
]
_STYLES = cycler(color=2 * _PALETTE, marker=list(2 * "os^Dvp*XPh<>"), linestyle=[*6 * ["-"], *18 * [(0, (4, 1.2))]])
_LETTERS = 12.5  # to an inch
_FEW = 4  # curves whose bands, one over the other, can still be told apart
_STYLE: Any = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "hatch.color": GREY,
    "hatch.linewidth": 0.8,
    "path.simplify_threshold": 1.0,  # a schedule of thousands of windows is as large as a picture can show
}

styled = rc_context(_STYLE)
"""Decorates what draws in the package's style, whatever matplotlib is set to."""


class Look:
    """What every method looks like, by its position among them.

    Args:
        methods: names, in order; others are grey.
        seeds: how many each was run with.
    """

    def __init__(self, methods: Sequence[str], seeds: int = 1) -> None:
        self._styles, self._seeds = dict(zip(methods, cycle(_STYLES), strict=False)), seeds

    def color(self, method: str) -> str:
        """Its colour."""
        return str(self._styles[method]["color"]) if method in self._styles else _LIGHTER.get(method, GREY)

    def line(self, method: str) -> dict[str, Any]:
        """Its line."""
        return {"color": self.color(method), "linestyle": self._styles[method]["linestyle"]}

    def marker(self, method: str) -> dict[str, Any]:
        """Its marker."""
        return {"marker": self._styles[method]["marker"], "markersize": 4}

    def legend(self, figure: Figure, methods: Iterable[str], filled: bool = False) -> None:
        """One entry a method, above everything."""
        names = list(methods)
        handles = [Patch(color=self.color(name)) if filled else Line2D([], [], **self.line(name)) for name in names]
        place_legend(figure, handles, [_label(name, figure) for name in names])

    def legend_of_curves(self, figure: Figure, curves: Iterable[Curve]) -> None:
        """One entry a curve, that which ends lowest first; of which seeds some have no value, says so."""
        ranked = sorted(curves, key=lambda curve: (math.isnan(curve.mean[-1]), curve.mean[-1]))
        handles = [Line2D([], [], **self.line(curve.method), **self.marker(curve.method)) for curve in ranked]
        labels = [_label(curve.method, figure) for curve in ranked]
        parts = [f" ({curve.seeds} of {self._seeds} seeds)" if curve.seeds < self._seeds else "" for curve in ranked]
        place_legend(figure, handles, [label + part for label, part in zip(labels, parts, strict=True)])


def place_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend above everything, for which the figure grows, in as many columns as fit; it reads line by line."""
    if handles:
        count = len(labels)
        columns = next(c for c in range(count, 0, -1) if _width(labels, c) <= figure.get_figwidth() or c == 1)
        rows = -(-count // columns)
        columns = -(-count // rows)
        figure.set_figheight(figure.get_figheight() + 0.19 * rows)
        order = [i for column in range(columns) for i in range(column, count, columns)]  # matplotlib fills columns
        handles, labels = [handles[i] for i in order], [labels[i] for i in order]
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.8, columnspacing=1.4)


def panels(count: int, width: float, columns: int = 1, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A new figure that pyplot does not know, with panels in rows."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, 0.4 + height * rows), layout="constrained")
    found: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axes in found[count:]:
        axes.remove()
    return figure, found[:count]


def empty(text: str, width: float) -> Figure:
    """A figure that says why it shows nothing."""
    figure, (axes,) = panels(1, width, height=0.6)
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center")
    return figure


def plain(axes: Axes, grid: Any = "both") -> None:
    """Ticks and grid."""
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(True, axis=grid, color=GREY, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)


def heading(axes: Axes, text: str, width: float) -> None:
    """Small text above a panel, in lines of the figure's width."""
    axes.set_title("\n".join(wrap(text, int(width * _LETTERS))), loc="left")


def draw_curves(axes: Axes, curves: Sequence[Curve], look: Look, factor: float) -> None:
    """Means as steps, ranges as bands; `factor` is what costs are multiplied by."""
    for curve in curves:
        cost = curve.cost * factor
        style = {**look.line(curve.method), **look.marker(curve.method), "markevery": -(-len(cost) // 12)}
        axes.step(cost, curve.mean, where="post", label=curve.method, linewidth=1.7, **style)
        if curve.seeds > 1:
            color = look.color(curve.method)
            alpha = 0.14 if len(curves) <= _FEW else 0.07
            axes.fill_between(cost, curve.low, curve.high, step="post", color=color, alpha=alpha, linewidth=0)
    if not curves:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no incumbents yet", transform=axes.transAxes, ha="center")


def mark_budget(axes: Axes, amount: float) -> None:
    """A line where the budget ends."""
    axes.axvline(amount, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    near = {"xycoords": ("data", "axes fraction"), "xytext": (-3, -2), "textcoords": "offset points", "fontsize": 8}
    axes.annotate("budget", (amount, 1), rotation=90, ha="right", va="top", **near)  # type: ignore[arg-type]


def mark_reference(axes: Axes) -> None:
    """A line where regret is 0."""
    axes.axhline(0, color=INK, linewidth=1, linestyle=(0, (1, 1.5)))


def scale_cost(axes: Axes, begin: float, end: float, ticks: int) -> None:
    """An axis of cost, logarithmic where the first incumbents came early."""
    axes.margins(x=0.03)
    scale(axes.xaxis, [begin, end], log_from=20, ticks=ticks)
    if axes.get_xscale() == "linear":
        axes.set_xlim(left=0)


def scale_worth(axes: Axes, curves: Sequence[Curve], log_from: float, reference: Sequence[float] = ()) -> None:
    """An axis of what curves are worth, logarithmic where that spans a factor, and about a reference of 0.

    First values so far off that they would hide the differences at the end are cut off.
    """
    if not curves:
        return
    means = np.concatenate([reference, *(curve.mean for curve in curves)], axis=None)
    ends = [float(curve.high[-1]) for curve in curves if curve.high[-1] > 0 and np.isfinite(curve.high[-1])]
    most = 100 * max(ends, default=math.inf)
    # around a reference that some are better than, differences matter more than orders of magnitude
    decades = 1.5 if (means < 0).any() else 3
    scale(axes.yaxis, means.clip(max=most), log_from=log_from, ticks=8, decades=decades)
    if any((curve.high[np.isfinite(curve.high)] > most).any() for curve in curves):
        axes.set_ylim(top=1.1 * most)


def unit_in_words(unit: str, largest: float) -> tuple[float, str]:
    """A factor and a label for an axis of cost that ends there: long times are shown in minutes or hours."""
    label = COST_LABELS[unit]
    if unit.endswith("_seconds") and largest >= 7200:
        return 1 / 3600, label.replace("seconds", "hours")
    if unit.endswith("_seconds") and largest >= 240:
        return 1 / 60, label.replace("seconds", "minutes")
    return 1.0, label


def _label(name: str, figure: Figure) -> str:
    return shortened(name, 18 if figure.get_figwidth() < 5 else 24)


def _width(labels: Sequence[str], columns: int) -> float:
    """Of a legend in so many columns, in inches."""
    return sum(0.55 + max(map(len, labels[column::columns])) / _LETTERS for column in range(columns))
