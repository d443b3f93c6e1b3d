"""Hypergradients of schedules that a person would draw: both modes against a plain torch.optim loop's differences, and
the same numbers from the space to the replay."""

import copy
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from engine_problems import MODES, assert_close, differentiate, double, make_loop, make_problem

from tune_hypergrad import InputError, Schedule, check_problem, hypergradient
from tune_hypergrad.hypergradients import EnsembleLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.hypergradients.check import finite_differences
from tune_hypergrad.regularisers import WeightDecay
from tune_hypergrad.space import flat_values

STEPS = 7
CURVES = {
    "knots": {"lr": {"knots": {"0": 0.05, "1": 0.3, "2": 0.2, "3": 0.02}}},
    "cosine": {"lr": {"cosine": {"peak": 0.3, "warm_up": 0.25, "floor": 0.1}}},
    "linear": {"lr": {"linear": {"peak": 0.3, "warm_up": 0.3, "floor": 0.2}}},
    "wsd": {"lr": {"wsd": {"peak": 0.3, "warm_up": 0.2, "decay": 0.45, "floor": 0.1}}},
    "complement": {"momentum": {"one_minus": {"0": 0.3, "1": 0.1}}, "lr": 0.2},
    "complement of knots": {"momentum": {"one_minus": {"knots": {"0": 0.3, "1": 0.1, "2": 0.5}}}, "lr": 0.2},
    "complement of a cosine": {
        "momentum": {"one_minus": {"cosine": {"peak": 0.6, "warm_up": 0.3, "floor": 0.2}}},
        "lr": 0.2,
    },
    "all at once": {
        "lr": {"cosine": {"peak": 0.3, "warm_up": 0.25, "floor": 0.1}},
        "momentum": {"one_minus": {"knots": {"0": 0.3, "1": 0.1, "2": 0.5}}},
        "weight_decay": {"0": 0.01, "1": 0.05},
    },
}


def full_batch():
    problem = make_problem(batch_size=12)
    assert len(problem.train) == 12
    return problem


