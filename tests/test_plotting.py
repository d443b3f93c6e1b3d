"""Axes of pictures and schedules drawn on them: scales that hide no differences, and ticks in plain numbers."""

import io

import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

from tune_hypergrad.plotting import draw_values, scale, stairs
from tune_hypergrad.schedules import Schedule


def scaled(values, *, log_from=20, ticks=8, **options):
    """An axis with these values on it, and the texts of the ticks that are seen."""
    figure = Figure()
    axes = figure.subplots()
    axes.plot(range(len(values)), values)
    scale(axes.yaxis, values, log_from=log_from, ticks=ticks, **options)
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    seen = [text for at, text in zip(axes.get_yticks(), axes.yaxis.get_ticklabels(), strict=True) if low <= at <= high]
    return axes, [text.get_text().replace("\N{MINUS SIGN}", "-") for text in seen]


@pytest.mark.parametrize(
    ("values", "kind", "texts"),
    [
        ((0, 0.06), "linear", ["0", "0.01", "0.02", "0.03", "0.04", "0.05", "0.06"]),
        ((1000, 6000), "linear", ["1000", "2000", "3000", "4000", "5000", "6000"]),
        ((0, 42_000), "linear", ["0", "10k", "20k", "30k", "40k"]),
        ((-3, -2.5), "linear", ["-3", "-2.9", "-2.8", "-2.7", "-2.6", "-2.5"]),
        ((0.7, 42), "log", ["1", "2", "5", "10", "20", "50"]),
        ((0.7, 420), "log", ["1", "3", "10", "30", "100", "300"]),
        ((1e-5, 1), "log", ["1e-05", "0.0001", "0.001", "0.01", "0.1", "1"]),
        ((3, 3e6), "log", ["10", "100", "1k", "10k", "100k", "1M"]),
        ((0, 1, 80), "symlog", ["0", "1", "2", "5", "10", "20", "50", "100"]),
        ((-2, 0.5, 80), "symlog", ["-1", "-0.1", "0", "0.1", "1", "10", "100"]),
        ((float("nan"), float("inf"), 0.2, 0.3), "linear", ["0.2", "0.22", "0.24", "0.26", "0.28", "0.3"]),
    ],
)
def test_scales_and_their_ticks(values, kind, texts):
    axes, seen = scaled(values)
    assert (axes.get_yscale(), seen) == (kind, texts)


@pytest.mark.parametrize("values", [(0.5, 0.6), (0.02, 42), (0, 0.02, 42), (-3, 0.1, 42)])
def test_everything_is_seen_with_some_room_around_it(values):
    low, high = scaled(values)[0].get_ylim()
    assert low < min(values) and max(values) < high
    assert scaled(values)[0].transData.transform((0, min(values)))[1] > 60  # pixels; the axes begin at 53


def test_differences_decide_which_decades_are_logarithmic():
    values = (0, 1e-5, 1)
    assert scaled(values)[0].yaxis.get_transform().linthresh == pytest.approx(1e-3)
    assert scaled(values, decades=1.5)[0].yaxis.get_transform().linthresh == pytest.approx(1e-2)


def test_no_axis_has_more_ticks_than_it_has_room_for():
    for ticks in (4, 8):
        for decades in range(1, 14, 4):
            for values in ((0.9, 0.9 * 10**decades), (0, 0.9, 0.9 * 10**decades), (-30, 0.9, 0.9 * 10**decades)):
                assert 2 <= len(scaled(values, ticks=ticks)[1]) <= 1.5 * ticks


def size(values):
    """Letters of the picture of a schedule of so many windows, and its largest and smallest drawn heights."""
    with rc_context({"path.simplify_threshold": 1.0}):
        figure = Figure(figsize=(2.4, 1.9))
        axes = figure.subplots()
        stairs(axes, values)
        axes.set_ylim(-10, 10)
        written = io.StringIO()
        figure.savefig(written, format="svg")
    text = written.getvalue()
    path = next(part for part in text.split('<path d="')[3:] if "clip-path" in part).split('"')[0]
    heights = [float(line.split()[2]) for line in path.splitlines() if line[:1] in "ML"]
    scale_of_pixels = axes.transData.transform((0, 1))[1] - axes.transData.transform((0, 0))[1]
    return len(path), (max(heights) - min(heights)) / scale_of_pixels * figure.dpi / 72


def test_a_schedule_of_very_many_windows_is_drawn_as_small_as_it_is_seen_and_keeps_its_spikes():
    values = [0.5 + 0.1 * (i % 7) for i in range(5000)]
    values[1234], values[4321] = 9.0, -9.0
    letters, height = size(values)
    assert letters < 20_000 and height == pytest.approx(18, abs=0.1)


def test_windows_are_steps_and_curves_are_lines():
    axes = Figure().subplots()
    schedule = Schedule({"lr": {"cosine": {"peak": 1.0, "warm_up": 0.0, "floor": 0.0}}, "momentum": (0.9, 0.5)})
    draw_values(axes, schedule, "lr", label="rate")
    draw_values(axes, schedule, "momentum")
    (line,), (steps,) = axes.lines, axes.patches
    assert line.get_label() == "rate" and line.get_xdata()[0] == 0.5 / 200 and len(line.get_xdata()) == 200
    assert list(line.get_ydata()) == list(schedule.windows("lr"))
    assert list(steps.get_data().values) == [0.9, 0.5] and list(steps.get_data().edges) == [0, 0.5, 1]
