"""What the engine does on a GPU: exactness, steps one by one and replayed, memory, processes, the papers' figures.

    python benchmarks/gpu.py [--out gpu.json] [--limit-s 400] [--piece NAME ...] [--data-dir DIR]

It works in pieces: `machine`, `exactness`, `capture`, `steps`, `forward`, `memory`, `processes`, `figure1` (the first
outer step of the recipe's search), `fds-fig1` and `fds-fig4` (the recipes, at `--scale`). A piece has parts. What is
done stands in the file, and the same command goes on with the rest until `--limit-s` is over (exit status 3: there is
more to do). A part that has begun is finished, which takes a minute or two; recipes stop in between. A part that fails,
or is not captured where it should be, is put down as that, and tried again where `--piece` names it. When all is done,
the tables are written into `docs/gpu.md`, between the markers; with `--quick` or on a CPU only into what `--docs` says.

Milliseconds are medians over rounds in which the ways take turns, with the range, by CUDA events (on a CPU by the
clock). All is computed without TF32 and with deterministic convolutions, as the recipes are; `figure1` is timed without
replays and with them, as a job of the recipe would be. Without CIFAR-10 in `--data-dir`, data of its shape are made up.
`--quick` is for trying the script out: small batches, few steps.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from tune_hypergrad import Problem
from tune_hypergrad.errors import in_one_line
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.hypergradients.capture import RECORDERS
from tune_hypergrad.hypergradients.captured_steps import WORTHWHILE_STEPS, CapturedSteps, try_capture
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.step_graph import adjoint_step
from tune_hypergrad.problems.cifar import FOLDER, TEST_BATCHES, TRAIN_BATCHES
from tune_hypergrad.problems.models import lenet5_grey
from tune_hypergrad.problems.wide_resnet import wrn_16_1
from tune_hypergrad.recipes import RECIPES
from tune_hypergrad.recipes.jobs import Place
from tune_hypergrad.recipes.training import Experiment, differentiated
from tune_hypergrad.wording import markdown_table, with_range

HERE = Path(__file__).resolve()
DOCS = HERE.parent.parent / "docs" / "gpu.md"
BEGIN, END = "<!-- benchmarks/gpu.py writes from here -->", "<!-- to here -->"
MORE = 3
NOT_CAPTURED = "not captured: no CUDA"
VALUES = {"lr": torch.full((2,), 0.01), "momentum": torch.tensor([0.5]), "weight_decay": torch.tensor([1e-4])}
PROCESSES = (1, 2, 4, 6)
WAYS = ("eager", "captured")
MODES = ("forward", "reverse", "checkpointed_reverse")
ON_CPU: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
"""Hypergradients that a CPU has found, by network and mode."""
_SECONDS_LEFT = 60.0  # for a recipe to be begun


class Network(NamedTuple):
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    channels_last: bool = False


def normalised_mlp() -> nn.Module:
    """With a batch normalisation of vectors."""
    return nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 10))


NETWORKS = {"LeNet": Network(lenet5_grey, (1, 28, 28), 128), "WRN-16-1": Network(wrn_16_1, (3, 32, 32), 256)}
EXACT = {
    "LeNet": NETWORKS["LeNet"],
    "MLP with BatchNorm1d": Network(normalised_mlp, (32,), 64),
    "WRN-16-1": Network(wrn_16_1, (3, 32, 32), 4),
    "WRN-16-1, channels last": Network(wrn_16_1, (3, 32, 32), 4, channels_last=True),
}


@dataclass
class Bench:
    """Where and how much is measured."""

    device: str
    quick: bool
    data_dir: Path
    folder: Path
    scale: float
    end: float

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 9

    def problem(self, network: Network, dtype: torch.dtype = torch.float32) -> Problem:
        model, shape, batch, _ = network
        batch = 8 if self.quick else batch
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(4 * batch, *shape, generator=generator), torch.randint(10, (4 * batch,), generator=generator)
        val = x[:batch], y[:batch]
        return Problem(lambda: model().to(dtype), (x, y), val, batch_size=batch, eval_batch_size=batch)

    def timed(self, work: Callable[[], Any], times: int) -> float:
        """Milliseconds of a call, on average over some."""
        if not self.on_gpu:
            begun = time.perf_counter()
            for _ in range(times):
                work()
            return 1e3 * (time.perf_counter() - begun) / times
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(times):
            work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / times


def machine(bench: Bench) -> dict[str, Any]:
    today = date.today().isoformat()
    data = "CIFAR-10" if has_cifar(bench.data_dir) else "made-up data in place of CIFAR-10"
    return {"date": today, "torch": torch.__version__, "CUDA": torch.version.cuda, "data": data}


def refuse_uncaptured(way: str, reason: str) -> None:
    """Fail where steps should have been captured, and `reason` says that they were not."""
    if way == "captured" and "steps are captured" not in reason:
        raise RuntimeError(f"not captured ({reason})")


def exactness(bench: Bench, network: str, mode: str, way: str) -> dict[str, float]:
    """The largest difference of float64 hypergradients from those of a CPU without replays, over the largest one."""
    steps = 6 if bench.quick else WORTHWHILE_STEPS
    problem = bench.problem(EXACT[network], torch.float64)

    def differentiated_on(device: str, way: str) -> dict[str, torch.Tensor]:
        last = EXACT[network].channels_last
        settings = TrainingSettings(steps, device=device, capture=way == "captured", channels_last=last)
        loop = InnerLoop(problem, settings)
        run = hypergradient_run(loop, VALUES, differentiation=mode)
        with loop.running():
            run.advance(run.length)
        refuse_uncaptured(way, run.reason)
        return {name: value.cpu() for name, value in run.hypergradients.items()}

    found = differentiated_on(bench.device, way)
    if (network, mode) not in ON_CPU:
        ON_CPU[network, mode] = differentiated_on("cpu", "eager")
    on_cpu = ON_CPU[network, mode]
    return {"difference": max(float((found[name] - v).abs().max() / v.abs().max()) for name, v in on_cpu.items())}


def capture(bench: Bench, network: str) -> dict[str, str]:
    """What the check says of a network's steps."""
    if not bench.on_gpu:
        return {"said": NOT_CAPTURED}
    problem, settings = bench.problem(NETWORKS[network]), TrainingSettings(200, device=bench.device)
    reason = try_capture(problem, settings, VALUES, RECORDERS["cuda"])
    refuse_uncaptured("captured", "steps are captured" if reason is None else reason)
    return {"said": "captured"}


