"""A small float64 problem that trains in milliseconds, for tests of the Ray level."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_hypergrad.losses import accuracy
from tune_hypergrad.problem import Problem

STEPS = 12


def clusters(examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points around three centres, float64 [n, 4], and which centre, int64 [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (examples,), generator=generator)
    centres = 2 * torch.eye(3, 4, dtype=torch.float64)
    return centres[labels] + torch.randn(examples, 4, generator=generator, dtype=torch.float64), labels


def network(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()


def penalised(output: Tensor, target: Tensor, *, params: dict[str, Tensor], l2: float | Tensor = 0.0) -> Tensor:
    return F.cross_entropy(output, target) + l2 * sum((p**2).sum() for p in params.values())


def tiny_problem(**fields: Any) -> Problem:
    """48 training examples in batches of 8, 24 of validation and of test."""
    given: dict[str, Any] = {
        "model": network,
        "train": clusters(48, seed=0),
        "val": clusters(24, seed=1),
        "test": clusters(24, seed=2),
        "train_loss": penalised,
        "metrics": {"accuracy": accuracy},
        "batch_size": 8,
        "name": "tiny",
    }
    return Problem(**{**given, **fields})


_RAYS_OWN = {
    *("config", "date", "hostname", "iterations_since_restore", "node_ip", "pid", "time_since_restore", "trial_id"),
    *("time_this_iter_s", "time_total_s", "timestamp", "training_iteration"),
    *("checkpoint_dir_name", "experiment_tag"),
}


def ours(result: dict[str, Any]) -> dict[str, Any]:
    """What of a result repeats to the bit: without Ray's own keys and without seconds."""
    return {k: v for k, v in result.items() if k.split("/")[0] not in _RAYS_OWN and "seconds" not in k}


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """`ours` without costs, in one order: what a restored trial repeats (its reverse pass trains some steps again)."""
    return {key: value for key, value in sorted(ours(result).items()) if not key.startswith("cost/")}
