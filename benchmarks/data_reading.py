"""What reading data costs beside a person's own torch loop with the same workers.

    python benchmarks/data_reading.py [--repetitions 5] [--workers 0 1 2] [--steps 24]

A tiny CNN on images that are decoded from JPEG (from zlib-compressed arrays where there is no PIL) and cropped and
flipped at random for every batch, so that reading is nearly all of the time; and an LSTM on tensors, where it is none.
On the CPU in one thread, as wall time, workers' start included. Contenders take turns in one process; a figure is the
median (and the range) over the turns of the ratio to the person's loop in the same turn. The loop is `torch.optim` over
a `DataLoader` with as many workers; evaluation reads the validation split once in all of them.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tune_hypergrad import Problem
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.wording import with_range

try:
    from PIL import Image
except ImportError:
    Image = None

SIDE, CROP, BATCH, LR = 96, 64, 32, 0.05


class Images(Dataset[tuple[Tensor, int]]):
    """Compressed noise with a bright corner, and which corner; decoded, cropped and flipped at every access."""

    def __init__(self, examples: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.labels = generator.integers(4, size=examples)
        self.packed = [_packed(_image(generator, int(label))) for label in self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        pixels = _unpacked(self.packed[position])
        top, left, flipped = (int(torch.randint(n, ())) for n in (SIDE - CROP, SIDE - CROP, 2))
        cropped = pixels[top : top + CROP, left : left + CROP, :]
        image = torch.from_numpy(cropped[:, ::-1].copy() if flipped else cropped.copy())
        return image.permute(2, 0, 1).float() / 255, int(self.labels[position])


def _image(generator: np.random.Generator, label: int) -> np.ndarray[Any, Any]:
    image = generator.integers(128, size=(SIDE, SIDE, 3), dtype=np.uint8)
    rows, columns = (slice(0, SIDE // 2) if bit else slice(SIDE // 2, SIDE) for bit in divmod(label, 2))
    image[rows, columns] += 100
    return image


def _packed(image: np.ndarray[Any, Any]) -> bytes:
    if Image is None:
        return zlib.compress(image.tobytes())
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> np.ndarray[Any, Any]:
    if Image is None:
        return np.frombuffer(zlib.decompress(packed), np.uint8).reshape(SIDE, SIDE, 3)
    return np.asarray(Image.open(io.BytesIO(packed)))


def tiny_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 4)
    )


class SequenceClassifier(nn.Module):
    """An LSTM whose last state is read off."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 64, batch_first=True)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def images(workers: int, steps: int) -> Problem:
    train, val = Images(BATCH * steps, 0), Images(4 * BATCH, 1)
    return Problem(
        model=tiny_cnn, train=train, val=val, batch_size=BATCH, eval_batch_size=BATCH, workers=workers, name="images"
    )


def sequences(workers: int, steps: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(BATCH * steps, 32, 16, generator=generator), torch.arange(BATCH * steps) % 4
    return Problem(
        model=SequenceClassifier,
        train=(x, y),
        val=(x[: 4 * BATCH], y[: 4 * BATCH]),
        batch_size=BATCH,
        eval_batch_size=BATCH,
        name="LSTM",
    )


def own_loop(problem: Problem, workers: int) -> float:
    """One epoch and the validation loss, as a person writes it."""
    train, val = (split.dataset or TensorDataset(*split.tensors) for split in (problem.train, problem.val))  # type: ignore[union-attr]
    torch.manual_seed(0)
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for x, y in DataLoader(train, BATCH, shuffle=True, drop_last=True, num_workers=workers):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    total = 0.0
    with torch.no_grad():
        for x, y in DataLoader(val, BATCH, num_workers=workers):
            total += float(F.cross_entropy(model(x), y)) * len(y)
    return total / len(val)  # type: ignore[arg-type]


def our_run(problem: Problem, steps: int, *, differentiated: bool) -> float:
    """The same by the package, with or without the hypergradient by the learning rate."""
    loop = InnerLoop(problem, TrainingSettings(steps))
    limit = torch.inf if differentiated else -torch.inf
    run = hypergradient_run(loop, {"lr": torch.tensor([LR])}, differentiation="reverse", reject_above=limit)
    with loop.running(plain=run.plain):
        run.advance(run.length)
    return run.result().val_loss


def measure(problem: Problem, workers: int, steps: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each contender in each turn; the first turn is not counted."""
    contenders: dict[str, Callable[[], float]] = {
        "own loop": lambda: own_loop(problem, workers),
        "plain run": lambda: our_run(problem, steps, differentiated=False),
        "hypergradient": lambda: our_run(problem, steps, differentiated=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repetitions + 1):
        for name, run in contenders.items():
            begun = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("problem", "workers", "own loop, ms", "plain run", "hypergradient")
    cases = [(images, workers) for workers in arguments.workers] + [(sequences, 0)]
    for make, workers in cases:
        problem = make(workers, arguments.steps)
        seconds = measure(problem, workers, arguments.steps, arguments.repetitions)
        own = seconds.pop("own loop")
        ratios = {name: [a / b for a, b in zip(each, own, strict=True)] for name, each in seconds.items()}
        figures = [with_range(own, ".2f") for own in ratios.values()]
        table.add_row(problem.name, str(workers), f"{1000 * statistics.median(own):.0f}", *figures)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
