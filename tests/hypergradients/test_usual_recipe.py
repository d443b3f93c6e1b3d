"""The usual recipe: clipping by norm, accumulated batches, averaged weights, autocast, and optimizers beside Adam."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from engine_problems import MODES, Values, assert_close, differentiate, double, make_loop, make_problem
from ray import tune
from tiny_problem import tiny_problem
from torch import Tensor, nn
from torch_loops import SGD, VALUES, assert_exact, train

from tune_hypergrad.budget import Budget
from tune_hypergrad.comparison.methods import Task, get_method
from tune_hypergrad.comparison.running.plan import Plan
from tune_hypergrad.comparison.running.retraining import Retraining
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import Optimizer, TrainingSettings, check_problem, hypergradient
from tune_hypergrad.regularisers import WeightDecay
from tune_hypergrad.trainables import STN, FixedSchedule, InnerRun

SEEDS = (3, 5)


class Sometimes(nn.Module):
    """A part of it has a gradient in some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) + self.sometimes(x) if float(x.detach()[0, 0]) > 0 else self.always(x)


def final_val_loss(trainable: Any, config: dict[str, Any], **settings: Any) -> float:
    """Of a trial that runs to its end."""
    trial = trainable.from_problem(tiny_problem(), check=False, **settings)(config=config)
    result: dict[str, Any] = {"done": False}
    while not result["done"]:
        result = trial.train()
    return float(result["val_loss"])


def assert_members_are_runs(problem: Any, values: Values, **settings: Any) -> None:
    """Each run of an ensemble at once is the one that it is by itself."""
    settings = {"steps": 5, "differentiation": "reverse", **settings}
    result = hypergradient(problem, values, seed=SEEDS, check=False, **settings)
    assert "runs at once" in result.reason
    for seed, member in zip(SEEDS, result.members, strict=True):
        own = hypergradient(problem, values, seed=seed, check=False, **settings)
        assert member.val_loss == pytest.approx(own.val_loss, rel=1e-12)
        assert_close(member.hypergradients, own.hypergradients, 1e-10)
        assert_close(member.params, own.params, 1e-10)


class TestClipNorm:
    @pytest.mark.parametrize("optimizer", VALUES)
    @pytest.mark.parametrize("clip", [0.3, 0.6])
    def test_is_torchs(self, optimizer: str, clip: float) -> None:
        """The second limit is between the norms of the steps' gradients, so that some are clipped and some are not."""
        fixed = {"eps": 1e-3} if optimizer == "adamw" else {}
        assert_exact(make_problem("batch_norm"), VALUES[optimizer], optimizer=optimizer, fixed=fixed, clip_norm=clip)

    def test_acts_where_the_gradient_is_longer(self) -> None:
        plain, loose, tight = (
            hypergradient(make_problem(), SGD, steps=3, clip_norm=clip, check=False).val_loss
            for clip in (None, 100.0, 0.1)
        )
        assert plain == loose != tight

    def test_of_a_gradient_of_zero(self) -> None:
        loop = make_loop(clip_norm=0.5)
        gradient = torch.zeros(loop.size, dtype=torch.float64, requires_grad=True)
        params, _ = loop.update(loop.initial_state().params, gradient, loop.initial_state().slots, {}, 0)
        (derivative,) = torch.autograd.grad(params.sum(), gradient)
        assert derivative.isfinite().all()

    def test_of_an_ensemble(self) -> None:
        assert_members_are_runs(make_problem("batch_norm"), SGD, clip_norm=0.5)

    def test_is_checked(self) -> None:
        check = check_problem(make_problem(), clip_norm=0.4)
        assert check.ok and set(check.errors) == {"forward", "reverse"}

    @pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
    def test_limits(self, limit: float) -> None:
        with pytest.raises(InputError, match=f"clip_norm is {limit}: give a positive number"):
            TrainingSettings(3, clip_norm=limit)

    def test_both_clips(self) -> None:
        with pytest.raises(InputError, match=r"clip_gradient is 1.0 and clip_norm 2.0: set one of them"):
            TrainingSettings(3, clip_gradient=1.0, clip_norm=2.0)


