"""Problems from Lightning modules are their trainer's training, and schedules are replayed in it."""

import pytest
import torch
import torch.nn.functional as F
from ray import tune
from tiny_problem import clusters
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from tune_hypergrad import DeltaSTN, InputError, Problem, Schedule, check_problem, compare, schedule
from tune_hypergrad.comparison import Retraining
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.regularisers import WeightDecay

lightning = pytest.importorskip("lightning")
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score  # noqa: E402

from tune_hypergrad.bridges.lightning import ScheduleCallback  # noqa: E402

SILENT = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
pytestmark = pytest.mark.filterwarnings(
    *("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*torch.jit.script"),
    *("ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from a checkpoint that ended before"),
)


class InOrder(Sampler):
    """A given order, each pass going on where the last one ended."""

    def __init__(self, order):
        self.order, self.passes = order, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.order[self.passes - 1])

    def __len__(self):
        return len(self.order[0])


class Points(lightning.LightningDataModule):
    def __init__(self, order=None, batch_size=8):
        super().__init__()
        self.order, self.batch_size = order, batch_size

    def setup(self, stage):
        self.train, self.val, self.test = (TensorDataset(*clusters(n, n)) for n in (20, 10, 9))

    def train_dataloader(self):
        given = {"shuffle": True} if self.order is None else {"sampler": InOrder(self.order)}
        return DataLoader(self.train, batch_size=self.batch_size, **given)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=4)

    def test_dataloader(self):
        return [DataLoader(self.test, batch_size=4)]


class Classifier(lightning.LightningModule):
    """The usual module: the loss of `self(x)`, a measured accuracy, a schedule by epoch."""

    def __init__(self, width=6, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()
        self.loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
        self.accuracy, self.f1 = MulticlassAccuracy(3, average="micro"), MulticlassF1Score(3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        output = self(x)
        loss = self.loss(output, y)
        self.accuracy(output, y)
        self.log("train_accuracy", self.accuracy)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        output = self(x)
        self.accuracy(output, y)
        self.f1.update(output, y)
        self.log_dict({"val_loss": self.loss(output, y), "val_accuracy": self.accuracy}, prog_bar=True)

    def on_validation_epoch_end(self):
        self.log("val_f1", self.f1.compute())
        self.f1.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Plain(Classifier):
    """Logs nothing at the end of an epoch."""

    def on_validation_epoch_end(self):
        pass


class OneCycle(Plain):
    """A part that is called instead of `self`, a returned loss, and a schedule of the trainer's length by step."""

    def validation_step(self, batch):
        return {"loss": self.loss(self.net(batch[0]), batch[1])}

    def training_step(self, batch):
        return {"loss": self.loss(self.net(batch[0]), batch[1])}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01, betas=(0.8, 0.99))
        total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Autoencoder(Plain):
    """Two networks in one loss, a penalty of the weights, and noise between them."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(3, 4).double()

    def training_step(self, batch, batch_idx):
        code = self.net(batch[0])
        noisy = code + 0.1 * torch.randn_like(code) if self.training else code
        return F.mse_loss(self.decoder(noisy), batch[0]) + 0.01 * self.decoder.weight.square().sum()

    def validation_step(self, batch, batch_idx):
        loss = self.training_step(batch, batch_idx)
        self.log("val/loss", loss)
        self.log("val_double", 2 * loss)


class Grouped(Plain):
    """Param groups with values of their own, which a scheduler keeps apart."""

    def configure_optimizers(self):
        body, head = self.net[0], self.net[2]
        groups = [
            {"params": [body.weight], "lr": 0.3, "name": "body"},
            {"params": [head.weight], "momentum": 0.5},
            {"params": [body.bias, head.bias], "weight_decay": 0.0, "name": "biases"},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
        steps = self.trainer.estimated_stepping_batches
        rates = [lambda step: 1 - 0.5 * step / steps] * 3
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


MODULES = [Classifier, OneCycle, Autoencoder]


def trainer(**given):
    return lightning.Trainer(accelerator="cpu", **{"max_epochs": 3, **SILENT, **given})


def taken(module, **given):
    name = "val/loss" if module is Autoencoder else "val_loss"
    return Problem.from_lightning(module, Points(), trainer=trainer(), val_loss=name, **given)


def inner_loop(problem, **settings):
    own = problem.defaults
    settings = {"fixed": own.fixed({}), "optimizer": own.optimizer, **own.recipe, **settings}
    return InnerLoop(problem, TrainingSettings(**settings, steps=own.steps, seed=3))


def fit(problem, loop, module, **given):
    """The module after the trainer's training from the loop's weights with the loop's batches."""
    epochs = [[] for _ in range(3)]
    for step in range(loop.steps):
        for number in range(problem.batches_in(step)):
            epochs[problem.place(step)[0]] += loop.batches.indices(step, number).tolist()
    own = module()
    own.load_state_dict(loop.model.state_dict())
    fitting = trainer(**given)
    fitting.fit(own, Points(epochs, problem.batch_size))
    return own, fitting


def assert_same(loop, state, module, **tolerances):
    mine = loop.unflatten(state.params)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            mine[name], parameter.detach(), msg=name, **{"rtol": 1e-9, "atol": 1e-11, **tolerances}
        )