def steps(bench: Bench, network: str) -> dict[str, list[float]]:
    """Milliseconds of training and adjoint steps, by step and way, of every round."""
    loop = InnerLoop(bench.problem(NETWORKS[network]), TrainingSettings(1000, device=bench.device))
    values = {name: loop.values.placed(name, v) for name, v in VALUES.items()}
    times = 2 if bench.quick else 20
    with loop.running():
        state = loop.initial_state()
        for step in range(2):
            state, _ = loop.take_eager_step(state, loop.scalars(values, step), step)
        h = loop.scalars(values, 2)
        leaves = {name: value.detach().requires_grad_() for name, value in h.items()}
        adjoint = tuple(torch.ones_like(tensor) for tensor in (state.params, *state.slots))
        buffers = {name: torch.ones_like(state.buffers[name]) for name in loop.differentiated(state.buffers)}
        ways: dict[str, Callable[[], Any]] = {
            "training eager": lambda: loop.take_eager_step(state, h, 2),
            "adjoint eager": lambda: adjoint_step(loop, state, leaves, 2, adjoint, buffers),
        }
        if bench.on_gpu:
            captured = CapturedSteps(loop, RECORDERS["cuda"](loop.device))
            ways["training captured"] = lambda: captured.take_step(loop, state, h, 2)
            ways["adjoint captured"] = lambda: captured.adjoint_step(loop, state, h, 2, adjoint, buffers)
        for work in ways.values():
            bench.timed(work, 3)
        if bench.on_gpu and captured.reason is not None:
            raise RuntimeError(f"not captured ({captured.reason})")
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(bench.rounds):
            for way, work in ways.items():
                found[way].append(bench.timed(work, times))
    return found


def forward(bench: Bench, network: str) -> dict[str, list[float]]:
    """Milliseconds of a step of forward mode with all four columns."""
    rounds, times = bench.rounds, 1 if bench.quick else 5
    loop = InnerLoop(bench.problem(NETWORKS[network]), TrainingSettings(2 * (rounds + 1) * times, device=bench.device))
    with loop.running():
        run = ForwardRun(loop, dict(VALUES))
        run.advance((rounds + 1) * times)  # the second window of the learning rate has opened
        return {"step": [bench.timed(lambda: run.advance(times), 1) / times for _ in range(rounds)]}


