"""Problems from what `transformers.Trainer` takes are its training, and schedules are replayed in it."""

import numpy as np
import pytest
import torch
from pipelines import Texts
from ray import tune
from torch.utils.data import Dataset

from tune_hypergrad import InputError, Problem, Schedule, check_problem
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from transformers import Trainer, TrainingArguments  # noqa: E402

from tune_hypergrad.bridges.transformers import ScheduleCallback  # noqa: E402

SILENT = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory'", "ignore:.*torch.jit.script")


def classifier():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=8, **sizes, **rates)
    return transformers.BertForSequenceClassification(config).double()


def language_model():
    sizes = {"vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **rates)).double()


class Sentences(Dataset):
    """Language modelling, some labels of which do not count, with a column that no model takes."""

    def __init__(self, examples, seed):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, 40, (examples, 8), generator=generator)
        self.ignored = torch.rand(examples, 8, generator=generator) < 0.3

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        labels = self.ids[index].masked_fill(self.ignored[index], -100)
        return {"input_ids": self.ids[index], "labels": labels, "page": torch.tensor(index)}


def arguments(folder, **changes):
    given = {"max_grad_norm": 0.0, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3}
    given |= {"num_train_epochs": 2, "learning_rate": 0.02}
    return TrainingArguments(output_dir=str(folder), **{**SILENT, **given, **changes})


def right(prediction):
    return {"accuracy": float((np.argmax(prediction.predictions, 1) == prediction.label_ids).mean()), "note": "text"}


class InOrder(Trainer):
    """The trainer, with the batches of an inner loop."""

    def __init__(self, order, **given):
        super().__init__(**given)
        self.order = order

    def _get_train_sampler(self, *_):
        return iter_once(self.order)


class Noting(transformers.TrainerCallback):
    """Notes the optimizer's values at every step."""

    def __init__(self):
        self.steps = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.steps.append([dict(group) for group in optimizer.param_groups])


class iter_once(torch.utils.data.Sampler):
    """A given order, each pass going on where the last one ended."""

    def __init__(self, order):
        self.order, self.passes = order, 0

    def __iter__(self):
        own = self.order[self.passes]
        self.passes += 1
        return iter(own)

    def __len__(self):
        return len(self.order[0])


def trained_by_the_trainer(problem, loop, args, train, evaluation, **given):
    """The trainer after training from the loop's weights with the loop's batches."""
    epochs = [[] for _ in range(problem.place(loop.steps - 1)[0] + 1)]
    for step in range(loop.steps):
        for number in range(problem.batches_in(step)):
            epochs[problem.place(step)[0]] += torch.arange(len(train))[loop.batches.indices(step, number)].tolist()
    model = problem.model()
    model.load_state_dict(loop.model.state_dict())
    trainer = InOrder(epochs, model=model, args=args, train_dataset=train, eval_dataset=evaluation, **given)
    trainer.train()
    return trainer


def inner_loop(problem, **settings):
    own = problem.defaults
    settings = {"optimizer": own.optimizer, "fixed": own.fixed({}), **own.recipe, **settings}
    return InnerLoop(problem, TrainingSettings(own.steps, **settings, seed=3))


class OwnLoss(transformers.BertForSequenceClassification):
    """Is not told a count, so that `Trainer` divides by the number of batches."""

    accepts_loss_kwargs = False


def own_loss():
    return OwnLoss(classifier().config).double()


class Lossless(transformers.BertForSequenceClassification):
    """Does nothing with labels."""

    def forward(self, input_ids, labels=None, **kwargs):
        return {"logits": super().forward(input_ids).logits}


def tuples():
    """Gives its outputs without names."""
    model = classifier()
    model.config.return_dict = False
    return model


