"""Small float64 problems of every architecture, and helpers to compare hypergradients on them.

Activations are smooth and pooling is by averages unless a name says otherwise: kinks spoil finite differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.hypergradients.run import HypergradientResult
from tune_hypergrad.problem import Problem

MODES = ("forward", "reverse", "checkpointed_reverse")
Values = dict[str, Tensor]


def double(*values: float) -> Tensor:
    """A hyperparameter's values, one per window."""
    return torch.tensor(values, dtype=torch.float64)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3))


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))


def group_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )


def max_pool_relu() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))


class Attention(nn.Module):
    """`nn.MultiheadAttention` over an embedded token sequence, dropout inside it included."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


class DotProductAttention(nn.Module):
    """`F.scaled_dot_product_attention` with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embedding(tokens)).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1).mean(1))


class Recurrent(nn.Module):
    """An embedding and a recurrent network of two layers."""

    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.recurrent = cell(3, 4, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(tokens))[0][:, -1])


class Transformer(nn.Module):
    """A transformer layer, whose dropout acts on activations that are not contiguous in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, activation="gelu", batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).mean(1))


class TiedWeights(nn.Module):
    """Embedding and output layer share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.hidden = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens).mean(1))))[:, :3]


class Frozen(nn.Module):
    """A first layer that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()
        self.layers[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TwoInputs(nn.Module):
    """Takes tokens and features."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.cat([self.embedding(tokens).mean(1), features], 1)))


FEATURES, IMAGES, TOKENS, BOTH = "features", "images", "tokens", "both"

ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mlp": (mlp, FEATURES),
    "batch_norm": (batch_norm, FEATURES),
    "dropout": (dropout, FEATURES),
    "layer_norm": (layer_norm, FEATURES),
    "group_norm": (group_norm, IMAGES),
    "conv": (conv, IMAGES),
    "attention": (Attention, TOKENS),
    "dot_product_attention": (DotProductAttention, TOKENS),
    "transformer": (Transformer, TOKENS),
    "lstm": (lambda: Recurrent(nn.LSTM), TOKENS),
    "gru": (lambda: Recurrent(nn.GRU), TOKENS),
    "tied_weights": (TiedWeights, TOKENS),
    "frozen": (Frozen, FEATURES),
    "two_inputs": (TwoInputs, BOTH),
}


def data(kind: str = FEATURES, examples: int = 12, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs of a kind, then labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
    images = torch.randn(examples, 1, 6, 6, generator=generator, dtype=torch.float64)
    tokens = torch.randint(7, (examples, 4), generator=generator)
    labels = torch.randint(3, (examples,), generator=generator)
    inputs = {FEATURES: (features,), IMAGES: (images,), TOKENS: (tokens,), BOTH: (tokens, features)}[kind]
    return (*inputs, labels)


def make_problem(
    architecture: str | Callable[[], nn.Module] = "mlp",
    kind: str = FEATURES,
    dtype: torch.dtype = torch.float64,
    **fields: Any,
) -> Problem:
    """A problem of 12 training examples in batches of 4 and 6 validation examples."""
    factory, kind = ARCHITECTURES[architecture] if isinstance(architecture, str) else (architecture, kind)
    given = {"train": data(kind), "val": data(kind, 6, seed=1), "loss": F.cross_entropy, "batch_size": 4}
    return Problem(model=lambda: factory().to(dtype), **{**given, **fields})


def make_loop(problem: Problem | None = None, steps: int = 5, optimizer: str = "sgd", **settings: Any) -> InnerLoop:
    return InnerLoop(problem or make_problem(), TrainingSettings(steps, optimizer, **settings))


def differentiate(loop: InnerLoop, values: Values, mode: str = "forward", **arguments: Any) -> HypergradientResult:
    """A whole hypergradient run."""
    run = hypergradient_run(loop, values, differentiation=mode, **arguments)
    with loop.running():
        run.advance(run.length)
    return run.result()


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Equal names, and elements equal up to `tolerance` of each hyperparameter's largest."""
    assert set(actual) == set(expected)
    for name, reference in expected.items():
        scale = float(reference.abs().max())
        error = float((actual[name] - reference).abs().max())
        assert scale > 1e-12, f"{name} has a zero derivative: the comparison would show nothing"
        assert error <= tolerance * scale, f"{name}: {actual[name].tolist()} is not {reference.tolist()}"
