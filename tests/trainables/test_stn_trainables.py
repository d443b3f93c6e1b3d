"""Self-tuning networks as trials: results, checkpoints, and life under searchers, schedulers and failures."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from self_tuning import EPOCH, FIXED, Spy, loaded_and_judged, regularised_problem
from test_faults import KillTrial
from test_trainables import make, refusal, run_to_end
from tiny_problem import numbers, ours

from tune_hypergrad import STN, BOHBSearch, CenteredSTN, DeltaSTN, FixedSchedule, RandomSearch, Schedule
from tune_hypergrad.budget import Cost
from tune_hypergrad.problem import Problem
from tune_hypergrad.regularisers import Dropout, EmbeddingDropout, WeightDecay

EPOCHS = 4
SPACE = {
    "dropout": tune.uniform(0, 0.9),
    "l2": tune.loguniform(1e-5, 1e-1),
    "mixup": tune.uniform(0, 2),
    "input_noise": 0.1,
    "cutout_length": tune.randint(0, 5),
    "cutout_holes": tune.randint(0, 4),
}
TUNED = [name for name in SPACE if name != "input_noise"]
SETTINGS = {"space": SPACE, "steps": EPOCHS * EPOCH, "fixed": FIXED, "warm_up": 1, "train_steps": 2, "hyper_lr": 0.05}
CLASSES = {"stn": STN, "centered-stn": CenteredSTN, "delta-stn": DeltaSTN}


def made(config=None, trainable=DeltaSTN, **settings):
    return make(trainable, config, regularised_problem(), **{**SETTINGS, **settings})


def saved_by(trial, folder):
    trial.save(str(folder))
    return Schedule.load(folder / "schedule.json"), torch.load(folder / "best_weights.pt", weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# driven by hand


@pytest.mark.parametrize("trainable", CLASSES.values())
def test_a_result_for_every_epoch(trainable):
    results = run_to_end(made(trainable=trainable))
    assert [result["cost/steps"] for result in results] == [EPOCH, 2 * EPOCH, 3 * EPOCH, 4 * EPOCH]
    assert [result["run/step"] for result in results] == [result["run/steps"] for result in results]
    assert [result["run/step"] for result in results] == [EPOCH, 2 * EPOCH, 3 * EPOCH, 4 * EPOCH]
    figures = [f"{split}_{figure}" for split in ("val", "test") for figure in ("loss", "accuracy")]
    figures += ["objective"]
    schedule = [f"schedule/{name}" for name in TUNED]
    run = ["run/step", "run/steps"]
    expected = {*figures, *schedule, *(f"best_{name}" for name in (*figures, *schedule)), *Cost().as_result(), *run}
    for result in results:
        assert set(ours(result)) | {key for key in result if "seconds" in key and "cost" in key} == {
            *expected,
            *(f"scale/{name}" for name in TUNED),
            "done",
        }
        assert all(isinstance(value, float | int | bool) for value in ours(result).values())
    assert results[0]["schedule/dropout"] == pytest.approx(0.45) and results[0]["scale/dropout"] == 1
    assert len({result["schedule/dropout"] for result in results}) == EPOCHS, "nothing is tuned in the first epoch"


def test_the_number_of_results_can_be_set():
    assert [result["cost/steps"] for result in run_to_end(made(reports=3))] == [7, 14, 20]
    assert len(run_to_end(made({"reports": 1}))) == 1


@pytest.mark.parametrize(("variant", "trainable"), CLASSES.items())
def test_the_classes_differ_by_their_variant_only(variant, trainable):
    own = run_to_end(made(trainable=trainable))
    for other in CLASSES.values():
        assert [ours(r) for r in run_to_end(made({"variant": variant}, other))] == [ours(r) for r in own]


def test_the_best_results_are_those_of_the_lowest_validation_loss():
    results = run_to_end(made(fixed={"lr": (0.05, 1.5)}, reports=20))
    losses = [result["val_loss"] for result in results]
    assert min(losses) != losses[-1]
    for count, result in enumerate(results, start=1):
        best = results[int(np.argmin(losses[:count]))]
        for name in ("val_loss", "test_loss", "val_accuracy", *(f"schedule/{name}" for name in TUNED)):
            assert result[f"best_{name}"] == best[name]


@pytest.mark.parametrize(
    ("lr", "length"),
    # the best result, then two without progress; or none is ever better than the first, which is no number
    [((*[0.05] * 3, *[1e200] * 7), 5), (1e200, 3)],
)
def test_patience_ends_a_run_without_progress(lr, length):
    settings = {"steps": 10 * EPOCH, "fixed": {"lr": lr}}
    results = run_to_end(made(patience=2, **settings))
    losses = [result["val_loss"] for result in results]
    assert len(results) == length and repr(results[-1]["best_val_loss"]) == repr(losses[length - 3])
    assert len(run_to_end(made(**settings))) == 10


def test_a_checkpoint_holds_the_best_weights_and_the_schedule_of_every_step(tmp_path):
    problem = regularised_problem()
    trial = make(DeltaSTN, None, problem, **SETTINGS)
    result = run_to_end(trial)[-1]
    schedule, weights = saved_by(trial, tmp_path)
    assert loaded_and_judged(problem, weights).loss == result["best_val_loss"]
    assert loaded_and_judged(problem, weights).metrics["accuracy"] == result["best_val_accuracy"]
    assert set(schedule.values) == {*SPACE, *FIXED}
    assert all(len(schedule.values[name]) == EPOCHS * EPOCH for name in TUNED)
    assert len(set(schedule.values["dropout"])) > 5
    assert {name: schedule.values[name] for name in (*FIXED, "input_noise")} == {
        "lr": (0.05,),
        "momentum": (0.9,),
        "input_noise": (0.1,),
    }


def test_there_is_neither_before_the_first_step(tmp_path):
    made().save(str(tmp_path))
    assert not (tmp_path / "schedule.json").exists() and not (tmp_path / "best_weights.pt").exists()


def replayed(problem, schedule, steps):
    """The result of plain training with a schedule."""
    return run_to_end(make(FixedSchedule, schedule.to_config(), problem, steps=steps, reports=1))[-1]


@pytest.mark.parametrize("epochs", [2, EPOCHS])
def test_a_fixed_schedule_replays_a_run_ended_or_cut_short_to_its_result(tmp_path, epochs):
    problem = regularised_problem()
    trial = make(DeltaSTN, None, problem, **{**SETTINGS, "fixed": {"lr": (0.1, 0.05, 0.02, 0.01)}})
    result = [trial.train() for _ in range(epochs)][-1]
    schedule, _ = saved_by(trial, tmp_path)
    found = replayed(problem, schedule, epochs * EPOCH)
    for name in ("val_loss", "test_loss", "val_accuracy"):
        assert found[name] == pytest.approx(result[name], rel=1e-10)


@pytest.mark.parametrize("trainable", CLASSES.values())
def test_a_replay_gives_regularisers_the_values_of_each_step(tmp_path, trainable):
    spy = Spy("spied", upper=1.0)
    problem = regularised_problem(regularisers=[spy, Dropout()])
    space = {"spied": tune.uniform(0, 1), "dropout": tune.uniform(0, 0.9)}
    trial = make(trainable, None, problem, **{**SETTINGS, "space": space})
    run_to_end(trial)
    schedule, _ = saved_by(trial, tmp_path)
    replay = make(FixedSchedule, schedule.to_config(), problem, steps=EPOCHS * EPOCH)
    spy.seen.clear()
    assert math.isfinite(run_to_end(replay)[-1]["val_loss"])
    assert tuple(float(value) for value in spy.seen) == schedule.values["spied"]
    assert len(set(schedule.values["spied"])) > 5


def test_a_config_says_where_hyperparameters_begin_and_what_is_held(tmp_path):
    begun = {"dropout": 0.2, "l2": 1e-4, "cutout_length": 3}
    trial = made({**begun, "lr": 0.01, "label_smoothing": 0.1}, initial={"dropout": 0.7, "mixup": 0.5})
    by_settings = made(initial={**begun, "mixup": 0.5}, fixed={**FIXED, "lr": 0.01, "label_smoothing": 0.1})
    assert [ours(r) for r in run_to_end(trial)] == [ours(r) for r in run_to_end(by_settings)]
    schedule, _ = saved_by(trial, tmp_path)
    first = {name: values[0] for name, values in schedule.values.items()}
    assert first == pytest.approx(
        {**begun, "mixup": 0.5, "cutout_holes": 2, **FIXED, "lr": 0.01, "label_smoothing": 0.1, "input_noise": 0.1}
    )


def test_a_config_overrides_settings_and_the_length_in_epochs():
    config = {"budget": 2, "batch_size": 4, "entropy_weight": 1.0, "seed": 5, "val_steps": 2}
    overridden = run_to_end(made(config))
    expected = run_to_end(
        make(
            DeltaSTN,
            None,
            regularised_problem(batch_size=4),
            **{**SETTINGS, "steps": 20, "entropy_weight": 1.0, "seed": 5, "val_steps": 2},
        )
    )
    assert [ours(r) for r in overridden] == [ours(r) for r in expected]
    assert [r["cost/examples"] for r in overridden] == [40, 80]


@pytest.mark.parametrize("trainable", CLASSES.values())
def test_restoring_at_any_result_ends_with_the_same_numbers(tmp_path, trainable):
    settings = {"patience": 9, "reports": 5}
    trial, results = made(trainable=trainable, **settings), []
    while not results or not results[-1]["done"]:
        results.append(trial.train())
        trial.save(str(tmp_path / str(len(results))))
    for begun in range(1, len(results)):
        restored = made(trainable=trainable, **settings)
        restored.restore(str(tmp_path / str(begun)))
        later = run_to_end(restored)
        assert [repr(ours(r)) for r in later] == [repr(ours(r)) for r in results[begun:]], f"from result {begun}"
        assert saved_by(restored, tmp_path / "again")[0] == saved_by(trial, tmp_path / "whole")[0]


def test_patience_is_counted_across_a_restore(tmp_path):
    settings = {"steps": 10 * EPOCH, "fixed": {"lr": 1e200}, "patience": 3}
    trial = made(**settings)
    for _ in range(3):
        trial.train()
    trial.save(str(tmp_path))
    restored = made(**settings)
    restored.restore(str(tmp_path))
    assert restored.train()["done"]


def test_a_reused_actor_does_what_a_fresh_one_does():
    config = {"dropout": 0.2, "lr": 0.01}
    fresh = run_to_end(made(config))
    reused = made({"seed": 5, "variant": "stn", "batch_size": 4, "mixup": 1.5})
    run_to_end(reused)
    assert reused.reset(config)
    assert [ours(r) for r in run_to_end(reused)] == [ours(r) for r in fresh]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"space": {"dropuot": tune.uniform(0, 0.5)}}, "did you mean 'dropout'?"),
        ({"space": {**SPACE, "lr": tune.loguniform(1e-3, 1)}}, "'lr' is the optimizer's"),
        ({"space": {**SPACE, "momentum": tune.uniform(0, 1)}}, "'momentum' is the optimizer's"),
        ({"space": {**SPACE, "weight_decay": tune.uniform(0, 1)}}, "a regulariser such as WeightDecay"),
        ({"space": {**SPACE, "dropout": tune.uniform(0, 1.2)}}, "its regulariser takes 0 to 1"),
        ({"space": {**SPACE, "dropout": tune.choice([0.1, 0.2])}}, "'dropout' cannot be tuned"),
        ({"space": {"cutout_length": tune.randint(0, 5)}}, "Cutout has no value for 'cutout_holes'"),
        ({"space": {"input_noise": 0.1}}, "nothing to tune"),
        ({"space": {}}, "nothing to tune"),
        ({"initial": {"dropout": 0.95}}, "'dropout' begins at 0.95: it must be within (0, 0.9)"),
        ({"initial": {"dropuot": 0.5}}, "did you mean 'dropout'?"),
        ({"initial": {"l2": "small"}}, "'l2' begins at 'small'"),
        ({"fixed": {"dropout": 0.1}}, "'dropout' is both tuned and fixed"),
        ({"fixed": {"input_noise": -0.1}, "space": {"dropout": SPACE["dropout"]}}, "'input_noise' is -0.1"),
        ({"fixed": {"learning_rate": 0.1}}, "'learning_rate'"),
        ({"per_minibatch": ("lr",)}, "per_minibatch has 'lr'"),
        ({"scale": 1e-400}, "scale is 0.0"),
        ({"patience": 0}, "patience is 0"),
        ({"patience": True}, "patience is True"),
        ({"patience": 2.5}, "patience is 2.5"),
        ({"reports": 0}, "reports is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"variant": "delta"}, "unknown variant 'delta'"),
        ({"warmup": 3}, "no setting 'warmup'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_trial(settings, words):
    assert words in refusal(DeltaSTN.from_problem, regularised_problem(), **{**SETTINGS, **settings})


def test_a_model_without_a_layer_that_responds_is_refused():
    problem = regularised_problem(model=lambda: _Bias().double(), regularisers=[WeightDecay(parameters="*")])
    space = {"l2": SPACE["l2"]}
    words = refusal(DeltaSTN.from_problem, problem, **{**SETTINGS, "space": space})
    assert "no layer whose weights can respond" in words


class _Bias(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x[:, 0, :3, 0] + self.bias


class _Words(torch.nn.Module):
    """Tells whole sentences apart; where its layers look for examples is for `how` to say."""

    def __init__(self, how):
        super().__init__()
        self.how, self.words, self.positions = how, torch.nn.Embedding(11, 6), torch.nn.Embedding(20, 6)
        self.dropout, self.hidden = torch.nn.Dropout(0.1), torch.nn.Linear(6, 6)
        self.head = torch.nn.Linear(6, 3)
        self.positions.requires_grad_(how != "frozen positions")

    def forward(self, words):
        b, t = words.shape
        positions = torch.arange(t)
        if self.how not in ("positions", "frozen positions"):
            positions = positions.expand(1 if self.how == "one row of positions" else b, t)
        x = self.words(words) + self.positions(positions)
        if self.how == "dropout on all":
            x = self.dropout(x.flatten(0, 1)).unflatten(0, (b, t))
        if self.how == "times first":
            x = self.hidden(x.transpose(0, 1)).transpose(0, 1)
        if self.how == "decoder on all":
            x = self.hidden(x.flatten(0, 1)).unflatten(0, (b, t))
        if self.how == "own error" and hasattr(self.positions, "response"):
            raise KeyError("of its own")
        return self.head(self.dropout(x).mean(1))


def sentences(examples):
    generator = torch.Generator().manual_seed(examples)
    words = torch.randint(11, (examples, 7), generator=generator)
    return words, words[:, 0] % 3


def of_words(how, **fields):
    """Batches of as many examples as a sentence has words, so that either passes for the other."""
    given = {"train": sentences(70), "val": sentences(14), "batch_size": 7, "regularisers": [Dropout()]}
    return Problem(lambda: _Words(how), **{**given, **fields})


def words_settings(**settings):
    return {"space": {"dropout": SPACE["dropout"]}, "steps": 20, "warm_up": 0, **settings}


@pytest.mark.parametrize("trainable", CLASSES.values())
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("dropout on all", "dropout has rates for 5 examples, but acts on a tensor of shape (35, 6)"),
        ("own error", "a self-tuning step on 5 examples fails: KeyError: 'of its own'"),
    ],
)
def test_a_network_that_loses_its_examples_is_refused_before_any_trial(trainable, how, words):
    assert words in refusal(trainable.from_problem, of_words(how), **words_settings())


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("positions", "SelfTuningEmbedding: the perturbation is of 5 examples, but the input of shape (7,)"),
        ("times first", "SelfTuningLinear: the perturbation is of 5 examples, but the input of shape (7, 5, 6)"),
        ("decoder on all", "SelfTuningLinear: the perturbation is of 5 examples, but the input of shape (35, 6)"),
    ],
)
@pytest.mark.parametrize("trainable", CLASSES.values())
def test_a_network_that_loses_its_examples_has_one_perturbation_for_all(trainable, how, words, caplog):
    trainable.from_problem(of_words(how), **words_settings())
    assert f"one perturbation serves a whole minibatch: {words}" in caplog.text
    found = run_to_end(make(trainable, None, of_words(how), **words_settings()))
    asked_for = run_to_end(make(trainable, None, of_words(how), **words_settings(per_minibatch=("dropout",))))
    assert [ours(result) for result in found] == [ours(result) for result in asked_for]
    caplog.clear()
    trainable.from_problem(of_words(how), **words_settings(per_minibatch=("dropout",)))
    assert "one perturbation" not in caplog.text


def test_embedding_dropout_of_positions_is_refused_before_any_trial():
    problem = of_words("frozen positions", regularisers=[EmbeddingDropout("dropout")])
    words = refusal(DeltaSTN.from_problem, problem, **words_settings())
    assert "dropout has rates for 5 examples, but acts on a tensor of shape (7, 6)" in words
    problem = problem.replace(regularisers=[EmbeddingDropout("dropout", "words")])
    assert run_to_end(make(DeltaSTN, None, problem, **words_settings()))


@pytest.mark.parametrize("trainable", CLASSES.values())
@pytest.mark.parametrize("how", ["positions of each", "one row of positions"])
def test_a_network_that_keeps_its_examples_is_tried_out_and_leaves_no_trace(trainable, how):
    def run():
        return [ours(result) for result in run_to_end(make(trainable, None, of_words(how), **words_settings()))]

    expected = run()
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    trainable.from_problem(of_words(how), **words_settings())
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert run() == expected


class _Images(torch.nn.Module):
    """Three classes of images; how its middle layer is put to use is for `how` to say."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.middle = how, torch.nn.Linear(36, 6), torch.nn.Linear(6, 6)
        self.dropout, self.head = torch.nn.Dropout(0.1), torch.nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x.flatten(1)))
        if self.how == "functional":
            h = h @ self.middle.weight.T
        elif self.how == "no_grad":
            with torch.no_grad():
                other = self.middle(h)
            h = h + other
        elif self.how == "evaluation without gradient":
            with torch.set_grad_enabled(self.training):
                h = torch.tanh(self.middle(h))
        elif self.how == "by type":
            h = self.middle(h) if type(self.middle) is torch.nn.Linear else h
        elif self.how == "function":
            h = _Cube.apply(self.middle(h))
        else:
            h = self.middle(h)
        logits = self.head(self.dropout(h))
        return {"logits": logits, "loss": logits.logsumexp(1).mean()} if self.how == "loss" else logits


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def of_images(how, **fields):
    return regularised_problem(model=lambda: _Images(how).double(), regularisers=[Dropout()], **fields)


