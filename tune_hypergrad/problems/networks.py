"""Networks of the self-tuning networks' experiments, with dropout modules of probability 0 where the papers tune it.

Sources of the selection and of the places of dropout: MacKay et al., "Self-Tuning Networks: Bilevel Optimization of
Hyperparameters using Structured Best-Response Functions", 2019, and Bae and Grosse, "Delta-STN: Efficient Bilevel
Optimization for Neural Networks using Structured Response Jacobians", 2020. Inputs lose single values and not whole
channels, so that a grey image is never all gone. Everything here pickles, and so do `functools.partial`s of it.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from tune_hypergrad.errors import InputError
from tune_hypergrad.problems.images import CLASSES

Named = list[tuple[str, nn.Module]]

_ALEXNET_CHANNELS = (64, 192, 384, 256, 256)
_ALEXNET_POOLED = (1, 2, 5)
_VGG_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_RESNET_WIDTHS = (64, 128, 256, 512)


def mnist_mlp() -> nn.Module:
    """An MLP 784-1200-1200-1200-10 for [b, 1, 28, 28] inputs: 3,836,410 weights.

    Dropout: `input_dropout`, and `dropout1` to `dropout3` after the hidden layers. The paper tunes the first three.
    """
    layers: Named = [("flatten", nn.Flatten()), ("input_dropout", nn.Dropout(0.0))]
    features = 28 * 28
    for number in (1, 2, 3):
        layers += [*_linear(number, features, 1200), (f"dropout{number}", nn.Dropout(0.0))]
        features = 1200
    return _sequential([*layers, ("fc4", nn.Linear(features, CLASSES))])


def simple_cnn(width: float = 1.0) -> nn.Module:
    """Two convolutions 5x5 and one hidden layer for [b, 1, 28, 28] inputs: 2,489,130 weights at width 1.

    Dropout: `input_dropout`, `dropout1` and `dropout2` (channels) after the convolutions, `fc_dropout`.

    Args:
        width: factor of 16 and 32 channels and of 1,568 hidden units, above 0; 158,898 weights at 0.25.

    Raises:
        InputError: `width` is not above 0.
    """
    if not width > 0:
        raise InputError(f"width is {width!r}: it must be a number above 0, such as 0.25")
    channels = max(1, round(16 * width))
    features = 2 * channels * 7 * 7
    return _sequential(
        [
            ("input_dropout", nn.Dropout(0.0)),
            *_convolution(1, 1, channels, kernel_size=5),
            ("pool1", nn.MaxPool2d(2)),
            ("dropout1", nn.Dropout2d(0.0)),
            *_convolution(2, channels, 2 * channels, kernel_size=5),
            ("pool2", nn.MaxPool2d(2)),
            ("dropout2", nn.Dropout2d(0.0)),
            ("flatten", nn.Flatten()),
            *_linear(1, features, features),
            ("fc_dropout", nn.Dropout(0.0)),
            ("fc2", nn.Linear(features, CLASSES)),
        ]
    )


def alexnet() -> nn.Module:
    """AlexNet with 3x3 convolutions for [b, 3, 32, 32] inputs: 23,272,266 weights.

    Dropout: `input_dropout`, `dropout1` to `dropout5` (channels) after the convolutions, `fc_dropout1`, `fc_dropout2`.

    Source: Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 2012.
    """
    layers: Named = [("input_dropout", nn.Dropout(0.0))]
    channels = 3
    for number, width in enumerate(_ALEXNET_CHANNELS, 1):
        layers += _convolution(number, channels, width, stride=2 if number == 1 else 1)
        if number in _ALEXNET_POOLED:
            layers.append((f"pool{number}", nn.MaxPool2d(2)))
        layers.append((f"dropout{number}", nn.Dropout2d(0.0)))
        channels = width
    return _sequential([*layers, *_classifier(channels * 2 * 2, 4096)])


def vgg16() -> nn.Module:
    """VGG-16 with BatchNorm and 512 hidden units for [b, 3, 32, 32] inputs: 15,249,354 weights.

    Dropout: `input_dropout`, `dropout1` to `dropout13` (channels) after the convolutions, `fc_dropout1`, `fc_dropout2`.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015.
    """
    layers: Named = [("input_dropout", nn.Dropout(0.0))]
    channels, number = 3, 0
    for block, widths in enumerate(_VGG_BLOCKS, 1):
        for position, width in enumerate(widths, 1):
            number += 1
            layers += _convolution(number, channels, width, normalised=True)
            if position == len(widths):
                layers.append((f"pool{block}", nn.MaxPool2d(2)))
            layers.append((f"dropout{number}", nn.Dropout2d(0.0)))
            channels = width
    return _sequential([*layers, *_classifier(channels, 512)])


def resnet18() -> nn.Module:
    """ResNet-18 with a 3x3 stem for [b, 3, 32, 32] inputs: 11,173,962 weights.

    Dropout: `input_dropout`, and `dropout` before the classifier.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016.
    """
    channels = _RESNET_WIDTHS[0]
    layers: Named = [("input_dropout", nn.Dropout(0.0)), *_convolution(1, 3, channels, normalised=True)]
    for group, width in enumerate(_RESNET_WIDTHS, 1):
        first = ResidualBlock(channels, width, stride=1 if group == 1 else 2)
        layers += [(f"block{group}a", first), (f"block{group}b", ResidualBlock(width, width, stride=1))]
        channels = width
    return _sequential(
        [
            *layers,
            ("pool", nn.AdaptiveAvgPool2d(1)),
            ("flatten", nn.Flatten()),
            ("dropout", nn.Dropout(0.0)),
            ("fc", nn.Linear(channels, CLASSES)),
        ]
    )


def lstm_language_model(vocabulary: int, embedding: int = 650, hidden: int = 650, layers: int = 2) -> nn.Module:
    """An LSTM that predicts the next word: 13,280,400 weights for 10,000 words and the other arguments' defaults.

    Args:
        vocabulary: how many words there are.
        embedding: length of a word's vector, which the last LSTM's output has too.
        hidden: length of the other LSTMs' outputs.
        layers: how many LSTMs.

    Raises:
        InputError: one of them is no whole number of at least 1.
    """
    require_whole(vocabulary=vocabulary, embedding=embedding, hidden=hidden, layers=layers)
    return LstmLanguageModel(vocabulary, embedding, hidden, layers)


def require_whole(least: int = 1, **sizes: int) -> None:
    """Raise `InputError` unless each of the sizes, passed by name, is a whole number of at least `least`."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise InputError(f"{name} is {size!r}: it must be a whole number of at least {least}")