HALVES = {"gradient_accumulation_steps": 2}
CASES = {
    "classifier": (classifier, Texts, {"weight_decay": 0.0, "warmup_steps": 2, "adam_beta1": 0.8}),
    "language model": (language_model, Sentences, {"lr_scheduler_type": "cosine", "adam_epsilon": 1e-6}),
    "label smoothing": (
        classifier,
        Texts,
        {"label_smoothing_factor": 0.2, "optim": "sgd", "dataloader_drop_last": True},
    ),
    "smoothed language model": (language_model, Sentences, {"label_smoothing_factor": 0.1, "optim": "adamw_torch"}),
    "tuples": (tuples, Texts, {"optim": "sgd", "remove_unused_columns": False}),
    "checkpointed activations": (classifier, Texts, {"gradient_checkpointing": True, "optim": "sgd"}),
    "clipping and decay": (classifier, Texts, {"max_grad_norm": 0.3, "weight_decay": 0.3}),
    "accumulated sums": (language_model, Sentences, {**HALVES, "max_grad_norm": 0.3}),
    "accumulated means": (own_loss, Texts, {**HALVES, "optim": "sgd", "max_grad_norm": 0.3}),
    "accumulated without a mean": (classifier, Texts, {**HALVES, "per_device_train_batch_size": 3, "optim": "sgd"}),
    "accumulated smoothed": (
        language_model,
        Sentences,
        {**HALVES, "per_device_train_batch_size": 3, "label_smoothing_factor": 0.1, "optim": "sgd"},
    ),
}
"""Models, data of ten examples, and arguments; of which two of three steps may have half as many batches."""


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_trainers(case, tmp_path):
    model, data, changes = CASES[case]
    args, train, evaluation = arguments(tmp_path, **changes), data(10, 0), data(6, 1)
    problem = Problem.from_transformers(model, args, train, evaluation)
    assert problem.defaults.left_out == ()
    loop = inner_loop(problem)
    with loop.running():
        state = loop.run({})
        mine, loss = loop.unflatten(state.params), loop.evaluate(state).loss
    trainer = trained_by_the_trainer(problem, loop, args, train, evaluation)
    assert trainer.state.global_step == loop.steps == problem.defaults.steps
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(mine[name], parameter.detach(), rtol=1e-6, atol=1e-8, msg=name)
    if data is Texts:  # else the trainer's is a mean over batches of their means
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_hypergradients_are_right(case, tmp_path):
    model, data, changes = CASES[case]
    problem = Problem.from_transformers(model, arguments(tmp_path, **changes), data(10, 0), data(6, 1))
    found = check_problem(problem, optimizer=problem.defaults.optimizer, **problem.defaults.recipe)
    assert found.ok and max(found.errors.values()) < 1e-4, found.message
    tuned = "label_smoothing" in problem.train_loss_hyperparameters
    assert tuned == ("label_smoothing_factor" in changes)


def test_metrics_are_of_the_whole_split(tmp_path):
    args, evaluation = arguments(tmp_path, per_device_eval_batch_size=4), Texts(9, 1)
    problem = Problem.from_transformers(classifier, args, Texts(8, 0), evaluation, compute_metrics=right)
    assert list(problem.metrics) == ["accuracy"]
    problem.check()
    loop = inner_loop(problem)
    with loop.running():
        found = loop.evaluate(loop.initial_state())
    model = problem.model()
    model.load_state_dict(loop.model.state_dict())
    theirs = Trainer(model=model, args=args, eval_dataset=evaluation, compute_metrics=right).evaluate()
    assert found.metrics["accuracy"] == theirs["eval_accuracy"]
    assert found.loss == pytest.approx(theirs["eval_loss"], rel=1e-6)


def test_bfloat16_is_the_trainers(tmp_path):
    args, train, evaluation = arguments(tmp_path, bf16=True, optim="sgd", learning_rate=0.3), Texts(10, 0), Texts(6, 1)

    def model():
        return classifier().float()

    problem = Problem.from_transformers(model, args, train, evaluation)
    loop, whole = inner_loop(problem), inner_loop(problem, autocast=None)
    with loop.running(), whole.running():
        state, exact = loop.run({}), whole.run({})
    trainer = trained_by_the_trainer(problem, loop, args, train, evaluation)
    reached = loop.flatten({name: p.detach() for name, p in trainer.model.named_parameters()})
    assert (state.params - reached).norm() < 0.1 * (exact.params - reached).norm()


def test_defaults_are_the_arguments(tmp_path):
    data, given = (Texts(8, 0), Texts(8, 1)), {"weight_decay": 0.1, "max_grad_norm": 1.0, "bf16": True}
    problem = Problem.from_transformers(classifier, arguments(tmp_path, **given), *data)
    own = problem.defaults
    assert own.recipe == {"clip_norm": 1.0, "autocast": "bfloat16"} and own.left_out == ()
    assert [(group.name, group.schedule.values["weight_decay"]) for group in own.groups] == [
        ("decay", (0.1,)),
        ("no_decay", (0.0,)),
    ]
    assert "bert.embeddings.LayerNorm.weight" in own.groups[1].parameters
    space = {"lr/no_decay": tune.loguniform(1e-4, 1), "weight_decay": tune.loguniform(1e-4, 1)}
    settings = own.comparison_settings(space)
    assert settings["fixed"]["weight_decay/no_decay"] == 0 and "weight_decay" not in settings["fixed"]
    assert settings["start"] == pytest.approx({"lr/no_decay": 0.02 * 5 / 8, "weight_decay": 0.1})
    assert settings["clip_norm"] == 1 and settings["autocast"] == "bfloat16"
    plain = Problem.from_transformers(classifier, arguments(tmp_path), *data)
    assert inner_loop(plain).groups.values == {"weight_decay/no_decay": 0.0}, "biases are exempt where it is tuned"


def padded_on_the_left(items):
    longest = max(len(item["input_ids"]) for item in items)
    ids = [torch.nn.functional.pad(item["input_ids"], (longest - len(item["input_ids"]), 0)) for item in items]
    return {"input_ids": torch.stack(ids), "labels": torch.stack(ids).masked_fill(torch.stack(ids) == 0, -100)}


