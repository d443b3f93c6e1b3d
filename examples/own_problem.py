"""An existing PyTorch model and data become a `Problem`; its hypergradients are checked, then taken.

python examples/own_problem.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_hypergrad import Problem, check_problem, hypergradient


class Net(nn.Module):
    """The model you have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def data(examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """The data you have, or a torch Dataset."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (examples,), generator=generator)
    return torch.eye(3, 8)[labels] + 0.7 * torch.randn(examples, 8, generator=generator), labels


def train_loss(output: Tensor, target: Tensor, *, params: dict[str, Tensor], l2: float | Tensor = 0.0) -> Tensor:
    """Its keyword-only arguments, but for `params`, are hyperparameters."""
    return F.cross_entropy(output, target) + l2 * sum((p**2).sum() for p in params.values())


problem = Problem(
    model=Net,
    train=data(512, seed=0),
    val=data(256, seed=1),
    train_loss=train_loss,
    metrics={"accuracy": lambda output, target: (output.argmax(1) == target).float().mean()},
    batch_size=32,
)

if __name__ == "__main__":
    print(check_problem(problem))  # against finite differences, on this very model
    values = {"lr": torch.full((4,), 0.05), "momentum": torch.tensor([0.5]), "l2": torch.tensor([1e-3])}
    result = hypergradient(problem, values, steps=64)
    print(f"validation loss {result.val_loss:.3f}, accuracy {result.metrics['accuracy']:.3f}")
    for name, gradient in result.hypergradients.items():
        print(f"d loss / d {name} =", [round(value, 4) for value in gradient.tolist()])
    print(f"by {result.differentiation} mode: {result.reason}")
