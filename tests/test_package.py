"""The package as a whole: what importing it brings in, its public names, and problems on their way to workers."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_problem import clusters, tiny_problem
from torch.utils.data import Dataset

import tune_hypergrad
from tune_hypergrad import FixedSchedule

REPOSITORY = Path(__file__).parent.parent


def test_the_engine_brings_no_ray_in():
    lines = "import sys, tune_hypergrad, tune_hypergrad.hypergradients, tune_hypergrad.problems, tune_hypergrad.cli"
    script = lines + "; print([name for name in sys.modules if name.split('.')[0] in ('ray', 'hpbandster', 'pandas')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
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


def test_the_version_stands_in_one_place():
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    version = config["metadata"]["version"]
    assert tune_hypergrad.__version__ == version
    assert f"version: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()
    changes = (REPOSITORY / "CHANGELOG.md").read_text()
    assert f"## [{version}]" in changes or f"What will be {version}" in changes


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
