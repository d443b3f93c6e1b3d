"""A method of your own in a comparison: Optuna's TPE beside FDS and random search; needs `pip install optuna`.

python examples/own_method.py [FOLDER]
"""

import sys
from pathlib import Path

from ray.tune.search.optuna import OptunaSearch

from tune_hypergrad import Comparison, Method, Retraining, compare, problems

TPE = Method(
    "tpe",
    searcher=lambda task: OptunaSearch(seed=task.seed),  # gets the comparison's search space
    description="Optuna's tree-structured Parzen estimator, each configuration trained in full",
)


def main(folder: Path, budget: str = "60e") -> Comparison:
    """Compare; the report is in `folder`/own_method/report.html."""
    return compare(
        problems.get("digits_mlp"),
        ["fds", "rs", TPE],
        budget=budget,
        epochs=2,
        retraining=Retraining(seeds=1),
        out=folder / "own_method",
        progress="quiet",
    )


if __name__ == "__main__":
    found = main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
    print(found.summary[["method", "trials", "share", "val_loss", "test_accuracy"]].to_string(index=False))
    print("TPE found", found.schedule("tpe"))
