"""Schedules that a person would draw, as search spaces: from the space through searchers' configs to the replay."""

import json
import math

import numpy as np
import pytest
import torch
from engine_problems import make_loop, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.variant_generator import generate_variants
from ray.tune.utils.util import merge_dicts
from self_tuning import EPOCH, regularised_problem
from tiny_problem import STEPS, numbers, tiny_problem

from tune_hypergrad import (
    FDS,
    HD,
    STN,
    BOHBSearch,
    DeltaSTN,
    FixedSchedule,
    HyperBandSearch,
    HypergradientSearch,
    InnerRun,
    InputError,
    RandomSearch,
    Retraining,
    Schedule,
    compare,
    complement,
    schedule,
)
from tune_hypergrad.comparison.running.plan import _in_words
from tune_hypergrad.comparison.running.reference import grid_points
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.space import (
    Range,
    flat_values,
    gradient_ranges,
    in_form_of,
    longest_schedule,
    schedules_in,
    tuned_values,
    without_schedule,
)

RATES, RESTS = tune.loguniform(1e-3, 1), tune.loguniform(0.01, 1)
SPACES = {
    "windows": {"lr": schedule(RATES, windows=3), "momentum": complement(RESTS)},
    "knots": {"lr": schedule(RATES, knots=4), "momentum": complement(schedule(RESTS, windows=2))},
    "cosine": {"lr": schedule(RATES, shape="cosine"), "momentum": schedule(complement(RESTS), knots=3)},
    "linear": {"lr": schedule(RATES, shape="linear", floor=0.1), "momentum": complement(tune.uniform(0.05, 0.9))},
    "wsd": {
        "lr": schedule(RATES, shape="wsd", warm_up=0.1, decay=tune.uniform(0.1, 0.3)),
        "momentum": complement(schedule(RESTS, shape="cosine", floor=0.2)),
    },
}
COSINE = {"cosine": {"peak": 0.3, "warm_up": 0.2, "floor": 0.1}}


@pytest.fixture(params=list(SPACES))
def space(request):
    return SPACES[request.param]


def refusal(function, *arguments, **keywords):
    with pytest.raises(InputError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def drawn(space, seed):
    """A config as Ray resolves it."""
    ((_, config),) = generate_variants(dict(space), random_state=seed)
    return config


# ---------------------------------------------------------------------------------------------------------------------
# the spaces


def test_spaces_are_plain_dicts_of_domains():
    assert schedule(RATES, knots=2) == {"knots": {"0": RATES, "1": RATES}}
    assert complement(RESTS) == {"one_minus": RESTS}
    assert complement(schedule(RESTS, windows=2)) == schedule(complement(RESTS), windows=2)
    assert complement(schedule(RESTS, knots=2)) == schedule(complement(RESTS), knots=2)
    made = schedule(RATES, shape="wsd", warm_up=0.1, floor=0)
    assert list(made) == ["wsd"] and list(made["wsd"]) == ["peak", "warm_up", "decay", "floor"]
    assert made["wsd"]["peak"] is RATES and (made["wsd"]["warm_up"], made["wsd"]["floor"]) == (0.1, 0)
    assert (made["wsd"]["decay"].lower, made["wsd"]["decay"].upper) == (0.05, 0.8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "neither"),
        ({"windows": 2, "knots": 2}, "windows and knots"),
        ({"knots": 1}, "at least 2"),
        ({"knots": True}, "at least 2"),
        ({"shape": "cosin"}, "did you mean 'cosine'"),
        ({"shape": 3}, "choose one of"),
        ({"shape": "cosine", "decay": 0.1}, "no decay"),
        ({"windows": 2, "floor": 0.1}, "without a shape"),
        ({"shape": "cosine", "warm_up": 1.5}, "within"),
        ({"shape": "cosine", "warm_up": tune.uniform(0, 2)}, "within"),
        ({"shape": "cosine", "floor": "low"}, "within"),
        ({"shape": "cosine", "floor": tune.choice([0.1])}, "within"),
        ({"shape": "wsd", "decay": -0.1}, "within"),
    ],
)
def test_schedules_that_cannot_be(arguments, words):
    assert words in refusal(schedule, RATES, **arguments)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (0.1, "write 0.9"),
        ("adam", "loguniform"),
        (None, "loguniform"),
        (complement(RESTS), "leave out both"),
        (schedule(0.1, windows=2), "loguniform"),
        (tune.loguniform(0.1, 2), "up to 2"),
        (schedule(tune.loguniform(0.1, 2), windows=2), "up to 2"),
        ({"inner": RESTS}, "loguniform"),
        (tune.grid_search([0.1]), "loguniform"),
    ],
)
def test_what_has_no_complement(entry, words):
    assert words in refusal(complement, entry)


