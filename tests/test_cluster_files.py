"""The files for clusters: what `ray up` takes, and a Slurm script that starts what it says."""

import json
import os
import subprocess
from pathlib import Path

import jsonschema
import ray
import yaml
from paths import REPOSITORY

CLUSTER = REPOSITORY / "examples" / "cluster"
SCRIPT = CLUSTER / "slurm.sbatch"


def test_the_cluster_file_is_one_of_rays():
    config = yaml.safe_load((CLUSTER / "cluster.yaml").read_text())
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text()))
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert sum(each.get("min_workers", 0) for each in types.values()) <= config["max_workers"]
    pinned = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert f"ray=={config['docker']['image'].split(':')[1].split('-')[0]}" in pinned


def test_all_nodes_of_the_cluster_file_ask_for_one_token():
    config = yaml.safe_load((CLUSTER / "cluster.yaml").read_text())
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_the_slurm_script_is_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def run(folder, *arguments, **changes):
    """What the script asks of `srun`, in an allocation of three nodes."""
    stub = folder / "srun"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN" "$@"\n')
    stub.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "16", "SLURM_GPUS_ON_NODE": "2"}
    given = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **slurm, "SHARED": "/shared/a b", **changes}
    given = {name: value for name, value in given.items() if value is not None}
    return subprocess.run(["bash", SCRIPT, *arguments], env=given, capture_output=True, text=True, timeout=60)


def test_the_slurm_script_starts_ray_on_all_nodes_and_one_comparison(tmp_path):
    mode, token, *command = run(tmp_path, "mine.py:problem", "--gpus", "0.25", HEAD_IP="10.0.0.1").stdout.splitlines()
    assert mode == "token" and len(token) == 64
    separator = command.index("--")
    before, after = command[:separator], command[separator + 1 :]
    assert before[:3] == ["--nodes=3", "--ntasks=3", "--cpus-per-task=16"]
    ray_address = ["ray", "symmetric-run", "--address", "10.0.0.1:6379"]
    assert before[3:] == [*ray_address, "--min-nodes", "3", "--num-cpus=16", "--num-gpus=2"]
    assert after[:3] == ["tune-hypergrad", "compare", "mine.py:problem"]
    assert after[3:] == ["--address", "auto", "--out", "/shared/a b/tune-hypergrad-7", "--gpus", "0.25"]


def test_the_slurm_script_works_without_gpus_and_finds_its_own_address(tmp_path):
    command = run(tmp_path, "digits", SLURM_GPUS_ON_NODE=None, HEAD_IP=None).stdout.splitlines()
    assert "--num-gpus=0" in command
    own = subprocess.run(["hostname", "--all-ip-addresses"], capture_output=True, text=True, check=True).stdout.split()
    assert f"{own[0] if own else ''}:6379" in command


def test_the_slurm_script_says_what_it_lacks(tmp_path):
    assert "usage: sbatch" in run(tmp_path).stderr
    assert "set SHARED" in run(tmp_path, "digits", SHARED=None).stderr
