"""Good models of text and of series: transformers, of a library as well, and recurrent and convolutional networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from check_cases.case import (
    CLASSES,
    IGNORED,
    LENGTH,
    VOCABULARY,
    Good,
    Named,
    with_series,
    with_text,
    with_tokens,
)

_CHECKPOINTED = {"forward": r"forward mode does not work on this model \(RuntimeError: .*(functorch|[Cc]heckpoint)"}


class Encoder(nn.Module):
    """torch's transformer with padding masked, mean over the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        x = self.encoder(self.embedding(tokens) + self.positions, src_key_padding_mask=padding)
        present = ~padding[..., None]
        return self.head((x * present).sum(1) / present.sum(1))


class DecoderBlock(nn.Module):
    """Causal self-attention and a gated MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.RMSNorm(width), nn.RMSNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.widen, self.narrow = nn.Linear(width, 16), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        normal = self.norm2(x)
        return x + self.narrow(F.silu(self.gate(normal)) * self.widen(normal))


class Decoder(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList([DecoderBlock(8, 2), DecoderBlock(8, 2)])
        self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.checkpointed = checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    """An embedding, a recurrent network of two layers, and its last output."""

    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.cell = cell(6, 6, num_layers=2, dropout=0.2, bidirectional=cell is nn.GRU, batch_first=True)
        self.head = nn.Linear(12 if cell is nn.GRU else 6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.cell(self.embedding(tokens))[0][:, -1])


class TemporalBlock(nn.Module):
    """A dilated causal convolution with dropout, and a way past it."""

    def __init__(self, channels: int, width: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv, self.dropout = nn.Conv1d(channels, width, 3, dilation=dilation), nn.Dropout(0.1)
        self.past = nn.Conv1d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dropout(F.relu(self.conv(F.pad(x, (self.pad, 0))))) + self.past(x))


def tcn() -> nn.Module:
    """Bai, Kolter and Koltun, "An Empirical Evaluation of Generic Convolutional and Recurrent Networks", 2018."""
    blocks = [TemporalBlock(3, 6, 1), TemporalBlock(6, 6, 2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, CLASSES))


def gpt2(*, checkpointed: bool = False) -> nn.Module:
    """GPT-2 of two layers with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2)
    model: nn.Module = GPT2LMHeadModel(config)
    if checkpointed:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model


def bert(attention: str) -> nn.Module:
    """BERT of two layers with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    class Unpacking(BertForSequenceClassification):  # type: ignore[misc]
        """Takes its inputs by name."""

        def forward(self, inputs: dict[str, Tensor]) -> Any:
            return super().forward(**inputs)

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
        attn_implementation=attention,
    )
    model: nn.Module = Unpacking(config)
    return model


def next_token(output: Any, target: Tensor) -> Tensor:
    """Cross entropy over known tokens, in single precision, of logits or of a library's output."""
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=IGNORED)


def summed(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of all known tokens, and their number."""
    total = F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (target != IGNORED).sum()


def of_logits(output: Any, target: Tensor) -> Tensor:
    """Cross entropy of a library's output."""
    return F.cross_entropy(output.logits.float(), target)


SEQUENCES = [
    Good("transformer encoder", Encoder, with_tokens, "adam"),
    Good("decoder with tied embeddings", Decoder, with_text, "adamw", loss=summed),
    Good(
        "decoder, gradient checkpointing",
        lambda: Decoder(checkpointed=True),
        with_text,
        "adamw",
        loss=next_token,
        refused=_CHECKPOINTED,
    ),
    Good("GPT-2", gpt2, with_text, "adamw", loss=next_token, requires="transformers"),
    Good(
        "GPT-2, gradient checkpointing",
        lambda: gpt2(checkpointed=True),
        with_text,
        "adamw",
        loss=next_token,
        refused=_CHECKPOINTED,
        requires="transformers",
    ),
    Good("BERT, SDPA", lambda: bert("sdpa"), with_tokens, "adamw", loss=of_logits, wrap=Named, requires="transformers"),
    Good("BERT, eager", lambda: bert("eager"), with_tokens, loss=of_logits, wrap=Named, requires="transformers"),
    Good("LSTM", lambda: Recurrent(nn.LSTM), with_tokens, "rmsprop"),
    Good("bidirectional GRU", lambda: Recurrent(nn.GRU), with_tokens, "adam"),
    Good("TCN", tcn, with_series, "nesterov"),
]
