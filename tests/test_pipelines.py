"""A dozen kinds of training, each written the way its users write it: right hypergradients, and trials."""

import inspect

import pytest
import torch
from pipelines import KINDS

from tune_hypergrad import InnerRun, check_problem

WITHOUT_FORWARD_MODE = {"packed_sequences": "_pack_padded_sequence"}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def test_hypergradients_are_right(kind):
    problem = kind()
    problem.check()
    found = check_problem(problem)
    assert found.ok, found.message
    missing = WITHOUT_FORWARD_MODE.get(kind.__name__)
    assert set(found.errors) == ({"reverse"} if missing else {"forward", "reverse"})
    assert max(found.errors.values()) < 1e-4
    assert not missing or missing in found.refusals["forward"]


def test_a_trial_learns(kind):
    problem = kind()
    optimizer, lr = ("sgd", 0.05)
    config = {"lr": {"0": lr, "1": lr / 2}, "reject_above": float("inf")}
    trial = InnerRun.from_problem(problem, steps=6, optimizer=optimizer, check=False)(config=config)
    result = trial.train()
    while not result["done"]:
        result = trial.train()
    values = [value for name, value in result.items() if name.startswith("hypergradient/lr")]
    assert len(values) == 2 and all(torch.isfinite(torch.tensor(values)))
    assert torch.isfinite(torch.tensor(result["val_loss"])) and result["run/step"] == 6


def test_each_is_written_in_thirty_lines():
    assert all(len(inspect.getsource(kind).splitlines()) <= 30 for kind in KINDS)
