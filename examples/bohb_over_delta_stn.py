"""BOHB searches the learning rate and the entropy weight outside; inside, each trial tunes its own regularisation.

python examples/bohb_over_delta_stn.py [FOLDER]
"""

import sys
from pathlib import Path

from ray import tune
from ray.tune import ResultGrid, RunConfig, TuneConfig

from tune_hypergrad import BOHBSearch, DeltaSTN, problems

INSIDE = {
    "input_dropout": tune.uniform(0, 0.8),
    "dropout1": tune.uniform(0, 0.8),
    "dropout2": tune.uniform(0, 0.8),
    "l2": tune.loguniform(1e-6, 0.1),
    "input_noise": tune.uniform(0, 1),
}
OUTSIDE = {"lr": tune.loguniform(1e-2, 0.3), "entropy_weight": tune.loguniform(1e-4, 1e-1)}


def main(folder: Path, max_epochs: int = 9, trials: int = 16) -> ResultGrid:
    """Search; returns all trials."""
    problem = problems.get("digits")  # its regularisers have the names of INSIDE
    trainable = DeltaSTN.from_problem(
        problem,
        steps=max_epochs * problem.steps_per_epoch,
        space=INSIDE,
        initial={"input_dropout": 0.05, "dropout1": 0.05, "dropout2": 0.05, "l2": 1e-4, "input_noise": 0.05},
        fixed={"momentum": 0.9},
        warm_up=0.5,
    )
    # BOHB's budget is the length of a trial in epochs
    search = BOHBSearch(min_budget=max_epochs / 9, max_budget=max_epochs, eta=3, seed=0)
    tuner = tune.Tuner(
        trainable,
        param_space=OUTSIDE,
        tune_config=TuneConfig(search_alg=search, metric="val_loss", mode="min", num_samples=trials, reuse_actors=True),
        run_config=RunConfig(name="bohb_over_delta_stn", storage_path=str(folder.resolve())),
    )
    return tuner.fit()


if __name__ == "__main__":
    best = main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")).get_best_result("best_val_loss")
    found = ", ".join(f"{name} {best.metrics[f'best_schedule/{name}']:.2g}" for name in INSIDE)
    print(f"test accuracy {best.metrics['best_test_accuracy']:.3f} with {best.config}, and inside with {found}")
