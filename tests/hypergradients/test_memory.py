"""How much memory a run may take: a share of what is free, less where many processes like it are at work."""

from types import SimpleNamespace

import pytest
import torch

from tune_hypergrad.hypergradients import memory
from tune_hypergrad.trainables import base

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory._Processes, "by_device", {})


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(("processes", "expected"), [(1, 250), (3, 250), (6, 125), (64, 11)])
def test_a_run_takes_a_quarter_or_less(processes: int, expected: int) -> None:
    memory.set_processes("cpu", processes)
    assert memory.free_memory(CPU) == expected
    assert processes * memory.free_memory(CPU) <= 750 or processes == 1
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
        ((1, 0.25), {"cpu": 8, "cuda": 4}),
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
    assert memory._Processes.by_device == expected


def test_without_a_session_a_trial_is_alone() -> None:
    base._share_memory(1, 0)
    assert memory._Processes.by_device == {"cpu": 1, "cuda": 1}