class TestAccumulate:
    """12 examples in batches of 3, two to a step."""

    @pytest.mark.parametrize("optimizer", VALUES)
    @pytest.mark.parametrize("architecture", ["batch_norm", "dropout"])
    def test_is_torchs(self, architecture: str, optimizer: str) -> None:
        problem = make_problem(architecture, batch_size=3, accumulate=2)
        fixed = {"eps": 1e-3} if optimizer == "adamw" else {}
        results = assert_exact(problem, VALUES[optimizer], optimizer=optimizer, fixed=fixed)
        for result in results.values():
            assert_close(result.hypergradients, results["forward"].hypergradients, 1e-9)

    def test_is_the_step_of_the_whole(self) -> None:
        """Where no module sees the batch, two batches of 3 are one of 6."""
        for mode in MODES:
            whole, parts = (
                differentiate(make_loop(make_problem(batch_size=size, accumulate=count)), SGD, mode)
                for size, count in ((6, 1), (3, 2))
            )
            assert parts.val_loss == pytest.approx(whole.val_loss, rel=1e-12)
            assert_close(parts.hypergradients, whole.hypergradients, 1e-10)
            assert (parts.cost.steps, parts.cost.examples) == (whole.cost.steps, whole.cost.examples)

    def test_counts(self) -> None:
        problem = make_problem(batch_size=3, accumulate=2)
        assert (problem.steps_per_epoch, problem.examples_per_step, problem.step_length(0)) == (2, 6, 6)
        assert make_loop(problem).costs.step(0).examples == 6
        assert make_loop(problem).costs.step(0).gradients == 1
        assert (
            make_loop(problem).costs.evaluation("val").gradients
            == make_loop(make_problem(batch_size=6)).costs.evaluation().gradients
        )
        epoch = [problem.place(step, number) for step in range(2) for number in range(2)]
        assert epoch == [(0, slice(begin, begin + 3)) for begin in (0, 3, 6, 9)]

    def test_the_last_step_of_a_pass(self) -> None:
        dropped = make_problem(batch_size=5, accumulate=2)
        kept = make_problem(batch_size=5, accumulate=2, drop_last=False)
        assert (dropped.steps_per_epoch, kept.steps_per_epoch) == (1, 2)
        assert [kept.batches_in(step) for step in range(4)] == [2, 1, 2, 1]
        assert [kept.step_length(step) for step in range(4)] == [10, 2, 10, 2]
        forward, *others = (differentiate(make_loop(kept), SGD, mode) for mode in MODES)
        assert forward.cost.examples == 34
        for other in others:
            assert_close(other.hypergradients, forward.hypergradients, 1e-9)

    def test_draws_of_their_own(self) -> None:
        loop = make_loop(make_problem("dropout", batch_size=3, accumulate=2))
        draws = []
        with loop.running():
            for place in ((0, 0), (0, 1), (1, 0), (0, 0)):
                loop.seed_model(*place)
                draws.append(float(torch.rand(())))
        assert draws[0] == draws[3] and len(set(draws)) == 3

    def test_a_parameter_with_a_gradient_in_some_batches(self) -> None:
        assert_exact(make_problem(Sometimes, batch_size=2, accumulate=2), SGD, modes=("reverse",))

    def test_of_an_ensemble(self) -> None:
        assert_members_are_runs(make_problem("batch_norm", batch_size=3, accumulate=2), SGD)

    def test_is_checked(self) -> None:
        check = check_problem(make_problem("batch_norm", batch_size=3, accumulate=2))
        assert check.ok and set(check.errors) == {"forward", "reverse"}

    def test_more_than_there_is(self) -> None:
        with pytest.raises(
            InputError, match=r"accumulate 5 batches of 3 are more than the training split's 12 examples"
        ):
            make_problem(batch_size=3, accumulate=5)
        with pytest.raises(InputError, match="accumulate is 0: it must be a whole number of at least 1"):
            make_problem(accumulate=0)


