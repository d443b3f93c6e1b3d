"""What an evaluation costs the searcher: our BOHB beside HpBandSter's own, on an objective that takes no time.

    python benchmarks/bohb_cost.py [--observations 1000] [--dimensions 9] [--categorical 0] [--block 50]

An evaluation is one suggestion and the bookkeeping of its result, fits of the model included. Measured on the CPU in
one thread, as process time; contenders take turns of `--block` evaluations in one process:

- HpBandSter at one budget: `get_config` and `new_result` of its BOHB generator, nothing around them;
- BOSearch: `suggest` and `on_trial_complete`, with the same seed;
- HpBandSter in brackets: `BOHBSearch` with HpBandSter's generator in place of ours;
- BOHBSearch: `suggest` and `on_trial_complete`, budgets 1 to 27 with eta 3, the same seed. Here the model sees fewer
  observations than at one budget, and a promotion needs no model.

A ratio is to HpBandSter's of the same kind. "of the model" counts the configurations that the model picked: HpBandSter
catches errors of its model and draws at random instead, which would be cheap. "the same" counts how many evaluations
pass until a contender's configuration or budget first differs from HpBandSter's.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
from ConfigSpace import Categorical, ConfigurationSpace, Float
from figures import figure, with_json, write
from hpbandster.core.dispatcher import Job
from hpbandster.optimizers.config_generators.bohb import BOHB
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from tune_hypergrad import BOHBSearch, BOSearch
from tune_hypergrad.wording import with_range

BUDGETS: dict[str, Any] = {"min_budget": 1, "max_budget": 27, "eta": 3}
LAST = 200
SEED = 0
TARGET = 20  # ms
LEVELS = "abcd"

Evaluation = tuple[dict[str, Any], float]


def make_space(dimensions: int, categorical: int) -> ConfigurationSpace:
    space = ConfigurationSpace(seed=SEED)
    space.add([Float(f"x{i}", (0, 1)) for i in range(dimensions - categorical)])
    space.add([Categorical(f"c{i}", list(LEVELS)) for i in range(categorical)])
    return space


def objective(config: Mapping[str, Any], budget: float) -> float:
    """Best at 0.3 and "a", and a little better with every budget."""
    levels = {level: 0.1 * i for i, level in enumerate(LEVELS)}
    return sum(levels[v] if isinstance(v, str) else (v - 0.3) ** 2 for v in config.values()) + 0.5 / budget


class Contender(Protocol):
    def evaluate(self) -> Evaluation:
        """Go through one evaluation."""

    def picks(self) -> list[bool]:
        """For each configuration so far whether the model picked it."""


class HpBandSter:
    """The bare generator, which draws from NumPy's global generator."""

    def __init__(self, space: ConfigurationSpace) -> None:
        self.generator = BOHB(space)
        self.jobs: list[tuple[Job, dict[str, Any]]] = []

    def evaluate(self) -> Evaluation:
        config, info = self.generator.get_config(27)
        job = Job((0, 0, len(self.jobs)), config=config, budget=27)
        job.result = {"loss": objective(config, 27), "info": None}
        self.generator.new_result(job)
        self.jobs.append((job, info))
        return config, 27

    def picks(self) -> list[bool]:
        return [info["model_based_pick"] for _, info in self.jobs]


class Ours:
    """A searcher as Ray calls it."""

    def __init__(self, search: BOSearch | BOHBSearch) -> None:
        self.search, self.trials = search, 0

    def evaluate(self) -> Evaluation:
        self.trials += 1
        trial_id = f"trial{self.trials}"
        config = self.search.suggest(trial_id)
        assert isinstance(config, dict)
        budget = config.pop("budget")
        self.search.on_trial_complete(trial_id, {"loss": objective(config, budget), "training_iteration": budget})
        return config, budget

    def picks(self) -> list[bool]:
        entries = self.search.result().get_id2config_mapping().values()
        return [bool(entry["config_info"].get("model_based_pick")) for entry in entries]


class HpBandSterInBrackets(BOHBSearch):
    """HpBandSter's generator in our brackets."""

    def _make_generator(self, configspace: ConfigurationSpace) -> BOHB:
        return BOHB(configspace)


