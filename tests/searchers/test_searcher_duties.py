"""Our searchers do what Ray Tune asks of a searcher; and the page that says so is the script's."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import REPOSITORY
from ray.tune.search import ConcurrencyLimiter
from searcher_duties import (
    BEGIN,
    END,
    Outcome,
    attempt,
    expected,
    outcome_of,
    read_table,
    run_column,
    table,
    write,
)
from searcher_duty_cases import DUTIES, Duty
from searcher_duty_tools import COLUMNS, OURS, SPACE, Cell, Unmet, drive

from tune_hypergrad import InputError

PAGE = REPOSITORY / "docs" / "searchers.md"
PATIENCE = 3
"""On a busy machine a process takes longer to show that it lives."""


class Columns:
    """Outcomes of the duties that this run of the tests has chosen, each found when it is first asked for."""

    def __init__(self, address: str, chosen: dict[str, list[str]]) -> None:
        self.columns = {name: run_column(name, duties, address, PATIENCE) for name, duties in chosen.items()}
        self.found: dict[tuple[str, str], Outcome] = {}

    def outcome(self, searcher: str, duty: str) -> Outcome:
        while (searcher, duty) not in self.found:
            name, outcome = next(self.columns[searcher])
            self.found[searcher, name] = outcome
        return self.found[searcher, duty]


@pytest.fixture(scope="module")
def columns(request: pytest.FixtureRequest, ray_session: str) -> Iterator[Columns]:
    chosen: dict[str, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.originalname == test_duty.__name__:
            params: Any = item.callspec.params
            chosen.setdefault(params["searcher"], []).append(params["duty"])
    columns = Columns(ray_session, chosen)
    yield columns
    for column in columns.columns.values():
        column.close()  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("duty", DUTIES)
@pytest.mark.parametrize("searcher", OURS)
def test_duty(columns: Columns, searcher: str, duty: str) -> None:
    outcome = columns.outcome(searcher, duty)
    assert outcome.kind in expected(DUTIES[duty], searcher), f"{DUTIES[duty].description}: {outcome}"


def test_page_has_every_duty_and_every_searcher() -> None:
    lines = [line for line in PAGE.read_text().split("\n") if line.startswith("|")]
    rows = [[entry.strip() for entry in line.strip("|").split(" | ")] for line in lines]
    assert rows[0] == ["duty", *COLUMNS]
    assert [row[0] for row in rows[2:]] == [duty.description for duty in DUTIES.values()]
    assert set(read_table(PAGE.read_text())) == {(duty, searcher) for duty in DUTIES for searcher in COLUMNS}


def test_duties_have_descriptions_and_searchers_of_their_own() -> None:
    assert len({duty.description for duty in DUTIES.values()}) == len(DUTIES) > 40
    for duty in DUTIES.values():
        assert duty.description and not set(duty.may_refuse) & set(duty.not_for)
        assert set(duty.may_refuse) <= set(OURS) and set(duty.not_for) <= set(COLUMNS)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    kinds = [Outcome("yes"), Outcome("yes", "12 B"), Outcome("no", "a | b"), Outcome("refused", "no"), Outcome("—")]
    outcomes = {
        (duty, searcher): kinds[(i + j) % len(kinds)]
        for i, duty in enumerate(DUTIES)
        for j, searcher in enumerate(COLUMNS)
    }
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\n{END}\n\nafter\n")
    write(page, outcomes)
    assert read_table(page.read_text()) == outcomes
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")
    name = next(iter(DUTIES))
    write(page, {(name, "BOSearch"): Outcome("hangs")})
    assert read_table(page.read_text()) == {**outcomes, (name, "BOSearch"): Outcome("hangs")}
    assert "| ? |" in table({})


def test_expectations() -> None:
    assert expected(DUTIES["metric_nan"], "BOSearch") == ("yes",)
    assert expected(DUTIES["repeater"], "BOSearch") == ("yes",)
    assert expected(DUTIES["repeater"], "HypergradientSearch") == ("yes", "refused")
    assert expected(DUTIES["evaluated_rewards"], "HypergradientSearch") == ("—",)


def raising(error: Exception) -> Callable[[Cell], str | None]:
    def action(cell: Cell) -> str | None:
        raise error

    return action


@pytest.mark.parametrize(
    ("action", "outcome"),
    [
        (lambda cell: None, Outcome("yes")),
        (lambda cell: "12 B", Outcome("yes", "12 B")),
        (raising(Unmet("3 trials")), Outcome("no", "3 trials")),
        (raising(InputError("'x' is no number")), Outcome("refused", "'x' is no number")),
        (raising(ValueError("oh\nno")), Outcome("no", "ValueError: no")),
        (raising(KeyError("a")), Outcome("no", "KeyError: 'a'")),
        (raising(OSError("/tmp/a/b.pkl is torn")), Outcome("no", "OSError: … is torn")),
    ],
)
def test_outcomes(tmp_path: Path, action: Callable[[Cell], str | None], outcome: Outcome) -> None:
    assert attempt(Duty("a", "A", action), Cell(COLUMNS["RandomSearch"], tmp_path)) == outcome


def test_a_refusal_beneath_another_exception_is_seen(tmp_path: Path) -> None:
    def action(cell: Cell) -> str | None:
        try:
            raise InputError("pass a space")
        except InputError as error:
            raise RuntimeError("the experiment has failed") from error

    assert attempt(Duty("a", "A", action), Cell(COLUMNS["BOSearch"], tmp_path)) == Outcome("refused", "pass a space")


def test_silence_is_a_hang() -> None:
    lines: queue.Queue[str | None] = queue.Queue()
    lines.put("alive\n")
    assert outcome_of(lines, 0.01, float("inf")) is None
    lines.put('@["no", "why"]\n')
    assert outcome_of(lines, 10, float("inf")) == Outcome("no", "why")
    lines.put(None)
    assert outcome_of(lines, 10, float("inf")) == Outcome("no", "the process dies")
    lines.put('@["yes", ""]\n')
    assert outcome_of(lines, 10, 0) is None  # too late


def test_a_searcher_that_waits_for_nothing_is_seen() -> None:
    search = COLUMNS["RandomSearch"].make(space=dict(SPACE), metric="val_loss", mode="min")
    limited = ConcurrencyLimiter(search, max_concurrent=1)
    limited.suggest("another")
    with pytest.raises(Unmet, match="waits though no trial runs"):
        drive(limited, 1)
