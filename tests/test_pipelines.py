"""A dozen kinds of training, each written the way its users write it: right hypergradients, trials, comparisons."""

import inspect
import sys
from importlib import import_module

import pipelines
import pytest
import torch
from pipelines import KINDS
from ray import tune
from torch.utils.data import DataLoader, TensorDataset

from tune_hypergrad import DeltaSTN, InnerRun, InputError, Problem, check_problem, compare, hypergradient, schedule
from tune_hypergrad.comparison import Retraining
from tune_hypergrad.regularisers import WeightDecay

WITHOUT_FORWARD_MODE = {"packed_sequences": "_pack_padded_sequence"}
WITHOUT_DELTA_STN = {
    "bert": "gives a loss itself",
    "gpt2": "DynamicCache",
    "nano_gpt": "gives a loss itself",
    "packed_sequences": "_pack_padded_sequence",
    "from_transformers": "weight_decay/no_decay",
}
"""Kinds of which no self-tuning network can be made, and what the refusal says."""
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:TF32 acceleration")


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


def test_a_trial_gives_what_the_engine_gives(kind):
    problem = kind()
    lr = torch.tensor([0.05, 0.025])
    expected = hypergradient(problem, {"lr": lr}, steps=4, check=False)
    config = {"lr": {"0": 0.05, "1": 0.025}}
    trial = InnerRun.from_problem(problem, steps=4, check=False)(config=config)
    result = trial.train()
    while not result["done"]:
        result = trial.train()
    assert result["val_loss"] == pytest.approx(expected.val_loss, rel=1e-5)
    assert all(f"val_{name}" in result for name in problem.metrics)
    for window, derivative in enumerate(expected.hypergradients["lr"].tolist()):
        assert derivative != 0
        assert result[f"hypergradient/lr/{window}"] == pytest.approx(derivative, rel=1e-3)


def test_a_self_tuning_network_is_made_or_refused_in_one_line(kind):
    problem = kind().replace(regularisers=[WeightDecay("l2")])
    settings = {"space": {"l2": tune.loguniform(1e-5, 1e-1)}, "steps": 60, "warm_up": 1}
    words = WITHOUT_DELTA_STN.get(kind.__name__)
    if words is None:
        DeltaSTN.from_problem(problem, **settings)
        return
    with pytest.raises(InputError, match=words) as caught:
        DeltaSTN.from_problem(problem, **settings)
    assert "\n" not in str(caught.value)


def test_each_is_written_in_thirty_lines():
    assert all(len(inspect.getsource(kind).splitlines()) <= 30 for kind in KINDS)


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch):
    for library, take in [
        ("transformers", lambda: Problem.from_transformers(pipelines.tiny_bert, None, None, None)),
        ("lightning", lambda: Problem.from_lightning(pipelines.VAE, None, trainer=None)),
    ]:
        monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.delitem(sys.modules, f"tune_hypergrad.bridges.{library}", raising=False)
        message = rf"{library} cannot be imported .*: pip install 'tune_hypergrad\[{library}\]'$"
        with pytest.raises(InputError, match=message):
            take()
        with pytest.raises(ImportError, match=message):
            import_module(f"tune_hypergrad.bridges.{library}")


def test_a_tensor_data_set_may_have_a_collate_function():
    x = torch.randn(8, 3)
    loader = DataLoader(
        TensorDataset(x), batch_size=4, collate_fn=lambda items: {"x": torch.stack([i for (i,) in items])}
    )
    problem = Problem(torch.nn.Identity, train=loader, val=loader)
    assert torch.equal(problem.val.batch(slice(2, 5))["x"], x[2:5])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "recommender"])
def test_they_are_compared_by_gradients_and_by_black_boxes(name, ray_session, tmp_path):
    left_out = ["delta-stn"] if name in WITHOUT_DELTA_STN else []
    methods = [method for method in ("fds", "delta-stn", "bohb") if method not in left_out]
    comparison = compare(
        getattr(pipelines, name)().replace(regularisers=[WeightDecay("l2")]),
        ["fds", "delta-stn", "bohb"],
        budget="24e",
        epochs=3,
        space={"lr": schedule(tune.loguniform(1e-3, 1), 2), "l2": tune.loguniform(1e-5, 1e-1)},
        out=tmp_path / "out",
        retraining=Retraining(seeds=1),
        progress="quiet",
        max_failures=0,
    )
    assert comparison.methods == methods and list(comparison.left_out) == left_out
    assert all(WITHOUT_DELTA_STN[name] in reason for reason in comparison.left_out.values())
    assert set(comparison.results["method"]) == set(methods)
    for method in methods:
        own = comparison.results[comparison.results["method"] == method]
        assert own["val_loss"].dropna().map(float).min() < float("inf")
        assert comparison.schedule(method).values
