"""How well BOHB keeps a cluster busy: `BOHBSearch` beside Ray's own `TuneBOHB` with `HyperBandForBOHB`.

    python benchmarks/searcher_utilisation.py [--max-budget 27] [--seconds 0.2] [--evaluations 6] [--repetitions 2]

A simulated cluster on this machine, of 4 nodes with 2 pretended CPUs each: 8 trials at once. They only sleep, so few
real cores suffice. A step lasts `--seconds` times a factor between 0.5 and 2 that depends on the configuration, and
reports a loss that is lower the longer the trial has run. Contenders take turns; a run ends at `--evaluations`
evaluations of `--max-budget` steps (full ones), or `--limit` seconds after its first result. `BOHBSearch` trains each
promotion from scratch, or with `resume_promoted` continues it from a checkpoint; `HyperBandForBOHB` pauses trials and
continues them.

- utilisation: time inside steps / (8 x seconds);
- seconds: from the first step's begin to the end of the last full evaluation, or of the last step if time was up;
- promotions correct: of the rungs from which `BOHBSearch` promoted, on how many it was the best, and as many as
  Hyperband has it. The losses are computed anew from the configurations.

To be fair to both: the same space, objective, seeds and limit of 8 concurrent trials, which is given the way Ray's
documentation has it; `reuse_actors`, and checkpoints of one number; a short unmeasured run of each comes first; and the
first step waits until 8 actors are up, since starting them takes seconds of the machine's real cores. What is left is
Ray's own time for each result, pause and new trial, which steps this short make visible. Which bracket the last full
evaluation falls into makes the seconds vary: with `--evaluations 16` they vary less, and a run takes twice as long.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import ray
from figures import figure, with_json, write
from hpbandster.core.result import Result
from ray import tune
from ray.cluster_utils import Cluster
from ray.tune import CheckpointConfig, RunConfig, Stopper, TuneConfig
from ray.tune.schedulers import TrialScheduler
from ray.tune.schedulers.hb_bohb import HyperBandForBOHB
from ray.tune.search import Searcher
from ray.tune.search.bohb import TuneBOHB
from rich.console import Console
from rich.table import Table

from tune_hypergrad import BOHBSearch, continuing, hpbandster_result
from tune_hypergrad.searchers.brackets import hyperband_bracket
from tune_hypergrad.wording import with_range

RAYS, OURS, RESUMING = "TuneBOHB + HyperBandForBOHB", "BOHBSearch", "BOHBSearch, resume_promoted"
ETA = 3
START_LIMIT = 120  # seconds for actors to start
SPACE = {"a": tune.uniform(0, 1), "b": tune.uniform(0, 1), "c": tune.loguniform(1e-3, 1), "d": tune.uniform(0, 1)}


class Setting(NamedTuple):
    """What the runs have in common."""

    max_budget: int
    seconds: float
    evaluations: int
    limit: float
    slots: int


class Step(NamedTuple):
    """A line of the log."""

    begin: float
    end: float
    actor: str
    trial: str
    iteration: int
    budget: int | None
    config: dict[str, float]


def objective(config: Mapping[str, float], iteration: int) -> float:
    """Lower with every iteration; which configuration leads may change on the way."""
    quality = (config["a"] - 0.3) ** 2 + (config["b"] - 0.6) ** 2 + (np.log10(config["c"]) + 1) ** 2 / 4
    return float(quality + (0.2 + config["d"]) / iteration)


def pace(config: Mapping[str, float]) -> float:
    """Between 0.5 and 2; so irregular that a search cannot drift to fast or to slow configurations."""
    return float(2 ** (2 * (1000 * config["a"] % 1) - 1))


class Sleeper(tune.Trainable):
    """Writes down when it slept, into a file for each actor."""

    def setup(self, config: dict[str, Any], folder: Path | None = None, setting: Setting | None = None) -> None:
        assert folder is not None and setting is not None
        self.seconds, self.steps, self.actor = setting.seconds, 0, uuid4().hex
        self.log = folder / f"{self.actor}.jsonl"
        self.log.touch()
        deadline = time.monotonic() + START_LIMIT
        while len(list(folder.glob("*.jsonl"))) < setting.slots and time.monotonic() < deadline:
            time.sleep(0.02)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.steps = 0
        return True

    def step(self) -> dict[str, Any]:
        begin = time.time()
        time.sleep(self.seconds * pace(self.config))
        self.steps += 1
        config, budget = {name: self.config[name] for name in SPACE}, self.config.get("budget")
        line = Step(begin, time.time(), self.actor, self.trial_id, self.steps, budget, config)
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return {"loss": objective(config, self.steps), "done": self.steps == budget}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / "steps").write_text(str(self.steps))

    def load_checkpoint(self, checkpoint_dir: str | dict[str, Any] | None) -> None:
        assert isinstance(checkpoint_dir, str)
        self.steps = int((Path(checkpoint_dir) / "steps").read_text())


class Enough(Stopper):
    """End the experiment when there are enough full evaluations, or time is up."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.deadline = setting, time.monotonic() + START_LIMIT
        self.started, self.full = False, set[str]()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if not self.started:
            self.started, self.deadline = True, time.monotonic() + self.setting.limit
        if result["training_iteration"] >= self.setting.max_budget:
            self.full.add(trial_id)
        return False

    def stop_all(self) -> bool:
        return time.monotonic() > self.deadline or len(self.full) >= self.setting.evaluations


