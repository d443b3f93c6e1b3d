"""A comparison's report: tables, pictures, schedules and results as files, and one HTML page with all of it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich import box
from rich.table import Column as TerminalColumn
from rich.table import Table
from rich.text import Text

from tune_hypergrad.comparison.telling import pictures, tables
from tune_hypergrad.comparison.telling.drawing import COST_LABELS, INK, NARROW
from tune_hypergrad.comparison.telling.records import Comparison, measure_label
from tune_hypergrad.comparison.telling.series import Granted, distinct_units
from tune_hypergrad.comparison.telling.tables import Column, TextTable
from tune_hypergrad.comparison.telling.troubles import Trouble
from tune_hypergrad.comparison.telling.verdict import cost_in_words, verdict_text
from tune_hypergrad.curves import Curve
from tune_hypergrad.results import OBJECTIVE
from tune_hypergrad.schedules import SCHEDULE_FILE
from tune_hypergrad.wording import markdown_table, shortened

REPORT_FILE = "report.html"
"""In a comparison's folder: one page, which needs no network and no other file."""
SUMMARY_FILE = "summary.md"
"""In a comparison's folder: the tables."""
RESULTS_FILE = "results.csv"
"""In a comparison's folder: `Comparison.results`."""
PICTURES_FOLDER = "pictures"
"""In a comparison's folder: every picture as PNG and SVG."""

_TEMPLATE = "report.html.j2"
_CAUSE_LETTERS = 200
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_FIRST_COLUMNS = ("method", "seed", "trial", "iteration")


@dataclass(frozen=True)
class Picture:
    """One picture, drawn when its width is known."""

    name: str
    """Of its files."""
    caption: str
    """One line below it."""
    alt: str
    """What it shows, to who cannot see it."""
    draw: Callable[..., Figure]
    """Takes a width."""


def write_report(comparison: Comparison) -> Path:
    """Write everything that is made of a comparison, finished or not, into its folder; the path of its page."""
    folder = comparison.folder
    _results(comparison).to_csv(folder / RESULTS_FILE, index=False)
    for method, schedule in pictures.best_schedules(comparison).items():
        (folder / method).mkdir(exist_ok=True)
        schedule.save(folder / method / SCHEDULE_FILE)
    (folder / SUMMARY_FILE).write_text(summary_text(comparison), encoding="utf-8")
    page = folder / REPORT_FILE
    page.write_text(_page(comparison, _write_pictures(comparison)), encoding="utf-8")
    return page


