"""Outer searches on problems of several kinds, against hand-made schedules: what a search finds, and for how much.

    python benchmarks/outer_search.py --data-dir DATA --problems fashion_mnist digits --seeds 3 --out RUN.jsonl
    python benchmarks/outer_search.py --table RUN.jsonl

Problems (the inner optimizer's hyperparameters are tuned, the learning rate in 7 windows, in the default space):

- fashion_mnist, mnist: LeNet, one epoch (429 steps of batch 128), SGD;
- digits: a small CNN, 10 epochs (170 steps of batch 64), SGD;
- cifar: WRN-16-1 with BatchNorm on 10,000 images of CIFAR-10 at half size, one epoch (156 steps of batch 64), SGD;
- text: a transformer of two layers on characters of WikiText-2, 400 steps of batch 32, AdamW;
- lstm: an LSTM on the same text, 300 steps, Adam.

Contenders: `robust` (`RobustSearch`), `paper` (`PaperSearch`: sign steps from zero on linear scales), `polish`
(`robust` from a customary cosine schedule, whose outcome must not be worse by validation) and `grid`: cosine and step
schedules over six peaks with momentum 0.9 and 0.95 (SGD), or over seven peaks (Adam), each trained with three seeds.
The table has the best of them by validation loss, and the best by test accuracy, which no one could have chosen. What a
search found is trained with `--tests` fresh seeds as it was found, and with half as many with gradient clipping turned
on (off, with `--clip`); only then is the test split read. Every line that is done is kept, and the same command goes
on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_hypergrad import Problem, problems
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.outer import Descent, Outcome, OuterSearch, PaperSearch, RobustSearch
from tune_hypergrad.problems.wide_resnet import wrn_16_1
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.space import Range
from tune_hypergrad.wording import markdown_table, with_range

WINDOWS, CLIP = 7, 3.0
CONTEXT, CHARACTERS = 64, 96
_TESTS = 1 << 30  # seeds of retrainings, apart from the searches'


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of the examples, or characters, whose class is the most likely one."""
    return (output.argmax(1) == target).float().mean()


class Block(nn.Module):
    """Attention and a feed-forward network, normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.attended = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """From and to [b, time, width]."""
        batch, time, width = x.shape
        mixed = self.mixed(self.before_attention(x)).view(batch, time, 3, self.heads, -1)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(attended.transpose(1, 2).reshape(batch, time, width))
        return x + self.network(self.before_network(x))


class Transformer(nn.Module):
    """Logits of the next character, [b, characters, time], from [b, time]."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(layers)))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.output(self.norm(self.blocks(0.5 * self.characters(x) + self.places))).transpose(1, 2)


