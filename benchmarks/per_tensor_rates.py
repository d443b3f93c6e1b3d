"""Learning rates for every tensor, or layer, of a model, against one common schedule at the same cost.

    python benchmarks/per_tensor_rates.py --seeds 3 --trainings 40
    python benchmarks/per_tensor_rates.py --data-dir DATA --problems digits fashion_mnist

Problems: digits, a small CNN, 10 epochs (170 steps of batch 64); fashion_mnist, LeNet, one epoch (429 steps of batch
128). The learning rate is tuned in windows, with momentum and weight decay for all, by `RobustSearch` in reverse mode,
whose cost does not depend on how many rates there are. All contenders begin at one and the same rate and may spend as
many trainings: `common` has one schedule, `layer` and `tensor` one for each. What a search found is trained with fresh
seeds, and only then is the test split read. The table has the means over these, and over the searches with their range;
seconds are the process's for a training with its hypergradients.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from outer_search import outcome_of
from torch import Tensor

from tune_hypergrad import Problem, problems
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.outer import RobustSearch
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.space import Range
from tune_hypergrad.wording import markdown_row, markdown_table, with_range

STEPS = {"digits": 170, "fashion_mnist": 429}
CONTENDERS = {"common": None, "layer": "layer", "tensor": "tensor"}
_TESTS = 1 << 30  # seeds of retrainings, apart from the searches'


class Found(NamedTuple):
    """What a search found."""

    values: dict[str, Tensor]
    spent: float
    """In trainings."""
    seconds: float
    """Of the process, for a training with hypergradients."""


def ranges(loop: InnerLoop, windows: int) -> dict[str, Range]:
    """A learning rate for every group, or a common one where there are none, and the rest for all."""
    names = [f"lr/{group}" for group in loop.groups.names] or ["lr"]
    rates = {name: Range(windows, 1e-4, 1.0, "log") for name in names}
    return {**rates, "momentum": Range(1, 0.0, 0.99, "complement"), "weight_decay": Range(1, 1e-6, 1e-2, "log")}


def searched(problem: Problem, steps: int, windows: int, seed: int, trainings: float) -> Found:
    """The outcome of a search of so many trainings."""
    search = RobustSearch(ranges(loop_of(problem, steps, 0), windows), trainings=trainings)
    spent, seconds = 0.0, []
    while proposals := search.round():
        outcomes = []
        for proposal in proposals:
            begin = time.process_time()
            loop = loop_of(problem, steps, fold_seed(seed, proposal.seed))
            outcomes.append(outcome_of(loop, proposal.values, proposal.reject_above))
            if outcomes[-1].hypergradients is not None:
                seconds.append(time.process_time() - begin)
        spent += sum(outcome.cost for outcome in outcomes)
        search.tell(outcomes)
    assert search.incumbent is not None
    return Found(search.incumbent.values, spent, fmean(seconds))


def loop_of(problem: Problem, steps: int, seed: int) -> InnerLoop:
    """One training run."""
    return InnerLoop(problem, TrainingSettings(steps, "sgd", seed=seed))


def judged(problem: Problem, steps: int, values: dict[str, Tensor], seeds: range) -> list[tuple[float, float]]:
    """Validation loss and test accuracy in per cent of fresh trainings."""
    results = []
    for seed in seeds:
        loop = loop_of(problem, steps, fold_seed(_TESTS, seed))
        placed = {name: loop.values.placed(name, value) for name, value in values.items()}
        with loop.running():
            state = loop.run(placed)
            test = loop.evaluate(state, "test").metrics["accuracy"]
            results.append((loop.evaluate(state).loss, 100 * test))
    return results


def row(name: str, contender: str, columns: int, found: list[Found], results: list[list[tuple[float, float]]]) -> str:
    """A line of the table."""
    losses = [fmean(loss for loss, _ in of_search) for of_search in results]
    tests = [fmean(test for _, test in of_search) for of_search in results]
    figures = (
        f"{columns}",
        f"{fmean(each.spent for each in found):.1f}",
        with_range(losses, ".4f", fmean),
        with_range(tests, ".2f", fmean),
        f"{fmean(each.seconds for each in found):.2f}",
    )
    return markdown_row((name, contender, *figures))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with the data sets; digits need none")
    parser.add_argument("--problems", nargs="+", choices=list(STEPS), default=["digits"])
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=3, help="searches of each kind")
    parser.add_argument("--windows", type=int, default=7, help="of every learning rate")
    parser.add_argument("--steps", type=int, help="inner steps of a training, in place of the problem's")
    parser.add_argument("--trainings", type=float, default=40, help="what a search may cost")
    parser.add_argument("--tests", type=int, default=5, help="fresh seeds for what a search found")
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = ("problem", "learning rates", "numbers", "trainings", "validation loss", "test accuracy", "seconds")
    print(markdown_table(head, []))
    for name in options.problems:
        plain = problems.get(name, **({} if options.data_dir is None else {"data_dir": options.data_dir}))
        steps = options.steps or STEPS[name]
        for contender in options.contenders:
            problem = plain.replace(groups=CONTENDERS[contender])
            found = [
                searched(problem, steps, options.windows, seed, options.trainings) for seed in range(options.seeds)
            ]
            results = [
                judged(problem, steps, each.values, range(1000 * (seed + 1), 1000 * (seed + 1) + options.tests))
                for seed, each in enumerate(found)
            ]
            numbers = sum(limits.windows for limits in ranges(loop_of(problem, steps, 0), options.windows).values())
            print(row(name, contender, numbers, found, results), flush=True)


if __name__ == "__main__":
    main()
