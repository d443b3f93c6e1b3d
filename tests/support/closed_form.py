"""Bilevel problems whose best responses, their Jacobians and the best hyperparameters are known in closed form."""

from __future__ import annotations

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from tune_hypergrad import Problem
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.recipes.toy import Ridge
from tune_hypergrad.regularisers import Dropout, InputNoise
from tune_hypergrad.stn import TunedHyperparameter
from tune_hypergrad.stn.self_tuning_run import SelfTuningRun, SelfTuningSettings

FEATURES = 6


class LinearNetwork:
    """Two linear layers on inputs x that are noisy or dropped out: f(x) = W2 W1 z, a linear function w' z.

    With independent standard normal noise n of deviation s, and m_j that is 1 with probability 1 - p, else 0,
    z_j = m_j (x_j + s n_j) / (1 - p) has the mean x_j, and z_i z_j the mean x_i x_j, but for z_j^2, whose mean is
    (x_j^2 + s^2) / (1 - p). With C and b the means of x x' and x y over the examples, the expected loss is, up to a
    constant,

        1/2 w' (C + D) w - b' w,    D = (p diag(C) + s^2) / (1 - p),

    a ridge regression whose penalty is on the output's derivative by the inputs. The hidden layer is as wide as the
    input, so that every w is some W2 W1, and all local minima of a product of two layers are global (Baldi and Hornik
    1989): the best response of the function is w* = (C + D)^-1 b, and its derivative by a hyperparameter that moves D
    is -(C + D)^-1 D' w*. The layers themselves are not unique; only w is compared.

    Every training example is there `COPIES` times, each with draws of its own: C and b stay, the draws' noise shrinks.

    Args:
        name: what is tuned, "noise" (s) or "dropout" (p), with a value of its own for every example; the other is 0.
    """

    COPIES = 160

    def __init__(self, name: str) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weights, scales = normal(FEATURES), torch.linspace(0.4, 1.6, FEATURES, dtype=torch.float64)

        def examples(count: int) -> tuple[Tensor, Tensor]:
            x = normal(count, FEATURES) * scales
            return x, x @ weights + 3 * normal(count)

        self.name = name
        (x, y), self.val = examples(25), examples(1000)
        self.train = x.repeat(self.COPIES, 1), y.repeat(self.COPIES)
        self.second, self.first = x.T @ x / len(x), x.T @ y / len(x)
        self.definition = {
            "noise": TunedHyperparameter("noise", 0.1, 3.0, log=True),
            "dropout": TunedHyperparameter("dropout", 0.0, 0.95),
        }[name]
        best = minimize_scalar(self.outer_loss, bounds=(-3, 4), method="bounded", options={"xatol": 1e-9})
        self.optimum = float(best.x)
        """On the unconstrained scale."""

    def value(self, u: float) -> float:
        """The hyperparameter."""
        return float(self.definition.value(torch.tensor(u, dtype=torch.float64)))

    def best_response(self, u: float) -> Tensor:
        """The function's weights w, shape [features]."""
        s, p = (self.value(u), 0.0) if self.name == "noise" else (0.0, self.value(u))
        penalty = (p * self.second.diag() + s**2) / (1 - p)
        return torch.linalg.solve(self.second + penalty.diag(), self.first)

    def outer_loss(self, u: float) -> float:
        """The exact bilevel objective."""
        x, y = self.val
        return float(Ridge.loss((x @ self.best_response(u))[:, None], y))

    @staticmethod
    def model() -> nn.Module:
        """Dropout and two layers."""
        layers = [nn.Linear(FEATURES, FEATURES, bias=False), nn.Linear(FEATURES, 1, bias=False)]
        return nn.Sequential(nn.Dropout(0.0), *layers).double()

    def loop(self, steps: int, seed: int = 0, **fixed: object) -> InnerLoop:
        """Full-batch training."""
        problem = Problem(
            self.model, self.train, self.val, loss=Ridge.loss, batch_size=len(self.train[0]),
            regularisers=[InputNoise("noise"), Dropout("dropout")],
        )  # fmt: skip
        fixed = {"lr": 0.03, "momentum": 0.9, **fixed}
        return InnerLoop(problem, TrainingSettings(steps, fixed=fixed, seed=seed))

    def run(self, variant: str, start: float, steps: int, seed: int = 0) -> SelfTuningRun:
        """Tune from `start`, on the unconstrained scale; everything but the variant is the same for all methods."""
        settings = SelfTuningSettings(
            variant, {self.name: self.value(start)}, scale=0.5, train_steps=5, warm_up=300, hyper_optimizer="sgd",
            hyper_lr=0.1, entropy_weight=0.008, val_batch_size=1000,
        )  # fmt: skip
        run = SelfTuningRun(self.loop(steps, seed), [self.definition], settings)
        with run.loop.running():
            run.advance(steps)
        return run


def product(parameters: dict[str, Tensor]) -> Tensor:
    """The function's weights: of one layer, or of two, shape [features]."""
    weights = list(parameters.values())
    return (weights[0] if len(weights) == 1 else weights[1] @ weights[0]).squeeze(0)


def jacobian_error(problem: Ridge | LinearNetwork, run: SelfTuningRun, step: float = 1e-5) -> float:
    """How far the learned response of the function is from the exact one, at the present hyperparameter.

    Both are derivatives by the unconstrained hyperparameter; the norm of the difference, relative to the exact one's.
    """
    u = float(run.tuned.unconstrained.detach())
    inputs = torch.zeros(1, dtype=torch.float64) if run.variant.centred else torch.tensor([u], dtype=torch.float64)
    learned = torch.autograd.functional.jacobian(lambda h: product(run.network.parameters_at(h)), inputs).squeeze(1)
    exact = (problem.best_response(u + step) - problem.best_response(u - step)) / (2 * step)
    return float((learned - exact).norm() / exact.norm())


def unconstrained_path(run: SelfTuningRun) -> Tensor:
    """Where the hyperparameter was before every training step, on the unconstrained scale: shape [steps]."""
    ((name, definition),) = run.tuned.definitions.items()
    return torch.tensor([definition.unconstrained(value) for value in run.history[name]], dtype=torch.float64)
