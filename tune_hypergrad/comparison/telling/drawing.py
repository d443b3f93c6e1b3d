"""How a comparison's pictures look: colours, panels, scales that hide no differences, plain ticks, legends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from textwrap import wrap
from typing import Any, ParamSpec

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tune_hypergrad.comparison.ledger import GRID, START
from tune_hypergrad.comparison.telling.series import Curve

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
_MARKERS = "os^Dvp*XPh<>"
_SOLID = 6  # so many methods have solid lines, further ones broken ones
_LOG_FROM = {"cost": 20.0, "regret": 20.0, "loss": 5.0, "schedule": 100.0}  # largest over smallest value
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
}
_P = ParamSpec("_P")


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Draw in the package's style, whatever matplotlib is set to."""

    @wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


class Look:
    """What every method looks like, by its position among them.

    Args:
        methods: names, in order; others are grey.
        seeds: how many each was run with.
    """

    def __init__(self, methods: Sequence[str], seeds: int = 1) -> None:
        self.methods, self.seeds = list(methods), seeds

    def position(self, method: str) -> int:
        """Its position; others come after all."""
        return self.methods.index(method) if method in self.methods else len(self.methods)

    def color(self, method: str) -> str:
        """Its colour; from the 13th method on colours come again."""
        if method not in self.methods:
            return _LIGHTER.get(method, GREY)
        return _PALETTE[self.position(method) % len(_PALETTE)]

    def line(self, method: str) -> dict[str, Any]:
        """Its line."""
        return {"color": self.color(method), "linestyle": "-" if self.position(method) < _SOLID else (0, (4, 1.2))}

    def marker(self, method: str) -> str:
        """Its marker."""
        return _MARKERS[self.position(method) % len(_MARKERS)]

    def legend(self, figure: Figure, methods: Iterable[str], filled: bool = False) -> None:
        """One entry a method, above everything."""
        names = sorted(dict.fromkeys(methods), key=self.position)
        handles = [Patch(color=self.color(name)) if filled else Line2D([], [], **self.line(name)) for name in names]
        place_legend(figure, handles, [_label(name, figure) for name in names])

    def legend_of_curves(self, figure: Figure, curves: Iterable[Curve]) -> None:
        """One entry a curve, that which ends lowest first; of which seeds some have no value, says so."""
        by_name = {curve.method: curve for curve in curves}
        last = {name: float(curve.mean[-1]) for name, curve in by_name.items()}
        names = sorted(by_name, key=lambda name: (math.isnan(last[name]), last[name], self.position(name)))
        handles = [Line2D([], [], **self.line(name), marker=self.marker(name), markersize=4) for name in names]
        parts = [
            f" ({by_name[name].seeds} of {self.seeds} seeds)" if by_name[name].seeds < self.seeds else ""
            for name in names
        ]
        place_legend(figure, handles, [_label(name, figure) + part for name, part in zip(names, parts, strict=True)])


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
        marks = {"marker": look.marker(curve.method), "markersize": 4, "markevery": -(-len(cost) // 12)}
        line: dict[str, Any] = {**look.line(curve.method), **marks, "linewidth": 1.7}
        axes.step(cost, curve.mean, where="post", label=curve.method, **line)
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
    if begin > 0 and end / begin >= _LOG_FROM["cost"]:
        axes.set_xscale("log")
        axes.set_xlim(0.9 * begin, 1.08 * end)
        _log_ticks(axes, "x", ticks)
    else:
        axes.set_xlim(0, 1.04 * end)
        linear_ticks(axes, "x", ticks)


def scale_regret(axes: Axes, curves: Sequence[Curve]) -> None:
    """An axis that has 0 at its foot, and is logarithmic above where regrets span decades."""
    top, values = _top_and_values(curves)
    shown = np.abs(values[(values != 0) & (values <= top)])
    if len(shown) and shown.max() / shown.min() >= _LOG_FROM["regret"]:
        means = np.abs(np.concatenate([curve.mean for curve in curves]))
        smallest = float(means[means > 0].min(initial=shown.max()))
        # around a reference that some are better than, differences matter more than orders of magnitude
        spanned = 1e3 if values.min() >= 0 else 30
        threshold = _round_down(max(smallest, shown.max() / spanned))
        axes.set_yscale("symlog", linthresh=threshold, linscale=0.5)
        axes.set_ylim(min(-0.15 * threshold, 1.2 * float(values.min())), 1.25 * top)
        _log_ticks(axes, "y", 8, threshold)
    elif len(values):
        low, high = min(0.0, float(values.min())), max(top, 0.0)
        space = 0.04 * (high - low) or 1.0
        axes.set_ylim(low - space, high + space)
        linear_ticks(axes, "y", 6)


def scale_losses(axes: Axes, curves: Sequence[Curve]) -> None:
    """An axis of losses, logarithmic where they span a factor of several."""
    top, values = _top_and_values(curves)
    if not len(values):
        return
    bottom = float(values.min())
    if bottom > 0 and top / bottom >= _LOG_FROM["loss"]:
        axes.set_yscale("log")
        axes.set_ylim(bottom / 1.1, top * 1.1)
        _log_ticks(axes, "y", 8)
    else:
        space = 0.05 * (top - bottom) or 0.05 * abs(top) or 1.0
        axes.set_ylim(bottom - space, top + space)
        linear_ticks(axes, "y", 6)


def scale_schedule(axes: Axes, values: np.ndarray) -> None:
    """An axis of a hyperparameter's values."""
    low, high, positive = float(values.min()), float(values.max()), values[values > 0]
    if low >= 0 and len(positive) and high / float(positive.min()) >= _LOG_FROM["schedule"]:
        threshold = 10.0 ** math.floor(math.log10(max(float(positive.min()), high / 1e6)))
        if low > 0:
            axes.set_yscale("log")
        else:
            axes.set_yscale("symlog", linthresh=threshold, linscale=0.5)
        axes.set_ylim(low / 1.3 if low > 0 else -0.15 * threshold, high * 1.3)
        _log_ticks(axes, "y", 5, None if low > 0 else threshold)
    else:
        space = max(0.08 * (high - low), 0.03 * abs(high)) or 0.1
        axes.set_ylim(low - space, high + space)
        linear_ticks(axes, "y", 4)


def linear_ticks(axes: Axes, which: str, most: int) -> None:
    """Ticks of a linear axis, about so many."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(nbins=max(3, most), steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(compact))


def unit_in_words(unit: str, largest: float) -> tuple[float, str]:
    """A factor and a label for an axis of cost that ends there: long times are shown in minutes or hours."""
    label = COST_LABELS[unit]
    if unit.endswith("_seconds") and largest >= 7200:
        return 1 / 3600, label.replace("seconds", "hours")
    if unit.endswith("_seconds") and largest >= 240:
        return 1 / 60, label.replace("seconds", "minutes")
    return 1.0, label


def compact(value: float, position: int | None = None) -> str:
    """A number for a tick, such as 0.02, 500, 20k or 1.5M."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(factor, 1e4):
            return f"{value / factor:.4g}{suffix}"
    return f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def shortened(text: str, most: int) -> str:
    """At most so many letters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _label(name: str, figure: Figure) -> str:
    return shortened(name, 18 if figure.get_figwidth() < 5 else 24)


def _width(labels: Sequence[str], columns: int) -> float:
    """Of a legend in so many columns, in inches."""
    return sum(0.55 + max(map(len, labels[column::columns])) / _LETTERS for column in range(columns))


def _top_and_values(curves: Sequence[Curve]) -> tuple[float, np.ndarray]:
    """All values, and the largest but for first ones so far off that they would hide the differences at the end."""
    values = np.concatenate([np.zeros(0), *([curve.low, curve.high] for curve in curves)], axis=None)
    values = values[np.isfinite(values)]
    last = max((float(curve.high[-1]) for curve in curves if np.isfinite(curve.high[-1])), default=0.0)
    largest = float(values.max(initial=-math.inf))
    return min(largest, 100 * last) if last > 0 else largest, values


def _round_down(value: float) -> float:
    """To 1, 2 or 5 times a power of ten."""
    decade = 10.0 ** math.floor(math.log10(value))
    return max(digit * decade for digit in (1, 2, 5) if digit * decade <= value * (1 + 1e-9))


def _log_ticks(axes: Axes, which: str, most: int, threshold: float | None = None) -> None:
    """Powers of ten, with 2 and 5 where they fit; with a threshold, of both signs beyond it, and 0."""
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    smallest = low if threshold is None else threshold
    decades = range(math.floor(math.log10(smallest)), math.ceil(math.log10(max(high, -low))) + 1)
    found: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        positive = [digit * 10.0**decade for decade in decades for digit in digits]
        both = [value for value in positive if value >= 0.999 * smallest]
        both += [] if threshold is None else [-value for value in both]
        found = sorted(value for value in both if low <= value <= high)
        if len(found) <= most:
            break
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(
        FixedLocator([*([] if threshold is None else [0.0]), *found[:: -(-len(found) // most) or 1]])
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(compact))