@pytest.mark.parametrize("module", [Classifier, OneCycle])
def test_training_is_the_trainers(module):
    problem = taken(module)
    loop = inner_loop(problem)
    assert problem.steps_per_epoch == 3 and loop.steps == 9 and not problem.drop_last
    with loop.running():
        state = loop.run({})
        found = loop.evaluate(state)
    theirs, fitted = fit(problem, loop, module)
    assert fitted.global_step == loop.steps
    assert_same(loop, state, theirs)
    x, y = clusters(10, 10)
    output = theirs(x).detach()
    assert found.loss == pytest.approx(float(theirs.loss(output, y)), rel=1e-9)
    if module is Classifier:
        assert set(found.metrics) == {"accuracy", "f1"}
        assert found.metrics["accuracy"] == pytest.approx(float(MulticlassAccuracy(3, average="micro")(output, y)))
        assert found.metrics["f1"] == pytest.approx(float(MulticlassF1Score(3)(output, y)))


RECIPES = {
    "norm": {"gradient_clip_val": 0.2},
    "value": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    "accumulation": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_clipping_accumulation_and_groups_are_the_trainers(recipe):
    given = RECIPES[recipe]
    problem = Problem.from_lightning(Grouped, Points(batch_size=6), trainer=trainer(**given))
    own, loop = problem.defaults, inner_loop(problem)
    assert own.left_out == () and loop.groups.names == ("body", "group1", "biases")
    assert own.steps == (6 if recipe == "accumulation" else 12) and own.epochs == 3
    with loop.running():
        state = loop.run({})
        plain = inner_loop(problem, clip_gradient=None, clip_norm=None)
        unclipped = plain.run({})
    theirs, fitted = fit(problem, loop, Grouped, **given)
    assert fitted.global_step == loop.steps
    assert_same(loop, state, theirs)
    assert not torch.allclose(state.params, unclipped.params, rtol=1e-3), "nothing is clipped"


def test_bfloat16_is_the_trainers():
    given = {"precision": "bf16-mixed"}

    class Single(Plain):
        def __init__(self):
            super().__init__()
            self.float()

        def forward(self, x):
            return super().forward(x.float())

    problem = Problem.from_lightning(Single, Points(), trainer=trainer(**given))
    loop, whole = inner_loop(problem), inner_loop(problem, autocast=None)
    assert problem.defaults.autocast == "bfloat16" and problem.defaults.left_out == ()
    with loop.running(), whole.running():
        state, exact = loop.run({}), whole.run({})
    theirs, _ = fit(problem, loop, Single, **given)
    reached = loop.flatten({name: p.detach() for name, p in theirs.named_parameters()})
    assert (state.params - reached).norm() < 0.1 * (exact.params - reached).norm()


def test_groups_are_those_of_configure_optimizers():
    problem = taken(Grouped)
    own = problem.defaults
    assert [(group.name, len(group.parameters)) for group in own.groups] == [("body", 1), ("group1", 1), ("biases", 2)]
    assert own.schedule.values["lr"][:2] == pytest.approx((0.1, 0.1 * (1 - 0.5 / 9)))
    assert own.schedule.values["lr/body"][:2] == pytest.approx((0.3, 0.3 * (1 - 0.5 / 9)))
    assert {name: own.schedule.values[name] for name in own.schedule.values if "/" in name and "lr" not in name} == {
        "momentum/group1": (0.5,),
        "weight_decay/biases": (0.0,),
    }
    loop = InnerLoop(problem, TrainingSettings(9))
    assert loop.groups.values == {"momentum/group1": 0.5, "weight_decay/biases": 0.0}
    space = {"lr": {"groups": {"*": tune.loguniform(1e-3, 1), "biases": tune.loguniform(1e-3, 1)}}}
    settings = own.trial_settings(space)
    assert settings["initial"] == pytest.approx({"lr": 0.1 * 7 / 9, "lr/biases": 0.1 * 7 / 9})
    assert len(settings["fixed"]["lr/body"]) == 9 and "lr" not in settings["fixed"]
    assert taken(Classifier).groups is None
    found = check_problem(problem, fixed=own.fixed({"lr": 0.1}))
    assert found.ok and max(found.errors.values()) < 1e-4, found.message


@pytest.mark.slow
def test_groups_are_tuned_and_compared(ray_session, tmp_path):
    given = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    problem = Problem.from_lightning(Grouped, Points(batch_size=6), trainer=trainer(**given))
    space = {"lr": schedule(tune.loguniform(1e-3, 1), 2), "lr/biases": tune.loguniform(1e-3, 1)}
    comparison = compare(
        problem,
        ["fds", "delta-stn", "rs"],
        budget="24e",
        space=space,
        out=tmp_path / "out",
        retraining=Retraining(seeds=1),
        progress="quiet",
        max_failures=0,
        **problem.defaults.comparison_settings(space),
    )
    assert comparison.methods == ["fds", "rs"] and list(comparison.left_out) == ["delta-stn"]
    for method in comparison.methods:
        found = comparison.schedule(method)
        assert {"lr", "lr/body", "lr/biases", "momentum/group1", "weight_decay/biases"} <= set(found.values)
        callback = ScheduleCallback(found)
        trainer(callbacks=[callback], **given).fit(Grouped(), Points(batch_size=6))


@pytest.mark.parametrize("module", MODULES)
def test_hypergradients_are_right(module):
    problem = taken(module)
    found = check_problem(problem)
    assert found.ok and set(found.errors) == {"forward", "reverse"}, found.message
    assert max(found.errors.values()) < 1e-4


@pytest.mark.parametrize("module", MODULES)
def test_self_tuning_networks_are_made_of_modules_whose_loss_is_outside(module):
    problem = taken(module).replace(regularisers=[WeightDecay("l2")])
    settings = {"space": {"l2": tune.loguniform(1e-5, 1e-1)}, "steps": 60, "warm_up": 1}
    if module is Autoencoder:
        with pytest.raises(InputError, match="the model gives a loss itself"):
            DeltaSTN.from_problem(problem, **settings)
    else:
        trial = DeltaSTN.from_problem(problem, **settings)(config={})
        assert torch.isfinite(torch.tensor(trial.train()["val_loss"]))


def test_what_is_logged_inside_the_network_is_a_metric():
    loop = inner_loop(taken(Autoencoder))
    with loop.running():
        found = loop.evaluate(loop.initial_state())
    assert found.metrics["double"] == pytest.approx(2 * found.loss)


def test_defaults_are_the_modules():
    own = taken(Classifier, width=4, lr=0.2).defaults
    assert (own.optimizer, own.steps, own.epochs) == ("sgd", 9, 3)
    assert own.schedule.values["lr"] == (0.2,) * 3 + (0.1,) * 3 + (0.05,) * 3
    assert own.schedule.values["momentum"] == (0.9,) and own.schedule.values["weight_decay"] == (0.01,)
    space = {"lr": schedule(tune.loguniform(1e-3, 0.15), 3), "momentum": tune.uniform(0, 0.5)}
    settings = own.trial_settings(space)
    assert settings["initial"]["lr"] == pytest.approx({"0": 0.15, "1": 0.1, "2": 0.05})
    assert settings["initial"]["momentum"] == 0.5
    assert settings["fixed"] == {"weight_decay": 0.01, "dampening": 0.0} and settings["steps"] == 9
    assert own.comparison_settings(space)["start"] == settings["initial"]
    one_cycle = taken(OneCycle).defaults
    assert one_cycle.optimizer == "adamw" and len(one_cycle.schedule.values["beta1"]) == 9


def test_arguments_of_the_module_are_hyperparameters():
    problem = taken(Classifier)
    assert problem.model_hyperparameters == ("width",)
    assert problem.model(width=5).net[0].out_features == 5


class Adversarial(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Classifier):
    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])], []