class ResidualBlock(nn.Module):
    """A residual block, two 3x3 convolutions with BatchNorm and a way past them: [b, channels, h, w] to [b, width, h /
    stride, ...]."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if channels != width or stride != 1:
            convolution = nn.Conv2d(channels, width, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, inputs: Tensor) -> Tensor:
        """The block's output for inputs [b, channels, h, w], after ReLU."""
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(inputs)))))
        return F.relu(residual + self.shortcut(inputs))


class LstmLanguageModel(nn.Module):
    """A language model by LSTMs: words of shape [b, t] (int64) to logits of the words after them, [b, vocabulary, t].

    The state begins at zero in every window, so that windows are examples like any others. The last layer's weight is
    the embedding's (Press and Wolf, "Using the Output Embedding to Improve Language Models", 2017). Dropout modules
    see [b, t, features]: `input_dropout` after the embedding, `hidden_dropout` between the LSTMs, `output_dropout`
    after the last.
    """

    def __init__(self, vocabulary: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        widths = [embedding, *[hidden] * (layers - 1), embedding]
        self.encoder = nn.Embedding(vocabulary, embedding)
        self.input_dropout = nn.Dropout(0.0)
        self.lstms = nn.ModuleList(nn.LSTM(features, width, batch_first=True) for features, width in pairwise(widths))
        self.hidden_dropout = nn.Dropout(0.0)
        self.output_dropout = nn.Dropout(0.0)
        self.decoder = nn.Linear(embedding, vocabulary)
        # an embedding's own N(0, 1) would make logits of a deviation of dozens
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = self.encoder.weight

    def forward(self, words: Tensor) -> Tensor:
        """Logits [b, vocabulary, t] for every position of every window of words [b, t]."""
        features = self.input_dropout(self.encoder(words))
        for number, lstm in enumerate(self.lstms):
            if number > 0:
                features = self.hidden_dropout(features)
            features, _ = lstm(features)
        logits: Tensor = self.decoder(self.output_dropout(features))
        return logits.transpose(1, 2)


def _convolution(
    number: int, channels: int, width: int, *, kernel_size: int = 3, stride: int = 1, normalised: bool = False
) -> Named:
    """A padded convolution and ReLU, with BatchNorm (which stands in for the bias) between them or not."""
    padding = kernel_size // 2
    layers: Named = [
        (f"conv{number}", nn.Conv2d(channels, width, kernel_size, stride, padding, bias=not normalised)),
    ]
    if normalised:
        layers.append((f"norm{number}", nn.BatchNorm2d(width)))
    return [*layers, (f"relu{number}", nn.ReLU())]


def _linear(number: int, features: int, width: int) -> Named:
    return [(f"fc{number}", nn.Linear(features, width)), (f"fc_relu{number}", nn.ReLU())]


def _classifier(features: int, hidden: int) -> Named:
    """A classifier of features: two hidden layers, each with dropout, and the layer of the logits."""
    return [
        ("flatten", nn.Flatten()),
        *_linear(1, features, hidden),
        ("fc_dropout1", nn.Dropout(0.0)),
        *_linear(2, hidden, hidden),
        ("fc_dropout2", nn.Dropout(0.0)),
        ("fc3", nn.Linear(hidden, CLASSES)),
    ]


def _sequential(layers: Named) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))
