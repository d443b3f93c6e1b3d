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


def fit(*callbacks: lightning.Callback) -> tuple[lightning.Trainer, float]:
    torch.manual_seed(0)
    settings = {"max_epochs": 4, "gradient_clip_val": 1.0, "logger": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(**settings, callbacks=list(callbacks))
    trainer.fit(Module(), Digits())
    return trainer, float(trainer.callback_metrics["val_loss"])


if __name__ == "__main__":
    trainer, by_hand = fit()
    problem = Problem.from_lightning(Module, Digits(), trainer=trainer)
    space = {"lr": schedule(tune.loguniform(1e-3, 1), windows=4), "momentum": tune.uniform(0, 0.99)}
    fds = FDS.from_problem(problem, space=space, outer_steps=8, **problem.defaults.trial_settings(space))
    grid = tune.Tuner(fds, run_config=tune.RunConfig(storage_path=os.getcwd())).fit()
    best = Schedule.from_scalars(grid[0].metrics, "best_schedule")
    print(f"validation loss by hand {by_hand:.3f}, tuned {fit(ScheduleCallback(best))[1]:.3f}; {best}")
