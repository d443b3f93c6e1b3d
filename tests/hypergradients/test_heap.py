"""Memory kept while training and given back afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from tune_hypergrad.hypergradients.heap import kept_heap

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
print(outside > 3 * inside, resident() - start < 20_000_000)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator only")
def test_pages_are_reused_inside_and_returned_afterwards() -> None:
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.split() == ["True", "True"]