class Measured(NamedTuple):
    blocks: list[list[float]]
    """For each turn, the milliseconds of its evaluations."""
    evaluations: list[Evaluation]


def take_turns(contenders: Mapping[str, Contender], observations: int, block: int) -> dict[str, Measured]:
    measured = {name: Measured([], []) for name in contenders}
    # HpBandSter draws from NumPy's global generator: each contender finds it as it left it
    states = dict.fromkeys(contenders, np.random.RandomState(SEED).get_state())
    for begin in range(0, observations, block):
        for name, (blocks, evaluations) in measured.items():
            np.random.set_state(states[name])
            blocks.append([])
            for _ in range(min(block, observations - begin)):
                start = time.process_time()
                evaluations.append(contenders[name].evaluate())
                blocks[-1].append(1000 * (time.process_time() - start))
            states[name] = np.random.get_state()
    return measured


def same(evaluations: list[Evaluation], others: list[Evaluation]) -> int:
    """How many are the same from the first on."""
    pairs = enumerate(zip(evaluations, others, strict=True))
    return next((i for i, (one, other) in pairs if one != other), len(evaluations))


def mean_costs(measured: Measured) -> tuple[float, float]:
    """Of all evaluations, and of the last."""
    times = list(chain.from_iterable(measured.blocks))
    return statistics.mean(times), statistics.mean(times[-LAST:])


def costs(measured: Measured) -> list[str]:
    blocks = [statistics.mean(block) for block in measured.blocks]
    return [*(f"{mean:.2f}" for mean in mean_costs(measured)), with_range(blocks, ".2f")]


def model_share(contender: Contender) -> str:
    picks = contender.picks()
    return f"{sum(picks)} of {len(picks)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", type=int, default=1000)
    parser.add_argument("--dimensions", type=int, default=9)
    parser.add_argument("--categorical", type=int, default=0, help="how many dimensions are categories, of 4 each")
    parser.add_argument("--block", type=int, default=50, help="evaluations in a turn")
    with_json(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # ConfigSpace's, of HpBandSter's calls
    logging.disable()  # HpBandSter's warnings of every candidate without a finite value
    spaces = [make_space(options.dimensions, options.categorical) for _ in range(4)]
    contenders: dict[str, Contender] = {
        "HpBandSter at one budget": HpBandSter(spaces[0]),
        "BOSearch": Ours(BOSearch(spaces[1], "loss", "min", 27, SEED)),
        "HpBandSter in brackets": Ours(HpBandSterInBrackets(spaces[2], "loss", "min", seed=SEED, **BUDGETS)),
        "BOHBSearch": Ours(BOHBSearch(spaces[3], "loss", "min", seed=SEED, **BUDGETS)),
    }
    with threadpool_limits(1):
        measured = take_turns(contenders, options.observations, options.block)
    table = Table(
        *("ms an evaluation", "mean", f"mean of last {LAST}", f"blocks of {options.block}: median (range)"),
        *("ratio: all, last", f"mean < {TARGET}", "of the model", "the same"),
        title=f"{options.observations} observations, {options.dimensions} dimensions, {options.categorical} of them "
        "categorical",
    )
    for reference, name in (("HpBandSter at one budget", "BOSearch"), ("HpBandSter in brackets", "BOHBSearch")):
        table.add_row(reference, *costs(measured[reference]), "", "", model_share(contenders[reference]), "")
        means, of_reference = mean_costs(measured[name]), mean_costs(measured[reference])
        count = same(measured[name].evaluations, measured[reference].evaluations)
        table.add_row(
            name,
            *costs(measured[name]),
            ", ".join(f"{a / b:.3f}" for a, b in zip(means, of_reference, strict=True)),
            "yes" if means[0] < TARGET else "no",
            model_share(contenders[name]),
            f"{count} of {options.observations}",
        )
    Console(width=150).print(table)
    means = {name: [statistics.mean(block) for block in found.blocks] for name, found in measured.items()}
    write(options.json, (figure(name, blocks, "ms an evaluation") for name, blocks in means.items()))


if __name__ == "__main__":
    main()