def test_ranges_and_constants():
    ranges, constants = gradient_ranges(
        {
            "lr": schedule(RATES, shape="linear", floor=0.1),
            "momentum": complement(RESTS),
            "beta1": complement(schedule(RESTS, windows=2)),
            "alpha": complement(tune.uniform(0.1, 0.3)),
            "beta2": complement(schedule(RESTS, knots=3)),
            "eps": complement(schedule(RESTS, shape="cosine", warm_up=0)),
            "l2": COSINE,
        }
    )
    assert ranges == {
        "lr/linear/peak": Range(1, 1e-3, 1.0, scale="log"),
        "lr/linear/warm_up": Range(1, 0.0, 0.3),
        "momentum": Range(1, 0.0, 0.99, scale="complement"),
        "beta1": Range(2, 0.0, 0.99, scale="complement"),
        "alpha": Range(1, 0.7, 0.9),
        "beta2/knots": Range(3, 0.0, 0.99, scale="complement"),
        "eps/one_minus/cosine/peak": Range(1, 0.01, 1.0, scale="log"),
        "eps/one_minus/cosine/floor": Range(1, 0.0, 0.5),
    }
    assert constants == {"lr/linear/floor": 0.1, "eps/one_minus/cosine/warm_up": 0, "l2": COSINE}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (complement(tune.choice([0.1, 0.2])), "a choice"),
        ({"knots": {"0": tune.randint(0, 2), "1": tune.randint(0, 2)}}, "an integer domain"),
        ({"cosine": {"peak": tune.grid_search([1])}}, "a grid search"),
        ({"knots": {"0": RATES, "1": 0.1}}, "different domains"),
        ({"one_minus": {"0": RATES, "1": RESTS}}, "different domains"),
        ({"one_minus": {"one_minus": RATES}}, "no schedule"),
        ({"cosine": {"top": RATES}}, "no schedule"),
        ({"knots": {"cosine": {"peak": RATES}}}, "no schedule"),
        ({"one_minus": RATES, "knots": RATES}, "no schedule"),
    ],
)
def test_entries_that_gradient_methods_cannot_read(entry, words):
    assert words in refusal(gradient_ranges, {"momentum": entry})


def test_what_a_space_tells_of_its_schedules():
    assert [longest_schedule(SPACES[name]) for name in SPACES] == [3, 4, 3, 1, 1]
    assert longest_schedule({"lr": RATES, "model": {"width": 3}, "grid": tune.grid_search([1, 2])}) == 1
    assert schedules_in(SPACES["linear"]) == ["lr"] and schedules_in(SPACES["cosine"]) == ["lr", "momentum"]
    assert schedules_in({"inner": SPACES["wsd"]}) == ["inner/lr", "inner/momentum"]
    assert without_schedule(SPACES["knots"]["momentum"]) == complement(RESTS) == without_schedule(complement(RESTS))
    assert without_schedule(SPACES["wsd"]["momentum"]) == complement(RESTS)
    assert without_schedule(SPACES["wsd"]["lr"]) is without_schedule(SPACES["knots"]["lr"]) is RATES
    assert without_schedule(RATES) is RATES and without_schedule({"width": 3}) == {"width": 3}
    assert _in_words(SPACES["knots"]["lr"]) == "loguniform (0.001, 1), 4 knots"
    assert _in_words(SPACES["knots"]["momentum"]) == "1 - loguniform (0.01, 1), 2 windows"
    assert (
        _in_words(SPACES["linear"]["lr"]) == "linear: peak loguniform (0.001, 1), warm_up uniform (0.0, 0.3), floor 0.1"
    )


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(SPACES)), st.integers(0, 2**20))
def test_a_config_and_its_values_by_flat_name_are_each_other(name, seed):
    space = SPACES[name]
    config = drawn(space, seed)
    ranges, _ = gradient_ranges(space)
    values = {flat: own for flat, own in flat_values(config).items() if flat in ranges}
    assert {flat: len(own) for flat, own in values.items()} == {flat: r.windows for flat, r in ranges.items()}
    assert all(r.lower <= value <= r.upper for flat, r in ranges.items() for value in values[flat])
    there_and_back = flat_values(in_form_of(space, values))
    assert there_and_back.keys() == flat_values(config).keys()
    for flat, own in flat_values(config).items():
        assert there_and_back[flat] == pytest.approx(own, rel=0, abs=1e-15)  # 1 - (1 - x) rounds
    again = {flat: own for flat, own in there_and_back.items() if flat in ranges}
    assert flat_values(in_form_of(space, again)) == there_and_back, "once rounded, to the bit"
    assert {flat: tuple(own.tolist()) for flat, own in tuned_values(space, config).items()} == values


