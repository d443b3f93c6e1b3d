"""What a hypergradient costs beside a person's own training loop, in time and memory, on models of five kinds.

    python benchmarks/pipeline_cost.py [--turns 3] [--models bert gpt2 resnet lstm recommender] [--json FILE]

Models: BERT-tiny and GPT-2-tiny of transformers (two layers of width 128; AdamW), a ResNet-18 on pictures of 32 x 32
that are flipped and shifted as they are read (SGD), a language model of two LSTM layers (Adam) and a recommender with
embeddings of users and items (Adam). The data are made up; the loop is a `DataLoader`, a `torch.optim` optimizer and
the validation loss at the end. A hypergradient is that of three numbers: a learning rate in two windows, and weight
decay.

On the CPU in one thread. Times are those of the process; the contenders take turns, after short runs of all of them,
and a figure is the median (and the range) over the turns of the ratio to the loop of the same turn. Memory is how far
the peak of a process of its own is above what it holds when model and data are there and a short run is over, for a run
of the same length, by what Linux says of it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from figures import Figure, figure, with_json, write
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tune_hypergrad import Problem, hypergradient
from tune_hypergrad.wording import markdown_row, markdown_table, with_range

WIDTH, TOKENS, LENGTH = 128, 8_000, 64


@dataclass(frozen=True)
class Pipeline:
    """What a person has: the same arguments make their loop and the `Problem`."""

    model: Callable[[], nn.Module]
    train: Any
    val: Any
    batch_size: int
    steps: int
    optimizer: type[torch.optim.Optimizer]
    lr: float
    loss: Callable[[Any, Any], Tensor] | None = None
    """None where the model gives it."""

    def of_batch(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss as their loop computes it."""
        if isinstance(batch, Mapping):
            output = model(**{name: leaf for name, leaf in batch.items() if name != "rating"})
            return output.loss if self.loss is None else self.loss(output, batch)
        x, y = batch
        return (self.loss or F.cross_entropy)(model(x), y)

    def problem(self) -> Problem:
        """The package's view."""
        given = {} if self.loss is None else {"loss": self.loss}
        return Problem(
            self.model, self.train, self.val, batch_size=self.batch_size, eval_batch_size=self.batch_size, **given
        )


class Columns(Dataset[Any]):
    """Examples as dicts of rows, or as pairs where there are no names."""

    def __init__(self, columns: dict[str, Tensor] | tuple[Tensor, ...]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())) if isinstance(self.columns, dict) else self.columns[0])

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.columns, dict):
            return {name: column[index] for name, column in self.columns.items()}
        return tuple(column[index] for column in self.columns)


class Pictures(Columns):
    """Flipped and shifted at random as they are read."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return image.roll(int(torch.randint(-2, 3, ())), -1), label


def _draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _texts(examples: int, seed: int) -> Tensor:
    return torch.randint(0, TOKENS, (examples, LENGTH), generator=_draws(seed))


def bert(steps: int) -> Pipeline:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH}

    def model() -> nn.Module:
        return BertForSequenceClassification(BertConfig(vocab_size=TOKENS, hidden_size=WIDTH, **sizes))

    def texts(examples: int, seed: int) -> Columns:
        ids = _texts(examples, seed)
        return Columns({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[:, 0] % 2)})

    return Pipeline(model, texts(16 * steps, 0), texts(64, 1), 16, steps, torch.optim.AdamW, 1e-3)


def gpt2(steps: int) -> Pipeline:
    from transformers import GPT2Config, GPT2LMHeadModel

    def model() -> nn.Module:
        return GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=LENGTH))

    def texts(examples: int, seed: int) -> Columns:
        ids = _texts(examples, seed)
        return Columns({"input_ids": ids, "labels": ids})

    return Pipeline(model, texts(16 * steps, 0), texts(64, 1), 16, steps, torch.optim.AdamW, 1e-3)


class Residual(nn.Module):
    """Two convolutions with BatchNorm, and what goes past them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        past = [nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)]
        self.past = nn.Identity() if before == width else nn.Sequential(*past)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(inside + self.past(x))


def resnet18() -> nn.Module:
    """Eight blocks, with the stem of small pictures: 11 million weights."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Residual(before, width, 1 if before == width else 2) for before, width in pairwise(widths)]
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def resnet(steps: int) -> Pipeline:
    def pictures(examples: int, seed: int) -> tuple[Tensor, Tensor]:
        draws = _draws(seed)
        return torch.randn(examples, 3, 32, 32, generator=draws), torch.randint(0, 10, (examples,), generator=draws)

    train, val = Pictures(pictures(32 * steps, 0)), Columns(pictures(64, 1))
    return Pipeline(resnet18, train, val, 32, steps, torch.optim.SGD, 0.01)


class LanguageModel(nn.Module):
    """The next token, by two LSTM layers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm = nn.Embedding(1_000, WIDTH), nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 1_000)

    def forward(self, ids: Tensor) -> Tensor:
        """From [b, time] to [b, classes, time]."""
        return self.head(self.lstm(self.tokens(ids))[0]).movedim(-1, 1)


def lstm(steps: int) -> Pipeline:
    def texts(examples: int, seed: int) -> Columns:
        ids = _texts(examples, seed) % 1_000
        return Columns((ids[:, :-1], ids[:, 1:]))

    return Pipeline(LanguageModel, texts(16 * steps, 0), texts(64, 1), 16, steps, torch.optim.Adam, 1e-3)