class Recurrent(nn.Module):
    """The same by an LSTM."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        self.lstm, self.output = nn.LSTM(width, width, batch_first=True), nn.Linear(width, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.output(self.lstm(self.characters(x))[0]).transpose(1, 2)


def text(model: Callable[[], nn.Module], data_dir: Path) -> Problem:
    """Characters of WikiText-2's validation text, a sixth of them to validate on, and of its test text."""

    def examples(characters: Tensor, count: int) -> tuple[Tensor, Tensor]:
        characters = characters[: (len(characters) - 1) // CONTEXT * CONTEXT + 1]
        return characters[:-1].view(-1, CONTEXT)[:count], characters[1:].view(-1, CONTEXT)[:count]

    def read(name: str) -> Tensor:
        lines = (data_dir / "wikitext-2" / name).read_text()
        return torch.tensor([min(max(ord(character) - 31, 0), CHARACTERS - 1) for character in lines])

    known, test = read("valid.txt"), read("test.txt")
    end = len(known) * 17 // 20
    return Problem(
        model=model,
        train=examples(known[:end], 1 << 20),
        val=examples(known[end:], 1_000),
        test=examples(test, 2_000),
        loss=F.cross_entropy,
        metrics={"accuracy": accuracy},
        batch_size=32,
        eval_batch_size=250,
    )


def small_cifar(data_dir: Path) -> Problem:
    """10,000 training, 2,000 validation and 4,000 test images of CIFAR-10 at half size."""
    whole = problems.get("cifar10", data_dir=data_dir)

    def half(split: Any, count: int) -> tuple[Tensor, Tensor]:
        images, labels = split.tensors
        return F.avg_pool2d(images[:count], 2), labels[:count]

    return Problem(
        model=wrn_16_1,
        train=half(whole.train, 10_000),
        val=half(whole.val, 2_000),
        test=half(whole.test, 4_000),
        loss=F.cross_entropy,
        metrics={"accuracy": accuracy},
        batch_size=64,
        eval_batch_size=500,
    )


@lru_cache(maxsize=1)
def made(name: str, data_dir: Path) -> tuple[Problem, int, str]:
    """A problem, its inner steps and its inner optimizer."""
    if name in ("fashion_mnist", "mnist"):
        return problems.get(name, data_dir=data_dir), 429, "sgd"
    if name == "digits":
        return problems.get("digits"), 170, "sgd"
    if name == "cifar":
        return small_cifar(data_dir), 156, "sgd"
    return (text(Transformer, data_dir), 400, "adamw") if name == "text" else (text(Recurrent, data_dir), 300, "adam")


SEARCHES = ("robust", "paper", "polish")
PROBLEMS = ("fashion_mnist", "mnist", "digits", "cifar", "text", "lstm")


def ranges(optimizer: str) -> dict[str, Range]:
    """The default search space."""
    if optimizer == "sgd":
        lr, momentum = Range(WINDOWS, 1e-4, 1.0, "log"), {"momentum": Range(1, 0.0, 0.99, "complement")}
    else:
        lr, momentum = Range(WINDOWS, 1e-5, 0.1, "log"), {}
    return {"lr": lr, **momentum, "weight_decay": Range(1, 1e-6, 1e-2, "log")}


def search_of(rule: str, optimizer: str, trainings: float) -> OuterSearch:
    """A search by name, with a budget in trainings."""
    if rule == "robust":
        return RobustSearch(ranges(optimizer), trainings=trainings)
    if rule == "polish":
        start = {name: torch.tensor(values, dtype=torch.float64) for name, values in experts(optimizer).items()}
        return RobustSearch(ranges(optimizer), initial=start, polish=True, trainings=trainings)
    widest = {"lr": 1.0 if optimizer == "sgd" else 0.03, "momentum": 0.99, "weight_decay": 0.01}
    linear = {name: Range(r.windows, 0.0, widest[name]) for name, r in ranges(optimizer).items()}
    return PaperSearch(Descent(linear), outer_steps=int(trainings / 3.7))


def loop_of(name: str, data_dir: Path, seed: int, clip: float | None) -> InnerLoop:
    """One training run."""
    problem, steps, optimizer = made(name, data_dir)
    return InnerLoop(problem, TrainingSettings(steps, optimizer, seed=seed, clip_gradient=clip))


def outcome_of(loop: InnerLoop, values: dict[str, Tensor], reject_above: float) -> Outcome:
    """Train and, if that is asked for, differentiate."""
    run = hypergradient_run(loop, values, reject_above=reject_above)
    with loop.running():
        untrained = loop.evaluate(loop.initial_state()).loss
        run.advance(run.length)
    assert run.final is not None
    return Outcome(
        run.final.loss, untrained, None if run.rejected else run.hypergradients, run.cost.gradients / loop.steps
    )


def searched(name: str, data_dir: Path, rule: str, seed: int, trainings: float, clip: float | None) -> dict[str, Any]:
    """What a search finds."""
    _, _, optimizer = made(name, data_dir)
    search, history, spent = search_of(rule, optimizer, trainings), [], 0.0
    while proposals := search.round():
        outcomes = [
            outcome_of(loop_of(name, data_dir, fold_seed(seed, p.seed), clip), p.values, p.reject_above)
            for p in proposals
        ]
        search.tell(outcomes)
        spent += sum(outcome.cost for outcome in outcomes)
        for proposal, outcome in zip(proposals, outcomes, strict=True):
            values = {key: value.tolist() for key, value in proposal.values.items()}
            rejected, confirms = outcome.hypergradients is None, proposal.confirmed is not None
            history.append(
                {"val_loss": outcome.val_loss, "rejected": rejected, "confirms": confirms, "cost": outcome.cost}
                | {"values": values, "spent": spent}
            )
    assert search.incumbent is not None
    found = {key: value.tolist() for key, value in search.incumbent.values.items()}
    started = search.start_loss if isinstance(search, RobustSearch) else None
    result = {"found": found, "val_loss": search.incumbent.val_loss, "history": history, "spent": spent}
    return {**result, "start_loss": started}


def experts(optimizer: str) -> dict[str, list[float]]:
    """What a person would begin with: half a cosine in the windows of the search, customary values for the rest."""
    peak = 0.05 if optimizer == "sgd" else 3e-3
    lr = [peak * (1 + math.cos(math.pi * (window + 0.5) / WINDOWS)) / 2 for window in range(WINDOWS)]
    return {"lr": lr, **({"momentum": [0.9]} if optimizer == "sgd" else {}), "weight_decay": [1e-4]}


def hand_made(optimizer: str) -> dict[str, dict[str, list[float]]]:
    """Customary schedules by name: cosine to zero, and three steps of a tenth, over peaks and momentum."""
    cosine = [(1 + math.cos(math.pi * (window + 0.5) / 100)) / 2 for window in range(100)]
    steps = [1.0] * 5 + [0.1] * 3 + [0.01] * 2
    sgd = optimizer == "sgd"
    peaks = (0.02, 0.035, 0.05, 0.07, 0.1, 0.2) if sgd else (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
    found = {}
    for shape, factors in (("cosine", cosine), ("step", steps)):
        for peak in peaks:
            for momentum in (0.9, 0.95) if sgd else (None,):
                rest = {} if momentum is None else {"momentum": [momentum]}
                key = f"{shape} {peak:g}" + ("" if momentum is None else f" momentum {momentum:g}")
                found[key] = {"lr": [peak * factor for factor in factors], **rest, "weight_decay": [1e-4]}
    return found


def judged(name: str, data_dir: Path, values: dict[str, list[float]], seeds: range, clip: float | None) -> list[Any]:
    """Validation loss and test accuracy of fresh trainings."""
    results = []
    for seed in seeds:
        loop = loop_of(name, data_dir, fold_seed(_TESTS, seed), clip)
        tensors = {key: torch.tensor(value, dtype=loop.dtype) for key, value in values.items()}
        with loop.running():
            state = loop.run(tensors)
            test = loop.evaluate(state, "test").metrics["accuracy"]
            results.append([loop.evaluate(state).loss, 100 * test])
    return results


def contender(task: tuple[str, str, int], data_dir: Path, trainings: float, tests: int, clip: bool) -> dict[str, Any]:
    """One line of the output: a search with one seed, or one hand-made schedule."""
    torch.set_num_threads(1)
    name, rule, seed = task
    own = CLIP if clip else None
    result: dict[str, Any] = {"problem": name, "contender": rule, "seed": seed, "clip": clip, "trainings": trainings}
    if rule in SEARCHES:
        result |= searched(name, data_dir, rule, seed, trainings, own)
        values, seeds = result["found"], range(1_000 * (seed + 1), 1_000 * (seed + 1) + tests)
    else:
        values, seeds = hand_made(made(name, data_dir)[2])[rule], range(3)
    result["judged"] = judged(name, data_dir, values, seeds, own)
    if rule == "polish":
        result["judged_start"] = judged(name, data_dir, experts(made(name, data_dir)[2]), seeds, own)
    if rule == "robust":
        other = None if clip else CLIP
        result["judged_otherwise"] = judged(name, data_dir, values, seeds[: tests // 2], other)
    return result


def tasks_of(names: list[str], contenders: list[str], seeds: int) -> list[tuple[str, str, int]]:
    """Searches first."""
    searches = [(name, rule, seed) for rule in contenders if rule != "grid" for name in names for seed in range(seeds)]
    optimizers = {"text": "adamw", "lstm": "adam"}
    grids = [(name, key, 0) for name in names for key in hand_made(optimizers.get(name, "sgd"))]
    return [*searches, *(grids if "grid" in contenders else [])]


def table(lines: list[dict[str, Any]]) -> str:
    """One row for each problem and contender."""
    head = ("problem", "contender", "trainings", "validation loss", "test accuracy", "over", "worst", "dead")
    rows = []
    for name in dict.fromkeys(line["problem"] for line in lines):
        own = [line for line in lines if line["problem"] == name]
        for rule in SEARCHES:
            if of_rule := [line for line in own if line["contender"] == rule]:
                spent = fmean(line["spent"] for line in of_rule)
                rows.append(_row(name, rule, f"{spent:.0f}", [line["judged"] for line in of_rule]))
                if starts := [line["judged_start"] for line in of_rule if "judged_start" in line]:
                    rows.append(_row(name, "where polish began", "", starts))
                if otherwise := [line["judged_otherwise"] for line in of_rule if "judged_otherwise" in line]:
                    rows.append(_row(name, f"{rule}, clipping the other way", "", otherwise))
        if grid := [line for line in own if line["contender"] not in SEARCHES]:
            by_val = min(grid, key=lambda line: fmean(loss for loss, _ in line["judged"]))
            by_test = max(grid, key=lambda line: fmean(test for _, test in line["judged"]))
            for how, line in (("validation", by_val), ("test", by_test)):
                label = f"best of {len(grid)} by {how}: {line['contender']}"
                rows.append(_row(name, label, f"{3 * len(grid)}", [line["judged"]]))
    return markdown_table(head, rows)


def _row(name: str, label: str, spent: str, judged: list[list[Any]]) -> tuple[str, ...]:
    means = [fmean(test for _, test in of_search) for of_search in judged]
    flat = [pair for of_search in judged for pair in of_search]
    chance = 0.5 * fmean(means)
    dead = sum(not math.isfinite(loss) or test < chance for loss, test in flat)
    tests = with_range(means, ".2f", fmean)
    worst = f"{min(test for _, test in flat):.2f}"
    loss = f"{fmean(loss for loss, _ in flat):.4g}"
    return name, label, spent, loss, tests, str(len(flat)), worst, str(dead)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder with the data sets")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["digits"])
    parser.add_argument("--contenders", nargs="+", choices=[*SEARCHES, "grid"], default=["robust", "grid"])
    parser.add_argument("--seeds", type=int, default=3, help="searches of each kind")
    parser.add_argument("--trainings", type=float, default=40)
    parser.add_argument("--tests", type=int, default=10, help="fresh seeds for what a search found")
    parser.add_argument("--clip", action="store_true", help=f"clip the training gradient at {CLIP:g}")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("outer_search.jsonl"))
    parser.add_argument("--table", type=Path, help="only show the table of what a file holds")
    options = parser.parse_args()
    if options.table is None:
        known = [json.loads(line) for line in options.out.open()] if options.out.exists() else []
        done = {(line["problem"], line["contender"], line["seed"], line["clip"]) for line in known}
        tasks = tasks_of(options.problems, options.contenders, options.seeds)
        settings = (options.data_dir, options.trainings, options.tests, options.clip)
        work = partial(_work, settings)
        with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
            todo = [task for task in tasks if (*task, options.clip) not in done]
            for future in as_completed([pool.submit(work, task) for task in todo]):
                line = future.result()
                with options.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                tests = [test for _, test in line["judged"]]
                print(
                    line["problem"],
                    line["contender"],
                    line["seed"],
                    f"{fmean(tests):.2f} ({min(tests):.2f})",
                    flush=True,
                )
    print(table([json.loads(line) for line in (options.table or options.out).open()]))


def _work(settings: tuple[Path, float, int, bool], task: tuple[str, str, int]) -> dict[str, Any]:
    return contender(task, *settings)


if __name__ == "__main__":
    main()
