"""Layers that torch has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from construct_cases.case import IMAGES, PADDED, SEQUENCES, TOKENS, Case, Values, before_head, inside, mlp

NO_DECAY: Values = {"lr": (0.1, 0.2), "momentum": (0.6,)}


def with_statistics(layer: nn.BatchNorm1d) -> nn.BatchNorm1d:
    """As if it had been trained before."""
    assert layer.running_mean is not None and layer.running_var is not None
    layer.running_mean.copy_(torch.linspace(-0.3, 0.3, 6))
    layer.running_var.copy_(torch.linspace(0.2, 0.6, 6))
    return layer


class FrozenBatchNorm(nn.BatchNorm1d):
    """Stays in evaluation mode, whatever the model does."""

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        return super().train(False)


def reset_embedding() -> nn.Embedding:
    """A padding row that initialisation has overwritten: it has no gradient, and is not zero."""
    layer = nn.Embedding(7, 4, padding_idx=0)
    nn.init.normal_(layer.weight)
    return layer


class TiedWeights(nn.Module):
    """Embedding and output layer share a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens).mean(1))))[:, :3]


class Recurrent(nn.Module):
    """A recurrent network over sequences, read off at their ends."""

    def __init__(self, cell: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.recurrent = cell(4, 4, batch_first=True, **options)
        self.head = nn.Linear(8 if self.recurrent.bidirectional else 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Packed(nn.Module):
    """A recurrent network over sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        padded, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        return self.head(padded.sum(1) / lengths[:, None])


class Cells(nn.Module):
    """A recurrent cell called step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for item in x.unbind(1):
            state = self.cell(item, state)
        assert state is not None
        return self.head(state[0])


class Attention(nn.Module):
    """`nn.MultiheadAttention` of a sequence to itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(x, x, x, **self.options)[0]).mean(1))


class DotProductAttention(nn.Module):
    """`F.scaled_dot_product_attention` with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1).mean(1))


