"""An existing Ray pipeline, a function and its param_space, in which only `search_alg=` has changed: BOHB chooses.

python examples/bohb_in_ray.py [FOLDER]
"""

import sys
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune import ResultGrid, RunConfig, TuneConfig
from sklearn.datasets import load_digits

from tune_hypergrad import BOHBSearch

PARAM_SPACE = {
    "lr": tune.loguniform(1e-4, 1),
    "momentum": tune.uniform(0, 0.99),
    "model": {"width": tune.lograndint(8, 129), "activation": tune.choice(["relu", "tanh"])},
    "epochs": 9,
}


def train(config: dict[str, Any]) -> None:
    """The user's own training loop."""
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    activation = {"relu": torch.nn.ReLU(), "tanh": torch.nn.Tanh()}[config["model"]["activation"]]
    width = config["model"]["width"]
    model = torch.nn.Sequential(torch.nn.Linear(64, width), activation, torch.nn.Linear(width, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=config["momentum"])
    for _ in range(config["epochs"]):
        for batch in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            tune.report({"val_loss": torch.nn.functional.cross_entropy(model(images[1400:]), labels[1400:]).item()})


def main(folder: Path, trials: int = 40) -> ResultGrid:
    """Search; returns all trials."""
    search = BOHBSearch(min_budget=1, max_budget=9, eta=3, seed=0, budget_key="epochs")
    tuner = tune.Tuner(
        train,
        param_space=PARAM_SPACE,
        tune_config=TuneConfig(search_alg=search, metric="val_loss", mode="min", num_samples=trials, reuse_actors=True),
        run_config=RunConfig(name="bohb", storage_path=str(folder.resolve())),
    )
    return tuner.fit()


if __name__ == "__main__":
    best = main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")).get_best_result()
    print(f"validation loss {best.metrics['val_loss']:.3f} with {best.config}")