def test_a_part_of_the_values_makes_a_part_of_a_config():
    space = {"lr": schedule(RATES, shape="linear", floor=0.1), "momentum": complement(RESTS)}
    assert in_form_of(space, {"lr/linear/peak": [0.5]}) == {"lr": {"linear": {"peak": 0.5, "floor": 0.1}}}
    assert in_form_of(space, {"momentum": [0.75]}) == {"momentum": {"one_minus": 0.25}}


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(list(SPACES)), st.integers(0, 2**20), st.integers(5, 50))
def test_what_is_replayed_is_what_trains_to_the_bit(tmp_path_factory, name, seed, steps):
    """space -> config -> Schedule -> JSON -> scheduler, against the values with which the engine trains."""
    config = drawn(SPACES[name], seed)
    found = Schedule.from_config(config)
    path = tmp_path_factory.mktemp("schedules") / "schedule.json"
    found.save(path)
    loaded = Schedule.load(path)
    assert loaded == found == Schedule.from_config(found.to_config()) == Schedule.from_tensors(found.to_tensors())
    assert Schedule.from_scalars(found.to_scalars()) == found
    loop, tensors = make_loop(make_problem(), steps), found.to_tensors()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.5)
    scheduler = loaded.scheduler(optimizer, steps)
    for step in range(steps):
        group = optimizer.param_groups[0]
        trained = {flat: float(value) for flat, value in loop.scalars(tensors, step).items()}
        assert {flat: group[flat] for flat in trained} == trained == found.at_step(step, steps)
        optimizer.step()
        scheduler.step()
    held = make_loop(make_problem(), steps, fixed=config)
    assert [held.values.fixed_at(step) for step in range(steps)] == [
        found.at_step(step, steps) for step in range(steps)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# schedules


def test_a_schedule_of_shapes():
    found = Schedule({"lr": COSINE, "momentum": {"one_minus": 0.1}, "l2": {"knots": [0.0, 1.0]}})
    assert found.values["momentum"] == (0.9,)
    assert str(found) == "lr cosine (peak 0.3, warm_up 0.2, floor 0.1), momentum 0.9, l2 0 ~ 1"
    assert found.at(0.1) == {"lr": pytest.approx(0.15), "momentum": 0.9, "l2": 0.1}
    assert found.to_config() == {"lr": COSINE, "momentum": 0.9, "l2": {"knots": {"0": 0.0, "1": 1.0}}}
    assert found.to_scalars() == {
        "schedule/lr/cosine/peak": 0.3,
        "schedule/lr/cosine/warm_up": 0.2,
        "schedule/lr/cosine/floor": 0.1,
        "schedule/momentum": 0.9,
        "schedule/l2/knots/0": 0.0,
        "schedule/l2/knots/1": 1.0,
    }
    assert len(found.windows("lr")) == 200 and found.windows("momentum") == (0.9,)
    frame = found.to_frame()
    assert len(frame[frame["hyperparameter"] == "lr"]) == 200 and frame["end"].max() == 1
    figure = found.plot()
    assert len(figure.axes) == 3 and len(figure.axes[0].lines[0].get_xdata()) == 200


def test_the_beginning_of_a_warm_up_makes_no_logarithmic_axis():
    rates = {"knots": {"0": 1.0, "1": 1e-3}}
    panels = Schedule({"lr": {"linear": {"peak": 1.0, "warm_up": 0.5, "floor": 0.0}}, "l2": rates}).plot().axes
    assert [panel.get_yscale() for panel in panels] == ["linear", "log"]


def test_files_of_version_1_still_load(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"format": "tune_hypergrad/schedule", "version": 1, "values": {"lr": [0.1, 0.2]}}))
    assert Schedule.load(path) == Schedule({"lr": (0.1, 0.2)})
    Schedule({"lr": COSINE}).save(path)
    saved = json.loads(path.read_text())
    assert saved["version"] == 2 and saved["values"] == {"lr": COSINE}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"cosine": {"peak": 0.1}}, "lacks lr/cosine/warm_up"),
        ({"cosine": {"peak": 0.1, "warm_up": 0.1, "floor": 1.5}}, "within"),
        ({"cosine": {"peak": math.inf, "warm_up": 0.1, "floor": 0.5}}, "finite"),
        ({"knots": {"0": 0.1}}, "at least 2"),
        ({"knots": 0.1}, "at least 2"),
        ({"one_minus": {"one_minus": 0.1}}, "no hyperparameter"),
        ({"one_minus": "a"}, "no hyperparameter"),
        ({"triangle": {"peak": 0.1}}, "no hyperparameter"),
    ],
)
def test_entries_that_are_no_schedule(entry, words):
    assert words in refusal(Schedule, {"lr": entry})