class Twice(nn.Module):
    """A bilinear layer of a vector and itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(6, 6, 6)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h, h)


def in_folds() -> nn.Module:
    """Patches, a layer on each, and an image again."""
    return nn.Sequential(nn.Unfold(3, stride=3), nn.Linear(4, 4), nn.Tanh(), nn.Fold((6, 6), 3, stride=3))


def encoder_layer() -> nn.Module:
    """A transformer layer with dropout."""
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, activation="gelu", batch_first=True)


def compiled() -> nn.Module:
    """Traced by dynamo."""
    return cast("nn.Module", torch.compile(mlp(), backend="eager"))


def convolution() -> nn.Module:
    """Images to 3 x 4 x 4."""
    return nn.Conv2d(1, 3, 3)


ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Softplus, nn.ELU, nn.Mish, nn.Hardtanh, nn.PReLU, nn.RReLU)

LAYERS = [
    Case("Linear, Tanh"),
    *(Case(activation.__name__, inside(activation)) for activation in ACTIVATIONS),
    Case("Bilinear", inside(Twice)),
    Case("Conv1d", before_head(12, partial(nn.Conv1d, 6, 4, 2), nn.Tanh), SEQUENCES),
    Case("Conv2d, strided", before_head(27, partial(nn.Conv2d, 1, 3, 2, stride=2), nn.Tanh), IMAGES),
    Case(
        "Conv2d, grouped and dilated",
        before_head(16, partial(nn.Conv2d, 1, 4, 3), nn.Tanh, partial(nn.Conv2d, 4, 4, 2, groups=2, dilation=2)),
        IMAGES,
    ),
    Case(
        "Conv2d, circular padding",
        before_head(108, partial(nn.Conv2d, 1, 3, 3, padding=1, padding_mode="circular"), nn.Tanh),
        IMAGES,
    ),
    Case(
        "ConvTranspose2d",
        before_head(98, convolution, nn.Tanh, partial(nn.ConvTranspose2d, 3, 2, 3, stride=2, padding=1)),
        IMAGES,
    ),
    Case("BatchNorm1d", inside(partial(nn.BatchNorm1d, 6))),
    Case("BatchNorm2d", before_head(48, convolution, partial(nn.BatchNorm2d, 3), nn.Tanh), IMAGES),
    Case("BatchNorm1d, cumulative average", inside(partial(nn.BatchNorm1d, 6, momentum=None))),
    Case("BatchNorm1d without running statistics", inside(partial(nn.BatchNorm1d, 6, track_running_stats=False))),
    Case("BatchNorm1d left in eval() by the factory", inside(lambda: with_statistics(nn.BatchNorm1d(6)).eval())),
    Case("whole model left in eval() by the factory", lambda: inside(partial(nn.Dropout, 0.3))().eval()),
    Case("BatchNorm1d frozen by its train()", inside(lambda: with_statistics(FrozenBatchNorm(6)))),
    Case(
        "InstanceNorm2d with running statistics",
        before_head(
            48, convolution, partial(nn.InstanceNorm2d, 3, affine=True, track_running_stats=True, momentum=0.3), nn.Tanh
        ),
        IMAGES,
    ),
    Case("GroupNorm", before_head(48, convolution, partial(nn.GroupNorm, 3, 3), nn.Tanh), IMAGES),
    Case("LayerNorm", inside(partial(nn.LayerNorm, 6))),
    Case("RMSNorm", inside(partial(nn.RMSNorm, 6))),
    Case("LocalResponseNorm", before_head(48, convolution, partial(nn.LocalResponseNorm, 2), nn.Tanh), IMAGES),
    Case("Embedding", before_head(16, partial(nn.Embedding, 7, 4), nn.Tanh), TOKENS),
    Case("Embedding with max_norm", before_head(16, partial(nn.Embedding, 7, 4, max_norm=1.5), nn.Tanh), TOKENS),
    Case(
        "Embedding with scale_grad_by_freq",
        before_head(16, partial(nn.Embedding, 7, 4, scale_grad_by_freq=True), nn.Tanh),
        TOKENS,
    ),
    Case("Embedding, padding row overwritten", before_head(16, reset_embedding, nn.Tanh), TOKENS),
    Case(
        "Embedding with sparse gradients",
        before_head(16, partial(nn.Embedding, 7, 4, sparse=True), nn.Tanh),
        TOKENS,
        values=NO_DECAY,
    ),
    Case("EmbeddingBag", before_head(4, partial(nn.EmbeddingBag, 7, 4), nn.Tanh), TOKENS),
    Case("tied weights", TiedWeights, TOKENS),
    Case("LSTM, two layers, dropout", partial(Recurrent, nn.LSTM, num_layers=2, dropout=0.2), SEQUENCES),
    Case("GRU, bidirectional", partial(Recurrent, nn.GRU, bidirectional=True), SEQUENCES),
    Case("RNN", partial(Recurrent, nn.RNN), SEQUENCES),
    Case("LSTMCell", Cells, SEQUENCES),
    Case("packed sequences", Packed, PADDED),
    Case("MultiheadAttention", partial(Attention, need_weights=False), SEQUENCES),
    Case("MultiheadAttention with its weights", Attention, SEQUENCES),
    Case("scaled_dot_product_attention", DotProductAttention, SEQUENCES),
    Case("TransformerEncoderLayer", before_head(24, encoder_layer), SEQUENCES),
    Case("Dropout", inside(partial(nn.Dropout, 0.3))),
    Case("Dropout2d", before_head(48, convolution, nn.Tanh, partial(nn.Dropout2d, 0.3)), IMAGES),
    Case("AlphaDropout", inside(partial(nn.AlphaDropout, 0.3))),
    Case("MaxPool2d", before_head(12, convolution, partial(nn.MaxPool2d, 2), nn.Tanh), IMAGES),
    Case("AvgPool2d", before_head(12, convolution, nn.Tanh, partial(nn.AvgPool2d, 2)), IMAGES),
    Case("AdaptiveAvgPool2d", before_head(27, convolution, nn.Tanh, partial(nn.AdaptiveAvgPool2d, 3)), IMAGES),
    Case("AdaptiveMaxPool2d", before_head(27, convolution, nn.Tanh, partial(nn.AdaptiveMaxPool2d, 3)), IMAGES),
    Case("LPPool2d", before_head(12, convolution, nn.Sigmoid, partial(nn.LPPool2d, 2, 2)), IMAGES),
    Case(
        "FractionalMaxPool2d",
        before_head(27, convolution, nn.Tanh, partial(nn.FractionalMaxPool2d, 2, output_size=3)),
        IMAGES,
    ),
    Case(
        "Upsample, bilinear",
        before_head(192, convolution, nn.Tanh, partial(nn.Upsample, scale_factor=2, mode="bilinear")),
        IMAGES,
    ),
    Case("Fold and Unfold", before_head(36, partial(nn.Conv2d, 1, 1, 1), in_folds), IMAGES),
    Case("weight_norm", inside(lambda: parametrizations.weight_norm(nn.Linear(6, 6)))),
    Case("weight_norm, old API", inside(lambda: nn.utils.weight_norm(nn.Linear(6, 6)))),
    Case("spectral_norm", inside(lambda: parametrizations.spectral_norm(nn.Linear(6, 6)))),
    Case("spectral_norm, old API", inside(lambda: nn.utils.spectral_norm(nn.Linear(6, 6)))),
    Case("orthogonal parametrisation", inside(lambda: parametrizations.orthogonal(nn.Linear(6, 6)))),
    Case("pruned weights", inside(lambda: prune.random_unstructured(nn.Linear(6, 6), "weight", amount=0.5))),
    Case("TorchScript module", lambda: torch.jit.script(mlp())),
    Case("torch.compile", compiled),
    Case("LazyLinear", inside(partial(nn.LazyLinear, 6))),
]
