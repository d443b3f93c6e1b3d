"""Networks of the self-tuning networks' experiments: sizes, shapes, and the places of their dropout."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tune_hypergrad.errors import InputError
from tune_hypergrad.problems import models, networks

GREY, COLOUR = (1, 28, 28), (3, 32, 32)

IMAGE_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int, list[str]]] = {
    "mnist_mlp": (networks.mnist_mlp, GREY, 3_836_410, ["input_dropout", "dropout1", "dropout2", "dropout3"]),
    "simple_cnn": (networks.simple_cnn, GREY, 2_489_130, ["input_dropout", "dropout1", "dropout2", "fc_dropout"]),
    "quarter_cnn": (
        partial(networks.simple_cnn, 0.25),
        GREY,
        158_898,
        ["input_dropout", "dropout1", "dropout2", "fc_dropout"],
    ),
    "alexnet": (
        networks.alexnet,
        COLOUR,
        23_272_266,
        ["input_dropout", *(f"dropout{number}" for number in range(1, 6)), "fc_dropout1", "fc_dropout2"],
    ),
    "vgg16": (
        networks.vgg16,
        COLOUR,
        15_249_354,
        ["input_dropout", *(f"dropout{number}" for number in range(1, 14)), "fc_dropout1", "fc_dropout2"],
    ),
    "resnet18": (networks.resnet18, COLOUR, 11_173_962, ["input_dropout", "dropout"]),
    "digits_cnn": (models.digits_cnn, (1, 8, 8), 3_818, ["input_dropout", "dropout1", "dropout2"]),
    "digits_mlp": (models.digits_mlp, (1, 8, 8), 3_610, ["input_dropout", "dropout"]),
}


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def dropouts(model: nn.Module) -> dict[str, nn.Dropout | nn.Dropout2d]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Dropout | nn.Dropout2d)}


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_image_network(name: str) -> None:
    factory, shape, count, places = IMAGE_NETWORKS[name]
    model = pickle.loads(pickle.dumps(factory))()
    assert weights(model) == count
    assert model(torch.zeros(2, *shape)).shape == (2, 10)
    assert list(dropouts(model)) == places
    assert all(layer.p == 0 for layer in dropouts(model).values())


@pytest.mark.parametrize("name", ["mnist_mlp", "quarter_cnn", "resnet18", "digits_cnn", "digits_mlp"])
def test_each_dropout_acts_and_none_draws_at_zero(name: str) -> None:
    factory, shape, _, _ = IMAGE_NETWORKS[name]
    torch.manual_seed(0)
    model, inputs = factory().train(), torch.randn(4, *shape)
    state = torch.get_rng_state()
    plain = model(inputs)
    assert torch.equal(torch.get_rng_state(), state)
    for layer in dropouts(model).values():
        layer.p = 0.5
        assert not torch.equal(model(inputs), plain)
        layer.p = 0.0


@pytest.mark.parametrize("width", [0, -1.0, float("nan")])
def test_width_must_be_above_zero(width: float) -> None:
    with pytest.raises(InputError, match="above 0"):
        networks.simple_cnn(width)


def test_a_tiny_width_keeps_a_channel() -> None:
    assert networks.simple_cnn(0.001)(torch.zeros(1, *GREY)).shape == (1, 10)


def test_published_language_model_has_its_weights() -> None:
    with torch.device("meta"):
        model = networks.lstm_language_model(10_000)
    assert weights(model) == 13_280_400


def test_language_model() -> None:
    model = networks.lstm_language_model(11, embedding=6, hidden=5, layers=3).train()
    words = torch.randint(11, (4, 7))
    output = model(words)
    assert output.shape == (4, 11, 7)
    F.cross_entropy(output, words).backward()
    assert model.decoder.weight is model.encoder.weight
    assert "decoder.weight" not in dict(model.named_parameters())
    lstms = sum(4 * width * (features + width + 2) for features, width in ((6, 5), (5, 5), (5, 6)))
    assert weights(model) == 11 * 6 + lstms + 11
    assert list(dropouts(model)) == ["input_dropout", "hidden_dropout", "output_dropout"]
    for layer in dropouts(model).values():
        layer.p = 0.5
        assert not torch.equal(model(words), output)
        layer.p = 0.0


def test_language_model_knows_the_past_of_its_window_only() -> None:
    model = networks.lstm_language_model(11, embedding=6, hidden=5).eval()
    words = torch.randint(11, (4, 7), generator=torch.manual_seed(0))
    changed = words.clone()
    changed[0, 4] = (words[0, 4] + 1) % 11
    same = (model(words) == model(changed)).all(dim=1)
    assert same[1:].all()
    assert same[0].tolist() == [True] * 4 + [False] * 3


@pytest.mark.parametrize("argument", ["vocabulary", "embedding", "hidden", "layers"])
@pytest.mark.parametrize("size", [0, 1.5, True])
def test_language_model_needs_whole_numbers(argument: str, size: float) -> None:
    with pytest.raises(InputError, match=f"{argument} is {size!r}: it must be a whole number of at least 1"):
        networks.lstm_language_model(**{"vocabulary": 5, argument: size})
