"""What a step and a comparison cost, beside another version of this package.

    python benchmarks/versions.py OTHER [--rounds 5] [--only lenet wrn digits searchers]

OTHER is a checkout of the other version, such as `git worktree add OTHER TAG` makes. Each figure is measured in a
process of its own, the versions taking turns, as process time in one thread (`digits`: seconds of the clock of a
comparison with a small budget, reports aside; `searchers`: what the driver spends in a searcher's own methods); a ratio
is this version's over the other's of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent

STEPS = """
import json, sys, time, torch
from tune_hypergrad import Problem
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.problems.models import lenet5_grey
from tune_hypergrad.problems.wide_resnet import wrn_16_1

torch.set_num_threads(1)
networks = {"lenet": (lenet5_grey, (1, 28, 28), 128, 40), "wrn": (wrn_16_1, (3, 32, 32), 64, 8)}
model, shape, batch, steps = networks[sys.argv[1]]
generator = torch.Generator().manual_seed(0)
x, y = torch.randn(4 * batch, *shape, generator=generator), torch.randint(0, 10, (4 * batch,), generator=generator)
problem = Problem(model, (x, y), (x[:batch], y[:batch]), batch_size=batch)
loop = InnerLoop(problem, TrainingSettings(steps))
values = {"lr": torch.full((2,), 0.01), "momentum": torch.tensor([0.5]), "weight_decay": torch.tensor([1e-4])}

def timed(work):
    start = time.process_time()
    work()
    return (time.process_time() - start) / steps

found = {}
with loop.running():
    begun = time.process_time()
    runs = {}
    for mode in ("reverse", "forward"):
        runs[mode] = [hypergradient_run(loop, values, differentiation=mode) for _ in range(2)]
    found["set-up, in plain steps"] = time.process_time() - begun
    loop.run(values)
    found["plain step"] = timed(lambda: loop.run(values))
    for mode, (first, second) in runs.items():
        first.advance(first.length)
        found[mode + " step"] = timed(lambda: second.advance(second.length))
found["set-up, in plain steps"] /= found["plain step"]
for mode in runs:
    found[mode + " / plain step"] = found[mode + " step"] / found["plain step"]
print(json.dumps(found))
"""

DIGITS = """
import json, tempfile, time
from tune_hypergrad import Retraining, compare, problems

made = problems.get("digits")
with tempfile.TemporaryDirectory() as folder:
    begun = time.perf_counter()
    compare(made, budget="40e", out=folder + "/run", retraining=Retraining(seeds=0), progress="quiet", epochs=10)
    print(json.dumps({"comparison of digits, 40e": time.perf_counter() - begun}))
"""


SEARCHERS = """
import json, logging, tempfile, time
from functools import partial
import ray
from ray import tune
from ray.tune import RunConfig, TuneConfig
from tune_hypergrad import BOHBSearch, BOSearch, HyperBandSearch, HypergradientSearch, RandomSearch

class Trial(tune.Trainable):
    def step(self):
        result = {f"hypergradient/{name}/0": self.config[name] - 0.3 for name in "abcd"}
        return {"val_loss": sum((self.config[name] - 0.3) ** 2 for name in "abcd"), **result, "done": True}

    def save_checkpoint(self, folder):
        return {}

    def reset_config(self, config):
        return True

spent = {}

def timed(method):
    def call(self, *arguments, **named):
        begun = time.thread_time()
        try:
            return method(self, *arguments, **named)
        finally:
            spent[type(self).__name__] = spent.get(type(self).__name__, 0.0) + time.thread_time() - begun
    return call

for kind in (BOHBSearch, HypergradientSearch):  # between them they have all base classes
    for name in ("suggest", "on_trial_result", "on_trial_complete", "save"):
        owner = next(base for base in kind.__mro__ if name in vars(base))
        if not hasattr(getattr(owner, name), "timed"):
            setattr(owner, name, timed(getattr(owner, name)))
            getattr(owner, name).timed = True

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
space, trials = {name: tune.uniform(0, 1) for name in "abcd"}, 150
known = {"space": space, "metric": "val_loss", "mode": "min", "seed": 0}
searchers = [
    RandomSearch(**known), BOSearch(**known), HyperBandSearch(max_budget=9, **known), BOHBSearch(max_budget=9, **known),
    HypergradientSearch(ensemble=3, trainings=1e9, **known),
]
for searcher in searchers:
    with tempfile.TemporaryDirectory() as folder:
        tune.Tuner(
            Trial,
            tune_config=TuneConfig(search_alg=searcher, metric="val_loss", mode="min", num_samples=trials,
                                   reuse_actors=True),
            run_config=RunConfig(storage_path=folder, verbose=0),
        ).fit()
print(json.dumps({f"ms per trial in {name}": 1e3 * seconds / trials for name, seconds in spent.items()}))
"""

PROGRAMS = {"digits": DIGITS, "searchers": SEARCHERS}


def measured(checkout: Path, what: str) -> dict[str, float]:
    """The figures of one version."""
    program = [PROGRAMS[what]] if what in PROGRAMS else [STEPS, what]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", *program]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checkout)
    if output.returncode:
        raise SystemExit(f"{checkout}: {output.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(output.stdout.strip().splitlines()[-1])
    return found


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Costs beside another version.")
    parser.add_argument("other", type=Path, help="a checkout of the other version")
    parser.add_argument("--rounds", type=int, default=5)
    everything = ["lenet", "wrn", *PROGRAMS]
    parser.add_argument("--only", nargs="+", choices=everything, default=everything)
    arguments = parser.parse_args()
    print("| what | other | this | this / other |\n| --- | --- | --- | --- |")
    for what in arguments.only:
        rounds = [(measured(arguments.other.resolve(), what), measured(HERE, what)) for _ in range(arguments.rounds)]
        for name in rounds[0][0]:
            other, this = [[each[side][name] for each in rounds] for side in (0, 1)]
            ratios = [b / a for a, b in zip(other, this, strict=True)]
            print(f"| {what}: {name} | {shown(other)} | {shown(this)} | {shown(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
