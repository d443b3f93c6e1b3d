"""The run of a self-tuning network, without Ray: exact restores, what is tuned when, incumbents, replay, refusals."""

import io
import math
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from self_tuning import (
    EPOCH,
    FIXED,
    INITIAL,
    TUNED,
    Spy,
    advanced,
    images,
    loaded_and_judged,
    make_run,
    network,
    regularised_problem,
)
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from tune_hypergrad.budget import GRADIENTS_PER
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import InnerLoop
from tune_hypergrad.losses import smoothed_cross_entropy
from tune_hypergrad.problem import Problem
from tune_hypergrad.regularisers import Cutout, Dropout, InputNoise, Mixup, WeightDecay
from tune_hypergrad.stn import VARIANTS, TunedHyperparameter, TunedHyperparameters
from tune_hypergrad.stn.self_tuning_run import unlike_batches

STEPS = 13
CUTS = {"warm_up": 0.8, "train_steps": 3, "val_steps": 2}
"""Four steps of warm-up, then validation steps after every third step."""

DROPOUT = TunedHyperparameter("dropout", 0.0, 0.9)
L2 = TunedHyperparameter("l2", 1e-5, 1e-1, log=True)
SMOOTHING = TunedHyperparameter("label_smoothing", 0.0, 0.5)


def bits(state):
    """A state dict as text that tells every bit, and in which NaN equals itself."""
    return repr(tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf, state))


def judged_every_fourth_step(run, until=STEPS):
    with run.loop.running():
        while run.position < until:
            run.advance(1)
            if run.position % 4 == 0:
                run.judge()
    return run


# ---------------------------------------------------------------------------------------------------------------------
# a run is a function of its seed and its steps


@cache
def undisturbed(variant):
    return bits(judged_every_fourth_step(make_run(steps=STEPS, variant=variant, **CUTS)).state_dict())


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(0, STEPS), variant=st.sampled_from(list(VARIANTS)), in_memory=st.booleans())
def test_a_run_cut_anywhere_continues_bit_for_bit(cut, variant, in_memory):
    run = judged_every_fourth_step(make_run(steps=STEPS, variant=variant, **CUTS), cut)
    saved = run.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    assert bits(judged_every_fourth_step(run).state_dict()) == undisturbed(variant)
    fresh = make_run(steps=STEPS, variant=variant, **CUTS)
    # the run that went on has not changed what was saved
    fresh.load_state_dict(saved if in_memory else torch.load(file, weights_only=True))
    assert fresh.position == cut
    assert bits(judged_every_fourth_step(fresh).state_dict()) == undisturbed(variant)


def test_every_part_of_the_state_moves():
    begun, ended = (judged_every_fourth_step(make_run(steps=STEPS, **CUTS), until).state_dict() for until in (0, STEPS))
    assert all(bits(begun[part]) != bits(ended[part]) for part in ended)
    for begun_slots, ended_slots in zip(begun["slots"], ended["slots"], strict=True):
        assert bits(begun_slots) != bits(ended_slots)
    for name, buffer in begun["buffers"].items():
        assert bits(buffer) != bits(ended["buffers"][name])
    assert ended["val_steps"] == 6 and ended["incumbent"] is not None


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_of_any_length_make_the_same_run(variant):
    whole = advanced(make_run(steps=STEPS, variant=variant, **CUTS))
    pieces = make_run(steps=STEPS, variant=variant, **CUTS)
    for length in (1, 5, 2, 99):
        advanced(pieces, length)
    assert whole.done and bits(pieces.state_dict()) == bits(whole.state_dict())


def test_another_seed_is_another_run_and_global_generators_are_left_as_found():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    runs = [advanced(make_run(steps=6, training={"seed": seed})) for seed in (3, 3, 4)]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    torch.manual_seed(1)
    runs.append(advanced(make_run(steps=6, training={"seed": 3})))
    first, again, other, elsewhere = (bits(run.state_dict()) for run in runs)
    assert first == again == elsewhere != other


# ---------------------------------------------------------------------------------------------------------------------
# what plain training makes of the same hyperparameters


def trained_plainly(run):
    """The plain network's state after training with the hyperparameters that each of the run's steps had."""
    loop = InnerLoop(run.loop.problem, replace(run.loop.settings, steps=run.position, fixed={}))
    values = {name: torch.tensor(values, dtype=torch.float64) for name, values in run.history.items()}
    with loop.running():
        return loop, loop.run(values)


