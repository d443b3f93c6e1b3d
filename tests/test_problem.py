"""`Problem` and its splits: what they take, what they refuse before any training."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from tune_hypergrad import InputError, Problem
from tune_hypergrad.data import Split, cast_batch

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


def net(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def make(**fields: Any) -> Problem:
    return Problem(**{"model": net, "train": (X, Y), "val": (X, Y), "batch_size": 8, **fields})


def exploding(output: Tensor, target: Tensor, *, weight: float = 1.0) -> Tensor:
    raise ValueError("boom\nmore of it")


def unreduced(output: Tensor, target: Tensor, *, weight: float = 1.0) -> Tensor:
    return weight * F.cross_entropy(output, target, reduction="none")


def with_defaults(
    output: Tensor, target: Tensor, *, smoothing: float = 0.1, classes: Tensor | None = None, flag: bool = True
) -> Tensor:
    return F.cross_entropy(output, target, weight=classes) * (1 + smoothing)


def needing(output: Tensor, target: Tensor, *, l2: float, params: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output, target) + l2 * sum(p.square().sum() for p in params.values())


class Shifted(TensorDataset):
    """Augments: what its tensors hold is not what it yields."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + 100, y


class Named(Dataset[Any]):
    """Inputs in a dict."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return {"x": X[index]}, Y[index]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": (X[:0], Y[:0])}, "train data is empty"),
        ({"val": (X, Y[:5])}, "val data: the tensors' lengths differ"),
        ({"train": (X / 0, Y)}, "train data: tensor 0 has NaN or infinite values"),
        ({"train": (1, 2)}, "train data must be tensors"),
        ({"val": 3}, "val data is a int"),
        ({"batch_size": 25}, "batch_size 25 is above the training split's 24 examples"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"model": net()}, "model is a module"),
    ],
)
def test_refused_when_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": lambda: nn.Linear(7, 3)}, "the model's forward on a train batch of shapes .* fails: RuntimeError"),
        ({"model": lambda: 3}, "model.. gave a int"),
        ({"loss": lambda output, target: output}, "must give a scalar"),
        ({"train_loss": exploding}, "train_loss on a train batch fails: ValueError: boom$"),
        ({"train_loss": unreduced}, "train_loss must give a scalar"),
        ({"metrics": {"broken": lambda output, target: output.nope}}, "metric 'broken' on a train batch fails"),
    ],
)
def test_refused_when_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make(**fields).check()
    assert "\n" not in str(caught.value)


def test_a_train_loss_tells_its_hyperparameters() -> None:
    assert make(train_loss=with_defaults).train_loss_hyperparameters == {"smoothing": 0.1}
    (default,) = make(train_loss=needing).train_loss_hyperparameters.values()
    assert default != default  # it has none
    make(train_loss=needing).check()
    assert make().model_hyperparameters == ("width",)


def test_checking_leaves_the_generators_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    make().check()
    assert torch.equal(torch.rand(2), expected)


def test_a_subclass_of_tensor_dataset_keeps_its_augmentation() -> None:
    plain, shifted = Split(TensorDataset(X, Y), "train"), Split(Shifted(X, Y), "train")
    assert plain.tensors is not None and shifted.tensors is None
    assert torch.equal(shifted.batch(slice(0, 3))[0], X[:3] + 100)


def test_nested_batches_are_cast() -> None:
    inputs, target = cast_batch(Split(Named(), "train").batch(torch.tensor([1, 2])), torch.device("cpu"), torch.float64)
    assert inputs["x"].dtype == torch.float64 and target.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_survive_a_pickle(dtype: torch.dtype) -> None:
    split = pickle.loads(pickle.dumps(Split((X.to(dtype), Y), "val")))
    assert torch.equal(split.tensors[0], X.to(dtype)) and torch.equal(split.tensors[1], Y)
