"""The search space as gradient methods read it."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune
from ray.tune.search.sample import Float

from tune_hypergrad.errors import InputError
from tune_hypergrad.space import Range, flat_values, gradient_ranges, is_hyperparameter, schedule

finite = st.floats(allow_nan=False, allow_infinity=False)


def refusal(function, *arguments, **keywords):
    with pytest.raises(InputError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_import_leaves_ray_alone():
    code = "import sys; from tune_hypergrad.schedules import Schedule; from tune_hypergrad.space import Range; "
    code += "Schedule.from_config({'lr': 1.0, 'optimizer': 'sgd'}); Range(1, 0, 1); "
    code += "print([name for name in ('ray', 'pandas', 'matplotlib') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_schedule_is_a_plain_dict_of_domains():
    domain = tune.uniform(0, 1)
    windows = schedule(domain, windows=3)
    assert type(windows) is dict
    assert windows == {"0": domain, "1": domain, "2": domain}
    assert schedule(0.5, windows=2) == {"0": 0.5, "1": 0.5}


@pytest.mark.parametrize("windows", [0, -1, 1.5, True, "2"])
def test_schedule_refuses_window_counts(windows):
    assert repr(windows) in refusal(schedule, tune.uniform(0, 1), windows)


@pytest.mark.parametrize("domain", ["adam", None, True, {"grid_search": [1]}, [0.1, 0.2]])
def test_schedule_refuses_what_is_no_domain(domain):
    assert repr(domain) in refusal(schedule, domain, 2)


@settings(deadline=None)
@given(st.lists(finite, min_size=1, max_size=12), st.randoms())
def test_windows_are_read_from_dicts_in_any_order_and_lists(values, shuffler):
    entries = [(str(i), value) for i, value in enumerate(values)]
    shuffler.shuffle(entries)
    for given_as in (dict(entries), values, tuple(values)):
        assert flat_values({"lr": given_as}) == {"lr": tuple(values)}


def test_values_are_pythons_floats():
    for value in (1, 1.0, np.float32(1), np.float64(1), np.int64(1)):
        assert flat_values({"lr": value}) == flat_values({"lr": [value]}) == {"lr": (1.0,)}
        assert type(flat_values({"lr": value})["lr"][0]) is float


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.bool_(True),
        "adam",
        None,
        [],
        {},
        [True],
        [[1.0]],
        {"0": 1.0, "2": 1.0},
        {0: 1.0},
        {"lr": 1.0},
        {"0": "a"},
    ],
)
def test_what_is_no_hyperparameter_is_refused(value):
    assert not is_hyperparameter(value)
    assert f"'lr': {value!r}" in refusal(flat_values, {"lr": value})


def test_a_number_in_two_places_is_refused():
    config = {"lr": {"cosine": {"peak": 0.1}}, "lr/cosine/peak": 0.2}
    assert "'lr/cosine/peak' is given twice" in refusal(flat_values, config)


def test_gradient_ranges():
    ranges, constants = gradient_ranges(
        {
            "lr": schedule(tune.loguniform(1e-4, 1), windows=7),
            "momentum": tune.uniform(0, 0.99),
            "bias": tune.randn(1, 2),
            "bare": Float(0, 2),
            "epochs": 10,
            "optimizer": "sgd",
            "weight_decay": {"0": 0.1, "1": 0.2},
            "layers": [1, 2],
        }
    )
    assert ranges == {
        "lr": Range(7, 1e-4, 1.0, scale="log"),
        "momentum": Range(1, 0.0, 0.99),
        "bias": Range(1, -math.inf, math.inf),
        "bare": Range(1, 0.0, 2.0),
    }
    assert constants == {"epochs": 10, "optimizer": "sgd", "weight_decay": {"0": 0.1, "1": 0.2}, "layers": [1, 2]}


@pytest.mark.parametrize(
    ("domain", "kind"),
    [
        (tune.randint(0, 5), "integer"),
        (tune.lograndint(1, 5), "integer"),
        (tune.qrandint(0, 10, 5), "integer"),
        (tune.quniform(0, 1, 0.1), "quantised"),
        (tune.qloguniform(0.1, 1, 0.1), "quantised"),
        (tune.qrandn(0, 1, 0.1), "quantised"),
        (tune.choice([1, 2]), "choice"),
        (tune.grid_search([1, 2]), "grid"),
        (tune.sample_from(lambda: 1), "sample_from"),
    ],
)
def test_what_has_no_derivative_is_refused_with_reason_and_remedy(domain, kind):
    others = {"lr": tune.uniform(0, 1)}
    for value in (domain, {"0": domain, "1": domain}):
        message = refusal(gradient_ranges, {**others, "width": value})
        assert "'width'" in message and kind in message and "derivative" in message and "'lr'" not in message
        assert "constant" in message and "tune.uniform" in message and "black-box" in message


def test_all_that_has_no_derivative_is_named_at_once():
    message = refusal(gradient_ranges, {"width": tune.randint(0, 5), "opt": tune.choice(["a"])})
    assert "'width' (an integer domain)" in message and "'opt' (a choice)" in message


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"0": tune.uniform(0, 1), "1": tune.uniform(0, 2)}, "different domains"),
        ({"0": tune.uniform(0, 1), "1": 0.5}, "different domains"),
        ({"0": tune.uniform(0.1, 1), "1": tune.loguniform(0.1, 1)}, "different domains"),
        ({"inner": tune.uniform(0, 1)}, "nested"),
        ({"inner": {"list": [tune.uniform(0, 1)]}}, "nested"),
        ({"0": {"0": tune.uniform(0, 1)}}, "nested"),
        ({"inner": tune.grid_search([1, 2])}, "nested"),
        ([tune.uniform(0, 1)], "schedule(domain, windows=1)"),
        (tune.uniform(1, 1), "leaves no room"),
        (tune.uniform(2, 1), "leaves no room"),
    ],
)
def test_spaces_that_gradient_methods_cannot_read(value, words):
    message = refusal(gradient_ranges, {"momentum": tune.uniform(0, 1), "lr": value})
    assert "'lr'" in message and words in message


@pytest.mark.parametrize("space", [{}, {"lr": 0.1}, {"lr": schedule(0.1, 2)}])
def test_nothing_to_tune(space):
    assert "nothing to tune" in refusal(gradient_ranges, space)


@pytest.mark.parametrize(
    "arguments", [(0, 0, 1), (1, 1, 0), (1, math.nan, 1), (1, 0, 1, "log"), (1, 0, 1, "complement"), (True, 0, 1)]
)
def test_range_refuses(arguments):
    refusal(Range, *arguments)


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5))
def test_range_scales(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    linear, log = Range(len(values), 1e-3, 10), Range(len(values), 1e-3, 10, scale="log")
    assert torch.equal(linear.to_internal(tensor), tensor) and torch.equal(linear.from_internal(tensor), tensor)
    torch.testing.assert_close(log.to_internal(tensor), torch.log(tensor))
    torch.testing.assert_close(log.from_internal(log.to_internal(tensor)), tensor)
    projected = linear.project(tensor)
    assert torch.equal(projected, torch.tensor([min(max(v, 1e-3), 10) for v in values], dtype=torch.float64))


def test_complement_scale_is_that_of_one_minus_the_value():
    momentum = Range(1, 0.0, 0.99, scale="complement")
    values = torch.tensor([0.0, 0.5, 0.9, 0.99], dtype=torch.float64)
    internal = momentum.to_internal(values)
    torch.testing.assert_close(internal, torch.log(1 / (1 - values)))
    torch.testing.assert_close(momentum.from_internal(internal), values)
    assert momentum.internal_width == pytest.approx(math.log(100))
    assert momentum.middle == pytest.approx(0.9)


@pytest.mark.parametrize("scale", ["linear", "log", "complement"])
def test_slope_is_the_derivative_by_what_is_tuned(scale):
    limits = Range(3, 0.01, 0.99, scale=scale)
    internal = limits.to_internal(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).requires_grad_()
    values = limits.from_internal(internal)
    (derivative,) = torch.autograd.grad(values.sum(), internal)
    torch.testing.assert_close(limits.slope(values.detach()), derivative)
    assert limits.to_internal(torch.tensor(limits.middle)) == pytest.approx(
        float(limits.to_internal(torch.tensor([0.01, 0.99], dtype=torch.float64)).mean()), rel=1e-5
    )


def test_internal_width():
    assert Range(1, -1, 2).internal_width == 3
    assert Range(1, 1e-4, 1, scale="log").internal_width == pytest.approx(4 * math.log(10))
    assert Range(1, -math.inf, math.inf).internal_width == math.inf