def images_settings(**settings):
    return {**SETTINGS, "space": {"dropout": SPACE["dropout"]}, **settings}


def loss_in_output(output, target):
    return output["loss"] - output["logits"].gather(1, target[:, None]).mean()


NOT_LINEARISED = [
    ("no_grad", {}, "the responses of first, middle are not what a linearised prediction takes them for"),
    ("function", {}, "the model has no forward-mode derivative"),
    ("loss", {"loss": loss_in_output, "train_loss": None, "metrics": {}}, "the model gives a loss itself, of shape []"),
]


@pytest.mark.parametrize(("how", "fields", "words"), NOT_LINEARISED)
def test_what_cannot_be_linearised_is_refused_before_any_trial(how, fields, words):
    said = refusal(DeltaSTN.from_problem, of_images(how, **fields), **images_settings())
    assert words in said and "choose the variant stn or centered-stn" in said
    linearised = images_settings(linearised_validation=True)
    assert words in refusal(STN.from_problem, of_images(how, **fields), **linearised)


@pytest.mark.parametrize("trainable", [STN, CenteredSTN])
@pytest.mark.parametrize(("how", "fields", "_"), NOT_LINEARISED)
def test_the_other_variants_train_it(trainable, how, fields, _):
    trainable.from_problem(of_images(how, **fields), **images_settings())
    results = run_to_end(make(trainable, None, of_images(how, **fields), **images_settings()))
    assert results[-1]["val_loss"] < results[0]["val_loss"]


