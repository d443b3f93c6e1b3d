"""`HypergradientSearch`: hypergradients as a `search_alg`, two seeds of every outer step in parallel.

python examples/hypergradient_search.py [FOLDER]
"""

import sys
from pathlib import Path

from ray import tune
from ray.tune import RunConfig, TuneConfig

from tune_hypergrad import HypergradientSearch, InnerRun, Schedule, problems, schedule


def main(folder: Path) -> Schedule:
    """Search; returns the best schedule."""
    problem = problems.get("digits_mlp")
    tuner = tune.Tuner(
        InnerRun.from_problem(problem, steps=problem.steps_per_epoch, reports=1),
        param_space={"lr": schedule(tune.uniform(0, 1), windows=5), "momentum": tune.uniform(0, 0.99)},
        tune_config=TuneConfig(
            search_alg=HypergradientSearch(ensemble=2, outer_steps=6),
            metric="val_loss",
            mode="min",
            num_samples=-1,  # the search says when it has ended
            reuse_actors=True,
        ),
        run_config=RunConfig(name="search", storage_path=str(folder.resolve())),
    )
    grid = tuner.fit()
    for result in grid:
        print(f"lr {[round(lr, 3) for lr in result.config['lr'].values()]}: {result.metrics['val_loss']:.3f}")
    best = grid.get_best_result()
    return Schedule.from_config(best.config, names=["lr", "momentum"])


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