def assert_trained_alike(run, rtol):
    loop, plain = trained_plainly(run)
    found = run.state
    torch.testing.assert_close(found.params, plain.params, rtol=rtol, atol=rtol)
    torch.testing.assert_close(found.buffers, plain.buffers, rtol=rtol, atol=rtol)
    assert not torch.allclose(plain.params, loop.initial_state().params, rtol=0.01)


@pytest.mark.parametrize("off", [{"val_steps": 0}, {"train_steps": 10**9}, {"warm_up": 99}])
def test_without_validation_steps_hyperparameters_stay_where_they_began(off):
    run = advanced(make_run(steps=7, scale=0.5, **off))
    assert run.values == pytest.approx(INITIAL, rel=1e-12) and run.val_steps == 0
    assert set(run.scales.values()) == {0.5}
    assert {name: set(values) for name, values in run.history.items()} == {
        name: {value} for name, value in {**run.values, **FIXED}.items()
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("val_steps", [0, 1])
def test_the_weights_of_delta_stn_are_those_of_plain_training_with_its_schedule(optimizer, val_steps):
    """Its general weights take unperturbed steps: also while hyperparameters move, and with dropout's own draws."""
    held = {"lr": (0.05, 0.01), "weight_decay": 0.01}
    run = make_run(
        tuned=(DROPOUT, L2, SMOOTHING),
        problem=regularised_problem(regularisers=[Dropout(), WeightDecay()]),
        training={"optimizer": optimizer, "fixed": held, "clip_gradient": 0.3},
        val_steps=val_steps,
    )
    advanced(run)
    assert (len(set(run.history["dropout"])) > 5) == bool(val_steps)
    assert run.history["lr"] == (*[0.05] * 10, *[0.01] * 10)
    assert_trained_alike(run, rtol=1e-12)


def test_weight_decay_of_the_optimizer_leaves_responses_alone():
    fixed = {"lr": 0.1, "weight_decay": 0.5}
    run = make_run(steps=1, training={"fixed": fixed})
    begun = run.loop.model.fc.weight.detach().clone()
    fc = advanced(run).network.model.fc
    # at first nothing responds, so that the response's weight has no gradient
    torch.testing.assert_close(fc.response.weight.detach(), begun, rtol=0, atol=0)
    assert not torch.equal(fc.weight, begun)


def test_a_centred_network_with_hardly_a_perturbation_trains_like_a_plain_one():
    run = advanced(make_run(variant="centered-stn", scale=1e-9, val_steps=0))
    assert_trained_alike(run, rtol=1e-6)
    perturbed = advanced(make_run(variant="centered-stn", scale=1.0, val_steps=0))
    assert not torch.allclose(perturbed.state.params, run.state.params, rtol=1e-3)


def test_a_replay_sees_the_values_of_each_step():
    spies = [Spy("a", upper=1.0), Spy("b", lower=2.0, upper=9.0)]
    tuned = (TunedHyperparameter("a", 0.0, 1.0), TunedHyperparameter("b", 2, 9, whole=True), DROPOUT)
    problem = regularised_problem(regularisers=[*spies, Dropout()])
    run = advanced(make_run(problem, 12, tuned=tuned, hyper_lr=0.2, training={"fixed": {"lr": 0.1}}))
    for spy in spies:
        spy.seen.clear()
    loop, plain = trained_plainly(run)
    for spy in spies:
        assert [float(value) for value in spy.seen] == list(run.history[spy.hyperparameter])
    assert all(len(set(run.history[name])) > 2 for name in ("a", "dropout"))
    assert math.isfinite(loop.evaluate(plain).loss)


# ---------------------------------------------------------------------------------------------------------------------
# what models do besides


class Residual(nn.Module):
    """Images to three classes by way of a middle layer, which `way` puts to use on the module and its inputs."""

    def __init__(self, way):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.way = nn.BatchNorm1d(8, affine=False), way
        self.register_buffer("cache", None)

    def forward(self, x):
        return self.last(self.way(self, torch.tanh(self.norm(self.first(x.flatten(1))))))

    def branch(self, h):
        # in another memory layout, torch's own dropout would draw another mask than the inner loop's
        return F.dropout(torch.tanh(self.middle(h)).T, 0.2, self.training).T

    def get_extra_state(self):
        return {"of": "Residual"}

    def set_extra_state(self, state):
        assert state == {"of": "Residual"}


def layer_dropped(net, h):
    return h if net.training and torch.rand(()) < 0.3 else h + net.branch(h)


def cached(net, h):
    net.cache = torch.zeros(h.shape[1:]).to(h) if net.cache is None else 0.9 * net.cache + 0.1 * h.mean(0)
    return h + net.branch(h) + net.cache


def checkpointed(net, h):
    return h + checkpoint(net.branch, h, use_reentrant=False)


def residual(way, **settings):
    """A run with regularisers that change batches and penalise weights."""
    regularisers = [WeightDecay(), InputNoise(), Mixup(3)]
    problem = regularised_problem(model=lambda: Residual(way).double(), regularisers=regularisers)
    return make_run(problem, tuned=TUNED[1:4], **settings)


def test_layers_dropped_at_random_and_plain_normalisation_are_those_of_plain_training():
    assert_trained_alike(advanced(residual(layer_dropped)), rtol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpointed_model_trains_as_without(variant):
    def plainly(net, h):
        return h + net.branch(h)

    runs = [advanced(residual(way, variant=variant)) for way in (checkpointed, plainly)]
    assert bits(runs[0].state_dict()) == bits(runs[1].state_dict()) and runs[0].val_steps == 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_buffers_that_the_model_makes_are_restored(variant):
    whole, saved = residual(cached, variant=variant), advanced(residual(cached, variant=variant), 7).state_dict()
    restored = residual(cached, variant=variant)
    restored.load_state_dict(saved)
    assert bits(restored.state_dict()) == bits(saved) and restored.network.model.cache.abs().max() > 0
    assert bits(advanced(restored).state_dict()) == bits(advanced(whole).state_dict())


def test_the_incumbents_weights_have_the_models_extra_state():
    run = advanced(residual(layer_dropped))
    with run.loop.running():
        loss = run.judge().loss
    assert run.incumbent.weights["_extra_state"] == {"of": "Residual"}
    assert loaded_and_judged(run.loop.problem, run.incumbent.weights).loss == loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_frozen_normalisation_stays_as_it_was_made(variant):
    def model():
        made = network()
        made.norm.eval().requires_grad_(False)
        return made

    run = advanced(make_run(regularised_problem(model=model), variant=variant))
    assert run.network.model.norm.num_batches_tracked == 0 and not run.network.model.norm.running_mean.any()
    run.network.train()
    assert [name for name, module in run.network.model.named_modules() if not module.training] == ["norm"]


def test_verifying_changes_nothing():
    run, other = residual(cached), residual(cached)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with run.loop.running():
        run.verify()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert bits(run.state_dict()) == bits(other.state_dict())
    assert bits(advanced(run).state_dict()) == bits(advanced(other).state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# what validation steps do


def vector_problem(labels, examples, regularisers):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples + 400, 20, generator=generator, dtype=torch.float64)
    y = labels(x, generator)
    return Problem(
        model=lambda: nn.Sequential(nn.Dropout(0.0), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 2)).double(),
        train=(x[:examples], y[:examples]),
        val=(x[examples:], y[examples:]),
        regularisers=regularisers,
        batch_size=20,
    )


USELESS_DROPOUT = vector_problem(lambda x, generator: (x[:, :10].sum(1) > 0).long(), 200, [Dropout()])
PURE_NOISE = vector_problem(lambda x, generator: torch.randint(2, (len(x),), generator=generator), 40, [WeightDecay()])
TUNING = {"warm_up": 1, "hyper_lr": 0.1, "val_batch_size": 100, "training": {"fixed": {"lr": 0.1}}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_useless_dropout_goes_down(variant):
    run = make_run(USELESS_DROPOUT, 200, tuned=(DROPOUT,), variant=variant, initial={"dropout": 0.6}, **TUNING)
    assert advanced(run).values["dropout"] < 0.4


@pytest.mark.parametrize("linearised", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_decay_goes_up_where_labels_are_noise(variant, linearised):
    run = make_run(
        PURE_NOISE,
        200,
        tuned=(TunedHyperparameter("l2", 1e-5, 10.0, log=True),),
        variant=variant,
        initial={"l2": 1e-2},
        linearised_validation=linearised,
        **TUNING,
    )
    assert advanced(run).values["l2"] > 0.1


@pytest.mark.parametrize(
    ("warm_up", "train_steps", "val_steps", "after"),
    [
        (0, 1, 1, [1, 2, 3, 4, 5, 6, 7, 8]),
        (0, 5, 1, [0, 0, 0, 0, 1, 1, 1, 1]),
        (0.6, 2, 3, [0, 0, 0, 0, 3, 3, 6, 6]),
        (1, 2, 1, [0, 0, 0, 0, 0, 0, 1, 1]),
    ],
)
def test_steps_take_turns_after_the_warm_up(warm_up, train_steps, val_steps, after):
    assert regularised_problem().steps_per_epoch == EPOCH
    run = make_run(steps=8, warm_up=warm_up, train_steps=train_steps, val_steps=val_steps)
    assert [advanced(run, 1).val_steps for _ in after] == after


@pytest.mark.parametrize(("variant", "kind"), [("stn", "stn_step"), ("delta-stn", "delta_stn_step")])
def test_costs_are_those_of_the_steps_taken(variant, kind):
    run = advanced(make_run(steps=7, variant=variant, val_batch_size=16))
    with run.loop.running():
        run.judge()
    assert run.cost.steps == 7 and run.cost.examples == 7 * 8
    evaluation, val_step = 24 / 8 * GRADIENTS_PER["evaluation"], 16 / 8 * GRADIENTS_PER["self_tuning_val_step"]
    assert run.cost.gradients == pytest.approx(7 * GRADIENTS_PER[kind] + 3 * val_step + evaluation)


def first_move(**settings):
    """What the first validation step adds to the hyperparameters and the scales, on the unconstrained scale."""
    run = advanced(make_run(steps=4, tuned=(DROPOUT, L2), train_steps=4, val_steps=0, **settings))
    before = torch.cat([run.tuned.unconstrained, run.tuned.log_scales]).detach()
    moved = advanced(make_run(steps=4, tuned=(DROPOUT, L2), train_steps=4, val_steps=1, **settings))
    return torch.cat([moved.tuned.unconstrained, moved.tuned.log_scales]).detach() - before


@pytest.mark.parametrize("variant", VARIANTS)
def test_hyperparameters_of_a_network_of_half_precision_move_by_small_steps(variant):
    def half():
        return network().bfloat16()

    problem = regularised_problem(model=half)
    run = make_run(problem, 12, variant=variant, hyper_lr=1e-4, train_steps=1)
    before = run.tuned.unconstrained.detach().clone()
    state = advanced(run).state_dict()
    moved = (run.tuned.unconstrained.detach() - before).abs()
    # where a whole step of bfloat16 is 0.004 and more, save for what is near 0
    assert (moved[:4] > 0).all() and (moved < 0.01).all()
    assert {tensor.dtype for tensor in (*state["tuned"], *state["hyper_slots"])} == {torch.float32}
    assert {tensor.dtype for tensor in state["weights"]} == {torch.bfloat16}
    with run.loop.running():
        assert math.isfinite(run.judge().loss)
    fresh = make_run(problem, 12, variant=variant, hyper_lr=1e-4, train_steps=1)
    fresh.load_state_dict(state)
    assert bits(fresh.state_dict()) == bits(state)


def test_hyperparameters_move_as_their_optimizer_says():
    by_sgd = first_move(hyper_optimizer="sgd", hyper_lr=0.5)
    torch.testing.assert_close(first_move(hyper_optimizer="sgd", hyper_lr=1.0), 2 * by_sgd)
    sign = by_sgd.sign()
    assert bool(sign.all())
    # adam's first step is the learning rate, RMSprop's that over the root of 1 - alpha
    torch.testing.assert_close(first_move(hyper_optimizer="adam", hyper_lr=0.02), 0.02 * sign, rtol=1e-3, atol=0)
    torch.testing.assert_close(first_move(hyper_optimizer="rmsprop", hyper_lr=0.02), 0.2 * sign, rtol=1e-3, atol=0)


def test_a_large_entropy_weight_widens_perturbations_and_none_lets_them_shrink():
    wide, narrow = (
        advanced(make_run(USELESS_DROPOUT, 100, tuned=(DROPOUT,), entropy_weight=weight, **TUNING))
        for weight in (10.0, 0.0)
    )
    assert wide.scales["dropout"] > 2 > 1 > narrow.scales["dropout"]


def test_linearised_validation_is_another_validation_step():
    plain, linearised = (first_move(linearised_validation=flag, scale=0.7) for flag in (False, True))
    assert not torch.equal(plain, linearised)


def test_each_example_has_a_value_of_its_own_save_where_told():
    spies = [Spy("own"), Spy("shared")]
    tuned = (
        TunedHyperparameter("own", 0.0, 1.0),
        TunedHyperparameter("shared", 0.0, 1.0, per_example=False),
        # the problem knows that weight decay has one value for all
        L2,
    )
    problem = regularised_problem(regularisers=[*spies, WeightDecay()])
    run = advanced(make_run(problem, 1, tuned=tuned, variant="stn"))
    assert [list(spy.seen[0].shape) for spy in spies] == [[8], []]
    assert len(set(spies[0].seen[0].tolist())) == 8
    assert not run.tuned.definitions["l2"].per_example


def test_whole_numbers_stay_whole_and_within_their_range():
    spy = Spy("count", lower=2.0, upper=5.0)
    problem = regularised_problem(regularisers=[spy])
    whole = TunedHyperparameter("count", 2, 6, whole=True)
    run = advanced(make_run(problem, 40, tuned=(whole,), scale=3.0, hyper_lr=1.0))
    seen = torch.cat([values.reshape(-1) for values in spy.seen]).tolist()
    assert set(seen) == {2.0, 3.0, 4.0, 5.0}
    assert set(run.history["count"]) <= set(seen) and len(set(run.history["count"])) > 1


# ---------------------------------------------------------------------------------------------------------------------
# incumbents


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_incumbents_weights_give_the_loss_it_tells(variant):
    problem = regularised_problem()
    run = make_run(problem, 24, variant=variant, training={"fixed": {"lr": 0.4}})
    told = []
    with run.loop.running():
        while not run.done:
            run.advance(2)
            values = run.values
            told.append((run.judge().loss, run.position, values))
    best = min(told, key=lambda each: each[0])
    assert (run.incumbent.val_loss, run.incumbent.step, run.incumbent.values) == best
    assert best[1] < 24, "weights after the incumbent's show that it was copied"
    assert loaded_and_judged(problem, run.incumbent.weights).loss == run.incumbent.val_loss


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("hyper_optimizer", ["rmsprop", "sgd", "adam"])
def test_training_that_diverges_spoils_neither_incumbent_nor_hyperparameters(variant, hyper_optimizer):
    held = {"fixed": {"lr": (0.05, 1e60)}}
    run = make_run(steps=20, variant=variant, hyper_optimizer=hyper_optimizer, training=held, train_steps=1)
    with run.loop.running():
        run.advance(10)
        good = run.judge().loss
        for _ in range(10):
            run.advance(1)
            assert not run.judge().loss < good
            assert all(map(math.isfinite, (*run.values.values(), *run.scales.values())))
    assert run.val_steps == 20 and not torch.isfinite(run.state.params).all()
    assert run.incumbent.step == 10 and run.incumbent.val_loss == good
    assert all(torch.isfinite(weight).all() for weight in run.incumbent.weights.values())
    assert all(torch.isfinite(slot).all() for slot in run.state_dict()["hyper_slots"])
    assert all(each.lower <= value <= each.largest for each, value in zip(TUNED, run.values.values(), strict=True))


def test_scales_stay_finite_however_far_they_are_driven():
    run = make_run(steps=4, hyper_optimizer="sgd", hyper_lr=1e6, entropy_weight=1.0, train_steps=1)
    scales = advanced(run).scales.values()
    assert all(math.isfinite(scale) and scale > 1e100 for scale in scales)
    assert all(map(math.isfinite, run.values.values()))


def test_a_loss_that_is_no_number_is_an_incumbent_until_there_is_one():
    run = make_run(steps=4, training={"fixed": {"lr": 1e200}})
    with run.loop.running():
        run.advance(2)
        first = run.judge().loss
        assert math.isnan(first) and run.incumbent.step == 2
        run.advance(2)
        run.judge()
        assert run.incumbent.step == 2
        good = make_run(steps=4)
        good.load_state_dict({**good.state_dict(), "incumbent": tuple(run.incumbent)})
        assert math.isfinite(good.judge().loss) and good.incumbent.step == 0


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def refusal(**arguments):
    with pytest.raises(InputError) as error:
        make_run(**arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tuned": ()}, "nothing to tune"),
        ({"tuned": (TunedHyperparameter("dropuot", 0, 0.5),)}, "did you mean 'dropout'?"),
        ({"tuned": (TunedHyperparameter("lr", 0, 1),)}, "'lr' is the optimizer's"),
        ({"tuned": (TunedHyperparameter("momentum", 0, 1),)}, "'momentum' is the optimizer's"),
        ({"tuned": (TunedHyperparameter("weight_decay", 0, 1),)}, "a regulariser such as WeightDecay"),
        ({"tuned": (TunedHyperparameter("dropout", 0, 1.2),)}, "from 0 to 1.2: its regulariser takes 0 to 1"),
        ({"tuned": (TunedHyperparameter("l2", -math.inf, 1),)}, "from -inf to 1: its regulariser takes 0 to inf"),
        ({"tuned": (TunedHyperparameter("cutout_length", 0, 3, whole=True),)}, "Cutout has no value for"),
        (
            {"tuned": (DROPOUT,), "training": {"fixed": {"cutout_holes": 1}}},
            "Cutout has no value for 'cutout_length'",
        ),
        ({"training": {"fixed": {"dropout": 0.3}}}, "'dropout' is both tuned and fixed"),
        ({"initial": {"dropout": 0.95}}, "'dropout' begins at 0.95"),
        ({"initial": {"dropout": 0.0}}, "'dropout' begins at 0.0: it must be within (0, 0.9)"),
        ({"initial": {"cutout_length": 5}}, "within [0, 4]"),
        ({"initial": {"dropout": [0.1, 0.2]}}, "'dropout' begins at [0.1, 0.2]"),
        ({"initial": {"label_smoothing": 0.1}}, "'label_smoothing', which is not tuned"),
        ({"scale": 1e-400}, "scale is 0.0"),
        ({"scale": 0}, "scale is 0"),
        ({"scale": "wide"}, "scale is 'wide'"),
        ({"variant": "delta_stn"}, "unknown variant 'delta_stn': choose one of stn, centered-stn, delta-stn"),
        ({"hyper_optimizer": "lamb"}, "'lamb'"),
        ({"train_steps": 0}, "train_steps is 0"),
        ({"val_steps": -1}, "val_steps is -1"),
        ({"val_batch_size": 2.5}, "val_batch_size is 2.5"),
        ({"warm_up": -1}, "warm_up is -1"),
        ({"warm_up": None}, "warm_up is None"),
        ({"hyper_lr": math.nan}, "hyper_lr is nan"),
        ({"entropy_weight": math.inf}, "entropy_weight is inf"),
    ],
)
def test_what_cannot_work_is_refused_before_training(arguments, words):
    assert words in refusal(**arguments)


def test_a_scale_that_is_nothing_in_the_weights_type_is_refused():
    x, y = images(40, seed=0)
    problem = regularised_problem(model=lambda: network().float(), train=(x.float(), y), val=(x.float(), y), test=None)
    assert "scale is 1e-60" in refusal(problem=problem, scale=1e-60)
    assert advanced(make_run(problem, 1, scale=1e-30)).done


def test_a_model_without_a_layer_that_responds_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return x[:, 0, :3, 0] * self.factor

    problem = regularised_problem(model=Scale, regularisers=[Cutout()])
    assert "no layer whose weights can respond" in refusal(problem=problem, tuned=TUNED[4:])


def test_an_argument_of_the_model_is_refused_as_such():
    problem = regularised_problem(model=lambda width=64: network())
    message = refusal(problem=problem, tuned=(TunedHyperparameter("width", 8, 64, whole=True),))
    assert "'width' is an argument of the model factory" in message


def test_the_train_losss_hyperparameters_can_be_tuned_without_regularisers():
    def penalised(output, target, *, params, l2):
        return F.cross_entropy(output, target) + l2 * sum(p.square().sum() for p in params.values())

    problem = regularised_problem(regularisers=[], train_loss=penalised)
    run = advanced(make_run(problem, tuned=(L2,), hyper_lr=0.1))
    assert len(set(run.history["l2"])) > 5
    assert_trained_alike(run, rtol=1e-12)
    assert "the train loss needs 'l2'" in refusal(problem=problem.replace(regularisers=[Dropout()]), tuned=(DROPOUT,))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_perturbation_for_all_is_the_same_for_every_example(variant, monkeypatch):
    tuned = [replace(each, per_example=False) for each in (DROPOUT, L2)]
    problem = regularised_problem(regularisers=[Dropout(), WeightDecay()])

    def run():
        initial = {name: INITIAL[name] for name in ("dropout", "l2")}
        return advanced(make_run(problem, STEPS, tuned=tuned, initial=initial, variant=variant, **CUTS))

    once = run()
    monkeypatch.setattr(TunedHyperparameters, "of_layers", lambda self, perturbations: perturbations)
    for_each = run()
    assert once.why_one_for_all is None and once.val_steps > 0
    for name, path in for_each.history.items():
        assert path == pytest.approx(once.history[name], rel=1e-9)
    torch.testing.assert_close(once.state.params, for_each.state.params)


@pytest.mark.parametrize("variant", VARIANTS)
def test_examples_that_can_be_told_apart_have_perturbations_of_their_own(variant):
    initial = {"dropout": INITIAL["dropout"]}
    problem = regularised_problem(regularisers=[Dropout(), WeightDecay()])
    run = make_run(problem, STEPS, tuned=(DROPOUT,), initial=initial, variant=variant, training={"fixed": {"l2": 0.0}})
    assert run.why_one_for_all is None and not run.tuned.one_for_all
    loop = run.loop
    with loop.running():
        own = len(loop.batches.of_step(0)[0])
        with unlike_batches(loop) as size:
            assert size != own and len(loop.batches.of_step(0)[0]) == size == loop.costs.step(0).examples
        assert len(loop.batches.of_step(0)[0]) == own == loop.costs.step(0).examples


class OfPacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 6, bidirectional=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[1][0][-1])


class OfGraphs(nn.Module):
    """Nodes of all graphs in one tensor, with the graph of each."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, batch):
        nodes, graphs, target = batch
        sums = torch.zeros(len(target), 6, dtype=nodes.dtype).index_add(0, graphs, torch.tanh(self.embed(nodes)))
        return self.head(sums)


def items(examples, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 6, (examples,), generator=generator).tolist()
    return [(torch.randn(length, 4, generator=generator, dtype=torch.float64), length % 2) for length in lengths]


def packed(examples):
    sequences, targets = zip(*examples, strict=True)
    return pack_sequence(sequences, enforce_sorted=False), torch.tensor(targets)


def graphs(examples):
    nodes, targets = zip(*examples, strict=True)
    of_nodes = torch.arange(len(nodes)).repeat_interleave(torch.tensor([len(each) for each in nodes]))
    return torch.cat(nodes), of_nodes, torch.tensor(targets)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("model", "collated", "forward", "said"),
    [
        (OfPacked, packed, None, "on a PackedSequence"),
        (OfGraphs, graphs, lambda model, batch: model(batch), "SelfTuningLinear: the perturbation is of"),
    ],
    ids=["packed sequences", "graphs"],
)
def test_examples_that_cannot_be_told_apart_have_one_perturbation(model, collated, forward, said, variant):
    problem = Problem(
        model=lambda: model().double(),
        train=items(40, 0),
        val=items(16, 1),
        train_loss=smoothed_cross_entropy,
        regularisers=[WeightDecay()],
        batch_size=8,
        eval_batch_size=8,
        collate_fn=collated,
        **({} if forward is None else {"forward": forward}),
    )
    run = make_run(problem, STEPS, tuned=[SMOOTHING, L2], initial={"l2": 1e-3}, variant=variant, **CUTS)
    assert said in run.why_one_for_all and "\n" not in run.why_one_for_all and run.tuned.one_for_all
    with run.loop.running():
        run.verify()
    advanced(run)
    weights = run.network.general_state_dict(run._present_inputs())
    evaluation = loaded_and_judged(problem, weights)
    with run.loop.running():
        assert run.judge().loss == pytest.approx(evaluation.loss, rel=1e-12)
    assert all(len(set(path)) > 1 for name, path in run.history.items() if name not in FIXED)