@pytest.mark.parametrize("trainable", CLASSES.values())
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("by type", "the responses of first, middle, head are not those of the plain model's weights"),
        ("evaluation without gradient", "the responses of first, middle have no gradient, or a part of it, in evaluat"),
    ],
)
def test_models_that_are_another_once_converted_or_evaluated_are_refused_before_any_trial(trainable, how, words):
    assert words in refusal(trainable.from_problem, of_images(how), **images_settings())


@pytest.mark.parametrize("trainable", CLASSES.values())
def test_weights_used_elsewhere_are_warned_of_and_reported_as_trained(caplog, tmp_path, trainable):
    problem = of_images("functional")
    trainable.from_problem(problem, **images_settings())
    said = [record.getMessage() for record in caplog.records]
    assert "these modules' weights do not respond to hyperparameters: middle" in said
    trial = make(trainable, None, problem, **images_settings())
    result = run_to_end(trial)[-1]
    assert loaded_and_judged(problem, saved_by(trial, tmp_path)[1]).loss == result["best_val_loss"]


def test_one_draw_for_a_minibatch_lets_dropout_have_any_shape():
    problem, settings = of_words("dropout on all"), words_settings(per_minibatch=("dropout",))
    assert run_to_end(make(DeltaSTN, None, problem, **settings))


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"warm_up": 3, "train_steps": 6}, True),
        ({"warm_up": 3, "train_steps": 5}, False),
        ({"warm_up": 5}, True),
        ({"warm_up": 5, "val_steps": 0}, False),
        ({"warm_up": 0, "train_steps": 21}, True),
    ],
)
def test_a_run_that_ends_before_it_tunes_anything_is_warned_of(caplog, settings, warned):
    DeltaSTN.from_problem(regularised_problem(), **{**SETTINGS, **settings})
    said = [record.getMessage() for record in caplog.records if "tunes nothing: lower warm_up" in record.getMessage()]
    assert len(said) == warned and all("a run of 20 steps" in line for line in said)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"learning_rate": 0.1}, "'learning_rate'"),
        ({"dropout": 0.95}, "'dropout' begins at 0.95"),
        ({"dropout": {"0": 0.1, "1": 0.2}}, "'dropout' begins at {'0': 0.1, '1': 0.2}"),
        ({"budget": 1, "steps": 3}, "both 'steps' and 'budget'"),
    ],
)
def test_a_config_that_cannot_work_is_refused_by_its_trial(config, words):
    assert words in refusal(made, config)


