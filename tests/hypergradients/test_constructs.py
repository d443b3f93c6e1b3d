"""No construct of a model, a loss or data gets a wrong number in silence; and who says so would notice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import construct_runs
import constructs
import pytest
import torch
from construct_cases import CASES, Case
from construct_cases.case import ADAM, inside
from construct_runs import Outcome, Reference, Row, differentiated, run_case, tensors, train_mode, trained_loss
from torch import nn

from tune_hypergrad import InputError, hypergradient
from tune_hypergrad.hypergradients import HypergradientResult, InnerLoop

PLAIN = Case("plain")
EXACT, REFUSED, FAILS, WRONG = (
    Outcome("exact"),
    Outcome("refused", "no"),
    Outcome("fails", "OSError: oh"),
    Outcome("wrong", "off by 1"),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads would only wait for each other on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_construct(case: Case) -> None:
    row = run_case(case)
    assert row.good, row


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 80


@pytest.mark.parametrize("case", [case for case in CASES if "own generator" in case.name])
def test_problems_share_no_state(case: Case) -> None:
    drawn = [InnerLoop(case.problem(), case.settings()).batches.of_step(0)[0] for _ in range(2)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "case",
    [
        PLAIN,
        Case("nesterov", optimizer="nesterov"),
        Case("adam", optimizer="adam", values=ADAM, clip_gradient=0.05),
        Case("dropout", inside(nn.Dropout)),
        Case("no decay", values={"lr": (0.1,)}, fixed={"momentum": 0.9}),
    ],
    ids=lambda case: case.name,
)
def test_reference_is_what_the_engine_trains(case: Case) -> None:
    reference, found = Reference(case), differentiated(case, "forward")
    assert reference.loss == pytest.approx(found.val_loss, rel=1e-12)
    assert trained_loss(case, {**tensors(case), "lr": torch.zeros(1)}) > reference.loss
    assert reference.error(found.hypergradients) < 1e-7
    assert reference.spread() < 1e-5


def test_reference_keeps_frozen_modules_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    train_mode(model)()
    assert [module.training for module in model] == [True, False]
    model.eval()
    train_mode(model)()
    assert all(module.training for module in model.modules())


def test_a_case_that_shows_nothing_is_an_error() -> None:
    def ignorant(output: torch.Tensor, target: torch.Tensor, *, a: float = 0.0) -> torch.Tensor:
        return output.square().mean()

    case = Case("ignorant", train_loss=ignorant, values={"lr": (0.1,), "a": (0.5,)})
    with pytest.raises(ValueError, match="ignorant: the validation loss does not depend on a"):
        run_case(case)


def test_a_good_row() -> None:
    row = run_case(PLAIN)
    assert (row.verdict, row.good, row.auto.mode) == ("exact", True, "reverse")


@pytest.mark.parametrize("factor", [1 + 3e-5, -1, torch.nan])
def test_wrong_hypergradients_are_seen(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    def off(*arguments: Any, **options: Any) -> HypergradientResult:
        found = hypergradient(*arguments, **options)
        found.hypergradients["weight_decay"] *= factor
        return found

    monkeypatch.setattr(construct_runs, "hypergradient", off)
    row = run_case(PLAIN)
    assert {row.forward.kind, row.reverse.kind, row.auto.kind} == {"wrong"} and row.forward.detail.startswith("off by")
    assert row.verdict == "wrong" and not row.good


def test_another_training_run_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        construct_runs, "hypergradient", lambda *args, seed=1, **options: hypergradient(*args, seed=seed, **options)
    )
    row = run_case(PLAIN)
    assert row.verdict == "wrong" and row.reverse.detail.startswith("another run: its validation loss is off by")


@pytest.mark.parametrize(
    ("error", "kind", "detail"),
    [(InputError("change it"), "refused", "change it"), (OSError("oh\nno"), "fails", "OSError: oh")],
)
def test_exceptions(monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str, detail: str) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(construct_runs, "hypergradient", fail)
    row = run_case(PLAIN)
    assert {(outcome.kind, outcome.detail) for outcome in (row.forward, row.reverse, row.auto)} == {(kind, detail)}


def test_a_check_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(construct_runs, "check_problem", lambda *args, **options: 1 / 0)
    assert run_case(PLAIN).verdict == "fails: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("forward", "reverse", "auto", "check", "verdict"),
    [
        (EXACT, EXACT, EXACT, EXACT, "exact"),
        (EXACT, REFUSED, EXACT, EXACT, "exact in forward only: no"),
        (REFUSED, EXACT, EXACT, EXACT, "exact in reverse only: no"),
        (REFUSED, REFUSED, REFUSED, REFUSED, "refused: no"),
        (WRONG, REFUSED, REFUSED, REFUSED, "refused by the check: no"),
        (FAILS, EXACT, EXACT, REFUSED, "refused by the check: no"),
        (EXACT, EXACT, EXACT, REFUSED, "false alarm: no"),
        (EXACT, WRONG, EXACT, EXACT, "wrong"),
        (EXACT, EXACT, WRONG, EXACT, "wrong"),
        (WRONG, FAILS, FAILS, EXACT, "wrong"),
        (FAILS, EXACT, EXACT, EXACT, "fails: OSError: oh"),
        (EXACT, EXACT, EXACT, FAILS, "fails: OSError: oh"),
        (REFUSED, FAILS, FAILS, EXACT, "fails: OSError: oh"),
    ],
)
def test_verdicts(forward: Outcome, reverse: Outcome, auto: Outcome, check: Outcome, verdict: str) -> None:
    row = Row("a", forward, reverse, auto, check)
    assert row.verdict == verdict
    assert row.good == verdict.startswith(("exact", "refused"))


@pytest.mark.parametrize(("row", "status"), [(Row("a | b", *[EXACT] * 4), 0), (Row("a | b", *[WRONG] * 4), 1)])
def test_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row: Row, status: int) -> None:
    monkeypatch.setattr(constructs, "run_case", lambda case: row)
    monkeypatch.setattr(
        sys, "argv", ["constructs.py", "--only", "batchnorm1d left", "--out", str(tmp_path / "page.md")]
    )
    with pytest.raises(SystemExit) as caught:
        constructs.main()
    assert int(caught.value.code or 0) == status
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Constructs") and f"1 constructs: 1 {row.verdict}." in page
    assert [line for line in page.splitlines() if line.startswith("| a ")] == [
        f"| a \\| b | {row.forward} | {row.reverse} | {row.auto} | {row.verdict} |"
    ]
