"""STN, centred STN and Delta-STN on problems whose best response and best hyperparameter are known in closed form.

Where a method ends is its mean over the last quarter of the run: the perturbations keep moving it. What is compared is
the hyperparameter itself (L2, the noise's deviation), not its logarithm: 2 per cent then mean the same in all units.
On one problem, all methods have the same settings and seeds.
"""

import functools
import math

import pytest
from closed_form import LinearNetwork, Ridge, jacobian_error, product, unconstrained_path

NEAR, FAR = "near", "far"
STARTS = {"ridge": {FAR: (-3.0, 0), NEAR: (1.2, 1)}, "noise": {NEAR: (-1.0, 1), FAR: (2.0, 1)}}
"""Where and with which seed runs begin, on the unconstrained scale (log L2 for ridge regression)."""

STEPS = {"ridge": 2400, "noise": 3000}


@functools.cache
def problem(name):
    return Ridge() if name == "ridge" else LinearNetwork(name)


@functools.cache
def run(name, variant, which):
    """A run, and where it was at each of its steps."""
    done = problem(name).run(variant, STARTS[name][which][0], STEPS[name], STARTS[name][which][1])
    return done, unconstrained_path(done)


def error(name, path):
    """Of the hyperparameter where a run ends, relative to the best."""
    found = float(path[-len(path) // 4 :].mean())
    value = math.exp if name == "ridge" else problem(name).value
    return abs(value(found) / value(problem(name).optimum) - 1)


def steps_needed(name, path):
    """Steps after which a run stays within 5 per cent of the way that it had to go."""
    away = (path - problem(name).optimum).abs() > 0.05 * abs(path[0] - problem(name).optimum)
    return int(away.nonzero()[-1]) + 1


def overshoot(name, path):
    """The farthest that a run goes beyond the optimum, as a share of the way that it had to go."""
    way = problem(name).optimum - float(path[0])
    return max(0.0, float(((path - problem(name).optimum) / way).max()))


@pytest.mark.parametrize(("name", "value"), [("noise", 0.5), ("noise", 1.5), ("dropout", 0.3)])
def test_best_response_of_the_linear_network_is_what_training_finds(name, value):
    network = LinearNetwork(name)
    loop = network.loop(800, **{"lr": 0.005, name: value})
    with loop.running():
        found = product(loop.unflatten(loop.run({}).params))
    expected = network.best_response(network.definition.unconstrained(value))
    assert (found - expected).norm() < 0.04 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("which", [NEAR, FAR])
def test_delta_stn_finds_the_bilevel_optimum_and_the_response(name, which):
    network, path = run(name, "delta-stn", which)
    assert error(name, path) < 0.02
    assert jacobian_error(problem(name), network) < 0.05
    if which == FAR:  # near the optimum, the way is no longer than what perturbations move it by
        assert overshoot(name, path) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("variant", ["stn", "centered-stn"])
def test_the_other_methods_find_the_bilevel_optimum(name, variant):
    assert error(name, run(name, variant, NEAR)[1]) < 0.02


@pytest.mark.slow
def test_delta_stn_needs_fewer_steps_than_stn():
    """On ridge regression, from a start far from the origin of the unconstrained scale, which STN depends on.

    The linear network's optimum lies near that origin, where STN is almost centred, and as fast.
    """
    _, stn = run("ridge", "stn", FAR)
    _, delta = run("ridge", "delta-stn", FAR)
    assert steps_needed("ridge", delta) < 0.75 * steps_needed("ridge", stn)
    assert error("ridge", delta) < 0.25 * error("ridge", stn)


@pytest.mark.slow
def test_stn_overshoots_where_delta_stn_does_not_since_its_path_depends_on_the_unit():
    """Ridge regression from log L2 = 1.2, with L2 measured in units of 1 and of exp(-4)."""
    far = {}
    for variant in ("stn", "delta-stn"):
        by_unit = {unit: Ridge(unit) for unit in (0.0, -4.0)}
        paths = [ridge.path(ridge.run(variant, 1.2, STEPS["ridge"])) for ridge in by_unit.values()]
        far[variant] = overshoot("ridge", paths[1])
        if variant == "delta-stn":
            assert (paths[0] - paths[1]).abs().max() < 1e-6
    assert far["delta-stn"] < 0.05
    assert far["stn"] > 0.2