# ---------------------------------------------------------------------------------------------------------------------
# under Ray


def fit(tmp_path, param_space=None, problem=None, *, settings=SETTINGS, failures=0, callbacks=(), reuse=True, **config):
    return tune.Tuner(
        DeltaSTN.from_problem(problem or regularised_problem(), **settings),
        param_space=param_space or {},
        tune_config=TuneConfig(metric="val_loss", mode="min", reuse_actors=reuse, **config),
        run_config=RunConfig(
            name="run",
            storage_path=str(tmp_path),
            verbose=0,
            callbacks=list(callbacks),
            failure_config=FailureConfig(max_failures=failures),
            checkpoint_config=CheckpointConfig(checkpoint_frequency=1),
        ),
    ).fit()


@pytest.mark.slow
def test_random_search_outside_and_reused_actors(ray_session, tmp_path):
    problem = regularised_problem()
    space = {"lr": tune.loguniform(1e-3, 0.2), "entropy_weight": tune.uniform(0, 0.1), "seed": tune.choice([0, 1])}
    grid = fit(tmp_path, space, problem, search_alg=RandomSearch(max_budget=EPOCHS, seed=0), num_samples=4)
    assert not grid.errors and len(grid) == 4
    assert len({result.metrics["pid"] for result in grid}) <= 2, "actors are reused"
    assert len({result.config["lr"] for result in grid}) == 4
    for result in grid:
        assert result.metrics["training_iteration"] == EPOCHS and result.metrics["done"]
        assert result.metrics["best_val_loss"] == result.metrics_dataframe["val_loss"].min()
        checkpoint = Path(result.checkpoint.path)
        weights = torch.load(checkpoint / "best_weights.pt", weights_only=True)
        assert loaded_and_judged(problem, weights).loss == result.metrics["best_val_loss"]
        assert Schedule.load(checkpoint / "schedule.json").values["lr"] == (result.config["lr"],)
    by_hand = run_to_end(made({**grid[0].config}))[-1]
    assert by_hand["val_loss"] == grid[0].metrics["val_loss"], "a reused actor's trial is that of a fresh one"