class ByEpoch(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.current_epoch)


class Clipping(Classifier):
    def configure_gradient_clipping(self, *_):
        pass


class Unlogged(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("loss_of_validation", self.loss(self(batch[0]), batch[1]))


class HeadOnly(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), lr=0.1)


class Lossless(Plain):
    def training_step(self, batch, batch_idx):
        self.log("train_loss", self.loss(self(batch[0]), batch[1]))


class Untrained(lightning.LightningModule):
    """Has a network and no training."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3).double()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Adversarial, "manual optimization"),
        (Lossless, "training_step returns no loss: let it return a tensor"),
        (Untrained, "Untrained has no training_step: give it one"),
        (TwoOptimizers, "2 optimizers"),
        (ByEpoch, "current_epoch"),
        (Clipping, "configure_gradient_clipping"),
        (Unlogged, "logs loss_of_validation: say which"),
        (HeadOnly, "does not train 'net.0.weight'"),
        (nn.Identity, "give a function that makes a LightningModule"),
    ],
)
def test_modules_that_cannot_be_repeated_are_refused_in_one_line(module, words):
    with pytest.raises(InputError, match=words) as caught:
        taken(module)
    assert "\n" not in str(caught.value)


class TwoLoaders(Points):
    def val_dataloader(self):
        return [super(TwoLoaders, self).val_dataloader() for _ in range(2)]


def test_several_loaders_of_a_split_are_refused():
    with pytest.raises(InputError, match="val_dataloader gives a list: let it give one DataLoader"):
        Problem.from_lightning(Classifier, TwoLoaders(), trainer=trainer(), val_loss="val_loss")


class Noted(Classifier):
    def on_train_epoch_end(self):
        pass

    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters(), "lr": 0.3, "name": "body"}, {"params": self.net[2].parameters()}]
        optimizer = torch.optim.Adam(groups, lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def test_what_is_left_out_is_said():
    with pytest.warns(UserWarning) as warned:
        own = trainer(gradient_clip_val=1.0, precision="64-true")
        problem = Problem.from_lightning(Noted, Points(), trainer=own)
    assert tuple(str(each.message) for each in warned) == problem.defaults.left_out
    said = " ".join(problem.defaults.left_out)
    assert all(word in said for word in ("64-true", "on_train_epoch_end", "ReduceLROnPlateau"))
    assert problem.defaults.recipe == {"clip_norm": 1.0}
    assert [(group.name, group.schedule.values["lr"]) for group in problem.defaults.groups] == [
        ("body", (0.3,)),
        ("group1", (0.1,)),
    ]
    for given, words in [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2 leaves 1 of 3 batches"),
        ({"max_epochs": -1}, "without an end"),
        ({"limit_train_batches": 2}, "limit_train_batches"),
        ({"callbacks": [lightning.pytorch.callbacks.StochasticWeightAveraging(1e-2)]}, "StochasticWeightAveraging"),
    ]:
        with pytest.raises(InputError, match=words):
            Problem.from_lightning(Classifier, Points(), trainer=trainer(**given))


FOUND = Schedule({"lr": (0.3, 0.1, 0.2), "momentum": (0.5, 0.9), "weight_decay": 0.01})


class Noting(lightning.Callback):
    """Notes the optimizer's values at every step."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps.append({name: [group[name] for group in optimizer.param_groups] for name in FOUND.values})


