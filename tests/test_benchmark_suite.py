"""The suite of benchmarks: what it has measured is kept, and not measured again. Nothing heavy is run."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import figures
import pytest
import suite
from paths import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
COMMANDS = {name: ["python", f"benchmarks/{name}.py"] for name in ("a", "b", "c")}


def record(command: list[str], value: float = 1.5) -> dict[str, Any]:
    found = figures.figure("time | of it", [value, 1.0, 2.0], "s")
    return {"command": shlex.join(command), "figures": [found._asdict(), figures.figure("peak", 12, "MiB")._asdict()]}


def test_a_figure_is_the_median_with_its_range():
    assert figures.figure("x", [3.0, 1.0, 2.0], "s") == ("x", 2.0, (1.0, 3.0), "s")
    assert figures.figure("x", 3, "s") == figures.figure("x", [3.0], "s") == ("x", 3.0, None, "s")


def test_figures_come_through_a_file(tmp_path: Path):
    found = [figures.figure("x", [1.0, 2.0], "s"), figures.figure("y", 1, "")]
    figures.write(tmp_path / "found.json", iter(found))
    figures.write(None, iter(found))
    assert json.loads((tmp_path / "found.json").read_text()) == [
        {"name": "x", "figure": 1.5, "spread": [1.0, 2.0], "unit": "s"},
        {"name": "y", "figure": 1.0, "spread": None, "unit": ""},
    ]


def test_it_goes_on_where_it_was_stopped(tmp_path: Path):
    out, ran = tmp_path / "suite.json", []

    def measure(command: list[str]) -> dict[str, Any]:
        ran.append(command[1])
        if len(ran) == 2:
            raise KeyboardInterrupt
        return record(command)

    with pytest.raises(KeyboardInterrupt):
        suite.run_missing(COMMANDS, out, measure)
    assert list(suite.known(out)) == ["a"]
    assert suite.run_missing(COMMANDS, out, measure) == []
    assert ran == [f"benchmarks/{name}.py" for name in ("a", "b", "b", "c")]
    assert suite.run_missing(COMMANDS, out, measure) == [] and len(ran) == 4
    assert list(suite.known(out)) == ["a", "b", "c"]
    assert [file.name for file in tmp_path.iterdir()] == ["suite.json"]


def test_one_that_fails_is_tried_again(tmp_path: Path):
    out = tmp_path / "suite.json"

    def failing(command: list[str]) -> dict[str, Any]:
        if command[1].endswith("b.py"):
            raise subprocess.CalledProcessError(3, command)
        return record(command)

    assert suite.run_missing(COMMANDS, out, failing) == ["b"]
    assert list(suite.known(out)) == ["a", "c"]
    assert suite.run_missing(COMMANDS, out, record) == []
    assert list(suite.known(out)) == ["a", "c", "b"]


def test_figures_of_another_command_are_measured_anew(tmp_path: Path):
    out, other = tmp_path / "suite.json", [*COMMANDS["a"], "--steps", "2"]
    assert suite.run_missing(COMMANDS, out, record) == []
    assert suite.run_missing({"a": other}, out, record) == []
    assert suite.known(out)["a"]["command"] == shlex.join(other) and len(suite.known(out)) == 3


def test_the_table_has_every_figure(tmp_path: Path):
    lines = suite.table({"a": record(COMMANDS["a"]), "b (quick)": record(COMMANDS["b"], 0.5)}).splitlines()
    assert lines[0] == "| benchmark | what | figure | spread | unit | command |"
    assert lines[2] == r"| a | time \| of it | 1.5 | 1 to 2 | s | `python benchmarks/a.py` |"
    assert lines[3] == "| a | peak | 12 |  | MiB | `python benchmarks/a.py` |"
    assert len(lines) == 6


def test_small_sizes_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    ran: list[list[str]] = []

    def measured(command: list[str]) -> dict[str, Any]:
        ran.append(command)
        return record(command)

    monkeypatch.setattr(suite.run_missing, "__defaults__", (measured,))
    out = ["--out", str(tmp_path / "suite.json")]
    assert suite.main(["--quick", "--only", "fds", *out]) == 0
    assert suite.main(["--only", "fds", "stn", *out, "--data-dir", "my data"]) == 0
    assert list(suite.known(tmp_path / "suite.json")) == ["fds (quick)", "fds", "stn"]
    assert ran[1] == ["python", "benchmarks/fds_end_to_end.py", "--data-dir", "my data"]
    assert capsys.readouterr().out.count("fds_end_to_end.py --data-dir 'my data'") == 2
    suite.main(["--quick", "--only", "fds", *out, "--data-dir", "my data"])
    assert ran[-1].count("--steps") == 1 and ran[-1][-2:] == ["--data-dir", "my data"]


@pytest.mark.parametrize("name", suite.BENCHMARKS)
def test_the_commands_are_those_of_the_scripts(name: str):
    """Every script takes the options that it is given, and can give its figures."""
    benchmark = suite.BENCHMARKS[name]
    source = (BENCHMARKS / benchmark.script).read_text(encoding="utf-8")
    for quick in (False, True):
        for word in benchmark.command(quick=quick)[2:]:
            assert not word.startswith("--") or f'"{word}"' in source
    assert "with_json(" in source and "write(" in source


def test_help():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "suite.py"), "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "--quick" in done.stdout, done.stderr
