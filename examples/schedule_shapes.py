"""Schedules that a person would draw: a cosine's peak, warm-up and floor found by their hypergradients, then replayed.

python examples/schedule_shapes.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from ray import tune
from ray.tune import RunConfig, TuneConfig

from tune_hypergrad import FDS, Schedule, complement, problems, schedule

SPACE = {
    # three numbers; also shape="linear" and "wsd", knots=5 for lines between five values, windows=7 for steps
    "lr": schedule(tune.loguniform(1e-3, 1), shape="cosine"),
    # 1 - momentum is log-uniform: 0.9 is as far from 0 as 0.99 is from 0.9
    "momentum": complement(tune.loguniform(0.01, 1)),
    "weight_decay": tune.loguniform(1e-6, 1e-2),
}


def main(folder: Path) -> Schedule:
    """Search; returns the best schedule, which is also in FOLDER/schedule.json."""
    problem = problems.get("digits_mlp")
    steps = 2 * problem.steps_per_epoch
    tuner = tune.Tuner(
        FDS.from_problem(problem, space=SPACE, steps=steps, outer_steps=10),
        tune_config=TuneConfig(metric="best_val_loss", mode="min"),
        run_config=RunConfig(name="shapes", storage_path=str(folder.resolve())),
    )
    best = tuner.fit().get_best_result()
    found = Schedule.from_scalars(best.metrics, prefix="best_schedule")
    found.save(folder / "schedule.json")
    found.plot().savefig(folder / "schedule.png")
    print(f"validation loss {best.metrics['best_val_loss']:.3f}, accuracy {best.metrics['best_val_accuracy']:.3f}")
    print(found)

    # the values with which it was trained, in any loop of one's own, of any length
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    scheduler = found.scheduler(optimizer, total_steps=steps)
    for _ in range(3):
        print(f"lr {optimizer.param_groups[0]['lr']:.4f}, momentum {optimizer.param_groups[0]['momentum']:.3f}")
        optimizer.step()
        scheduler.step()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
