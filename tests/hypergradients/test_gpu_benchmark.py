"""`benchmarks/gpu.py` runs to its end without a GPU, in as many calls as it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import REPOSITORY


@pytest.mark.slow
def test_the_benchmark_goes_on_where_it_was(tmp_path: Path) -> None:
    out, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    page.write_text((REPOSITORY / "docs" / "gpu.md").read_text())
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), "--device", "cpu", "--quick"]
    command += ["--out", str(out), "--docs", str(page)]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)

    assert run("--piece", "machine").returncode == 3
    first = json.loads(out.read_text())
    assert list(first) == ["machine"] and first["machine"]["CUDA"] is None
    assert run("--limit-s", "0").returncode == 3 and json.loads(out.read_text()) == first
    ended = run()
    assert ended.returncode == 0, ended.stderr
    found = json.loads(out.read_text())
    assert found["machine"] == first["machine"] and len(found) > 10
    out.write_text(json.dumps({**found, "steps/LeNet": {"failed": "no memory", "device": "no GPU: a CPU"}}))
    assert run().returncode == 0
    assert "- steps/LeNet: no memory" in page.read_text()
    assert run("--piece", "steps/LeNet", "--limit-s", "0").returncode == 3, "it is to be done again"
    assert run("--piece", "steps").returncode == 0
    assert "no memory" not in page.read_text()
    found = json.loads(out.read_text())
    text = page.read_text()
    assert "not captured: no CUDA" in text and "no GPU: a CPU" in text
    assert text.startswith("# GPUs") and text.endswith((REPOSITORY / "docs" / "gpu.md").read_text()[-100:])
    assert all(seconds > 0 for seconds in found["steps/LeNet"]["adjoint eager"])
