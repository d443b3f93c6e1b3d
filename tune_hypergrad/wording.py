"""How durations, numbers, long texts and Markdown tables read, wherever the package tells a person something."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from statistics import median


def duration(seconds: float) -> str:
    """Seconds in words, such as 42 s, 5 min or 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float) -> str:
    """A number to three significant digits at least, such as 0.0123, 4.56, 123 or 1,234,567."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float, decimals: int = 0) -> str:
    """A share in per cent with so many decimals, such as 63 %."""
    return f"{100 * share:.{decimals}f} %"


def with_range(values: Sequence[float], form: str, middle: Callable[[Sequence[float]], float] = median) -> str:
    """The middle of some figures and their range, such as 0.12 (0.1 to 0.15).

    Args:
        values: the figures.
        form: of each, such as ".2f".
        middle: their median, or another mean.
    """
    return f"{middle(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and "…" where it has more than so many letters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def markdown_row(cells: Iterable[str]) -> str:
    """A line of a table in Markdown, of cells without line breaks."""
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def markdown_table(headings: Sequence[str], rows: Iterable[Iterable[str]], numbers: Collection[str] = ()) -> str:
    """A table in Markdown; columns with the headings `numbers` are aligned at the right."""
    rule = ["--:" if heading in numbers else "---" for heading in headings]
    return "\n".join(map(markdown_row, [headings, rule, *rows]))
