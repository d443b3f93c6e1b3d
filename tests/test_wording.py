"""How durations, numbers and tables read."""

from statistics import fmean

import pytest
from markdown_it import MarkdownIt

from tune_hypergrad.wording import duration, markdown_table, number, percent, shortened, with_range


def test_durations_are_told_in_words():
    told = [duration(seconds) for seconds in (0, 42, 89.4, 90, 300, 3569, 3571, 7500, 360_000)]
    assert told == ["0 s", "42 s", "89 s", "2 min", "5 min", "59 min", "1 h 00 min", "2 h 05 min", "100 h 00 min"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12, "12"),
        (0.012345, "0.0123"),
        (-4.5678, "-4.57"),
        (99.6, "99.6"),
        (123.4, "123"),
        (1234567, "1,234,567"),
    ],
)
def test_numbers_have_three_digits_or_all_before_the_point(value, text):
    assert number(value) == text


def test_shares_are_told_in_per_cent():
    assert (percent(0.628), percent(1.0), percent(0.62816, 2)) == ("63 %", "100 %", "62.82 %")


def test_figures_are_told_with_their_range():
    assert with_range([3.0, 1.0, 1.25], ".2f") == "1.25 (1.00 to 3.00)"
    assert with_range([3.0, 1.0, 1.25], ".3g", fmean) == "1.75 (1 to 3)"


def test_what_is_too_long_ends_in_dots():
    assert [shortened("abcdef", most) for most in (6, 5)] == ["abcdef", "abcd…"]


def test_a_table_holds_whatever_is_in_its_cells():
    text = markdown_table(["a | b", "count"], [["left | right", "1"], ["", "20"]], numbers=["count"])
    page = MarkdownIt("commonmark").enable("table").render(text)
    assert page.count("<tr>") == 3 and page.count("<td") == 4 and page.count('style="text-align:right"') == 3
    assert "<th>a | b</th>" in page and "<td>left | right</td>" in page