def memory(bench: Bench, network: str, way: str) -> dict[str, float]:
    """The most memory that a hypergradient by reverse mode has taken, in MiB."""
    if not bench.on_gpu:
        return {}
    settings = TrainingSettings(120, device=bench.device, capture=way == "captured")
    loop = InnerLoop(bench.problem(NETWORKS[network]), settings)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = hypergradient_run(loop, VALUES, differentiation="reverse")
    with loop.running():
        run.advance(run.length)
    refuse_uncaptured(way, run.reason)
    return {
        "allocated": torch.cuda.max_memory_allocated() / 2**20,
        "reserved": torch.cuda.max_memory_reserved() / 2**20,
    }


def processes(bench: Bench, count: int, way: str) -> dict[str, float]:
    """Training steps of LeNets a second, of some processes at once, together."""
    leave_memory(bench)
    seconds = 1 if bench.quick else 8
    command = [sys.executable, str(HERE), "--worker", way, "--seconds", str(seconds), "--device", bench.device]
    command += ["--quick"] if bench.quick else []
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        for worker in workers:
            said = _stream(worker.stdout).readline().strip()
            if said != "ready":
                raise RuntimeError(f"a process of {count} has failed: {said}")
        for worker in workers:  # all have warmed up
            _stream(worker.stdin).write("go\n")
            _stream(worker.stdin).flush()
        return {"steps a second": sum(float(_stream(worker.stdout).readline()) for worker in workers)}
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def leave_memory(bench: Bench) -> None:
    """Leave what this process has no use for to others."""
    if bench.on_gpu:
        torch.cuda.empty_cache()


def _stream(stream: Any) -> Any:
    assert stream is not None
    return stream


def work(bench: Bench, way: str, seconds: float) -> None:
    """A process of `processes`."""
    loop = InnerLoop(bench.problem(NETWORKS["LeNet"]), TrainingSettings(100_000, device=bench.device))
    if way == "captured":
        loop.captured = CapturedSteps(loop, RECORDERS["cuda"](loop.device))
    values = {name: loop.values.placed(name, v) for name, v in VALUES.items()}
    state, step = loop.initial_state(), 0

    def take(until: float, most: float = inf) -> int:
        nonlocal state, step
        begun = step
        while time.perf_counter() < until and step - begun < most:
            state, loss = loop.take_step(state, loop.scalars(values, step), step)
            step += 1
            if step % 20 == 0:
                float(loss)  # nobody runs far ahead of the GPU
        return step - begun

    with loop.running(plain=True):
        take(inf, 10)
        refused = None if loop.captured is None else loop.captured.reason
        print("ready" if refused is None else f"not captured ({refused})", flush=True)
        sys.stdin.readline()
        begun = time.perf_counter()
        taken = take(begun + seconds)
        print(taken / (time.perf_counter() - begun), flush=True)


def figure1(bench: Bench, way: str) -> dict[str, Any]:
    """The first outer step of Figure 1's search."""
    settings: Any = RECIPES["fds-fig1"].settings
    values = {name: [0.05 if name == "lr" else 0.0] * windows for name, windows in settings.windows.items()}
    experiment = Experiment("digits", 64, 500) if bench.quick else settings.experiment
    data = None if bench.quick else str(data_of(bench))
    place = Place(data, bench.device, bench.folder / f"figure1-{way}.pt", inf, capture=way == "captured")
    place.checkpoint.unlink(missing_ok=True)  # of a try that failed
    loop = experiment.loop(place, settings.first_epochs, 0)
    found = differentiated(place, loop, values)
    refuse_uncaptured(way, found.reason)
    return {"seconds": place.seconds, "val_loss": found.val_loss, "lr": found.hypergradients["lr"].tolist()}


