"""How much memory a run may take: a share of what is free, less where many processes like it are at work."""

from types import SimpleNamespace

import pytest
import torch

from tune_hypergrad.hypergradients import memory
from tune_hypergrad.trainables import base

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PROCESSES", {})


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)


def processes() -> dict[str, int]:
    return dict(memory._PROCESSES)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(("count", "expected"), [(1, 250), (3, 250), (6, 125), (64, 11)])
def test_a_run_takes_a_quarter_or_less(count: int, expected: int) -> None:
    memory.set_processes("cpu", count)
    assert memory.free_memory(CPU) == expected
    assert count * memory.free_memory(CPU) <= 750
    assert memory.free_memory(GPU) == 200  # of what nobody has, and what this process keeps without use


@pytest.mark.usefixtures("free")
def test_each_device_has_a_number_of_its_own() -> None:
    memory.set_processes("cuda", 6)
    assert memory.free_memory(GPU) == 100
    assert memory.free_memory(CPU) == 250


@pytest.mark.parametrize(
    ("granted", "expected"),
    [
        ((1, 0), {"cpu": 16, "cuda": 1}),
        ((4, 0), {"cpu": 4, "cuda": 1}),
        ((0, 0), {"cpu": 1, "cuda": 1}),
        ((0.5, 0), {"cpu": 32, "cuda": 1}),
        ((0.2, 0), {"cpu": 80, "cuda": 1}),  # which rounding makes 79.99...
        ((1, 0.25), {"cpu": 8, "cuda": 4}),
        ((8, 0.25), {"cpu": 2, "cuda": 2}),  # CPUs leave room for no more
        ((0, 0.5), {"cpu": 4, "cuda": 2}),
        ((1, 2), {"cpu": 1, "cuda": 1}),
    ],
)
def test_a_trial_leaves_memory_to_those_that_have_room_beside_it(
    granted: tuple[float, float], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        {"NodeID": "other", "Resources": {"CPU": 2.0}},
        {"NodeID": "own", "Resources": {"CPU": 16.0, "GPU": 2.0}},
    ]
    context = SimpleNamespace(get_node_id=lambda: "own")
    ray = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: nodes, get_runtime_context=lambda: context)
    monkeypatch.setattr(base, "ray", ray)
    base._share_memory(*granted)
    assert processes() == expected


def test_without_a_session_a_trial_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "ray", SimpleNamespace(is_initialized=lambda: False))
    base._share_memory(1, 0)
    assert processes() == {"cpu": 1, "cuda": 1}