def summary_table(comparison: Comparison) -> Table:
    """One row a method, for the terminal; the least regret stands out. Ranges are those of regret alone, and why
    something went wrong is said below."""
    text = tables.results(comparison)
    shown = [i for i, column in enumerate(text.columns) if i == 0 or column.key or column.remark]
    troubles = {method: comparison.troubles(method) for method in comparison.methods}
    rows = [[_terminal_cell(text.columns[i], row[i], i == 1, troubles[row[0]]) for i in shown] for row in text.rows]
    narrow = text.columns[-1].remark  # what went wrong gets the room
    columns = [
        _terminal_column(text.columns[i], cells, i == 1, narrow)
        for i, cells in zip(shown, zip(*rows, strict=True), strict=True)
    ]
    title = f"{comparison.settings.get('problem', 'Comparison')}: {tables.state(comparison)}"
    causes = _causes(troubles, comparison.left_out)
    table = Table(*columns, title=title, caption=causes, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    means = [comparison.final_regret(row[0]).mean() for row in text.rows]
    best = min((mean for mean in means if np.isfinite(mean)), default=None)
    for row, mean in zip(rows, means, strict=True):
        table.add_row(*row, style="bold" if mean == best else None)
    return table


def summary_text(comparison: Comparison) -> str:
    """The tables in Markdown."""
    facts = tables.facts(comparison)
    parts = [
        f"# Comparison: {facts.get('Problem', comparison.folder.name)}",
        f"State: {tables.state(comparison)}.",
        verdict_text(comparison),
        "\n".join(f"- {name}: {_in_line(text)}" for name, text in facts.items()),
        "## Results",
        _markdown(tables.results(comparison)),
        "\n".join(f"- {note}" for note in tables.notes(comparison)),
        "## Methods",
        _markdown(tables.methods(comparison)),
        *([_markdown(tables.left_out(comparison))] if comparison.left_out else []),
        f"## Costs in {COST_LABELS[comparison.budget.unit]}, means over seeds",
        _markdown(tables.costs(comparison)),
        "## Failures",
        _markdown(tables.failures(comparison)) if tables.failures(comparison).rows else "None.",
        *(["## Time", _markdown(tables.profile(comparison))] if len(comparison.profile) else []),
        "## Search space",
        _markdown(tables.space(comparison)),
    ]
    return "\n\n".join(parts) + "\n"


def all_pictures(comparison: Comparison) -> dict[str, list[Picture]]:
    """A report's pictures by section: "regret", "other_units", "validation", "schedules", "spending", "utilisation"."""
    units = distinct_units(comparison)
    granted, unit = Granted.of(comparison), COST_LABELS[comparison.budget.unit]
    costs = {each: f"cost in {cost_in_words(comparison, each, 0)[1]}" for each in (*units, comparison.budget.unit)}
    measure = comparison.yardstick
    regrets = "; ".join(f"{method} {_mean(comparison.final_regret(method))}" for method in comparison.ranking)
    own = comparison.accounts.groupby("method", sort=False)[OBJECTIVE]
    losses = "; ".join(f"{method} {_mean(values)}" for method, values in own)
    judged = measure_label(comparison.criterion.column)
    regret = f"{measure.heading.capitalize()} of the incumbents against"
    which = tables.parts_of_budget(comparison.retraining.get("shares", (1.0,)))
    where = f"as tested after retraining those after {which}" if measure.tested else "by validation"

    def of(units: list[str]) -> str:
        return " and ".join(costs[unit] for unit in units)

    sections = {
        "regret": [
            Picture(
                f"regret_{unit}",
                f"Regret of incumbents against {costs[unit]}, {where}.",
                f"{regret} {costs[unit]}. At the end: {regrets}.",
                partial(pictures.regret, comparison, unit),
            )
            for unit in units[:2]
        ],
        "other_units": [
            Picture(
                "regret_in_other_units",
                f"Regret against {of(units[2:])}. Units in proportion to others are left out.",
                f"{regret} {of(units[2:])}.",
                partial(pictures.regrets, comparison, units[2:]),
            )
        ],
        "validation": [
            Picture(
                "validation",
                f"{judged.capitalize()} of the incumbents against {costs[comparison.budget.unit]}.",
                f"{'Highest' if comparison.criterion.larger_is_better else 'Lowest'} {judged} so far of every method "
                f"against {costs[comparison.budget.unit]}. At the end: {losses}.",
                partial(pictures.validation, comparison, comparison.budget.unit),
            )
        ],
        "schedules": [
            Picture(
                "schedules",
                f"Each method's best schedule; as numbers in METHOD/{SCHEDULE_FILE}.",
                "Hyperparameters over training progress. " + _schedules_in_words(comparison),
                partial(pictures.schedules, comparison),
            )
        ],
        "spending": [
            Picture(
                "spending",
                f"What the budgets went into, in {unit}, means over seeds; in per cent of the budget, what was spent "
                "and what was lost beside it.",
                "Bars of spending against the budget; the table of costs below has their numbers.",
                partial(pictures.spending, comparison),
            )
        ],
        "utilisation": [
            Picture(
                "utilisation",
                "What trials held of the cluster." + (_lines_in_words(granted) if granted else ""),
                "Share of the cluster granted over time. " + (granted.text if granted else ""),
                partial(pictures.utilisation, comparison),
            )
        ],
    }
    return sections if units[2:] else {**sections, "other_units": []}


def inline_svg(figure: Figure, prefix: str, alt: str) -> Markup:
    """A figure as an SVG element of a page: text is text in the page's colour, names are its own, nothing is linked."""
    buffer = io.BytesIO()
    # of the families that matplotlib would list with every text, the one that it has laid out
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.sans-serif": ["DejaVu Sans"]}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = ElementTree.fromstring(buffer.getvalue())
    for element in svg.iter():
        colored = {name: value.replace(INK, "currentColor") for name, value in element.attrib.items()}
        element.attrib = {_without_namespace(name): value for name, value in colored.items()}
        element.tag, element.tail = _without_namespace(element.tag), None
        element.text = (element.text or "").strip()
        if element.tag == "g":
            element.attrib.pop("id", None)  # those of groups are the same in every picture, and nothing refers to them
    svg.attrib = {"class": "picture", "viewBox": svg.attrib["viewBox"], "role": "img", "aria-label": alt}
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _without_namespace(name: str) -> str:
    return name.rpartition("}")[2]


def _page(comparison: Comparison, drawn: Mapping[str, list[dict[str, object]]]) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    look = pictures.look_of(comparison)
    return environment.get_template(_TEMPLATE).render(
        problem=comparison.settings.get("problem") or comparison.folder.name,
        state=tables.state(comparison),
        finished=comparison.finished,
        verdict=verdict_text(comparison),
        facts=tables.facts(comparison),
        notes=tables.notes(comparison),
        pictures=drawn,
        unit=COST_LABELS[comparison.budget.unit],
        colors={method: look.color(method) for method in comparison.methods},
        results=tables.results(comparison),
        judged=measure_label(comparison.criterion.column),
        methods=tables.methods(comparison),
        left_out=tables.left_out(comparison),
        profile=tables.profile(comparison),
        costs=tables.costs(comparison),
        failures=tables.failures(comparison),
        space=tables.space(comparison),
    )


def _write_pictures(comparison: Comparison) -> dict[str, list[dict[str, object]]]:
    """Write every picture's files; what the page shows of them, by section."""
    folder = comparison.folder / PICTURES_FOLDER
    folder.mkdir(exist_ok=True)
    shown: dict[str, list[dict[str, object]]] = {}
    for section, found in all_pictures(comparison).items():
        shown[section] = []
        for picture in found:
            wide, narrow = _laid_out(picture.draw()), _laid_out(picture.draw(width=NARROW))
            wide.savefig(folder / f"{picture.name}.png", dpi=150)
            with rc_context({"svg.hashsalt": picture.name}):
                wide.savefig(folder / f"{picture.name}.svg", metadata={"Date": None})
            svgs = {
                "wide": inline_svg(wide, f"{picture.name}-w", picture.alt),
                "narrow": inline_svg(narrow, f"{picture.name}-n", picture.alt),
            }
            shown[section].append({"caption": picture.caption, **svgs})
    return shown


def _laid_out(figure: Figure) -> Figure:
    """The figure with its layout found once for all files."""
    figure.draw_without_rendering()
    with rc_context({"figure.autolayout": False, "figure.constrained_layout.use": False}):
        figure.set_layout_engine(None)
    return figure


def _results(comparison: Comparison) -> pd.DataFrame:
    frame = comparison.results
    first = [name for name in _FIRST_COLUMNS if name in frame] if len(frame) else list(_FIRST_COLUMNS)
    return frame.reindex(columns=[*first, *sorted(name for name in frame if name not in first)])


def _lines_in_words(granted: Granted) -> str:
    gaps = " Interruptions are left out; dotted lines are where they were." if granted.gaps else ""
    return gaps + (" The solid line is where the first method had spent its budget." if granted.first_finished else "")


def _schedules_in_words(comparison: Comparison) -> str:
    found = pictures.best_schedules(comparison)
    return "; ".join(
        f"{method}: {', '.join(f'{name} {_in_short(value)}' for name, value in each.values.items())}"
        for method, each in found.items()
    )


def _in_short(values: tuple[float, ...] | Curve) -> str:
    return str(values) if isinstance(values, Curve) else f"{values[0]:.3g} to {values[-1]:.3g}"


def _markdown(table: TextTable) -> str:
    remarks = [column.remark for column in table.columns]
    rows = [[_in_line(cell, remark) for cell, remark in zip(row, remarks, strict=True)] for row in table.rows]
    numbers = {column.heading for column in table.columns if column.number}
    return markdown_table([column.heading for column in table.columns], rows, numbers)


def _terminal_cell(column: Column, text: str, whole: bool, troubles: Sequence[Trouble]) -> str:
    """What a terminal shows of a cell: the first line unless it is to be shown whole, and of troubles how often."""
    if column.remark:
        return "\n".join(each.what for each in troubles)
    return text.replace(" to ", ".." if "-" in text else "-") if whole else text.split("\n")[0]


def _terminal_column(column: Column, cells: Sequence[str], whole: bool, narrow: bool) -> TerminalColumn:
    """How a terminal lays a column out: no narrower than its cells if they are to be shown whole, and where numbers
    are to be narrow no wider than they and the words of the heading."""
    widest = max(len(line) for cell in cells for line in cell.split("\n"))
    return TerminalColumn(
        column.heading,
        justify="right" if column.number else "left",
        min_width=widest if whole else None,
        max_width=max(widest, *map(len, column.heading.split())) if narrow and column.number else None,
    )


def _causes(troubles: Mapping[str, Sequence[Trouble]], left_out: Mapping[str, str]) -> Text | None:
    lines = [f"{method}: {each.text}" for method, found in troubles.items() for each in found if each.cause]
    lines += [f"{method} is left out: {reason}" for method, reason in left_out.items()]
    return Text("\n".join(shortened(line, _CAUSE_LETTERS) for line in lines), justify="left") if lines else None


def _in_line(text: str, remarks: bool = False) -> str:
    """A cell's lines as one: of a figure, those after the first in brackets."""
    first, *more = text.splitlines() or [""]
    return "; ".join([first, *more]) if remarks else " ".join([first, *(f"({line})" for line in more)])


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.3g}" if values.notna().any() else "none"