class TestAverage:
    @pytest.mark.parametrize("optimizer", VALUES)
    def test_is_that_of_a_loop_in_torch(self, optimizer: str) -> None:
        """By every hyperparameter and by the decay, of which the second window is another one."""
        fixed = {"eps": 1e-3} if optimizer == "adamw" else {}
        values = {**VALUES[optimizer], "ema": double(0.7, 0.9)}
        results = assert_exact(make_problem("batch_norm"), values, optimizer=optimizer, fixed=fixed, ema=0.5)
        trained = train(make_problem("batch_norm"), values, optimizer=optimizer, fixed=fixed, ema=0.5).tensors()
        for result in results.values():
            found = {**result.params, **result.buffers}
            assert found.keys() == trained.keys()
            for name, tensor in trained.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("horizon", [1, 2])
    def test_modes_agree_on_truncated_hypergradients(self, horizon: int) -> None:
        loop, values = make_loop(ema=0.8), {**SGD, "ema": double(0.7, 0.9)}
        forward, *others = (differentiate(loop, values, mode, horizon=horizon) for mode in MODES)
        for other in others:
            assert_close(other.hypergradients, forward.hypergradients, 1e-9)

    def test_a_decay_of_zero_is_no_average(self) -> None:
        plain, averaged = (hypergradient(make_problem(), SGD, steps=4, ema=ema, check=False) for ema in (None, 0.0))
        assert averaged.val_loss == plain.val_loss
        assert_close(averaged.hypergradients, plain.hypergradients, 1e-12)

    def test_a_parameter_that_begins_late(self) -> None:
        """All weights are averaged after every step, whether they have moved or not."""
        assert_exact(make_problem(Sometimes, batch_size=2), SGD, modes=("reverse",), ema=0.6)

    def test_of_an_ensemble(self) -> None:
        assert_members_are_runs(make_problem("batch_norm"), {**SGD, "ema": double(0.7, 0.9)}, ema=0.5)

    def test_is_checked(self) -> None:
        check = check_problem(make_problem("batch_norm"), ema=0.6)
        assert check.ok and set(check.errors) == {"forward", "reverse"}

    def test_values(self) -> None:
        with pytest.raises(InputError, match=r"ema is 1.0: give the average's decay, at least 0 and below 1"):
            TrainingSettings(3, ema=1.0)
        with pytest.raises(InputError, match=r"'ema' is \[1.5\]: an average's decay is between 0 and 1"):
            hypergradient(make_problem(), {"ema": double(1.5)}, steps=3, ema=0.5)
        with pytest.raises(InputError, match="'ema' is given, but no average is kept: set ema to its decay"):
            hypergradient(make_problem(), {"ema": double(0.5)}, steps=3)

    def test_trials_have_it_as_a_setting_and_as_a_hyperparameter(self) -> None:
        steps, lr = 6, {"lr": 0.3}
        losses = {
            name: final_val_loss(trainable, config, steps=steps, ema=ema)
            for name, trainable, config, ema in (
                ("none", FixedSchedule, lr, None),
                ("setting", FixedSchedule, lr, 0.6),
                ("hyperparameter", FixedSchedule, {**lr, "ema": 0.6}, 0.9),
                ("differentiated", InnerRun, {**lr, "ema": 0.6}, 0.9),
            )
        }
        assert losses["setting"] == losses["hyperparameter"] == pytest.approx(losses["differentiated"], rel=1e-12)
        assert losses["setting"] != losses["none"]

    def test_a_self_tuning_network_has_none(self) -> None:
        problem = tiny_problem(train_loss=None, regularisers=(WeightDecay(),))
        with pytest.raises(InputError, match="a self-tuning network has no average of weights to judge: leave ema out"):
            STN.from_problem(problem, steps=6, ema=0.9, space={"l2": tune.loguniform(1e-4, 1e-1)})


