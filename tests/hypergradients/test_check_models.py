"""`check_problem` on whole models: it finds nothing wrong with good ones, and names what is wrong with broken ones."""

from __future__ import annotations

import pytest
import torch
from check_cases import BROKEN, GOOD, Broken, Good
from check_models import document, run_broken, run_good, trouble_of_broken, trouble_of_good

from tune_hypergrad.hypergradients.check import ProblemCheck

FAST = ("MLP-Mixer", "LayerDrop", "loss with parameters")
SEEDS = range(2)


def required(case: Good) -> Good:
    """The case, where the library is there that its model comes from."""
    if case.requires:
        pytest.importorskip(case.requires)
    return case


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_good_models(case: Good) -> None:
    assert not run_good(required(case), SEEDS).troubles


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_broken_problems(case: Broken) -> None:
    assert not run_broken(case, SEEDS).troubles


@pytest.mark.parametrize("name", FAST)
def test_some_good_models(name: str) -> None:
    (case,) = [case for case in GOOD if case.name == name]
    row = run_good(case, [0])
    assert not row.troubles and row.right == len(row.checks) == 2 and row.error < 1e-4
    assert f"| {name} | {case.optimizer} | 2 of 2 |" in document([row], [])


def test_what_counts_as_trouble() -> None:
    good, broken = GOOD[0], BROKEN[0]
    right = ProblemCheck(True, "agree", {"forward": 1e-9, "reverse": 1e-9})
    alarm = ProblemCheck(False, "something is off", {}, {"forward": "off", "reverse": "off"})
    assert trouble_of_good(good, right) == ""
    assert trouble_of_good(good, alarm).startswith("false alarm")
    assert trouble_of_good(good, ProblemCheck(True, "diverges")).startswith("not compared")
    assert trouble_of_broken(broken, right).startswith("missed in forward and reverse mode")
    assert trouble_of_broken(broken, alarm).startswith("culprit not named")
