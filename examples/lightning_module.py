"""A Lightning module tuned by FDS, and trained as tuned; needs `pip install 'tune_hypergrad[lightning]'`.

python examples/lightning_module.py
"""

import os

import lightning
import torch
from ray import tune
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from tune_hypergrad import FDS, Problem, Schedule, schedule
from tune_hypergrad.bridges.lightning import ScheduleCallback


class Digits(lightning.LightningDataModule):
    def setup(self, stage: str) -> None:
        images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
        self.digits = TensorDataset(images.float() / 16, labels)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.digits[:1400]), batch_size=70, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.digits[1400:]), batch_size=397)


class Module(lightning.LightningModule):
    def configure_model(self) -> None:
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(*callbacks: lightning.Callback) -> lightning.Trainer:
    torch.manual_seed(0)
    trainer = lightning.Trainer(max_epochs=4, logger=False, enable_checkpointing=False, callbacks=list(callbacks))
    trainer.fit(Module(), Digits())
    return trainer


if __name__ == "__main__":
    trainer = fit()
    problem = Problem.from_lightning(Module, Digits(), trainer=trainer)
    space = {"lr": schedule(tune.loguniform(1e-3, 1), windows=4), "momentum": tune.uniform(0, 0.99)}
    fds = FDS.from_problem(problem, space=space, outer_steps=8, **problem.defaults.trial_settings(space))
    grid = tune.Tuner(fds, run_config=tune.RunConfig(storage_path=os.getcwd())).fit()
    best = Schedule.from_scalars(grid[0].metrics, "best_schedule")
    tuned = fit(ScheduleCallback(best)).callback_metrics["val_loss"]
    print(f"validation loss by hand {trainer.callback_metrics['val_loss']:.3f}, tuned {tuned:.3f}; {best}")
