"""Data sets that are read by worker processes, ahead and once: the same batches, whatever reads them."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_problem import clusters, network, tiny_problem
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tune_hypergrad import InputError, Problem
from tune_hypergrad.data import Split
from tune_hypergrad.hypergradients import (
    InnerLoop,
    TrainingSettings,
    ahead,
    graph_size,
    hypergradient,
    hypergradient_run,
)
from tune_hypergrad.hypergradients.ahead import BatchesAhead
from tune_hypergrad.hypergradients.reverse import ReverseRun
from tune_hypergrad.hypergradients.run import HypergradientResult
from tune_hypergrad.reading import Loading, Reader, Task
from tune_hypergrad.stn import TunedHyperparameter
from tune_hypergrad.stn.self_tuning_run import SelfTuningRun, SelfTuningSettings

STEPS = 8
VALUES = {"lr": torch.tensor([0.1, 0.2]).double(), "momentum": torch.tensor([0.5]).double()}


class Augmented(Dataset[Any]):
    """Draws from all three generators for every example, and counts in its own process what it hands out."""

    def __init__(self, examples: int, seed: int) -> None:
        self.x, self.y = clusters(examples, seed)
        self.seen = 0

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        self.seen += 1
        noise = torch.randn(4).double() + torch.from_numpy(np.random.randn(4)) + random.gauss(0, 1)
        return self.x[position] + 0.1 * noise, self.y[position]


class Shared(Augmented):
    """Counts for all processes."""

    def __init__(self, examples: int, seed: int) -> None:
        super().__init__(examples, seed)
        self.reads = multiprocessing.Array("i", examples)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        with self.reads.get_lock():
            self.reads[position] += 1
        return super().__getitem__(position)


class Failing(Augmented):
    def __init__(self, error: Exception) -> None:
        super().__init__(48, 0)
        self.error = error

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        if position % 8 == 0:
            raise self.error
        return super().__getitem__(position)


class Numbers:
    """A split whose batches say what was read, and with which draws."""

    loading: Loading | None = Loading(workers=1)

    def collated(self, positions: Sequence[int]) -> Any:
        return list(positions), random.random(), float(np.random.random()), float(torch.rand(()))


def make(**fields: Any) -> Problem:
    own = {"train": Augmented(48, 0), "val": Augmented(24, 1), "test": None, "eval_batch_size": 5}
    return tiny_problem(**{**own, **fields})


def found(problem: Problem, **settings: Any) -> HypergradientResult:
    return hypergradient(problem, VALUES, steps=STEPS, check=False, **settings)


def assert_same(a: HypergradientResult, b: HypergradientResult) -> None:
    assert a.val_loss == b.val_loss and a.metrics == b.metrics
    for one, other in ((a.hypergradients, b.hypergradients), (a.params, b.params)):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """No process outlives its run."""
    yield
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "settings",
    [
        {"differentiation": "reverse"},
        {"differentiation": "checkpointed_reverse", "horizon": 4},
        {"differentiation": "forward", "val_examples": 12},
        {"differentiation": "reverse", "seed": (0, 1)},
    ],
    ids=["reverse", "checkpointed", "forward", "ensemble"],
)
def test_any_number_of_workers_gives_the_same_bits(settings: dict[str, Any]) -> None:
    assert_same(found(make(), **settings), found(make(workers=2), **settings))


def test_generators_are_left_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = float(torch.rand(())), np.random.random(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    found(make(workers=1))
    assert (float(torch.rand(())), np.random.random(), random.random()) == expected


@pytest.mark.parametrize("stop", [3, 11])
def test_a_run_goes_on_in_the_middle(stop: int) -> None:
    def advanced(workers: int, units: Sequence[int]) -> HypergradientResult:
        saved = None
        for part in units:
            loop = InnerLoop(make(workers=workers), TrainingSettings(STEPS))
            run = hypergradient_run(loop, VALUES, differentiation="reverse")
            if saved is not None:
                run.load_state_dict(saved)
            with loop.running():
                run.advance(part)
            saved = run.state_dict()
        return run.result()

    assert_same(advanced(0, [2 * STEPS]), advanced(2, [stop, 2 * STEPS - stop]))


def test_self_tuning_reads_both_splits_by_workers() -> None:
    def tuned(workers: int) -> dict[str, tuple[float, ...]]:
        problem = make(workers=workers)
        loop = InnerLoop(problem, TrainingSettings(STEPS, fixed={"lr": 0.1}))
        tuned = [TunedHyperparameter("l2", 1e-5, 1e-1, log=True)]
        run = SelfTuningRun(loop, tuned, SelfTuningSettings(train_steps=2, val_steps=2, warm_up=0.0))
        with loop.running():
            run.advance(STEPS)
        return run.history

    assert tuned(0) == tuned(1)


@pytest.mark.parametrize("keep_all", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_reverse_mode_reads_every_example_once(workers: int, keep_all: bool) -> None:
    train = Shared(64, 0)
    run = ReverseRun(InnerLoop(make(train=train, workers=workers), TrainingSettings(STEPS)), VALUES, keep_all=keep_all)
    with run.loop.running():
        run.advance(run.length)
    assert run.done and list(train.reads) == [1] * 64


@pytest.mark.parametrize("mode", ["reverse", "checkpointed_reverse"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [0, 3])
def test_what_there_is_no_room_for_is_read_again(
    mode: str, workers: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_size, "allocated", lambda device: None)  # no graphs, which spare a second reading
    kept, train = found(make(), differentiation=mode), Augmented(48, 0)
    size = 8 * (4 * 8 + 8)
    monkeypatch.setattr(ahead, "free_memory", lambda device: batches * size)
    assert_same(kept, found(make(train=train, workers=workers), differentiation=mode))
    if workers == 0:
        assert train.seen > 8 * STEPS


def test_steps_whose_graphs_are_kept_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    train = Augmented(48, 0)
    monkeypatch.setattr(ahead, "free_memory", lambda device: 0)
    problem = make(train=train)
    found(problem, differentiation="reverse")  # which finds out what there is to know of the problem
    seen = train.seen
    found(problem, differentiation="reverse")
    assert train.seen - seen == 8 * STEPS


def test_a_run_that_is_not_differentiated_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "free_memory", lambda device: pytest.fail("a batch is kept"))
    loop = InnerLoop(make(), TrainingSettings(STEPS))
    run = hypergradient_run(loop, VALUES, reject_above=-torch.inf)
    with loop.running():
        run.advance(run.length)
    assert run.rejected and run.done


def test_a_model_may_overwrite_its_input() -> None:
    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.mul_(0.5))

    x, y = clusters(48, 0)
    of_tensors, of_items = (make(model=Scaling, train=train) for train in ((x, y), [*zip(x, y, strict=True)]))
    assert_same(
        found(of_tensors, differentiation="checkpointed_reverse"),
        found(of_items, differentiation="checkpointed_reverse"),
    )


@pytest.mark.parametrize(
    "numbers",
    [[0, 1, 2, 3, 3, 2, 1, 0], [4, 5, 6, 2, 3, 4, 3, 2], [7, 0, 0, 5, 6, 7, 1], [3, 2, 1, 0, 1, 2]],
)
def test_any_order_gives_the_same_batches(numbers: list[int]) -> None:
    def tasks(number: int) -> list[Task]:
        return [Task(number, [number, number + 1]), Task(100 + number, [number])]

    reader = Reader(Numbers(), pin=False)
    alone = {number: reader.read(tasks(number)) for number in range(8)}
    followed, announced = BatchesAhead(reader, tasks, 8), BatchesAhead(reader, tasks, 8)
    with reader.opened():
        assert [followed.get(number) for number in numbers] == [alone[number] for number in numbers]
        announced.expect(numbers)
        assert [announced.get(number) for number in numbers] == [alone[number] for number in numbers]
        # in turns, each takes the workers from the other
        for number in numbers:
            assert followed.get(number) == announced.get(number) == alone[number]


def test_workers_end_with_a_run_that_fails() -> None:
    for error, message in (
        (InputError("example 8 is broken: mend it"), "^example 8 is broken: mend it$"),
        (ValueError("boom"), "boom"),
    ):
        with pytest.raises(type(error), match=message):
            found(make(train=Failing(error), workers=2))
        assert not multiprocessing.active_children()


def test_workers_end_when_a_person_stops_the_run() -> None:
    def stopping(output: Tensor, target: Tensor, *, l2: float = 0.0) -> Tensor:
        calls.append(len(multiprocessing.active_children()))
        if len(calls) > 6:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    calls: list[int] = []
    run = ReverseRun(InnerLoop(make(train_loss=stopping, workers=2), TrainingSettings(STEPS)), VALUES)
    with pytest.raises(KeyboardInterrupt), run.loop.running():
        run.advance(run.length)
    assert max(calls) == 2 and not multiprocessing.active_children()


def test_a_loader_brings_how_it_reads() -> None:
    def loader(**settings: Any) -> DataLoader[Any]:
        return DataLoader(Augmented(48, 0), batch_size=8, shuffle=True, **settings)

    def nothing(worker: int) -> None:
        pass

    own = {"num_workers": 2, "prefetch_factor": 4, "multiprocessing_context": "spawn", "worker_init_fn": nothing}
    problem = make(train=loader(**own, timeout=9), test=loader())
    expected = Loading(2, False, 4, "spawn", nothing, 9)
    assert loading(problem) == (expected, expected, Loading())
    changed = loading(problem.replace(workers=1))
    assert [each.workers for each in changed] == [1, 1, 1] and changed[0].prefetch_factor == 4
    assert [each.workers for each in loading(problem.with_workers_up_to(1))] == [1, 1, 0]
    few = problem.replace(workers=5).with_workers_up_to(2).replace(batch_size=4)
    assert [each.workers for each in loading(few)] == [2, 2, 2]
    assert [each.workers for each in loading(problem.independent())] == [0, 0, 0]


def loading(problem: Problem) -> tuple[Loading, ...]:
    splits = (problem.train, problem.val, problem.test)
    return tuple(split.loading for split in splits if isinstance(split, Split) and split.loading is not None)


@pytest.mark.parametrize("workers", [-1, 1.5, True])
def test_numbers_of_workers_that_there_cannot_be(workers: Any) -> None:
    with pytest.raises(InputError, match=r"workers is .*: it must be a whole number"):
        make(workers=workers)


def test_workers_begin_as_they_are_told() -> None:
    begun = multiprocessing.Value("i", 0)

    def begin(worker: int) -> None:
        begun.value += 1 + worker

    loader = DataLoader(Augmented(48, 0), batch_size=8, shuffle=True, num_workers=1, worker_init_fn=begin)
    found(make(train=loader, val=DataLoader(Augmented(24, 1))), differentiation="reverse")
    assert begun.value == 1