def recipe(bench: Bench, name: str) -> dict[str, Any] | None:
    """A whole recipe, which goes on where it was stopped; None where it is not done."""
    leave_memory(bench)
    left = bench.end - time.monotonic()
    out = bench.folder / name
    seconds = out.with_suffix(".seconds")
    before = float(seconds.read_text()) if seconds.exists() else 0.0
    options = {"scale": bench.scale, "out": out, "data-dir": data_of(bench), "processes": 6}
    options |= {"device": bench.device, "time-limit": max(5.0, left - _SECONDS_LEFT), "seeds": 1}
    command = [sys.executable, "-m", "tune_hypergrad", "reproduce", name]
    begun = time.monotonic()
    ended = subprocess.run(
        [*command, "--capture", *(f"--{key}={value}" for key, value in options.items())], capture_output=True, text=True
    )
    spent = before + time.monotonic() - begun
    seconds.write_text(str(spent))
    if ended.returncode == 130:
        return None
    if ended.returncode:
        raise RuntimeError(f"reproduce {name}: {(ended.stderr.strip().splitlines() or [str(ended.returncode)])[-1]}")
    return {"seconds": spent, "scale": bench.scale}


def has_cifar(folder: Path) -> bool:
    return any((folder / name).exists() for name in (FOLDER, "cifar-10-python.tar.gz"))


def data_of(bench: Bench) -> Path:
    """Where CIFAR-10, or something of its shape, is."""
    if has_cifar(bench.data_dir):
        return bench.data_dir
    made = Path(tempfile.gettempdir()) / "tune_hypergrad-made-up"
    if not (made / FOLDER / TEST_BATCHES[-1]).exists():
        (made / FOLDER).mkdir(parents=True, exist_ok=True)
        draws, size = np.random.default_rng(0), 10_000
        for name in (*TRAIN_BATCHES, *TEST_BATCHES):
            labels = draws.integers(0, 10, size)
            images = draws.integers(0, 156, (size, 3072), dtype=np.uint8) + 10 * labels[:, None].astype(np.uint8)
            batch = {"data": images, "labels": labels.tolist()}
            (made / FOLDER / name).write_bytes(pickle.dumps(batch))
    return made


def parts(bench: Bench) -> dict[str, Callable[[], Mapping[str, Any] | None]]:
    """Everything that is measured, by piece and part."""
    ways = WAYS if bench.on_gpu else WAYS[:1]
    made: dict[str, Callable[[], Mapping[str, Any] | None]] = {"machine": lambda: machine(bench)}
    exact = [
        (network, mode, way)
        for network in EXACT
        for mode in MODES
        for way in ways
        # no step of forward mode is captured; a WRN takes a CPU some time
        if (mode, way) != ("forward", "captured") and (mode == "reverse" or not network.startswith("WRN"))
    ]
    made |= {f"exactness/{n}/{m}/{w}": lambda n=n, m=m, w=w: exactness(bench, n, m, w) for n, m, w in exact}  # type: ignore[misc]
    for piece in (capture, steps, forward):
        made |= {f"{piece.__name__}/{n}": lambda p=piece, n=n: p(bench, n) for n in NETWORKS}  # type: ignore[misc]
    made |= {f"memory/{n}/{w}": lambda n=n, w=w: memory(bench, n, w) for n in NETWORKS for w in ways}  # type: ignore[misc]
    counts = PROCESSES[:2] if bench.quick else PROCESSES
    made |= {f"processes/{c}/{w}": lambda c=c, w=w: processes(bench, c, w) for c in counts for w in ways}  # type: ignore[misc]
    made |= {f"figure1/{w}": lambda w=w: figure1(bench, w) for w in ways}  # type: ignore[misc]
    if not bench.quick:
        made |= {name: lambda name=name: recipe(bench, name) for name in ("fds-fig1", "fds-fig4")}  # type: ignore[misc]
    return made


