"""All benchmarks of what the package costs, one after another, in one file and one table.

    python benchmarks/suite.py [--quick] [--only lenet fds ...] [--out suite.json] [--rivals DIR] [--data-dir DATA]

Each runs in a process of its own, with one thread. Its figures go into `--out` as they are there, and what is there, of
the same command, is not run again: the suite goes on where it was stopped, also after a benchmark failed. `--quick`
takes small sizes, whose figures say little; they are kept apart from the others. The table is Markdown, of all that the
file holds.

- lenet, long, mlp, wrn, wrn-long, wrn-graphs: ours beside a loop by hand, higher, torchopt and betty-ml, where
  `--rivals` has their environments (`rivals.py`);
- pipelines: a transformer, an LSTM and others beside a person's own loop (`pipeline_cost.py`);
- forward: forward mode's ways beside a loop of double backward (`hypergradient_cost.py`), and reverse mode;
- parts: where the time of reverse mode goes (`reverse_parts.py`);
- layout: images with their channels last (`layout_cost.py`);
- fds: ten outer steps of FDS from end to end (`fds_end_to_end.py`);
- ensemble: several seeds beside one run (`ensemble_cost.py`);
- stn: steps of STN and Delta-STN (`self_tuning_cost.py`);
- bohb, utilisation: suggestions of BOHB, and how busy it keeps a cluster (`bohb_cost.py`, `searcher_utilisation.py`);
- ray, ledger: a result's overhead, and a comparison as it grows (`ray_overhead.py`, `compare_scale.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent
Records = dict[str, dict[str, Any]]
"""By benchmark, the command that measured and its figures; "name (quick)" for small sizes."""


class Benchmark(NamedTuple):
    """A script, and with which arguments."""

    script: str
    whole: str
    quick: str

    def command(self, *, quick: bool, further: str = "") -> list[str]:
        """What a person would type."""
        return [
            "python",
            f"benchmarks/{self.script}",
            *shlex.split(self.quick if quick else self.whole),
            *shlex.split(further),
        ]


BENCHMARKS = {
    "lenet": Benchmark(
        "rivals.py",
        "--models lenet --steps 20 100 --counts 1 9 1000 --repeats 2",
        "--models lenet --steps 10 --counts 9 --repeats 1",
    ),
    "long": Benchmark(
        "rivals.py",
        "--models lenet --steps 400 --counts 1 --repeats 1",
        "--models lenet --steps 12 --counts 1 --repeats 1",
    ),
    "mlp": Benchmark(
        "rivals.py",
        "--models mlp --steps 20 100 400 --counts 1 1000 --repeats 2",
        "--models mlp --steps 10 --counts 1000 --repeats 1",
    ),
    "wrn": Benchmark(
        "rivals.py",
        "--models wrn --steps 20 100 --counts 1 9 1000 --repeats 1",
        "--models wrn --steps 4 --counts 1 --repeats 1",
    ),
    "wrn-long": Benchmark(
        "rivals.py",
        "--models wrn --steps 400 --counts 1 --repeats 1",
        "--models wrn --steps 6 --counts 1 --repeats 1",
    ),
    "wrn-graphs": Benchmark(
        "rivals.py",
        "--models wrn --steps 100 --counts 1 --repeats 2 --contenders 'tune_hypergrad, every graph' higher 'by hand'",
        "--models wrn --steps 5 --counts 1 --repeats 1 --contenders 'tune_hypergrad, every graph'",
    ),
    "pipelines": Benchmark("pipeline_cost.py", "--turns 2", "--models recommender --turns 1"),
    "forward": Benchmark(
        "hypergradient_cost.py",
        "--quick --only forward reverse",
        "--only forward --networks MLP LeNet --columns 4 --repetitions 1",
    ),
    "parts": Benchmark("reverse_parts.py", "", "--models lenet --steps 4 --turns 1"),
    "layout": Benchmark("layout_cost.py", "", "--models lenet --steps 8 --turns 1"),
    "fds": Benchmark("fds_end_to_end.py", "", "--steps 8 --outer 2 --grow 2"),
    "ensemble": Benchmark("ensemble_cost.py", "", '--networks "digits MLP" --seeds 2 --repetitions 1'),
    "stn": Benchmark("self_tuning_cost.py", "", "--repetitions 2"),
    "bohb": Benchmark("bohb_cost.py", "", "--observations 60 --dimensions 3"),
    "utilisation": Benchmark(
        "searcher_utilisation.py",
        "",
        "--max-budget 3 --seconds 0.05 --evaluations 1 --repetitions 1 --limit 20 --nodes 1",
    ),
    "ray": Benchmark("ray_overhead.py", "", "--trials 2 --reports 4 --rounds 1"),
    "ledger": Benchmark("compare_scale.py", "--results 2500 5000 10000", "--accounts 2 --results 20"),
}


def key_of(name: str, *, quick: bool) -> str:
    """By what a benchmark's figures are kept."""
    return f"{name} (quick)" if quick else name