@pytest.mark.slow
def test_bohb_outside_with_trials_of_several_lengths(ray_session, tmp_path):
    search = BOHBSearch(min_budget=1, max_budget=4, eta=2, seed=0, brackets=1)
    grid = fit(tmp_path, {"lr": tune.loguniform(1e-3, 0.2)}, search_alg=search, num_samples=7)
    assert not grid.errors
    assert sorted(result.config["budget"] for result in grid) == [1, 1, 1, 1, 2, 2, 4]
    for result in grid:
        assert result.metrics["training_iteration"] == result.config["budget"]
        assert result.metrics["cost/steps"] == EPOCH * result.config["budget"]
    one, two, four = ({r.config["lr"] for r in grid if r.config["budget"] == budget} for budget in (1, 2, 4))
    assert four < two < one


@pytest.mark.slow
def test_asha_stops_some_trials_early(ray_session, tmp_path):
    grid = fit(
        tmp_path,
        {"lr": tune.grid_search([0.1, 0.03, 1e-4, 1e-5])},
        scheduler=ASHAScheduler(max_t=EPOCHS, grace_period=1, reduction_factor=2),
    )
    assert not grid.errors and len(grid) == 4
    lengths = {result.config["lr"]: result.metrics["training_iteration"] for result in grid}
    assert lengths[0.1] == EPOCHS and min(lengths.values()) < EPOCHS
    for result in grid:
        found = Schedule.load(Path(result.checkpoint.path) / "schedule.json")
        assert len(found.values["dropout"]) == EPOCH * lengths[result.config["lr"]]