def run(contender: str, setting: Setting, seed: int, folder: Path) -> tune.ResultGrid:
    """Run a contender, with its log in `folder`."""
    log = folder / "log"
    log.mkdir()
    np.random.seed(seed)  # what HpBandSter's generator draws from
    trainable: type[tune.Trainable] = Sleeper
    checkpoints = CheckpointConfig()
    search: Searcher = BOHBSearch(max_budget=setting.max_budget, eta=ETA, seed=seed)
    scheduler: TrialScheduler | None = None
    if contender == RAYS:
        search = TuneBOHB(seed=seed)
        scheduler = HyperBandForBOHB(max_t=setting.max_budget, reduction_factor=ETA)
    elif contender == RESUMING:
        trainable, checkpoints = continuing(Sleeper), CheckpointConfig(checkpoint_at_end=True)
        search = BOHBSearch(max_budget=setting.max_budget, eta=ETA, seed=seed, resume_promoted=True)
    tuner = tune.Tuner(
        tune.with_parameters(trainable, folder=log, setting=setting),
        param_space=SPACE,
        tune_config=TuneConfig(
            metric="loss",
            mode="min",
            search_alg=search,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=setting.slots,
            reuse_actors=True,
        ),
        run_config=RunConfig(
            storage_path=str(folder), name="ray", verbose=0, stop=Enough(setting), checkpoint_config=checkpoints
        ),
    )
    return tuner.fit()


class Figures(NamedTuple):
    """What a log says of the time until enough full evaluations were there."""

    utilisation: float
    seconds: float
    full: int
    steps: int
    trials: int
    failed: int


def read_log(folder: Path) -> list[Step]:
    lines = [line for path in (folder / "log").glob("*.jsonl") for line in path.read_text().splitlines()]
    return sorted(Step(*json.loads(line)) for line in lines)


def figures(steps: list[Step], setting: Setting, failed: int) -> Figures:
    if not steps:
        raise SystemExit("no step ended in time: the machine is too busy, or --limit too small")
    ends = sorted(step.end for step in steps if step.iteration == setting.max_budget)[: setting.evaluations]
    reached = len(ends) == setting.evaluations
    begin, end = steps[0].begin, ends[-1] if reached else max(step.end for step in steps)
    counted = [step for step in steps if step.begin < end]
    busy = sum(min(step.end, end) - step.begin for step in counted)
    return Figures(
        busy / (setting.slots * (end - begin)),
        end - begin,
        len(ends),
        len(counted),
        len({step.trial for step in counted}),
        failed,
    )