def known(file: Path) -> Records:
    """What a file holds so far."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def measured(command: list[str]) -> dict[str, Any]:
    """Run one benchmark; its command and figures.

    Raises:
        CalledProcessError: it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")])),
        }
        arguments = [sys.executable, str(FOLDER / Path(command[1]).name), *command[2:], "--json", str(file)]
        subprocess.run(arguments, check=True, env=environment, stdout=sys.stderr)
        return {"command": shlex.join(command), "figures": json.loads(file.read_text(encoding="utf-8"))}


def run_missing(
    commands: Mapping[str, list[str]], out: Path, measure: Callable[[list[str]], dict[str, Any]] = measured
) -> list[str]:
    """Run the benchmarks of which a file has no figures by the same command, and put theirs there; returns the keys of
    those that failed."""
    failed = []
    for key, command in commands.items():
        if key in known(out) and known(out)[key]["command"] == shlex.join(command):
            print(f"{key}: is in {out}", file=sys.stderr, flush=True)
            continue
        print(f"{key}: {shlex.join(command)}", file=sys.stderr, flush=True)
        try:
            found = measure(command)
        except subprocess.CalledProcessError as error:
            print(f"{key}: failed with {error.returncode}", file=sys.stderr, flush=True)
            failed.append(key)
            continue
        whole = out.with_suffix(f"{out.suffix}.new")
        whole.write_text(json.dumps({**known(out), key: found}, indent=1), encoding="utf-8")
        whole.replace(out)  # whole, or not at all
    return failed


def table(records: Records) -> str:
    """Markdown: a row a figure, with its benchmark's command."""
    from tune_hypergrad.wording import markdown_table

    rows = []
    for key, record in records.items():
        for found in record["figures"]:
            spread = "" if found["spread"] is None else "{:.3g} to {:.3g}".format(*found["spread"])
            rows.append([key, found["name"], f"{found['figure']:.3g}", spread, found["unit"], f"`{record['command']}`"])
    return markdown_table(["benchmark", "what", "figure", "spread", "unit", "command"], rows)


def main(given: list[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all work")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="BENCHMARK")
    parser.add_argument("--out", type=Path, default=Path("suite.json"), help="where the figures are kept")
    parser.add_argument("--rivals", type=Path, metavar="DIR", help="environments of the others, or for them")
    parser.add_argument("--data-dir", type=Path, metavar="DATA", help="folder with Fashion-MNIST, for fds")
    options = parser.parse_args(given)
    rivals = "" if options.rivals is None else f"--environments {shlex.quote(str(options.rivals))}"
    further = {
        **{name: rivals for name, benchmark in BENCHMARKS.items() if benchmark.script == "rivals.py"},
        "fds": "" if options.data_dir is None else f"--data-dir {shlex.quote(str(options.data_dir))}",
    }
    commands = {
        key_of(name, quick=options.quick): BENCHMARKS[name].command(quick=options.quick, further=further.get(name, ""))
        for name in options.only
    }
    failed = run_missing(commands, options.out)
    print(table(known(options.out)))
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