def test_a_schedule_is_replayed_by_a_callback_also_after_a_checkpoint(tmp_path):
    problem = taken(Classifier)
    loop = inner_loop(problem, fixed=FOUND.to_config())
    with loop.running():
        mine = loop.unflatten(loop.run({}).params)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    given = {"callbacks": [ScheduleCallback(FOUND), saving], "enable_checkpointing": True}
    theirs, _ = fit(problem, loop, Classifier, **given)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(mine[name], parameter.detach(), rtol=1e-9, atol=1e-11, msg=name)
    noted, (checkpoint, *_) = Noting(), sorted(tmp_path.glob("*step=4.ckpt"))
    resuming = trainer(callbacks=[ScheduleCallback(FOUND), noted])
    resuming.fit(Classifier(), Points(), ckpt_path=str(checkpoint), weights_only=False)
    expected = [FOUND.at_step(step, 9) for step in range(4, 9)]
    assert noted.steps == [{name: [value] for name, value in values.items()} for values in expected]


def test_a_schedule_is_not_replayed_in_a_training_without_an_end():
    with pytest.raises(InputError, match="a schedule needs an end of training: give the Trainer max_epochs or"):
        trainer(max_epochs=-1, callbacks=[ScheduleCallback(FOUND)]).fit(Classifier(), Points())


def test_a_schedule_by_param_group_is_replayed():
    given = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}
    problem = Problem.from_lightning(Grouped, Points(batch_size=6), trainer=trainer(**given))
    found = Schedule({"lr": (0.2, 0.1), "lr/body": (0.5, 0.25, 0.1), "momentum/group1": 0.7, "weight_decay": 0.02})
    own = Schedule({**problem.defaults.schedule.values, **found.values})
    loop = inner_loop(problem, fixed=own.to_config())
    with loop.running():
        state = loop.run({})
    theirs, _ = fit(problem, loop, Grouped, callbacks=[ScheduleCallback(own)], **given)
    assert_same(loop, state, theirs)
    with pytest.raises(InputError, match="the schedule has the groups head"):
        trainer(callbacks=[ScheduleCallback(Schedule({"lr/head": 0.1}))]).fit(Grouped(), Points())