def test_a_scheduler_goes_on_from_its_state_with_a_curve():
    found = Schedule({"lr": COSINE})
    first, second = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0) for _ in range(2))
    scheduler = found.scheduler(first, 6)
    for _ in range(3):
        first.step()
        scheduler.step()
    other = Schedule({"lr": 0.5}).scheduler(second, 2)
    other.load_state_dict(scheduler.state_dict())
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"] == found.at_step(3, 6)["lr"]


# ---------------------------------------------------------------------------------------------------------------------
# searchers


def black_box(name, space):
    goal = {"metric": "val_loss", "mode": "min", "seed": 0}
    if name == "optuna":
        search = OptunaSearch(**goal)
        search.set_search_properties("val_loss", "min", space)
        return search
    return RandomSearch(space, **goal) if name == "random" else BOHBSearch(space, min_budget=1, max_budget=2, **goal)


def middle_of(space):
    """The config in the middle of every range."""
    return in_form_of(space, {flat: [r.middle] * r.windows for flat, r in gradient_ranges(space)[0].items()})


@pytest.mark.parametrize("name", ["random", "bohb", "optuna"])
def test_black_box_searchers_search_them_and_trials_train_with_them(space, name):
    config = merge_dicts(space, black_box(name, space).suggest("a"))  # as Ray does: Optuna gives no constants
    flat = flat_values({key: config[key] for key in space})
    ranges, constants = gradient_ranges(space)
    assert set(flat) == {*ranges, *constants}
    assert all(r.lower <= value <= r.upper for key, r in ranges.items() for value in flat[key])
    result = FixedSchedule.from_problem(tiny_problem(), steps=STEPS, check=False)(config=config).train()
    assert Schedule.from_scalars(result) == Schedule.from_config(config, names=space)


def test_points_to_evaluate_may_be_a_schedules_config():
    found = Schedule({"lr": COSINE, "momentum": 0.9})
    space = {"lr": schedule(RATES, shape="cosine"), "momentum": complement(RESTS)}
    for search in (
        RandomSearch(space, metric="val_loss", mode="min", points_to_evaluate=[found.to_config()]),
        HypergradientSearch(space, points_to_evaluate=[found.to_config()]),
        HypergradientSearch(space, points_to_evaluate=[{"lr": COSINE, "momentum": {"one_minus": 0.1}}]),
    ):
        config = search.suggest("a")
        assert config["momentum"]["one_minus"] == pytest.approx(0.1)
        assert Schedule.from_config(config, names=["lr", "momentum"]).to_scalars() == pytest.approx(found.to_scalars())


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"lr": 0.1}, "it must be such as {'lr': {'cosine': {'peak': 0.03"),
        ({"lr": {"cosine": {"peak": 5.0}}}, "within [0.001, 1]"),
        ({"lr": {"cosine": {"peak": 0.1, "floor": 0.2}}}, "which the space fixes to 0.1"),
        ({"momentum": {"one_minus": 0.001}}, "within [0, 0.99]"),
        ({"momentum": {"knots": [0.1, 0.2]}}, "it must be a number"),
    ],
)
def test_points_that_do_not_fit(point, words):
    space = {"lr": schedule(RATES, shape="cosine", floor=0.1), "momentum": complement(RESTS)}
    assert words in refusal(HypergradientSearch, space, points_to_evaluate=[point])


