"""How pictures show schedules: windows as steps, axes that hide no differences, ticks in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.scale import SymmetricalLogScale
from matplotlib.ticker import EngFormatter, Locator, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator
from numpy.typing import ArrayLike

from tune_hypergrad.curves import Curve, split_group
from tune_hypergrad.errors import InputError

if TYPE_CHECKING:
    from tune_hypergrad.schedules import Schedule

_LOG_FROM = 100.0  # largest over smallest value of a schedule from which a linear axis hides the small ones
_LINES = 8  # of parameter groups in one panel


def stairs(axes: Axes, values: Sequence[float], **style: Any) -> None:
    """Draw a hyperparameter over training progress, a step for every window."""
    axes.stairs(values, np.linspace(0, 1, len(values) + 1), baseline=None, **style)


def draw_values(axes: Axes, schedule: Schedule, name: str, **style: Any) -> None:
    """Draw one hyperparameter of a schedule over training progress: windows as steps, a curve as a line."""
    values = schedule.windows(name)
    if isinstance(schedule.values[name], Curve):
        axes.plot((np.arange(len(values)) + 0.5) / len(values), values, **style)
    else:
        stairs(axes, values, **style)


def scale(axis: XAxis | YAxis, values: ArrayLike, *, log_from: float, ticks: int, decades: float = 3.0) -> None:
    """Scale an axis so that it hides no differences, with ticks that are plain numbers.

    Args:
        axis: one of some `axes`, such as `axes.yaxis`.
        values: what is to be seen along it; those that are not finite count for nothing.
        log_from: the axis is logarithmic where the largest is so many times the smallest; if some are not above 0, it
            is linear around 0.
        ticks: about how many.
        decades: how many are logarithmic in the latter case, rounded up.
    """
    every = np.asarray(values, dtype=float)
    shown = every[np.isfinite(every)]
    sizes, kind = np.abs(shown[shown != 0]), _scale_of(shown, log_from)
    largest = float(sizes.max(initial=0))
    smallest = float(sizes.min(initial=largest))
    locator: Locator = MaxNLocator(max(3, ticks), steps=[1, 2, 2.5, 5, 10])
    if kind == "log":
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        locator = LogLocator(subs=_digits(shown, smallest, ticks), numticks=ticks)
    elif kind == "symlog":
        smallest = 10.0 ** math.floor(math.log10(max(smallest, largest / 10**decades)))
        axis.axes.set(**{f"{axis.axis_name}scale": SymmetricalLogScale(axis, linthresh=smallest, linscale=0.5)})
        locator = SymmetricalLogLocator(base=10, linthresh=smallest, subs=_digits(shown, smallest, ticks))
        locator.set_params(numticks=ticks)
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    whole = largest >= 1e4 and (kind == "linear" or smallest >= 1)
    axis.set_major_formatter(EngFormatter(sep="") if whole else "{x:g}")
    axis.axes.autoscale_view()  # margins are of the new scale


def scale_values(axes: Axes, values: np.ndarray) -> None:
    """Scale an axis of a hyperparameter's values."""
    scale(axes.yaxis, values, log_from=_LOG_FROM if values.min() >= 0 else math.inf, ticks=6)


def _digits(values: np.ndarray, smallest: float, ticks: int) -> Sequence[float]:
    """Those that a logarithmic axis has room for in every decade, on both sides of 0."""
    decades = sum(math.log10(end / smallest) for end in (values.max(), -values.min()) if end > smallest)
    return next((digits for digits in ((1, 2, 5), (1, 3)) if len(digits) * decades <= ticks), (1,))


def _scale_of(values: np.ndarray, log_from: float) -> Literal["linear", "log", "symlog"]:
    """Which scale hides no differences between finite values (see `scale`), by matplotlib's names."""
    sizes = np.abs(values[values != 0])
    if not len(sizes) or sizes.max() < log_from * sizes.min():
        return "linear"
    return "log" if values.min() > 0 else "symlog"


def plot_schedule(schedule: Schedule, axes: Axes | Sequence[Axes] | None) -> Figure:
    """Draw a schedule; see `Schedule.plot`."""
    drawn: dict[str, list[str]] = {}
    for name in schedule.values:
        drawn.setdefault(split_group(name)[0], []).append(name)
    if axes is None:
        axes = _new_panels([len(names) for names in drawn.values()])
    panels = [axes] if isinstance(axes, Axes) else list(axes)
    if len(panels) != len(drawn):
        raise InputError(f"plot got {len(panels)} axes for {len(drawn)} hyperparameters: pass one for each")
    for panel, (hyperparameter, names) in zip(panels, drawn.items(), strict=True):
        label = names[0] if len(names) == 1 else hyperparameter
        (_draw_rows if len(names) > _LINES else _draw_lines)(panel, label, schedule, names)
        panel.set_xlim(0, 1)
    panels[-1].set_xlabel("training progress")
    figure = panels[0].figure.figure  # of a subfigure's axes, the figure it is in
    figure.align_ylabels(panels)
    return figure


def _new_panels(counts: Sequence[int]) -> list[Axes]:
    """Panels above each other for so many lines, or rows, each."""
    heights = [1.5 if count <= _LINES else 0.4 + 0.14 * count for count in counts]
    width = 6 if max(counts) == 1 else 8
    figure = Figure(figsize=(width, 0.6 + sum(heights)), layout="constrained")
    return list(figure.subplots(len(counts), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])


def _draw_lines(panel: Axes, label: str, schedule: Schedule, names: Sequence[str]) -> None:
    """One hyperparameter's values, a line for every group."""
    for name in names:
        draw_values(panel, schedule, name, linewidth=2, label=_group_label(name))
    scale_values(panel, _spans(schedule, names))
    if len(names) > 1:
        panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    panel.margins(y=0.15)
    panel.set_ylabel(label)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_rows(panel: Axes, label: str, schedule: Schedule, names: Sequence[str]) -> None:
    """One hyperparameter's values, a row for every group, by colour."""
    count = max(len(schedule.windows(name)) for name in names)
    rows = [[own[len(own) * i // count] for i in range(count)] for own in map(schedule.windows, names)]
    spans = _spans(schedule, names)
    norm = "log" if _scale_of(spans, _LOG_FROM) == "log" else "linear"
    edges = np.linspace(0, 1, count + 1)
    image = panel.pcolormesh(edges, range(len(rows) + 1), rows, norm=norm, vmin=spans.min(), vmax=spans.max())
    panel.figure.colorbar(image, ax=panel, label=label)
    panel.set_yticks(np.arange(len(rows)) + 0.5, list(map(_group_label, names)), fontsize=6)
    panel.invert_yaxis()


def _spans(schedule: Schedule, names: Sequence[str]) -> np.ndarray:
    return np.concatenate([schedule.span(name) for name in names])


def _group_label(name: str) -> str:
    return split_group(name)[1] or "others"
