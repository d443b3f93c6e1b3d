"""FDS as one trial in a Tuner: a learning-rate schedule and a momentum, found by gradients; the best is saved.

python examples/fds_in_ray.py [FOLDER]
"""

import sys
from pathlib import Path

from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig

from tune_hypergrad import FDS, Schedule, problems, schedule


def main(folder: Path) -> Schedule:
    """Search; returns the best schedule, which is also in FOLDER/schedule.json."""
    problem = problems.get("digits_mlp")
    space = {"lr": schedule(tune.uniform(0, 1), windows=5), "momentum": tune.uniform(0, 0.99)}
    tuner = tune.Tuner(
        FDS.from_problem(problem, space=space, steps=problem.steps_per_epoch, outer_steps=8),
        param_space={"seed": tune.grid_search([0, 1])},  # two searches side by side
        tune_config=TuneConfig(metric="best_val_loss", mode="min"),
        run_config=RunConfig(
            name="fds",
            storage_path=str(folder.resolve()),
            failure_config=FailureConfig(max_failures=2),  # a lost node costs one report, no more
            checkpoint_config=CheckpointConfig(checkpoint_frequency=1, num_to_keep=2),
        ),
    )
    best = tuner.fit().get_best_result()
    print(f"validation loss {best.metrics['best_val_loss']:.3f}, accuracy {best.metrics['best_val_accuracy']:.3f}")
    # `schedule.json` of the last checkpoint: the best schedule of the whole search
    with best.checkpoint.as_directory() as checkpoint:
        found = Schedule.load(Path(checkpoint) / "schedule.json")
    found.save(folder / "schedule.json")
    found.plot().savefig(folder / "schedule.png")
    print(found)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