def plain_loss(problem, loop, numbers, steps=STEPS):
    """A torch.optim loop, driven by the scheduler that people replay schedules with."""
    schedule = Schedule.from_tensors(numbers)
    (x, y), (x_val, y_val) = problem.train.tensors, problem.val.tensors
    model = copy.deepcopy(loop.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.0 if "momentum" not in str(schedule) else 0.5)
    scheduler = schedule.scheduler(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    return float(F.cross_entropy(model(x_val), y_val).detach())


def differences(loss, numbers, size=1e-6):
    found = {}
    for name, values in numbers.items():
        found[name] = torch.zeros_like(values)
        for element in range(len(values)):
            losses = []
            for sign in (1, -1):
                moved = values.clone()
                moved[element] += sign * size
                losses.append(loss({**numbers, name: moved}))
            found[name][element] = (losses[0] - losses[1]) / (2 * size)
    return found


@pytest.mark.parametrize("case", CURVES)
def test_hypergradients_are_the_differences_of_a_plain_loop_replaying_the_schedule(case):
    problem = full_batch()
    loop = make_loop(problem, STEPS)
    numbers = Schedule(CURVES[case]).to_tensors()
    expected = differences(lambda moved: plain_loss(problem, loop, moved), numbers)
    found = {mode: differentiate(loop, numbers, mode) for mode in MODES}
    for result in found.values():
        assert result.val_loss == pytest.approx(plain_loss(problem, loop, numbers), rel=1e-12)
        assert_close(result.hypergradients, expected, 1e-5)
    for mode in MODES[1:]:
        assert_close(found[mode].hypergradients, found["forward"].hypergradients, 1e-11)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("case", ["knots", "wsd", "all at once"])
def test_an_ensembles_hypergradients_are_the_mean_differences_of_plain_loops(case, at_once):
    problem = full_batch()
    loop = EnsembleLoop(problem, TrainingSettings(STEPS), (0, 1, 2))
    numbers = Schedule(CURVES[case]).to_tensors()
    run = hypergradient_run(loop, numbers, differentiation="reverse", together=at_once)
    with loop.running():
        run.advance(run.length)
    for number, (member, result) in enumerate(zip(loop.members, run.result().members, strict=True)):
        expected = differences(lambda moved, member=member: plain_loss(problem, member, moved), numbers)
        assert_close(result.hypergradients, expected, 1e-5)
        for name, curve in run.curves.items():
            own = {
                f"{name}/{suffix}": run.by_step[name][number] @ rows for suffix, rows in curve.jacobian(STEPS).items()
            }
            assert_close({flat: result.hypergradients[flat] for flat in own}, own, 1e-12)
    expected = differences(lambda moved: fmean(plain_loss(problem, member, moved) for member in loop.members), numbers)
    assert_close(run.hypergradients, expected, 1e-5)


def smoothed(output, target, *, smoothing=0.0):
    log_probabilities = output.log_softmax(1)
    return (1 - smoothing) * F.nll_loss(log_probabilities, target) - smoothing * log_probabilities.mean()


@pytest.mark.parametrize("mode", MODES)
def test_curves_of_the_train_losss_hyperparameters(mode):
    config = {"smoothing": {"linear": {"peak": 0.3, "warm_up": 0.4, "floor": 0.1}}, **CURVES["knots"]}
    loop, numbers = make_loop(make_problem(train_loss=smoothed), STEPS), Schedule(config).to_tensors()
    assert_close(differentiate(loop, numbers, mode).hypergradients, finite_differences(loop, numbers), 1e-5)


def test_a_curve_must_keep_within_what_a_regulariser_takes():
    problem = make_problem("dropout", regularisers=[WeightDecay()])
    ((name, strength),) = problem.regulariser_hyperparameters.items()
    assert strength.lower == 0
    values = {f"{name}/knots": double(0.1, -0.1)}
    with pytest.raises(InputError, match=f"'{name}' is -"):
        hypergradient(problem, values, steps=STEPS)
    with pytest.raises(InputError, match=f"'{name}' is -"):
        hypergradient(problem, {"lr": double(0.1)}, fixed={name: {"knots": [0.1, -0.1]}}, steps=STEPS)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "nesterov", "rmsprop"])
@pytest.mark.parametrize("horizon", [None, 1, 3])
def test_modes_agree_with_other_optimizers_and_horizons(optimizer, horizon):
    fixed = {"eps": 1e-3} if optimizer in ("adam", "adamw", "rmsprop") else {"momentum": 0.5}
    loop = make_loop(steps=STEPS, optimizer=optimizer, fixed=fixed)
    numbers = Schedule({**CURVES["wsd"], "weight_decay": {"knots": {"0": 0.1, "1": 0.01, "2": 0.02}}}).to_tensors()
    forward, reverse, checkpointed = (differentiate(loop, numbers, mode, horizon=horizon) for mode in MODES)
    assert_close(reverse.hypergradients, forward.hypergradients, 1e-10)
    assert_close(checkpointed.hypergradients, forward.hypergradients, 1e-10)