class TestAutocast:
    """bfloat16 has 8 bits: relative errors of 1 / 256 in every product, where float32 has 1 / 2**24."""

    @pytest.mark.parametrize(
        "architecture", ["mlp", "batch_norm", "conv", "layer_norm", "dropout", "attention", "lstm"]
    )
    def test_is_torchs(self, architecture: str) -> None:
        """Training is plain torch's under autocast; derivatives are those of float32, to that precision."""
        problem = make_problem(architecture, dtype=torch.float32, batch_size=6)
        values = {name: value.float() for name, value in SGD.items()}
        expected = train(problem, values, autocast="bfloat16").val_loss
        exact = {mode: differentiate(make_loop(problem), values, mode) for mode in MODES}
        for mode in MODES:
            found = differentiate(make_loop(problem, autocast="bfloat16"), values, mode)
            assert found.val_loss != exact[mode].val_loss
            assert found.val_loss == pytest.approx(expected, rel=2e-3)
            assert found.val_loss == pytest.approx(exact[mode].val_loss, rel=2e-2)
            assert all(p.dtype == torch.float32 for p in found.params.values())
            assert_close(found.hypergradients, exact[mode].hypergradients, 0.1)

    def test_modes_agree(self) -> None:
        """As rounding lets them: every mode goes through the same casts."""
        problem = make_problem("mlp", dtype=torch.float32, batch_size=6)
        values = {name: value.float() for name, value in SGD.items()}
        forward, *others = (differentiate(make_loop(problem, autocast="bfloat16"), values, mode) for mode in MODES)
        for other in others:
            assert_close(other.hypergradients, forward.hypergradients, 2e-2)

    def test_a_float64_model_is_left_as_it_is(self) -> None:
        plain, under = (
            hypergradient(make_problem(), SGD, steps=3, autocast=a, check=False) for a in (None, "bfloat16")
        )
        assert plain.val_loss == under.val_loss
        assert_close(under.hypergradients, plain.hypergradients, 1e-14)

    def test_of_an_ensemble(self) -> None:
        problem = make_problem("dropout", dtype=torch.float32)
        values = {name: value.float() for name, value in SGD.items()}
        result = hypergradient(problem, values, steps=4, seed=SEEDS, differentiation="reverse", autocast="bfloat16")
        assert "runs at once" in result.reason
        for seed, member in zip(SEEDS, result.members, strict=True):
            own = hypergradient(problem, values, steps=4, seed=seed, differentiation="reverse", autocast="bfloat16")
            assert member.val_loss == pytest.approx(own.val_loss, rel=1e-2)
            assert_close(member.hypergradients, own.hypergradients, 5e-2)

    def test_the_check_says_what_it_compares(self) -> None:
        check = check_problem(make_problem("conv", dtype=torch.float32), autocast="bfloat16")
        assert check.ok and set(check.errors) == {"forward", "reverse"}
        assert "compared in float64, which autocast leaves as it is" in check.message

    def test_names(self) -> None:
        with pytest.raises(InputError, match=r"autocast is 'float16': give 'bfloat16', or None"):
            TrainingSettings(3, autocast="float16")


TUNED: dict[str, Values] = {
    "lion": {"lr": double(0.03, 0.05), "weight_decay": double(0.1)},
    "schedule_free_adamw": {"lr": double(0.03, 0.05), "beta1": double(0.8), "weight_decay": double(0.1)},
    "adafactor": {"lr": double(0.03, 0.05), "beta2_decay": double(-0.7), "weight_decay": double(0.1)},
}


class TestFurtherOptimizers:
    """Their equations are tested in test_optimizers.py, their derivatives in test_hypergradients.py."""

    @pytest.mark.parametrize("optimizer", TUNED)
    def test_of_an_ensemble(self, optimizer: str) -> None:
        fixed = {"eps": 1e-3} if optimizer == "schedule_free_adamw" else {}
        assert_members_are_runs(make_problem("dropout"), TUNED[optimizer], optimizer=optimizer, fixed=fixed)

    @pytest.mark.parametrize("optimizer", TUNED)
    def test_parameters_without_a_gradient_stay(self, optimizer: str) -> None:
        """By a loop in torch, which steps every parameter by itself."""
        problem = make_problem(Sometimes, batch_size=2)
        check = check_problem(problem, TUNED[optimizer], steps=4, optimizer=optimizer, modes=("reverse",))
        assert check.ok and check.errors["reverse"] < 1e-4

    @pytest.mark.parametrize("optimizer", TUNED)
    def test_with_all_of_the_recipe(self, optimizer: str) -> None:
        problem = make_problem("dropout", batch_size=3, accumulate=2)
        ema = None if optimizer == "schedule_free_adamw" else 0.7
        check = check_problem(problem, TUNED[optimizer], optimizer=optimizer, clip_norm=0.5, ema=ema)
        assert check.ok and set(check.errors) == {"forward", "reverse"}

    @pytest.mark.parametrize("optimizer", ["lion", "adafactor"])
    def test_a_gradient_that_is_nothing_but_rounding(self, optimizer: str) -> None:
        """A bias before a batch normalisation has a gradient of 0, whose rounding error decides a step."""
        check = check_problem(make_problem("batch_norm"), optimizer=optimizer)
        assert check.ok and not check.errors
        assert "not compared with finite differences: rounding decides how it trains" in check.message

    def test_schedule_free_adamw_reports_its_average(self) -> None:
        loop = make_loop(optimizer="schedule_free_adamw", fixed={"lr": 0.05})
        with loop.running():
            state = loop.run({})
            assert loop.optimizer.slots[1] == "average" and not torch.equal(state.slots[1], state.params)
            judged = loop.evaluate(state).loss
        result = differentiate(loop, {"weight_decay": double(0.0)}, "reverse")
        assert result.val_loss == pytest.approx(judged, rel=1e-12)
        assert torch.equal(loop.flatten(result.params), state.slots[1])

    def test_what_averages_itself_takes_no_ema(self) -> None:
        with pytest.raises(InputError, match=r"'schedule_free_adamw' averages the weights .* itself: leave ema out"):
            make_loop(optimizer="schedule_free_adamw", ema=0.9)

    def test_a_self_tuning_network_judges_the_weights_it_trains(self) -> None:
        problem = tiny_problem(train_loss=None, regularisers=(WeightDecay(),))
        space = {"l2": tune.loguniform(1e-4, 1e-1)}
        with pytest.raises(InputError, match="a self-tuning network has no average of weights to judge"):
            STN.from_problem(problem, steps=6, optimizer="schedule_free_adamw", space=space)
        with pytest.raises(InputError, match="hyper_optimizer 'schedule_free_adamw' moves an average of weights"):
            STN.from_problem(problem, steps=6, hyper_optimizer="schedule_free_adamw", space=space)

    @pytest.mark.parametrize("optimizer", ["lion", "adafactor"])
    def test_a_self_tuning_network_trains_by_them(self, optimizer: str) -> None:
        problem = tiny_problem(train_loss=None, regularisers=(WeightDecay(),), batch_size=6, accumulate=2)
        settings = {"optimizer": optimizer, "warm_up": 0, "clip_norm": 0.5}
        space = {"l2": tune.loguniform(1e-4, 1e-1)}
        trial = STN.from_problem(problem, steps=8, space=space, reports=1, **settings)(config={"lr": 0.01})
        result = trial.train()
        assert result["done"] and result["cost/examples"] == 8 * 12
        assert result["val_loss"] < 1.5