@pytest.mark.slow
def test_population_based_training_perturbs_what_is_outside(ray_session, tmp_path):
    problem = regularised_problem()
    space = {"lr": tune.grid_search([0.1, 1e-4, 1e-5]), "entropy_weight": tune.uniform(1e-4, 1e-2), "seed": 3}
    grid = fit(
        tmp_path,
        space,
        problem,
        settings={**SETTINGS, "steps": 6 * EPOCH},
        scheduler=PopulationBasedTraining(
            time_attr="training_iteration",
            perturbation_interval=2,
            hyperparam_mutations={"lr": tune.loguniform(1e-3, 0.2), "entropy_weight": tune.uniform(1e-4, 1e-2)},
            quantile_fraction=0.4,
            synch=True,
            log_config=False,
        ),
    )
    assert not grid.errors and len(grid) == 3
    schedules = [Schedule.load(Path(result.checkpoint.path) / "schedule.json") for result in grid]
    rates = [schedule.values["lr"] for schedule in schedules]
    assert max(len(set(values)) for values in rates) > 1, "some trial went on from another's weights at its own rate"
    for result, schedule in zip(grid, schedules, strict=True):
        assert result.metrics["cost/steps"] == 6 * EPOCH
        assert schedule.values["lr"][-1] == result.config["lr"]
        # a trial's weights come from its whole history, that of the trials it copied included
        found = run_to_end(
            make(FixedSchedule, {**schedule.to_config(), "seed": 3}, problem, steps=6 * EPOCH, reports=1)
        )[-1]
        assert found["val_loss"] == pytest.approx(result.metrics["val_loss"], rel=1e-10)


@pytest.mark.slow
def test_a_killed_trial_ends_with_the_same_numbers(ray_session, tmp_path):
    config = {"lr": 0.03, "reports": 7}
    undisturbed = run_to_end(made(config))[-1]
    flag = tmp_path / "killed"
    grid = fit(tmp_path, config, failures=2, callbacks=[KillTrial(3, flag)], reuse=False)
    assert flag.exists() and not grid.errors
    last = grid[0].metrics
    assert last["iterations_since_restore"] < last["training_iteration"] == undisturbed["training_iteration"]
    assert repr(numbers({name: value for name, value in last.items() if name in undisturbed})) == repr(
        numbers(undisturbed)
    )