class Recommender(nn.Module):
    """A rating of an item by a user."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(5_000, 32), nn.Embedding(2_000, 32)
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.head(torch.cat([self.users(user), self.items(item)], 1)).squeeze(1)


def recommender(steps: int) -> Pipeline:
    def ratings(examples: int, seed: int) -> Columns:
        draws = _draws(seed)
        user, item = (torch.randint(0, top, (examples,), generator=draws) for top in (5_000, 2_000))
        return Columns({"user": user, "item": item, "rating": torch.rand(examples, generator=draws)})

    def error(output: Tensor, batch: Any) -> Tensor:
        return F.mse_loss(output, batch["rating"])

    return Pipeline(Recommender, ratings(256 * steps, 0), ratings(1024, 1), 256, steps, torch.optim.Adam, 1e-3, error)


MODELS: dict[str, tuple[str, Callable[[int], Pipeline], int]] = {
    "bert": ("BERT-tiny", bert, 40),
    "gpt2": ("GPT-2-tiny", gpt2, 40),
    "resnet": ("ResNet-18", resnet, 16),
    "lstm": ("LSTM", lstm, 40),
    "recommender": ("recommender", recommender, 40),
}
"""Name, pipeline and inner steps."""

MODES = ("reverse", "checkpointed_reverse", "forward")
CONTENDERS = ("loop", *MODES)


def own_loop(pipeline: Pipeline, steps: int) -> float:
    """As a person writes it."""
    torch.manual_seed(0)
    model = pipeline.model()
    optimizer = pipeline.optimizer(model.parameters(), lr=pipeline.lr)  # type: ignore[call-arg]
    batches = iter(DataLoader(pipeline.train, pipeline.batch_size, shuffle=True, drop_last=True))
    for _ in range(steps):
        optimizer.zero_grad()
        pipeline.of_batch(model, next(batches)).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        losses = [float(pipeline.of_batch(model, batch)) for batch in DataLoader(pipeline.val, pipeline.batch_size)]
    return statistics.fmean(losses)


def run(pipeline: Pipeline, problem: Problem, contender: str, steps: int) -> float:
    """One run's validation loss."""
    if contender == "loop":
        return own_loop(pipeline, steps)
    values = {"lr": torch.full((2,), pipeline.lr), "weight_decay": torch.tensor([1e-4])}
    optimizer = pipeline.optimizer.__name__.lower()
    found = hypergradient(problem, values, steps=steps, optimizer=optimizer, differentiation=contender, check=False)
    return found.val_loss


def ratios(name: str, turns: int) -> dict[str, list[float]]:
    """Process times over the loop's in every turn; the loop's own are milliseconds a step."""
    _, make, steps = MODELS[name]
    pipeline = make(steps)
    problem = pipeline.problem()
    for contender in CONTENDERS:
        run(pipeline, problem, contender, 2)
    seconds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for _ in range(turns):
        for contender in CONTENDERS:
            gc.collect()
            begin = time.process_time()
            run(pipeline, problem, contender, steps)
            seconds[contender].append(time.process_time() - begin)
    own = seconds["loop"]
    over = {mode: [a / b for a, b in zip(seconds[mode], own, strict=True)] for mode in MODES}
    return {"loop": [1000 * each / steps for each in own], **over}


def mebibytes_of(what: str) -> float:
    """This process's "VmRSS", what it holds, or "VmHWM", the most that it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{what}:"))


def print_growth(name: str, contender: str) -> None:
    """How far a run takes this process's memory above what it held, in MiB."""
    _, make, steps = MODELS[name]
    pipeline = make(steps)
    problem = pipeline.problem()
    run(pipeline, problem, contender, 2)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = mebibytes_of("VmRSS")
    run(pipeline, problem, contender, steps)
    print(mebibytes_of("VmHWM") - before)


def growth(name: str, contender: str) -> float:
    """The same of a new process."""
    command = [sys.executable, __file__, "--growth-of", name, contender]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    with_json(parser)
    parser.add_argument("--growth-of", nargs=2, metavar=("MODEL", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.growth_of:
        print_growth(*options.growth_of)
        return
    in_memory = f"memory in MiB: {' / '.join(CONTENDERS)}"
    print(markdown_table(("model", "weights", "steps", "loop, ms a step", *MODES, in_memory), []))
    figures: list[Figure] = []
    for name in options.models:
        title, make, steps = MODELS[name]
        weights = sum(parameter.numel() for parameter in make(1).model().parameters())
        times = ratios(name, options.turns)
        shown = [with_range(times[mode], ".2f") for mode in MODES]
        grown = {contender: growth(name, contender) for contender in CONTENDERS}
        memory = " / ".join(f"{mebibytes:.0f}" for mebibytes in grown.values())
        cells = (title, f"{weights:,}", f"{steps}", f"{statistics.median(times['loop']):.1f}", *shown, memory)
        print(markdown_row(cells), flush=True)
        figures += [figure(f"{title}, {mode}", times[mode], "plain loops") for mode in MODES]
        figures += [figure(f"{title}, {contender}", mebibytes, "MiB") for contender, mebibytes in grown.items()]
    write(options.json, figures)


if __name__ == "__main__":
    main()