def test_micro_batches_that_are_no_parts_of_a_batch_are_refused(tmp_path):
    data = [{"input_ids": torch.arange(1, length + 1)} for length in (2, 3, 2, 3, 7, 8, 7, 8)]
    args = arguments(tmp_path, **HALVES)
    with pytest.raises(InputError, match="padding on the left"):
        Problem.from_transformers(language_model, args, data, data, padded_on_the_left)
    even = [each for each in data if len(each["input_ids"]) == 8] * 4
    assert Problem.from_transformers(language_model, args, even, even, padded_on_the_left).batch_size == 8


def test_arguments_that_cannot_be_repeated_are_refused(tmp_path):
    data = Texts(8, 0), Texts(8, 1)
    for changes, words in [
        ({"gradient_accumulation_steps": 3}, "leaves 2 of 2 batches"),
        ({"optim": "adafactor"}, "adamw_torch"),
        ({"neftune_noise_alpha": 1.0}, "neftune"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "follows a metric"),
    ]:
        with pytest.raises(InputError, match=words):
            Problem.from_transformers(classifier, arguments(tmp_path, **changes), *data)
    for evaluation in (None, {"one": data[1], "two": data[1]}):
        with pytest.raises(InputError, match="eval_dataset is the split"):
            Problem.from_transformers(classifier, arguments(tmp_path), data[0], evaluation)
    unlabelled = [{"input_ids": torch.arange(1, 8)}] * 8
    for changes, words in [({"label_smoothing_factor": 0.1}, "needs labels in the batches"), ({}, "gives no loss")]:
        with pytest.raises(InputError, match=words):
            Problem.from_transformers(classifier, arguments(tmp_path, **changes), unlabelled, unlabelled).check()
    with pytest.raises(InputError, match="the model gives no loss, but logits"):
        Problem.from_transformers(lambda: Lossless(classifier().config), arguments(tmp_path), *data).check()
    with pytest.raises(InputError, match=r"compute_metrics fails: .*no_such"):
        Problem.from_transformers(classifier, arguments(tmp_path), *data, compute_metrics=lambda p: p.no_such)


def test_a_schedule_is_replayed_by_a_callback_also_after_a_checkpoint(tmp_path):
    args = arguments(tmp_path, weight_decay=0.0, optim="sgd", save_strategy="steps", save_steps=2)
    train, evaluation = Texts(12, 0), Texts(6, 1)
    problem = Problem.from_transformers(classifier, args, train, evaluation)
    found = Schedule({"lr": (0.3, 0.1, 0.2), "momentum": (0.5, 0.9), "weight_decay": 0.01})
    loop = InnerLoop(problem, TrainingSettings(6, "sgd", found.to_config(), seed=3))
    with loop.running():
        mine = loop.unflatten(loop.run({}).params)
    callbacks = [ScheduleCallback(found)]
    whole = trained_by_the_trainer(problem, loop, args, train, evaluation, callbacks=callbacks)
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(mine[name], parameter.detach(), rtol=1e-6, atol=1e-8, msg=name)
    callbacks.append(noted := Noting())
    resumed = Trainer(model=problem.model(), args=args, train_dataset=train, callbacks=callbacks)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 6 and len(noted.steps) == 2
    for step, groups in zip((4, 5), noted.steps, strict=True):
        of_groups = [{name: group[name] for name in found.values} for group in groups]
        assert of_groups == [found.at_step(step, 6), {**found.at_step(step, 6), "weight_decay": 0.0}]


def test_a_schedule_by_the_trainers_own_groups_is_replayed(tmp_path):
    given = {**HALVES, "max_grad_norm": 0.3, "weight_decay": 0.1, "num_train_epochs": 3}
    args, train, evaluation = arguments(tmp_path, **given), Sentences(16, 0), Sentences(6, 1)
    problem = Problem.from_transformers(language_model, args, train, evaluation)
    changes = {"lr": (0.02, 0.01), "lr/no_decay": (0.03, 0.01, 0.005), "weight_decay": (0.2, 0.1)}
    found = Schedule({**problem.defaults.schedule.values, **changes})
    assert found.values["weight_decay/no_decay"] == (0.0,)
    loop = inner_loop(problem, fixed=found.to_config())
    with loop.running():
        mine = loop.unflatten(loop.run({}).params)
    trainer = trained_by_the_trainer(problem, loop, args, train, evaluation, callbacks=[ScheduleCallback(found)])
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(mine[name], parameter.detach(), rtol=1e-6, atol=1e-8, msg=name)


def test_a_schedule_by_param_group(tmp_path):
    args = arguments(tmp_path, max_steps=2, lr_scheduler_type="constant")
    callback = ScheduleCallback(Schedule({"lr/rest": (0.5, 0.25)}), groups={1: "rest"})
    noted = Noting()
    Trainer(model=classifier(), args=args, train_dataset=Texts(8, 0), callbacks=[callback, noted]).train()
    assert [[group["lr"] for group in groups] for groups in noted.steps] == [[0.02, 0.5], [0.02, 0.25]]
    for schedule, words in [(Schedule({"lr/head": 1.0}), "the groups head"), (Schedule({"l2": 1.0}), "l2")]:
        with pytest.raises(InputError, match=words):
            Trainer(
                model=classifier(), args=args, train_dataset=Texts(8, 0), callbacks=[ScheduleCallback(schedule)]
            ).train()