def check_promotions(result: Result) -> tuple[int, int]:
    """On how many rungs the right configurations were promoted, and from how many any were."""
    brackets: dict[int, list[Any]] = defaultdict(list)
    for (bracket, *_), datum in result.data.items():
        brackets[bracket].append(datum)
    right = []
    for index, members in brackets.items():
        plan = hyperband_bracket(index, tuple(result.HB_config["budgets"]), ETA)
        for budget, places in zip(plan.budgets, plan.num_configs[1:], strict=False):
            losses = [objective(datum.config, int(budget)) for datum in members]
            of_rung = [members[i] for i in np.argsort(losses, kind="stable")]
            promoted = [datum for datum in of_rung if datum.budget > budget]
            if promoted:
                counted = [(datum.results.get(budget) or {}).get("loss") for datum in members] == losses
                right.append(counted and promoted == of_rung[:places])
            members = promoted
    return sum(right), len(right)


def measure(contender: str, setting: Setting, seed: int) -> tuple[Figures, tuple[int, int]]:
    """What a run's log says, and what `check_promotions` says if the run was ours."""
    with tempfile.TemporaryDirectory() as folder:
        results = run(contender, setting, seed, Path(folder))
        found = figures(read_log(Path(folder)), setting, results.num_errors)
        return found, (0, 0) if contender == RAYS else check_promotions(hpbandster_result(results))


@contextmanager
def simulated_cluster(nodes: int) -> Iterator[None]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def shown(values: list[float]) -> str:
    return with_range(values, ".2f")


def print_tables(measured: Mapping[str, list[Figures]], evaluations: int) -> None:
    runs = Table("run", "contender", "utilisation", "seconds", "full evaluations", "steps", "trials", "failed")
    for repetition, by_contender in enumerate(zip(*measured.values(), strict=True), 1):
        for contender, found in zip(measured, by_contender, strict=True):
            counts = map(str, found[2:])
            runs.add_row(str(repetition), contender, f"{found.utilisation:.2f}", f"{found.seconds:.1f}", *counts)
    title = f"until {evaluations} full evaluations: median (range)"
    summary = Table("contender", "utilisation", "seconds", "seconds / Ray's of the same run", title=title)
    for contender, found in measured.items():
        columns = [[one.utilisation for one in found], [one.seconds for one in found]]
        if all(one.full == evaluations for one in (*found, *measured[RAYS])):  # otherwise time was up
            columns.append([one.seconds / other.seconds for one, other in zip(found, measured[RAYS], strict=True)])
        summary.add_row(contender, *map(shown, columns))
    console = Console(width=120)
    console.print(runs)
    console.print(summary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-budget", type=int, default=27, help="steps of a full evaluation")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a step, times a factor between 0.5 and 2")
    parser.add_argument("--evaluations", type=int, default=6, help="full evaluations at which a run ends")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument(
        "--limit", type=float, default=120, help="seconds after its first result at which a run ends in any case"
    )
    parser.add_argument("--nodes", type=int, default=4, help="of 2 pretended CPUs")
    with_json(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # ConfigSpace's, of Ray's and HpBandSter's calls
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # prints tables even if verbose=0
    setting = Setting(options.max_budget, options.seconds, options.evaluations, options.limit, 2 * options.nodes)
    measured: dict[str, list[Figures]] = {RAYS: [], OURS: [], RESUMING: []}
    right = rungs = 0
    with simulated_cluster(options.nodes):
        for contender in measured:
            measure(contender, setting._replace(seconds=0.01, evaluations=1), seed=0)
        for repetition in range(options.repetitions):
            for contender, found in measured.items():
                figures_of_run, (more_right, more_rungs) = measure(contender, setting, repetition)
                found.append(figures_of_run)
                right, rungs = right + more_right, rungs + more_rungs
    print_tables(measured, setting.evaluations)
    print(f"promotions correct: {right} of {rungs} rungs")
    write(
        options.json,
        (
            figure(f"{contender}, {what}", [getattr(one, what) for one in found], unit)
            for contender, found in measured.items()
            for what, unit in (("utilisation", ""), ("seconds", "s"))
        ),
    )


if __name__ == "__main__":
    main()