def test_a_hypergradient_search_over_inner_runs_descends_them(space):
    problem = tiny_problem(test=None)
    trainable = InnerRun.from_problem(problem, steps=STEPS, check=False, reports=1)
    start = {"lr": middle_of(space)["lr"]}
    ranges, constants = gradient_ranges(space)
    search = HypergradientSearch(
        space, metric="val_loss", mode="min", outer_steps=8, points_to_evaluate=[start], confirmations=0
    )
    losses, seeds = [], []
    for trial in range(8):
        config = search.suggest(f"t{trial}")
        assert flat_values({name: config[name] for name in space}).keys() == {*ranges, *constants}
        result = trainable(config=dict(config)).train()
        losses.append(result["val_loss"])
        seeds.append(config["seed"])
        search.on_trial_complete(f"t{trial}", result)
    assert min(losses) < losses[0]
    best, outer = search.incumbent, search._outer.incumbent
    replayed = FixedSchedule.from_problem(problem, steps=STEPS, check=False, reports=1)(
        config={**best.to_config(), "seed": seeds[outer.outer_step]}
    ).train()
    assert replayed["val_loss"] == outer.val_loss == losses[outer.outer_step]


def test_fds_descends_them_and_its_file_replays(space, tmp_path):
    problem = tiny_problem(test=None)
    start = middle_of(space)
    make = FDS.from_problem(
        problem, space=space, steps=STEPS, initial=start, outer_steps=6, confirmations=0, check=True
    )
    trial = make(config={})
    results = [trial.train() for _ in range(5)]
    trial.save_checkpoint(str(tmp_path))
    other = make(config={})
    other.load_checkpoint(str(tmp_path))
    results.append(trial.train())
    assert repr(numbers(other.train())) == repr(numbers(results[-1])) and results[-1]["done"]  # NaN equals itself
    assert min(result["val_loss"] for result in results) < results[0]["val_loss"]
    assert all(f"hypergradient/{flat}/0" in results[-1] for flat in gradient_ranges(space)[0])
    assert Schedule.from_scalars(results[-2], "best_schedule") == Schedule.load(tmp_path / "schedule.json")
    make_replay = FixedSchedule.from_problem(problem, steps=STEPS, check=False, reports=1)
    # every outer step has seeds of its own, as many as there are at the most
    config = {**trial.found.to_config(), "seed": fold_seed(0, 4 * trial.search.incumbent.outer_step)}
    assert make_replay(config=config).train()["val_loss"] == results[-1]["best_val_loss"]


def test_fds_begins_at_a_trials_config_and_refuses_another_form():
    space = {"lr": schedule(RATES, shape="cosine", floor=0.1), "momentum": complement(RESTS)}
    make = FDS.from_problem(tiny_problem(), space=space, steps=STEPS, check=False)
    trial = make(config={"lr": COSINE, "momentum": {"one_minus": 0.25}})
    values = {flat: own.tolist() for flat, own in trial.search.values.items()}
    assert values == {"lr/cosine/peak": [0.3], "lr/cosine/warm_up": [0.2], "momentum": [0.75]}
    other_forms = ({"lr": 0.1}, {"lr": {"linear": COSINE["cosine"]}}, {"lr": {"cosine": {"floor": 0.3}}})
    for initial, words in zip(other_forms, ("the space has", "the space has", "fixes to 0.1"), strict=True):
        said = refusal(FDS.from_problem, tiny_problem(), space=space, steps=STEPS, initial=initial)
        assert words in said and "'lr" in said


def test_hypergradient_descent_takes_single_values():
    make = HD.from_problem(tiny_problem(), space={"lr": RATES, "momentum": complement(RESTS)}, steps=STEPS, check=False)
    result = make(config={"momentum": {"one_minus": 0.5}}).train()
    assert 0 <= result["schedule/momentum"] <= 0.99
    for name in ("knots", "cosine", "windows"):
        said = refusal(HD.from_problem, tiny_problem(), space=SPACES[name], steps=STEPS, check=False)
        assert "makes its own schedule" in said


@pytest.mark.parametrize("trainable", [STN, DeltaSTN])
def test_self_tuning_networks_train_with_held_curves_that_their_files_replay(trainable, tmp_path):
    held = {"lr": {"linear": {"peak": 0.1, "warm_up": 0.25, "floor": 0.2}}, "momentum": {"one_minus": 0.5}}
    space = {"l2": tune.loguniform(1e-5, 1e-1)}
    make = trainable.from_problem(
        regularised_problem(), space=space, steps=2 * EPOCH, fixed=held, warm_up=0, train_steps=2
    )
    trial = make(config={})
    for _ in range(2):
        trial.train()
    trial.save(str(tmp_path))
    found = Schedule.load(tmp_path / "schedule.json")
    rates = Schedule(held)
    assert found.values["lr"] == tuple(rates.at_step(step, 2 * EPOCH)["lr"] for step in range(2 * EPOCH))
    assert found.values["momentum"] == (0.5,) and len(set(found.values["l2"])) > 1


