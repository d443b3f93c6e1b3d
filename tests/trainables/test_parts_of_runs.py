"""`InnerRun` as a part of a run: it differentiates by its share, in forward mode, and refuses what is no share."""

import math

import pytest
from tiny_problem import STEPS, tiny_problem

from tune_hypergrad import FDS, InnerRun, InputError

CONFIG = {"lr": {"0": 0.1, "1": 0.3}, "momentum": 0.5}
NUMBERS = ("hypergradient/lr/0", "hypergradient/momentum/0", "hypergradient/lr/1")
"""In the order in which they come into force."""


def run(config, **settings):
    trial, result = InnerRun.from_problem(tiny_problem(), steps=STEPS, **settings)(config=dict(config)), {"done": False}
    while not result["done"]:
        result = trial.train()
    return result


def refusal(function, *arguments, **keywords):
    with pytest.raises(InputError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("settings", [{}, {"horizon": 5, "val_examples": 10}, {"ensemble": 2}])
def test_parts_report_what_a_whole_run_does(settings):
    whole = run(CONFIG, differentiation="forward", **settings)
    parts = [run({**CONFIG, "part": [index, 2]}, **settings) for index in range(2)]
    for number, name in enumerate(NUMBERS):
        assert parts[number % 2][name] == pytest.approx(whole[name], rel=1e-12) != 0
        assert parts[1 - number % 2][name] == 0
    for part in parts:
        assert part["differentiation"] == "forward" and part["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-12)
        assert part["cost/steps"] == whole["cost/steps"] and part["cost/gradients"] < whole["cost/gradients"]


def test_a_rejected_part_has_no_hypergradients_and_a_plain_one_costs_a_training():
    rejected = run({**CONFIG, "part": [1, 2], "reject_above": 0.0})
    assert rejected["rejected"] and all(math.isnan(rejected[name]) for name in NUMBERS)
    plain = run({**CONFIG, "part": [1, 2], "reject_above": -math.inf})
    assert plain["cost/gradients"] < 2 * STEPS < rejected["cost/gradients"]


def test_a_part_continues_from_a_checkpoint_to_the_same_bits(tmp_path):
    trainable = InnerRun.from_problem(tiny_problem(), steps=STEPS, reports=3)
    trial = trainable(config={**CONFIG, "part": [1, 2]})
    trial.train()
    trial.save_checkpoint(str(tmp_path))
    ends = [trial.train(), trial.train()]
    other = trainable(config={**CONFIG, "part": [1, 2]})
    other.load_checkpoint(str(tmp_path))
    again = [other.train(), other.train()]
    assert again[-1]["done"] and all(again[-1][name] == ends[-1][name] for name in (*NUMBERS, "val_loss"))


@pytest.mark.parametrize("part", [2, "02", [0], [0, 1, 2], [2, 2], [-1, 2], [0.0, 2], [True, 2], [0, 0], {0: 2}])
def test_what_is_no_part_is_refused(part):
    message = refusal(InnerRun.from_problem, tiny_problem(), steps=STEPS, part=part)
    assert message.startswith(f"part is {part!r}: give (index, of)")


def test_a_part_without_a_number_or_of_reverse_mode_is_refused():
    made = InnerRun.from_problem(tiny_problem(), steps=STEPS)
    assert "part is [3, 4]: there are 3 numbers" in refusal(made, config={**CONFIG, "part": [3, 4]})
    reverse = InnerRun.from_problem(tiny_problem(), steps=STEPS, differentiation="reverse")
    assert "only forward mode can be divided" in refusal(reverse, config={**CONFIG, "part": [0, 2]})


def test_fds_makes_whole_runs():
    assert "part is (0, 2): FDS" in refusal(FDS.from_problem, tiny_problem(), steps=STEPS, space={}, part=(0, 2))
