"""Our trainables under Ray's own schedulers: fixed schedules under ASHA, self-tuning networks under PBT.

python examples/asha_and_pbt.py [FOLDER]
"""

import sys
from pathlib import Path

from ray import tune
from ray.tune import CheckpointConfig, ResultGrid, RunConfig, TuneConfig
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator

from tune_hypergrad import DeltaSTN, FixedSchedule, Schedule, problems, schedule

PROBLEM = problems.get("digits_mlp")
EPOCHS = 4
STEPS = EPOCHS * PROBLEM.steps_per_epoch
LR = tune.loguniform(1e-3, 0.5)
INSIDE = {"dropout": tune.uniform(0, 0.8), "l2": tune.loguniform(1e-6, 0.1)}  # each trial tunes these while it trains


def fit(name: str, trainable: type, space: dict, scheduler: TrialScheduler, trials: int, folder: Path) -> ResultGrid:
    """All trials of one search."""
    how = {"metric": "val_loss", "mode": "min", "num_samples": trials, "reuse_actors": True}
    config = TuneConfig(search_alg=BasicVariantGenerator(random_state=0), scheduler=scheduler, **how)
    # without num_to_keep, under which Ray's PBT hangs
    checkpoints = CheckpointConfig(checkpoint_frequency=1)
    run_config = RunConfig(name=name, storage_path=str(folder.resolve()), checkpoint_config=checkpoints)
    return tune.Tuner(trainable, param_space=space, tune_config=config, run_config=run_config).fit()


def asha(folder: Path) -> ResultGrid:
    """Trials with bad schedules are stopped early."""
    trainable = FixedSchedule.from_problem(PROBLEM, steps=STEPS, reports=EPOCHS)
    space = {"lr": schedule(LR, windows=3), "momentum": tune.uniform(0, 0.99)}
    return fit("asha", trainable, space, ASHAScheduler(max_t=EPOCHS, reduction_factor=2), trials=8, folder=folder)


def pbt(folder: Path) -> ResultGrid:
    """Every two epochs the worst trial goes on from a better one's weights, at a changed learning rate."""
    trainable = DeltaSTN.from_problem(PROBLEM, steps=STEPS, space=INSIDE, fixed={"momentum": 0.9}, warm_up=1)
    population = {"lr": tune.grid_search([0.1, 0.03, 1e-3, 1e-4])}
    every = {"time_attr": "training_iteration", "perturbation_interval": 2}
    scheduler = PopulationBasedTraining(**every, hyperparam_mutations={"lr": LR}, synch=True)
    return fit("pbt", trainable, population, scheduler, trials=1, folder=folder)


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    stopped, population = asha(where), pbt(where)
    print("ASHA: epochs of each trial", [result.metrics["training_iteration"] for result in stopped])
    for result in population:  # the history of the trials whose weights it took included
        rates = Schedule.load(Path(result.checkpoint.path) / "schedule.json").values["lr"]
        print(f"PBT: loss {result.metrics['val_loss']:.3f} after learning rates {list(dict.fromkeys(rates))}")