def test_shorter_runs_of_curves_are_not_continued(tmp_path):
    space = {"lr": schedule(RATES, shape="cosine"), "momentum": complement(RESTS)}
    assert "'lr'" in refusal(HyperBandSearch, space, min_budget=1, max_budget=3, resume_promoted=True)
    HyperBandSearch({"lr": RATES, "momentum": complement(RESTS)}, min_budget=1, max_budget=3, resume_promoted=True)
    trial = FixedSchedule.from_problem(tiny_problem(), steps=STEPS, check=False)(config={"lr": COSINE})
    with pytest.raises(InputError, match="'lr' is a schedule"):
        trial.load_promoted(tune.Checkpoint(str(tmp_path)))


def test_a_hypergradient_search_goes_on_from_its_file(space, tmp_path):
    def respond(config):
        flat = flat_values({name: config[name] for name in space})
        gradients = {f"hypergradient/{name}/{i}": v - 0.3 for name, own in flat.items() for i, v in enumerate(own)}
        return {
            "val_loss": sum(g**2 for g in gradients.values()),
            "untrained_val_loss": 50.0,
            "done": True,
            **gradients,
        }

    def advance(search, trials):
        configs = []
        for number in trials:
            configs.append(search.suggest(f"t{number}"))
            search.on_trial_complete(f"t{number}", respond(configs[-1]))
        return configs

    whole, first, second = (HypergradientSearch(space, outer_steps=10) for _ in range(3))
    expected = advance(whole, range(9))
    assert advance(first, range(6)) == expected[:6]
    first.save(str(tmp_path / "search.pkl"))
    second.restore(str(tmp_path / "search.pkl"))
    assert advance(second, range(6, 9)) == expected[6:]
    assert second.incumbent == whole.incumbent


def test_an_inner_run_differentiates_by_the_parts_that_are_tuned():
    config = {"lr": COSINE, "momentum": {"one_minus": 0.5}}
    make = InnerRun.from_problem(tiny_problem(), steps=STEPS, reports=1, differentiation="reverse")
    every = make(config=config).train()
    part = make(config={**config, "tuned": ["lr/cosine/peak", "momentum"]}).train()
    names = {"hypergradient/lr/cosine/peak/0", "hypergradient/momentum/0"}
    assert {key for key in part if key.startswith("hypergradient/")} == names
    assert {key: part[key] for key in names} == {key: every[key] for key in names}
    for result in (every, part):
        assert Schedule.from_scalars(result) == Schedule(config)
    with pytest.raises(InputError, match="no 'lr/linear/peak'"):
        make(config={**config, "tuned": ["lr/linear/peak"]})


def test_a_grid_covers_them(space):
    parts = len(gradient_ranges(space)[0])
    points = grid_points(space, 2**parts)
    assert len(points) == 2**parts
    ranges = gradient_ranges(space)[0]
    for point in points:
        flat = flat_values(point)
        assert all(len(set(flat[name])) == 1 and r.lower < flat[name][0] < r.upper for name, r in ranges.items())
    assert len({str(sorted(flat_values(point).items())) for point in points}) == 2**parts


@pytest.mark.slow
def test_a_comparison_of_methods_over_shapes(ray_session, tmp_path):
    space = {
        "lr": schedule(RATES, shape="cosine", floor=0.0),
        "momentum": complement(RESTS),
        "weight_decay": schedule(tune.loguniform(1e-6, 1e-2), knots=3),
    }
    comparison = compare(
        tiny_problem(),
        ["fds", "hd", "rs", "bohb", "cosine"],
        space=space,
        budget="20e",
        epochs=2,
        out=tmp_path / "out",
        progress="quiet",
        retraining=Retraining(seeds=1),
        reference="grid:16",
    )
    assert set(comparison.accounts["completed"]) == {True} and not any(map(comparison.troubles, comparison.methods))
    for method in ("fds", "rs", "bohb"):
        found = comparison.schedule(method)
        assert found.values["lr"].form == "cosine" and found.values["weight_decay"].form == "knots"
        assert 0 <= found.values["momentum"][0] <= 0.99
    assert np.isfinite(comparison.retrained["test_loss"]).all()
    report = (comparison.folder / "report.html").read_text()
    assert "1 - loguniform (0.01, 1)" in report and "cosine (peak" in report
