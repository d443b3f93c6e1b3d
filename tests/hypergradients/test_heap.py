"""Memory kept while training and given back afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from tune_hypergrad.hypergradients import heap

FAULTS = """
import resource, time, torch
from tune_hypergrad.hypergradients import heap
from tune_hypergrad.hypergradients.heap import free_in_heap, kept_heap

heap.IDLE_S = 60.0

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10_000_000)  # 40 MB, above glibc's largest threshold of its own
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
outside, start = faults(), resident()
with kept_heap():
    inside = faults()
print(outside > 3 * inside, resident() - start > 20_000_000, abs(free_in_heap() - (resident() - start)) < 10_000_000)
heap.IDLE_S = 0.5
with kept_heap():  # at once
    again = faults()
    time.sleep(1.5)
print(outside > 10 * again, resident() - start > 20_000_000)
deadline = time.monotonic() + 60
while resident() - start > 20_000_000 and time.monotonic() < deadline:
    time.sleep(0.1)
print(resident() - start < 20_000_000, free_in_heap() == 0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator only")
def test_pages_are_reused_and_returned_when_nothing_trains_for_a_while() -> None:
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.split() == ["True"] * 7


class _Forgetting(type):
    """The type of a heap that another thread has given back when it is looked at for the second time."""

    looks = 0

    @property
    def giving_back(cls) -> threading.Timer | None:
        cls.looks += 1
        return threading.Timer(60, print) if cls.looks == 1 else None

    @giving_back.setter
    def giving_back(cls, timer: threading.Timer | None) -> None:
        if timer is not None:
            timer.function = lambda *libc: None


class _Given(metaclass=_Forgetting):
    depth = resident_before = 0


@pytest.mark.skipif(heap._glibc() is None, reason="glibc's allocator only")
def test_training_may_begin_while_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_Heap", _Given)
    with heap.kept_heap():
        assert _Given.depth == 1


@pytest.mark.skipif(heap._glibc() is None or not hasattr(os, "fork"), reason="glibc's allocator only")
def test_a_fork_has_nothing_to_give_back() -> None:
    with heap.kept_heap():
        pass
    assert heap._Heap.giving_back is not None
    child = os.fork()
    if not child:
        os._exit(int(heap._Heap.giving_back is not None or heap._Heap.depth != 0))
    assert os.waitpid(child, 0)[1] == 0
