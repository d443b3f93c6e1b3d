"""What every method of `compare` finds on digits and on Fashion-MNIST, over three seeds, and in the first comparison.

    python benchmarks/compare_tables.py --data-dir DATA --run RUN --out docs/compare

- first: what `tune-hypergrad compare` does without any further word;
- digits: the command line's defaults, 300 epochs of plain training for each method and seed;
- fashion: LeNet on a fixed subset of 10,000 training images (2,000 others to validate on) and training runs of two
  epochs; the budget is 20 of them. Tuned are a learning-rate schedule of 7 windows, momentum and weight decay, and
  three regularisers: an L2 penalty, noise on the inputs, and cutout.

Writes each comparison's summary and pictures to the output folder. A run that was interrupted goes on when the same
command is given again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tune_hypergrad import Comparison, Problem, Retraining, compare, problems
from tune_hypergrad.regularisers import Cutout, InputNoise, WeightDecay

NAMES = ("first", "digits", "fashion")
PICTURES = ("regret_gradients.png", "validation.png", "schedules.png", "spending.png")


def fashion(data_dir: str | None) -> Problem:
    """The subset, with regularisers."""
    whole = problems.get("fashion_mnist", data_dir=data_dir, seed=0)
    chosen = torch.randperm(len(whole.train), generator=torch.Generator().manual_seed(0))[:12_000]
    images, labels = whole.train.tensors
    return whole.replace(
        train=(images[chosen[:10_000]], labels[chosen[:10_000]]),
        val=(images[chosen[10_000:]], labels[chosen[10_000:]]),
        regularisers=[WeightDecay("l2"), InputNoise(), Cutout()],
    )


def settings(name: str, data_dir: str | None) -> dict[str, Any]:
    """The arguments of `compare`."""
    if name == "digits":
        return {"problem": problems.get("digits", data_dir=data_dir, seed=0), "budget": "300e"}
    return {"problem": fashion(data_dir), "budget": "40e", "epochs": 2}


def main() -> None:
    """Run what has not been run, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--run", type=Path, default=Path("compare_tables"), help="folder of the comparisons themselves")
    parser.add_argument("--out", type=Path, default=Path("compare_tables/tables"))
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for name in options.only:
        run = options.run / name
        if name == "first":
            publish(first(run), options.out / name)
            continue
        comparison = compare(
            **settings(name, options.data_dir),
            seeds=options.seeds,
            retraining=Retraining(seeds=2, shares=(0.5, 1.0)),
            out=run,
            resume=run.exists(),
        )
        publish(comparison, options.out / name)


def first(run: Path) -> Comparison:
    """The comparison that the command line makes where nothing is said."""
    command = [sys.executable, "-m", "tune_hypergrad", "compare", "--resume" if run.exists() else "--out", str(run)]
    subprocess.run(command, check=True)
    return Comparison(run)


def publish(comparison: Comparison, out: Path) -> None:
    """Copy what the documentation shows."""
    out.mkdir(parents=True, exist_ok=True)
    for path in (comparison.folder / "summary.md", *(comparison.folder / "pictures" / name for name in PICTURES)):
        shutil.copy(path, out)


if __name__ == "__main__":
    main()
