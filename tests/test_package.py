"""The package as a whole: what importing it brings in, its public names, and problems on their way to workers."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest
import torch
from tiny_problem import clusters, tiny_problem
from torch.utils.data import Dataset

import tune_hypergrad
from tune_hypergrad import FixedSchedule

PACKAGE = Path(tune_hypergrad.__file__).parent
FLOORS = (
    *(
        "errors",
        "wording",
        "randomness",
        "modules",
        "losses",
        "criterion",
        "figures",
        "budget",
        "batches",
        "domains",
        "curves",
        "sampling",
    ),
    *("reading", "regularisers", "groups", "data", "objective", "space", "plotting", "schedules", "results"),
    *("defaults", "problem", "hypergradients", "outer", "problems", "stn", "bridges", "recipes", "ray_internals"),
    "trainables",
    "searchers",
    *("comparison.incumbents", "comparison.ledger", "comparison.telling", "comparison.methods", "comparison.running"),
    *("comparison", "cli", "__main__"),
)
"""Modules and packages, each of which imports only what stands before it."""


WITHOUT_RAY = (
    *FLOORS[: FLOORS.index("ray_internals")],
    *("comparison.incumbents", "comparison.ledger", "comparison.telling"),
)
READ_DOMAINS = ("domains", "space")
"""Those of them that import Ray in functions that are about its domains."""
SOURCES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file
    for file in PACKAGE.rglob("*.py")
    if file != PACKAGE / "__init__.py"
}
"""Files by module; of a package its `__init__`."""


def floor(module: str) -> str:
    """What of `FLOORS` a module belongs to."""
    _, *parts = module.removesuffix(".__init__").split(".")
    return ".".join(parts[:2] if parts[0] == "comparison" else parts[:1])


def imports(code: str, package: str) -> Iterator[str]:
    """Modules that a program imports when it runs, at its top or in a function.

    Args:
        code: of the program.
        package: that it is in, from which its relative imports go.
    """
    tree = ast.parse(code)
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    types_only = {id(node) for check in checks for line in check.body for node in ast.walk(line)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in types_only:
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and id(node) not in types_only:
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (defining(module, name.name) for name in node.names)


def defining(module: str, name: str) -> str:
    """The module that `from module import name` takes the name from: that name itself, where it is one."""
    if module == PACKAGE.name and name in tune_hypergrad._MODULES:
        return f"{module}.{tune_hypergrad._MODULES[name]}"
    if module.split(".")[0] != PACKAGE.name:
        return module  # others are told apart by their first name
    path = PACKAGE.parent.joinpath(*module.split("."), name)
    is_module = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
    return f"{module}.{name}" if is_module else module


@cache
def imports_of(module: str) -> frozenset[str]:
    return frozenset(imports(SOURCES[module].read_text(encoding="utf-8"), module.rpartition(".")[0]))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import tune_hypergrad.cli", ["tune_hypergrad.cli"]),
        ("import os, tune_hypergrad.cli as shown", ["os", "tune_hypergrad.cli"]),
        ("from tune_hypergrad import cli", ["tune_hypergrad.cli"]),
        ("from tune_hypergrad import InputError, compare", ["tune_hypergrad.errors", "tune_hypergrad.comparison"]),
        ("from tune_hypergrad.cli import main", ["tune_hypergrad.cli"]),
        ("from .run import check_values", ["tune_hypergrad.hypergradients.run"]),
        ("from . import run", ["tune_hypergrad.hypergradients.run"]),
        ("from ..cli import main", ["tune_hypergrad.cli"]),
        ("from .. import cli", ["tune_hypergrad.cli"]),
        ("def f():\n    import ray", ["ray"]),
        ("class A:\n    def f(self):\n        if self:\n            from ray import tune", ["ray"]),
        ("if TYPE_CHECKING:\n    import ray\nelse:\n    import os", ["os"]),
        ("try:\n    import ray\nexcept ImportError:\n    import os", ["ray", "os"]),
    ],
)
def test_imports_are_seen(code, found):
    assert list(imports(code, "tune_hypergrad.hypergradients")) == found


def test_imports_run_one_way():
    for module in SOURCES:
        of_ours = {other for other in imports_of(module) if other.split(".")[0] == PACKAGE.name}
        assert PACKAGE.name not in of_ours, f"{module} imports the package as a whole: name the module"
        above = {other for other in of_ours if FLOORS.index(floor(other)) > FLOORS.index(floor(module))}
        assert not above, f"{module} imports {above}"


def test_what_knows_no_ray_imports_none():
    for module in SOURCES:
        if floor(module) in WITHOUT_RAY:
            others = {name for name in imports_of(module) if name.split(".")[0] in ("ray", "hpbandster")}
            assert not others or floor(module) in READ_DOMAINS, f"{module} imports {others}"


def test_what_tells_of_a_comparison_brings_no_ray_in():
    files = sorted((PACKAGE / "comparison" / "telling").glob("[!_]*.py"))
    assert "report" in [file.stem for file in files]
    lines = [f"import tune_hypergrad.comparison.telling.{file.stem}" for file in files]
    lines += ["import sys", "print([name for name in sys.modules if name.split('.')[0] in ('ray', 'hpbandster')])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_engine_brings_no_ray_in():
    of_the_engine = ", ".join(
        f"tune_hypergrad.{name}" for name in ("hypergradients", "outer", "stn", "problems", "cli")
    )
    lines = f"import sys, tune_hypergrad, {of_the_engine}"
    script = lines + "; print([name for name in sys.modules if name.split('.')[0] in ('ray', 'hpbandster', 'pandas')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_trains_and_searches_brings_nothing_in_that_is_for_reports_or_data():
    files = [file for room in ("trainables", "searchers") for file in sorted((PACKAGE / room).glob("[!_]*.py"))]
    lines = [f"import tune_hypergrad.{file.parent.name}.{file.stem}" for file in files]
    lines += ["import tune_hypergrad.stn, tune_hypergrad.problems, tune_hypergrad.comparison.methods, sys"]
    lines += ["import tune_hypergrad.comparison.running.dispatching"]  # what runs in a trial's process
    others = "('matplotlib', 'sklearn', 'pooch', 'lightning', 'transformers')"
    lines += [f"print([name for name in sys.modules if name.split('.')[0] in {others}])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_package_itself_brings_no_torch_in():
    script = "import sys, tune_hypergrad; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_every_public_name_resolves():
    for name in tune_hypergrad.__all__:
        assert getattr(tune_hypergrad, name) is not None
    assert set(tune_hypergrad._MODULES) == set(tune_hypergrad.__all__)
    with pytest.raises(AttributeError, match="'nothing'"):
        tune_hypergrad.nothing  # noqa: B018


def addresses(references):
    """In a worker: where the training inputs lie after each of two gets, and whether they can be read and sliced."""
    import ray

    problems = [ray.get(references[0]) for _ in range(2)]
    inputs = [problem.train.tensors[0] for problem in problems]
    inputs[0][:2].sum()
    return [tensor.data_ptr() for tensor in inputs], float(inputs[0].sum())


@pytest.mark.slow
def test_workers_share_a_problems_tensors(ray_session):
    import ray

    problem = tiny_problem(train=clusters(40_000, seed=0))
    where, total = ray.get(ray.remote(addresses).remote([ray.put(problem)]))
    assert where[0] == where[1], "every ray.get would make a copy"
    assert total == pytest.approx(float(problem.train.tensors[0].sum()))


class Noisy(Dataset):
    """Points that are augmented at random."""

    def __init__(self, examples, seed):
        self.points, self.labels = clusters(examples, seed)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.points[index] + 0.1 * torch.randn(4, dtype=torch.float64), self.labels[index]


@pytest.mark.slow
def test_datasets_work_in_workers_and_augmentation_repeats(ray_session, tmp_path):
    from ray import tune

    made = FixedSchedule.from_problem(tiny_problem(train=Noisy(48, 0)), steps=6, reports=1)
    here = made(config={"lr": 0.3}).train()
    config = tune.RunConfig(storage_path=str(tmp_path), verbose=0)
    grid = tune.Tuner(made, param_space={"lr": 0.3}, run_config=config).fit()
    assert grid[0].metrics["val_loss"] == here["val_loss"]