def tanh_descent(name: str = "tanh", lr: float = 0.1) -> Optimizer:
    def update(params: Tensor, gradient: Tensor, slots: Any, h: Any, step: int) -> Any:
        return params - h["lr"] * torch.tanh(gradient), slots

    return Optimizer(name, update, (), {"lr": lr})


class TestOwnOptimizer:
    """An `Optimizer` wherever an optimizer's name is taken."""

    def plan(self, optimizer: str | Optimizer, space: dict[str, Any] | None = None) -> Plan:
        task = Task(tiny_problem(test=None), {"lr": tune.loguniform(1e-3, 1), **(space or {})}, 12, optimizer)
        resources = {"cpu": 1}
        return Plan(tiny_problem(), task, (get_method("rs"),), Budget(60), (0,), resources)

    def test_its_records_are_the_same_in_every_process_and_tell_another_one(self) -> None:
        written = [json.dumps(self.plan(each).settings()) for each in (tanh_descent(), tanh_descent())]
        assert written[0] == written[1]
        assert json.loads(written[0])["optimizer"] == "tanh"
        others = tanh_descent("other"), tanh_descent(lr=0.2), "sgd"
        assert all(json.dumps(self.plan(other).settings()) != written[0] for other in others)

    def test_its_records_in_a_space(self) -> None:
        written = [
            self.plan("sgd", {"optimizer": tune.choice(["sgd", tanh_descent(lr=lr)])}).settings()["space"]
            for lr in (0.1, 0.1, 0.2)
        ]
        assert written[0] == written[1] != written[2]
        with pytest.raises(InputError, match="two optimizers in the search space are called 'tanh': rename one"):
            self.plan("sgd", {"optimizer": tune.choice([tanh_descent(), tanh_descent(lr=0.2)])})

    def test_retrainings_know_it_by_its_name(self) -> None:
        space = {"optimizer": tune.choice(["sgd", tanh_descent()])}
        plan = self.plan("sgd", space)
        retrained = Retraining().trainable(plan.task)(config={"optimizer": "tanh", "lr": 0.3})
        expected = final_val_loss(FixedSchedule, {"optimizer": tanh_descent(), "lr": 0.3}, steps=12)
        result: dict[str, Any] = {"done": False}
        while not result["done"]:
            result = retrained.train()
        assert result["val_loss"] == expected != final_val_loss(FixedSchedule, {"lr": 0.3}, steps=12)
