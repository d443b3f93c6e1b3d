"""An existing Ray pipeline with our trainable: Optuna and ASHA search a schedule, four learning rates and a momentum.

python examples/optuna_schedule.py [FOLDER]
"""

import sys
from pathlib import Path

from ray import tune
from ray.tune import RunConfig, TuneConfig
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from tune_hypergrad import FixedSchedule, Schedule, problems, schedule


def main(folder: Path, trials: int = 12) -> Schedule:
    """Search; returns the best schedule."""
    problem = problems.get("digits_mlp")
    reports = 4
    tuner = tune.Tuner(
        FixedSchedule.from_problem(problem, steps=2 * problem.steps_per_epoch, reports=reports),
        param_space={"lr": schedule(tune.loguniform(1e-3, 1), windows=4), "momentum": tune.uniform(0, 0.99)},
        tune_config=TuneConfig(
            search_alg=ConcurrencyLimiter(OptunaSearch(seed=0), max_concurrent=2),
            scheduler=ASHAScheduler(max_t=reports, grace_period=1, reduction_factor=2),
            metric="val_loss",
            mode="min",
            num_samples=trials,
            reuse_actors=True,
        ),
        run_config=RunConfig(name="optuna", storage_path=str(folder.resolve())),
    )
    best = tuner.fit().get_best_result()
    print(f"validation accuracy {best.metrics['val_accuracy']:.3f}, test accuracy {best.metrics['test_accuracy']:.3f}")
    return Schedule.from_config(best.config, names=["lr", "momentum"])


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
