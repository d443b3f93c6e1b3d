"""The usual recipe: clipping by norm, accumulated batches, averaged weights, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_problems import MODES, Values, assert_close, differentiate, double, make_loop, make_problem
from torch_loops import SGD, VALUES, assert_exact

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import TrainingSettings, check_problem, hypergradient

SEEDS = (3, 5)


def assert_members_are_runs(problem: Any, values: Values, **settings: Any) -> None:
    """Each run of an ensemble at once is the one that it is by itself."""
    settings = {"steps": 5, "differentiation": "reverse", **settings}
    result = hypergradient(problem, values, seed=SEEDS, check=False, **settings)
    assert "runs at once" in result.reason
    for seed, member in zip(SEEDS, result.members, strict=True):
        own = hypergradient(problem, values, seed=seed, check=False, **settings)
        assert member.val_loss == pytest.approx(own.val_loss, rel=1e-12)
        assert_close(member.hypergradients, own.hypergradients, 1e-10)
        assert_close(member.params, own.params, 1e-10)


class TestClipNorm:
    @pytest.mark.parametrize("optimizer", VALUES)
    @pytest.mark.parametrize("clip", [0.3, 0.6])
    def test_is_torchs(self, optimizer: str, clip: float) -> None:
        """The second limit is between the norms of the steps' gradients, so that some are clipped and some are not."""
        fixed = {"eps": 1e-3} if optimizer == "adamw" else {}
        assert_exact(make_problem("batch_norm"), VALUES[optimizer], optimizer=optimizer, fixed=fixed, clip_norm=clip)

    def test_acts_where_the_gradient_is_longer(self) -> None:
        plain, loose, tight = (
            hypergradient(make_problem(), SGD, steps=3, clip_norm=clip, check=False).val_loss
            for clip in (None, 100.0, 0.1)
        )
        assert plain == loose != tight

    def test_of_a_gradient_of_zero(self) -> None:
        loop = make_loop(clip_norm=0.5)
        gradient = torch.zeros(loop.size, dtype=torch.float64, requires_grad=True)
        params, _ = loop.update(loop.initial_state().params, gradient, loop.initial_state().slots, {}, 0)
        (derivative,) = torch.autograd.grad(params.sum(), gradient)
        assert derivative.isfinite().all()

    def test_of_an_ensemble(self) -> None:
        assert_members_are_runs(make_problem("batch_norm"), SGD, clip_norm=0.5)

    def test_is_checked(self) -> None:
        check = check_problem(make_problem(), clip_norm=0.4)
        assert check.ok and set(check.errors) == {"forward", "reverse"}

    @pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
    def test_limits(self, limit: float) -> None:
        with pytest.raises(InputError, match=f"clip_norm is {limit}: give a positive number"):
            TrainingSettings(3, clip_norm=limit)

    def test_both_clips(self) -> None:
        with pytest.raises(InputError, match=r"clip_gradient is 1.0 and clip_norm 2.0: set one of them"):
            TrainingSettings(3, clip_gradient=1.0, clip_norm=2.0)
