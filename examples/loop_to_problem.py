"""A plain PyTorch training loop, and the `Problem` that states the same training, for FDS to tune.

python examples/loop_to_problem.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from ray import tune
from ray.tune import ResultGrid, RunConfig, TuneConfig
from sklearn.datasets import load_digits
from torch import nn

from tune_hypergrad import FDS, Problem, schedule

EPOCHS, BATCH = 4, 70
IMAGES, LABELS = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
TRAIN, VAL = ((IMAGES[rows].float() / 16, LABELS[rows]) for rows in (slice(1400), slice(1400, None)))
BY_HAND = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}


def make_model() -> nn.Module:
    """The model you have."""
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))


def train_by_hand() -> float:
    """The loop you have; returns the validation loss."""
    torch.manual_seed(0)
    (x, y), model = TRAIN, make_model()
    optimizer = torch.optim.SGD(model.parameters(), **BY_HAND)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(VAL[0]), VAL[1]).item()


PROBLEM = Problem(model=make_model, train=TRAIN, val=VAL, loss=F.cross_entropy, batch_size=BATCH)
STEPS = EPOCHS * PROBLEM.steps_per_epoch
LR = schedule(tune.uniform(0, 0.5), windows=4)
SPACE = {"lr": LR, "momentum": tune.uniform(0, 0.99), "weight_decay": tune.uniform(0, 0.01)}


def main(folder: Path, outer_steps: int = 12) -> ResultGrid:
    """Tune; returns the one trial."""
    begin = {**BY_HAND, "lr": [BY_HAND["lr"]] * 4}
    trainable = FDS.from_problem(PROBLEM, space=SPACE, initial=begin, steps=STEPS, outer_steps=outer_steps)
    run_config = RunConfig(name="loop_to_problem", storage_path=str(folder.resolve()))
    return tune.Tuner(trainable, tune_config=TuneConfig(metric="val_loss", mode="min"), run_config=run_config).fit()


if __name__ == "__main__":
    found = main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))[0].metrics
    print(f"validation loss by hand {train_by_hand():.3f}, tuned {found['best_val_loss']:.3f}")
