"""STN, centred STN and Delta-STN tune the penalty of a ridge regression, whose best value is known in closed form.

STN's weights respond to the hyperparameter itself, so that its path depends on the unit that the hyperparameter is
measured in; those of the centred methods respond to its perturbation, and the unit is all the same to them.

python examples/self_tuning_toy.py --out self_tuning_toy.png
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from tune_hypergrad import Problem
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.stn import VARIANTS, TunedHyperparameter
from tune_hypergrad.stn.run import SelfTuningRun, SelfTuningSettings

FEATURES = 10


class Ridge:
    """Linear regression with the penalty exp(log_l2) / 2 ||w||^2, and what is best, by the normal equations.

    Args:
        log_unit: what is tuned is `u = log_l2 - log_unit`, the logarithm of the penalty in this unit.
        seed: draws the data.
    """

    tuned = (TunedHyperparameter("u", -math.inf, math.inf, per_example=False),)

    def __init__(self, log_unit: float = 0.0, seed: int = 0) -> None:
        self.log_unit = log_unit
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weights, scales = normal(FEATURES), torch.linspace(0.3, 1.5, FEATURES, dtype=torch.float64)

        def examples(count: int) -> tuple[Tensor, Tensor]:
            x = normal(count, FEATURES) * scales
            return x, x @ weights + 3 * normal(count)

        self.train, self.val = examples(30), examples(200)
        self.optimum = float(minimize_scalar(self.outer_loss, bounds=(-8, 4), method="bounded").x)

    def best_response(self, log_l2: float) -> Tensor:
        """The weights that minimise the training loss."""
        x, y = self.train
        penalty = math.exp(log_l2) * torch.eye(FEATURES, dtype=x.dtype)
        weights: Tensor = torch.linalg.solve(x.T @ x / len(x) + penalty, x.T @ y / len(x))
        return weights

    def outer_loss(self, log_l2: float) -> float:
        """The exact bilevel objective."""
        x, y = self.val
        return float(self.loss((x @ self.best_response(log_l2))[:, None], y))

    @staticmethod
    def loss(output: Tensor, target: Tensor) -> Tensor:
        """Half the mean squared error."""
        return (output.squeeze(-1) - target).square().mean() / 2

    def train_loss(self, output: Tensor, target: Tensor, *, params: dict[str, Tensor], u: Tensor) -> Tensor:
        """The loss with its penalty."""
        return self.loss(output, target) + (u + self.log_unit).exp() / 2 * params["weight"].square().sum()

    @staticmethod
    def model() -> nn.Module:
        """One linear layer."""
        return nn.Linear(FEATURES, 1, bias=False, dtype=torch.float64)

    def run(self, variant: str, start: float, steps: int, seed: int = 0) -> SelfTuningRun:
        """Tune, from `start` of log L2; everything but the variant is the same for the three methods."""
        problem = Problem(self.model, self.train, self.val, loss=self.loss, train_loss=self.train_loss, batch_size=30)
        loop = InnerLoop(problem, TrainingSettings(steps, fixed={"lr": 0.01, "momentum": 0.9}, seed=seed))
        how: dict[str, Any] = {"scale": 0.5, "train_steps": 1, "warm_up": 300, "val_batch_size": 200}
        how |= {"hyper_optimizer": "sgd", "hyper_lr": 0.05, "entropy_weight": 0.003}
        initial = {"u": start - self.log_unit}
        settings = SelfTuningSettings(variant, initial, **how)
        run = SelfTuningRun(loop, self.tuned, settings)
        with loop.running():
            run.advance(steps)
        return run

    def path(self, run: SelfTuningRun) -> Tensor:
        """log L2 at every step of a run."""
        return torch.tensor(run.history["u"], dtype=torch.float64) + self.log_unit


def main() -> None:
    """Run the methods from two starts in two units, and draw where they go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("self_tuning_toy.png"))
    parser.add_argument("--steps", type=int, default=1800, help="training steps of a run")
    options = parser.parse_args()
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, *rights = figure.subplots(1, 3, width_ratios=(1, 1.3, 1.3))
    grid = torch.linspace(-3.0, 2.0, 121).tolist()
    left.plot(grid, [Ridge().outer_loss(log_l2) for log_l2 in grid], color="0.6")
    left.axvline(Ridge().optimum, color="black", linestyle=":")
    left.set(xlabel="log L2", ylabel="validation loss", title="The exact bilevel objective")
    for log_unit, axes in zip((0.0, -4.0), rights, strict=True):
        ridge = Ridge(log_unit)
        axes.axhline(ridge.optimum, color="black", linestyle=":", label="optimum")
        for variant, colour in zip(VARIANTS, ("C3", "C1", "C0"), strict=True):
            for start, line in ((-3.0, "-"), (1.2, "--")):
                path = ridge.path(ridge.run(variant, start, options.steps)).tolist()
                print(f"unit exp({log_unit:g}), {variant} from {start}: to {path[-1]:.3f}, best {ridge.optimum:.3f}")
                axes.plot(path, line, color=colour, linewidth=1, label=variant if line == "-" else None)
        axes.set(xlabel="training steps", ylabel="log L2", title=f"L2 in units of exp({log_unit:g}), from two starts")
    rights[0].legend(frameon=False)
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()