def test_a_curves_hypergradient_is_its_steps_own_by_the_jacobian():
    """Every step a window of its own gives each step's derivative; a curve's is the sum by the chain rule."""
    loop, config = make_loop(steps=STEPS), {**CURVES["cosine"], "weight_decay": 0.02}
    schedule = Schedule(config)
    curve = schedule.values["lr"]
    windows = {"lr": torch.tensor(curve.at_steps(STEPS), dtype=torch.float64), "weight_decay": double(0.02)}
    per_step = differentiate(loop, windows, "reverse").hypergradients["lr"]
    run = hypergradient_run(loop, schedule.to_tensors(), differentiation="reverse")
    with loop.running():
        run.advance(run.length)
    assert torch.equal(run.by_step["lr"], per_step)
    assert float(run.by_step["weight_decay"].sum()) == pytest.approx(float(run.hypergradients["weight_decay"]))
    expected = {f"lr/{suffix}": rows.T @ per_step for suffix, rows in curve.jacobian(STEPS).items()}
    assert_close({name: run.hypergradients[name] for name in expected}, expected, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_in_pieces_gives_the_same(mode):
    numbers = Schedule(CURVES["all at once"]).to_tensors()
    undivided = hypergradient_run(make_loop(steps=STEPS), numbers, differentiation=mode)
    with undivided.loop.running():
        undivided.advance(undivided.length)
    loop = make_loop(steps=STEPS)
    run = hypergradient_run(loop, numbers, differentiation=mode)
    with loop.running():
        while not run.done:
            run.advance(2)
            saved, run = run.state_dict(), hypergradient_run(loop, numbers, differentiation=mode)
            run.load_state_dict(saved)
    assert all(torch.equal(run.hypergradients[name], values) for name, values in undivided.hypergradients.items())
    if mode != "forward":
        assert all(torch.equal(run.by_step[name], values) for name, values in undivided.by_step.items())
        assert bool((run.by_step["lr"] != 0).all())


def test_columns_are_carried_from_the_first_step_that_a_number_acts_in():
    config = {
        "lr": {"knots": {"0": 0.1, "1": 0.2, "2": 0.3}},
        "momentum": {"wsd": {"peak": 0.5, "warm_up": 0.0, "decay": 0.25, "floor": 0.1}},
        "weight_decay": {"0": 0.1, "1": 0.2},
    }
    run = hypergradient_run(make_loop(steps=8), Schedule(config).to_tensors(), differentiation="forward")
    opened = dict(zip(run.columns, run._openings, strict=True))
    assert opened == {
        **{("lr/knots", 0): 0, ("lr/knots", 1): 0, ("lr/knots", 2): 4},
        **{("weight_decay", 0): 0, ("weight_decay", 1): 4},
        **{("momentum/wsd/peak", 0): 0, ("momentum/wsd/decay", 0): 6, ("momentum/wsd/floor", 0): 6},
        ("momentum/wsd/warm_up", 0): 8,  # no step is within it
    }
    assert (
        float(differentiate(make_loop(steps=8), Schedule(config).to_tensors()).hypergradients["momentum/wsd/warm_up"])
        == 0
    )


@pytest.mark.parametrize("case", ["knots", "all at once"])
def test_check_problem_takes_curves(case):
    checked = check_problem(make_problem(), Schedule(CURVES[case]).to_tensors(), steps=STEPS, fixed={"dampening": 0.1})
    assert checked.ok and set(checked.errors) == {"forward", "reverse"}, checked.message
    assert max(checked.errors.values()) < 1e-4


def test_a_step_of_a_run_on_no_device_computes_curves_on_the_cpu():
    """Where to train is not where curves are computed: a GPU's stand-in has no values at all."""
    loop = make_loop(steps=STEPS)
    loop.values.device, numbers = torch.device("meta"), Schedule(CURVES["all at once"]).to_tensors()
    placed = {name: loop.values.placed(name, values) for name, values in numbers.items()}
    assert {name: values.device.type for name, values in placed.items()} == {
        **{name: "cpu" for name in placed},
        "weight_decay": "meta",
    }
    scalars = loop.scalars(placed, 3)
    assert list(scalars) == ["lr", "momentum", "weight_decay"]
    assert {value.device.type for value in scalars.values()} == {"meta"}


def test_what_is_fixed_of_a_curve_is_not_differentiated():
    settings = {"steps": STEPS, "seed": 1, "check": False, "differentiation": "reverse"}
    part = hypergradient(
        make_problem(),
        {"lr/cosine/peak": double(0.3)},
        fixed={"lr/cosine/warm_up": 0.25, "lr": {"cosine": {"floor": 0.1}}},
        **settings,
    )
    nested = {"lr": {"cosine": {name: double(v) for name, v in CURVES["cosine"]["lr"]["cosine"].items()}}}
    whole = hypergradient(make_problem(), nested, **settings)
    assert part.val_loss == whole.val_loss
    assert list(part.hypergradients) == ["lr/cosine/peak"]
    assert set(whole.hypergradients["lr"]["cosine"]) == {"peak", "warm_up", "floor"}
    assert torch.equal(part.hypergradients["lr/cosine/peak"], whole.hypergradients["lr"]["cosine"]["peak"])


def test_a_curve_can_be_held():
    fixed = CURVES["all at once"]
    settings = {"steps": STEPS, "check": False}
    held = hypergradient(make_problem(), {"dampening": double(0.1)}, fixed=fixed, **settings)
    tuned = {**Schedule(fixed).to_tensors(), "dampening": double(0.1)}
    assert hypergradient(make_problem(), tuned, **settings).val_loss == held.val_loss


def test_hypergradients_by_one_minus_momentum_are_the_negative():
    settings = {"steps": STEPS, "check": False, "fixed": {"lr": 0.2}}
    by_momentum = hypergradient(make_problem(), {"momentum": double(0.5, 0.75)}, **settings).hypergradients["momentum"]
    nested = {"momentum": {"one_minus": double(0.5, 0.25)}}
    by_rest = hypergradient(make_problem(), nested, **settings).hypergradients["momentum"]["one_minus"]
    assert torch.equal(by_rest, -by_momentum)


def test_single_precision_trains_with_the_doubles_rounded():
    problem = make_problem(dtype=torch.float32)
    loop = make_loop(problem, STEPS)
    schedule = Schedule(CURVES["cosine"])
    numbers = {name: loop.values.placed(name, values) for name, values in schedule.to_tensors().items()}
    for step in range(STEPS):
        (value,) = loop.scalars(numbers, step).values()
        assert value.dtype == torch.float32
        assert float(value) == float(torch.tensor(schedule.at_step(step, STEPS)["lr"], dtype=torch.float32))


@pytest.mark.parametrize(
    ("hyperparameters", "fixed", "words"),
    [
        ({"lr/cosine/peak": double(0.1)}, {}, "lacks lr/cosine/warm_up"),
        ({"lr/cosine/peak": double(0.1, 0.2)}, {"lr/cosine/warm_up": 0, "lr/cosine/floor": 0}, "one element"),
        ({"lr/cosine/peak": double(0.1)}, {"lr": 0.1}, "both tuned and fixed"),
        ({"lr/cosine/peak": double(0.1)}, {"lr": CURVES["cosine"]["lr"]}, "both tuned and fixed"),
        ({"lr": double(0.1)}, {"lr/cosine/floor": 0.1}, "cosine and windows|windows and cosine"),
        ({"lr/knots": double(0.1)}, {}, "between 2 and"),
        ({"momentun/knots": double(0.1, 0.2)}, {}, "unknown hyperparameter 'momentun'"),
        ({"lr/cosin/peak": double(0.1)}, {}, "unknown hyperparameter 'lr/cosin/peak'"),
        ({"lr": {"cosin": {"peak": double(0.1)}}}, {}, "is no|give a tensor"),
        ({"lr": double(0.1)}, {"momentum": {"cosine": {"peak": 0.1, "warm_up": 2, "floor": 0}}}, r"within \[0, 1\]"),
        ({"lr": double(0.1)}, {"momentum": "high"}, "is no hyperparameter"),
    ],
)
def test_what_makes_no_curve_is_refused(hyperparameters, fixed, words):
    with pytest.raises(InputError, match=words) as error:
        hypergradient(make_problem(), hyperparameters, steps=STEPS, fixed=fixed)
    assert "\n" not in str(error.value)


def test_the_whole_check_of_a_problem_goes_with_curves():
    numbers = Schedule(CURVES["all at once"]).to_tensors()
    checked = hypergradient(make_problem(), numbers, steps=STEPS, check=True)
    assert checked.val_loss == hypergradient(make_problem(), numbers, steps=STEPS, check=False).val_loss
    assert set(checked.hypergradients) == set(flat_values(CURVES["all at once"]))
