"""A dozen kinds of training, each written the way its users write it, as small `Problem`s."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tune_hypergrad import Problem
from tune_hypergrad.losses import accuracy


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Texts(Dataset):
    """Tokenised texts with labels, as Hugging Face's data sets give them."""

    def __init__(self, examples: int, seed: int) -> None:
        self.ids = torch.randint(0, 40, (examples, 8), generator=draws(seed))
        self.labels = (self.ids[:, 0] > 20).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = torch.ones(8, dtype=torch.long)
        return {"input_ids": self.ids[index], "attention_mask": mask, "labels": self.labels[index]}


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=8, **sizes))


def bert() -> Problem:
    pytest.importorskip("transformers")

    def right(output, batch):
        return (output.logits.argmax(1) == batch["labels"]).float().mean()

    return Problem(tiny_bert, Texts(32, 0), Texts(16, 1), batch_size=8, metrics={"accuracy": right})


def gpt2() -> Problem:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    train, val = (torch.randint(0, 40, (examples, 8), generator=draws(examples)) for examples in (32, 16))
    return Problem(
        model=lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)),
        train={"input_ids": train, "labels": train},
        val={"input_ids": val, "labels": val},
        batch_size=8,
    )


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        heads = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.attend(self.norms[0](x)).chunk(3, -1))
        x = x + self.project(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class NanoGPT(nn.Module):
    """A language model that gives logits and loss, with the output layer's weights tied to the embedding's."""

    def __init__(self, width: int = 8, symbols: int = 12) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(symbols, width), nn.Embedding(6, width)
        self.blocks, self.norm = nn.Sequential(Block(width), Block(width)), nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids, targets=None):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        logits = self.head(self.norm(self.blocks(x)))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Windows(Dataset):
    """Every window of a text, and the same shifted by one."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __len__(self) -> int:
        return len(self.text) - 6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.text[index : index + 7]
        return window[:-1], window[1:]


def nano_gpt() -> Problem:
    text = torch.randint(0, 12, (120,), generator=draws())
    return Problem(
        model=NanoGPT,
        train=Windows(text[:80]),
        val=Windows(text[80:]),
        forward=lambda model, batch: model(*batch),
        loss=lambda output, target: output[1],
        batch_size=8,
    )


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])

    def forward(self, x):
        return x + self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))


class Pictures(Dataset):
    """Pictures, each flipped and shifted at random."""

    def __init__(self, examples: int, *, augment: bool) -> None:
        self.labels = torch.randint(0, 3, (examples,), generator=draws(examples))
        self.images = torch.randn(examples, 1, 6, 6, generator=draws(examples + 1)) + self.labels.view(-1, 1, 1, 1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.augment:
            image = image.flip(-1) if torch.rand(()) < 0.5 else image
            image = image.roll(int(torch.randint(-1, 2, ())), -1)
        return image, int(self.labels[index])


def resnet() -> Problem:
    def model() -> nn.Module:
        stem = nn.Conv2d(1, 4, 3, padding=1)
        return nn.Sequential(stem, Residual(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    train, val = Pictures(32, augment=True), Pictures(16, augment=False)
    return Problem(model, train, val, batch_size=8, metrics={"accuracy": accuracy})


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items, self.head = nn.Embedding(10, 4), nn.Embedding(12, 4), nn.Linear(8, 1)

    def forward(self, user, item):
        return self.head(torch.cat([self.users(user), self.items(item)], 1)).squeeze(1)


def recommender() -> Problem:
    def ratings(examples: int) -> dict[str, Tensor]:
        user, item = (torch.randint(0, top, (examples,), generator=draws(examples)) for top in (10, 12))
        return {"user": user, "item": item, "rating": torch.rand(examples, generator=draws(1))}

    return Problem(Recommender, ratings(32), ratings(16), loss=lambda o, b: F.mse_loss(o, b["rating"]), batch_size=8)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, x):
        mean, log_variance = self.encoder(x).chunk(2, -1)
        latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(latent), mean, log_variance


def vae() -> Problem:
    def evidence(output, x):
        decoded, mean, log_variance = output
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
        return F.mse_loss(decoded, x, reduction="none").sum(1).mean() + divergence

    train, val = (torch.randn(examples, 6, generator=draws(examples)) for examples in (32, 16))
    return Problem(VAE, train, val, loss=evidence, batch_size=8)


class Rows(Dataset):
    """Rows of numbers, and which of the first three is largest."""

    def __init__(self, examples: int) -> None:
        self.x = torch.randn(examples, 6, generator=draws(examples))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], int(self.x[index, :3].argmax())


class MultiTask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.value = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return {"kind": self.kind(hidden), "value": self.value(hidden).squeeze(1)}


def multi_task() -> Problem:
    def examples(count: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
        x = torch.randn(count, 5, generator=draws(count))
        return [(row, {"kind": row[:3].argmax(), "value": row.sum()}) for row in x]

    def both(output, target):
        return F.cross_entropy(output["kind"], target["kind"]) + 0.5 * F.mse_loss(output["value"], target["value"])

    metrics = {"accuracy": lambda output, target: accuracy(output["kind"], target["kind"])}
    return Problem(MultiTask, examples(32), examples(16), loss=both, metrics=metrics, batch_size=8)


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(12, 4, padding_idx=0), nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, ids, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(ids), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.head(self.lstm(packed)[1][0][-1])


def padded(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    sequences, labels = zip(*items, strict=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return nn.utils.rnn.pad_sequence(list(sequences), batch_first=True), lengths, torch.stack(labels)


def packed_sequences() -> Problem:
    def items(examples: int) -> list[tuple[Tensor, Tensor]]:
        lengths = torch.randint(2, 7, (examples,), generator=draws(examples))
        sequences = [torch.randint(1, 12, (int(n),), generator=draws(int(n) + i)) for i, n in enumerate(lengths)]
        return [(sequence, (sequence[0] > 6).long()) for sequence in sequences]

    loader = DataLoader(items(32), batch_size=8, shuffle=True, collate_fn=padded, drop_last=True)
    return Problem(Sequences, train=loader, val=DataLoader(items(16), batch_size=16, collate_fn=padded))


class GraphClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, adjacency, graph, count):
        hidden = torch.tanh(adjacency @ self.convolution(x))
        return self.head(torch.zeros(count, 6, dtype=hidden.dtype).index_add(0, graph, hidden))


def block_diagonal(graphs):
    features, adjacencies, labels = zip(*graphs, strict=True)
    sizes = torch.tensor([len(x) for x in features])
    graph = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    adjacency = torch.block_diag(*adjacencies)
    return {
        "x": torch.cat(features),
        "adjacency": adjacency,
        "graph": graph,
        "count": len(sizes),
        "y": torch.stack(labels),
    }


def graphs() -> Problem:
    def some(count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        own, found = draws(count), []
        for _ in range(count):
            size = int(torch.randint(3, 6, (), generator=own))
            x, edges = torch.randn(size, 4, generator=own), torch.rand(size, size, generator=own) < 0.5
            found.append((x, edges.float(), torch.randint(0, 3, (), generator=own)))
        return found

    def loss(output, batch):
        return F.cross_entropy(output, batch["y"])

    return Problem(GraphClassifier, some(32), some(16), loss=loss, collate_fn=block_diagonal, batch_size=8)


class NodeClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, adjacency):
        return adjacency @ self.second(F.dropout(torch.tanh(adjacency @ self.first(x)), 0.2, self.training))


def transductive_gcn() -> Problem:
    """One graph, of which some nodes train and others validate."""
    x, edges = torch.randn(20, 4, generator=draws()), torch.rand(20, 20, generator=draws(1)) < 0.2
    adjacency = F.normalize((edges | edges.T | torch.eye(20, dtype=torch.bool)).float(), p=1.0, dim=1)
    graph = {"x": x, "adjacency": adjacency, "y": x[:, :3].argmax(1)}
    nodes = torch.arange(20)

    def loss(output, batch):
        return F.cross_entropy(output[batch["mask"]], batch["y"][batch["mask"]])

    return Problem(
        NodeClassifier,
        train=[{**graph, "mask": nodes < 12}],
        val=[{**graph, "mask": nodes >= 12}],
        collate_fn=lambda graphs: graphs[0],
        loss=loss,
        batch_size=1,
    )


class TwoViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, first, second):
        return self.encoder(first), self.encoder(second)


class Views(Dataset):
    """Two random views of each example, without labels."""

    def __init__(self, examples: int) -> None:
        self.x = torch.randn(examples, 6, generator=draws(examples))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"first": self.x[index] + 0.1 * torch.randn(6), "second": self.x[index] + 0.1 * torch.randn(6)}


def nt_xent(output, batch):
    embedded, examples = F.normalize(torch.cat(output), dim=1), len(output[0])
    alike = (embedded @ embedded.T / 0.5).masked_fill(torch.eye(2 * examples, dtype=torch.bool), -1e9)
    partner = torch.arange(2 * examples).roll(examples)
    return F.cross_entropy(alike, partner)


def simclr() -> Problem:
    return Problem(TwoViews, Views(32), Views(16), loss=nt_xent, batch_size=8)


def from_lightning() -> Problem:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 3))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            output = self.model(batch[0])
            self.log("val_loss", F.cross_entropy(output, batch[1]))
            self.log("val_accuracy", accuracy(output, batch[1]), prog_bar=True)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    class Data(lightning.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Rows(32), batch_size=8, shuffle=True)

        def val_dataloader(self):
            return DataLoader(Rows(16), batch_size=8)

    trainer = lightning.Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False)
    return Problem.from_lightning(Module, Data(), trainer=trainer)


def from_transformers() -> Problem:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def metrics(prediction):
        return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean()}

    args = transformers.TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    return Problem.from_transformers(tiny_bert, args, Texts(32, 0), Texts(16, 1), compute_metrics=metrics)


KINDS: tuple[Callable[[], Problem], ...] = (
    bert,
    gpt2,
    nano_gpt,
    resnet,
    recommender,
    vae,
    multi_task,
    packed_sequences,
    graphs,
    transductive_gcn,
    simclr,
    from_lightning,
    from_transformers,
)