def tables(found: Mapping[str, Any]) -> str:
    """The tables of `docs/gpu.md`."""
    host = found["machine"]

    def of(key: str, name: str, form: str) -> str:
        value = found.get(key, {}).get(name)
        if "failed" in found.get(key, {}):
            return "failed"
        if value is None:
            return NOT_CAPTURED if host["CUDA"] is None and "captured" in f"{key} {name}" else "-"
        return with_range(value, form) if isinstance(value, list) else f"{value:{form}}"

    devices = dict.fromkeys(each["device"] for each in found.values())
    head = f"{' and '.join(devices)}, torch {host['torch']}, CUDA {host['CUDA']}, {host['date']}, {host['data']}."
    compared = dict.fromkeys(tuple(key.split("/")[1:3]) for key in found if key.startswith("exactness/"))
    exact = [
        [network, mode, *(of(f"exactness/{network}/{mode}/{way}", "difference", ".1e") for way in WAYS)]
        for network, mode in compared
    ]
    kinds = [f"{kind} {way}" for kind in ("training", "adjoint") for way in WAYS]
    step = [
        [
            f"{name}, {found[f'capture/{name}'].get('said', 'failed')}",
            *(of(f"steps/{name}", kind, ".2f") for kind in kinds),
            of(f"forward/{name}", "step", ".2f"),
        ]
        for name in NETWORKS
    ]
    taken = [[name, *(of(f"memory/{name}/{way}", "allocated", ".0f") for way in WAYS)] for name in NETWORKS]
    counts = sorted({key.split("/")[1] for key in found if key.startswith("processes/")})
    beside = [[count, *(of(f"processes/{count}/{way}", "steps a second", ".0f") for way in WAYS)] for count in counts]
    searches = [["the first outer step of Figure 1", *(of(f"figure1/{way}", "seconds", ".1f") for way in WAYS)]]
    for name in ("fds-fig1", "fds-fig4"):
        if name in found:
            scale = found[name].get("scale", "")
            searches.append([f"`reproduce {name} --scale {scale}`", "-", of(name, "seconds", ".0f")])
    sections: list[tuple[str, Sequence[str], list[list[str]]]] = [
        ("Difference of float64 hypergradients from a CPU's, relative:", ("network", "mode", *WAYS), exact),
        ("Milliseconds a step:", ("network", *kinds, "forward mode"), step),
        ("MiB allocated at the most in a hypergradient of 120 steps:", ("network", *WAYS), taken),
        ("Training steps of LeNets a second, in all processes together:", ("processes", *WAYS), beside),
        ("Seconds:", ("search", *WAYS), searches),
    ]
    shown = [f"{title}\n\n{markdown_table(heads, rows)}" for title, heads, rows in sections]
    failed = [f"- {key}: {each['failed']}" for key, each in found.items() if "failed" in each]
    return "\n\n".join([head, *shown, *(["Failed:\n\n" + "\n".join(failed)] if failed else [])])


def write_docs(path: Path, found: Mapping[str, Any]) -> None:
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise SystemExit(f"{path} lacks the lines {BEGIN!r} and {END!r}")
    path.write_text(f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine on a GPU, in pieces that go on where they were stopped.")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="what is done; beside it, a folder")
    parser.add_argument("--limit-s", type=float, default=400.0)
    parser.add_argument("--piece", nargs="+", default=[], help="pieces, or parts such as steps/LeNet; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--scale", type=float, default=0.1, help="of the recipes")
    parser.add_argument("--docs", type=Path, help="page to write the tables into")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True  # as the recipes' processes
    end, folder = time.monotonic() + given.limit_s, given.out.with_suffix("")
    bench = Bench(given.device, given.quick, given.data_dir, folder, given.scale, end)
    if given.worker:
        work(bench, given.worker, given.seconds)
        return
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    todo = parts(bench)
    folder.mkdir(parents=True, exist_ok=True)
    named = [key for key in todo if any(key == piece or key.startswith(f"{piece}/") for piece in given.piece)]
    found = {key: each for key, each in found.items() if key not in named or "failed" not in each}
    for key, measure in todo.items():
        if key in found or (given.piece and key not in named):
            continue
        if time.monotonic() > end:
            break
        begun = time.monotonic()
        try:
            result = measure()
        except Exception as error:
            result = {"failed": in_one_line(error)}
        if result is None:
            break
        found[key] = {**result, "device": torch.cuda.get_device_name() if bench.on_gpu else "no GPU: a CPU"}
        given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{key}: {time.monotonic() - begun:.0f} s", flush=True)
        if "failed" in result and bench.on_gpu:
            try:
                torch.cuda.synchronize()
            except Exception as error:  # all others would fail as well: the next call goes on
                raise SystemExit(MORE) from error
    if not all(key in found for key in todo):
        print("there is more to do: the same command goes on")
        raise SystemExit(MORE)
    page = given.docs or (DOCS if bench.on_gpu and not bench.quick else None)
    if page is not None:
        write_docs(page, found)
    print(tables(found))


if __name__ == "__main__":
    main()
