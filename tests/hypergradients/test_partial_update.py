"""Parameters without a gradient stay as they are, and the others step as `torch.optim` would have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from construct_runs import TORCH_OPTIMIZERS, set_values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tune_hypergrad.hypergradients.optimizers import OPTIMIZERS
from tune_hypergrad.hypergradients.partial_update import Block, counted, step_blocks, update_blocks

SHAPES = ((3,), (2, 2), (), (1, 4))
SIZES = [torch.Size(shape).numel() for shape in SHAPES]
HYPERPARAMETERS = {
    "sgd": {"lr": 0.1, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1},
    "nesterov": {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.1},
    "adam": {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1},
    "adamw": {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1},
    "rmsprop": {"lr": 0.1, "alpha": 0.8, "momentum": 0.7, "weight_decay": 0.1},
}

patterns = st.lists(st.frozensets(st.integers(0, len(SHAPES) - 1)), min_size=1, max_size=8)
"""Of every step, the positions of the parameters that have no gradient."""


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update_of(optimizer: str) -> Callable[..., Any]:
    """The optimizer's update as a function of (params, gradient, slots, block)."""
    own = OPTIMIZERS[optimizer]
    values = {**own.hyperparameters, **HYPERPARAMETERS[optimizer]}
    return lambda params, gradient, slots, block: own.update(params, gradient, slots, values, block.taken)


@settings(max_examples=40, deadline=None)
@given(optimizer=st.sampled_from(sorted(HYPERPARAMETERS)), pattern=patterns)
def test_steps_are_those_of_torch(optimizer: str, pattern: list[frozenset[int]]) -> None:
    theirs = [normal(position, *shape).requires_grad_() for position, shape in enumerate(SHAPES)]
    reference = TORCH_OPTIMIZERS[optimizer](theirs, lr=0.1)
    set_values(reference, HYPERPARAMETERS[optimizer])
    params = torch.cat([p.detach().reshape(-1) for p in theirs])
    slots, counts = tuple(torch.zeros_like(params) for _ in OPTIMIZERS[optimizer].slots), (0,) * len(SHAPES)
    for step, without in enumerate(pattern):
        gradients = [normal(100 * step + position, *shape) for position, shape in enumerate(SHAPES)]
        for position, (parameter, gradient) in enumerate(zip(theirs, gradients, strict=True)):
            parameter.grad = None if position in without else gradient
        reference.step()
        # what is filled in for missing gradients is not to be read
        given = [torch.full_like(g, torch.nan) if p in without else g for p, g in enumerate(gradients)]
        gradient, blocks = torch.cat([g.reshape(-1) for g in given]), step_blocks(counts, without)
        before = params.split(SIZES), [slot.split(SIZES) for slot in slots]
        params, slots = update_blocks(update_of(optimizer), blocks, SIZES, params, gradient, slots)
        counts = counted(counts, without)
        expected = torch.cat([p.detach().reshape(-1) for p in theirs])
        torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-14)
        for position in without:
            assert torch.equal(params.split(SIZES)[position], before[0][position])
            for slot, earlier in zip(slots, before[1], strict=True):
                assert torch.equal(slot.split(SIZES)[position], earlier[position])
    assert list(counts) == [sum(position not in without for without in pattern) for position in range(len(SHAPES))]


@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=6), data=st.data())
def test_blocks_are_parameters_of_one_count(counts: list[int], data: st.DataObject) -> None:
    without = data.draw(st.frozensets(st.integers(0, len(counts) - 1)))
    blocks = step_blocks(counts, without)
    assert sorted(m for block in blocks for m in block.members) == sorted(set(range(len(counts))) - without)
    assert len({block.taken for block in blocks}) == len(blocks)
    assert all(counts[member] == block.taken for block in blocks for member in block.members)


@pytest.mark.parametrize("optimizer", sorted(HYPERPARAMETERS))
def test_the_step_is_differentiable(optimizer: str) -> None:
    """By weights, gradients and state: as the update itself is, and the identity where nothing steps."""
    blocks = [Block(0, (0, 3)), Block(2, (1,))]
    total = sum(SIZES)
    slots = tuple(normal(seed, total).square() + 0.1 for seed, _ in enumerate(OPTIMIZERS[optimizer].slots, 2))

    def step(params: Tensor, gradient: Tensor, *slots: Tensor) -> tuple[Tensor, ...]:
        after, moved = update_blocks(update_of(optimizer), blocks, SIZES, params, gradient, slots)
        return after, *moved

    leaves = [leaf.requires_grad_() for leaf in (normal(0, total), normal(1, total), *slots)]
    assert torch.autograd.gradcheck(step, leaves)
    (by_params, by_gradient, *_) = torch.autograd.functional.jacobian(step, tuple(leaves))[0]
    still = slice(sum(SIZES[:2]), sum(SIZES[:3]))  # the third parameter
    assert torch.equal(by_params[still, still], torch.eye(SIZES[2], dtype=torch.float64))
    assert not by_gradient[still].any()


def test_all_step_as_one_vector() -> None:
    """Where every parameter steps, at one count, nothing is cut."""
    seen = []

    def update(params: Tensor, gradient: Tensor, slots: tuple[Tensor, ...], block: Block) -> Any:
        seen.append((params, block.taken))
        return params - gradient, slots

    params, gradient = normal(0, sum(SIZES)), normal(1, sum(SIZES))
    after, _ = update_blocks(update, step_blocks((2,) * len(SHAPES), frozenset()), SIZES, params, gradient, ())
    assert torch.equal(after, params - gradient)
    assert len(seen) == 1 and seen[0][0] is params and seen[0][1] == 2


def test_none_steps() -> None:
    params, gradient = normal(0, sum(SIZES)), normal(1, sum(SIZES))
    blocks = step_blocks((0,) * len(SHAPES), frozenset(range(len(SHAPES))))
    after, slots = update_blocks(update_of("adam"), blocks, SIZES, params, gradient, (params, gradient))
    assert blocks == [] and torch.equal(after, params)
    assert torch.equal(slots[0], params) and torch.equal(slots[1], gradient)
