"""Results: what is written of them is what is read, and only there."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tune_hypergrad
from tune_hypergrad import Schedule
from tune_hypergrad.results import (
    Confirmation,
    Position,
    hypergradient_results,
    hypergradients_in,
    schedule_identity,
    without_long_hypergradients,
    without_schedules_of,
)

KINDS = ("run", "cost", "hypergradient", "schedule", "best_schedule")
NAMES = st.sampled_from(["lr", "lr/backbone", "lr/cosine/peak", "momentum", "dropout"])
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)
COUNTS = st.integers(0, 10**6)


@given(st.builds(Position, COUNTS, COUNTS, COUNTS) | st.builds(Position, COUNTS, COUNTS))
def test_a_position_is_read_as_it_was_written(position):
    assert repr(Position.from_result(position.as_result())) == repr(Position(*map(float, position)))


@pytest.mark.parametrize("said", [{}, {"run/step": None, "run/steps": "many"}])
def test_of_a_result_that_does_not_say_any_moment_may_be_the_end(said):
    position = Position.from_result(said)
    assert position.is_trained and position.is_end and not position.is_known


def test_untrained_weights_are_no_end():
    assert not Position(0, 5).is_trained and not Position(4, 5).is_end and Position(5, 5).is_end


@given(st.builds(Confirmation, st.integers(0, 9), st.booleans()))
def test_a_confirmation_is_read_as_it_was_written(confirmation):
    assert Confirmation.from_result(confirmation.as_result()) == confirmation
    assert Confirmation.from_result({}) == Confirmation()


@given(st.dictionaries(NAMES, st.lists(NUMBERS, min_size=1, max_size=60)))
def test_hypergradients_are_read_as_they_were_written(values):
    tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}
    result = {**hypergradient_results(tensors), "val_loss": 1.0}
    read = hypergradients_in(result, {name: len(v) for name, v in values.items()})
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in read)
    short = without_long_hypergradients(result, 50)
    kept = {key.removeprefix("hypergradient/").rpartition("/")[0] for key in short if key.startswith("hypergradient/")}
    assert kept == {name for name, v in values.items() if len(v) <= 50} and short["val_loss"] == 1.0
    assert {key for key in result if "_norm" in key} <= short.keys()


def test_a_missing_hypergradient_is_named():
    result = hypergradient_results({"lr": torch.ones(2)})
    with pytest.raises(KeyError, match="hypergradient/lr/2"):
        hypergradients_in(result, {"lr": 3})


def test_a_schedules_windows_are_left_out_by_name():
    found = Schedule({"lr": (1.0, 2.0), "momentum": (0.5,), "lr/backbone": (3.0, 4.0)})
    result = {**found.to_scalars(), **found.to_scalars("best_schedule"), "schedule_file": "a", "val_loss": 1.0}
    kept = without_schedules_of(result, ["lr", "momentum"])  # of momentum there is its present value
    assert set(result) - set(kept) == {f"{kind}/lr/{i}" for kind in ("schedule", "best_schedule") for i in (0, 1)}


def test_what_tells_schedules_apart():
    def identity(**values):
        return schedule_identity({**Schedule(values).to_scalars(), "val_loss": 0.5, "cost/gradients": 3.0})

    assert identity(lr=(0.1, 0.2)) == identity(lr=(0.1 * (1 + 1e-14), 0.2)) != identity(lr=(0.2, 0.1))
    assert identity(lr=(0.1, 0.1)) == identity(lr=0.1) != identity(lr=0.1, momentum=0.9)
    assert identity(lr=(0.1, 0.1), momentum=0.2) != identity(lr=(0.2, 0.2), momentum=0.1)
    of_file = schedule_identity({"schedule_file": "a.json"})
    assert of_file == schedule_identity({"schedule_file": "a.json", "schedule/lr": math.nan}) and of_file
    assert of_file != schedule_identity({"schedule_file": "b.json"}) and not schedule_identity({"schedule_file": None})


def test_no_other_module_knows_what_entries_are_called():
    package = Path(tune_hypergrad.__file__).parent
    for file in package.rglob("*.py"):
        if file.name in ("results.py", "budget.py") and file.parent == package:
            continue
        tree = ast.parse(file.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs]
        known = [
            t.value for t in texts if isinstance(t.value, str) and t.value.partition("/")[0] in KINDS and "/" in t.value
        ]
        assert not known, f"{file} has {known}"


def test_names_of_ones_own_entries_are_left_alone():
    assert schedule_identity({"top/²": 1.0, "schedule/lr/²": 0.1}) == schedule_identity({"schedule/lr/²": 0.1})


def test_whatever_says_true_speaks_against_a_schedule():
    for said in (True, 1, np.True_):
        assert Confirmation.from_result({"run/fallen": said}).has_fallen
    for said in (False, 0, None, math.nan):
        assert not Confirmation.from_result({"run/fallen": said}).has_fallen
