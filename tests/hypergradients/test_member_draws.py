"""Draws under `vmap` are, for every member, those of the global generator seeded alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from tune_hypergrad.hypergradients.member_draws import MemberDraws

SEEDS = (1, 2, 5)
X = torch.rand(len(SEEDS), 4, 6, generator=torch.Generator().manual_seed(0)) + 0.1

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: torch.rand(4, 6),
    "rand of a type": lambda x: torch.rand(4, 6, dtype=torch.float64),
    "rand_like": lambda x: torch.rand_like(x),
    "rand_like of a type": lambda x: torch.rand_like(x, dtype=torch.float64),
    "randn": lambda x: torch.randn((17,)),
    "randn_like": lambda x: torch.randn_like(x),
    "randint": lambda x: torch.randint(2, 9, (3, 2)),
    "randint_like": lambda x: torch.randint_like(x, 9),
    "randint_like between": lambda x: torch.randint_like(x, 2, 9),
    "randperm": lambda x: torch.randperm(11),
    "normal": lambda x: torch.normal(0.0, 2.0, (4, 5)),
    "normal of means": lambda x: torch.normal(x, 0.5),
    "bernoulli": lambda x: torch.bernoulli(x.clamp(0, 1)),
    "multinomial": lambda x: torch.multinomial(x, 2),
    "poisson": lambda x: torch.poisson(5 * x),
    "gamma": lambda x: torch._standard_gamma(x),
    "bernoulli_": lambda x: torch.empty(4, 6).bernoulli_(0.3),
    "bernoulli_ of shares": lambda x: torch.empty_like(x).bernoulli_(x.clamp(0, 1)),
    "uniform_": lambda x: x.new_empty(5).uniform_(-1, 1),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "in place": lambda x: [y := torch.empty_like(x), y.uniform_(), y][-1],
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout in place": lambda x: F.dropout(x.clone(), 0.4, inplace=True),
    "dropout1d": lambda x: F.dropout1d(x[None], 0.4),
    "dropout2d": lambda x: F.dropout2d(x.reshape(4, 3, 2, 1), 0.4),
    "dropout3d": lambda x: F.dropout3d(x.reshape(4, 3, 2, 1, 1), 0.4),
    "dropout of everything": lambda x: F.dropout2d(x.reshape(4, 3, 2, 1), 1.0),
    "no dropout": lambda x: F.dropout2d(x.reshape(4, 3, 2, 1), 0.4, training=False),
    "one after another": lambda x: torch.rand(3) + torch.randn(3) * F.dropout(x, 0.5).sum(),
}


def together(draw: Callable[[Tensor], Tensor]) -> Tensor:
    draws = MemberDraws(len(SEEDS), torch.device("cpu"))
    draws.seed(SEEDS)

    def of_member(index: Tensor, x: Tensor) -> Tensor:
        with draws.under(index):
            return draw(x)

    return vmap(of_member, randomness="error")(torch.arange(len(SEEDS)), X)


@pytest.mark.parametrize("name", DRAWS)
def test_every_member_draws_what_it_would_by_itself(name: str) -> None:
    before = torch.random.get_rng_state()
    found = together(DRAWS[name])
    assert torch.equal(before, torch.random.get_rng_state())
    for member, seed in enumerate(SEEDS):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = DRAWS[name](X[member])
        if name in ("dropout", "dropout in place"):  # the engine's own, in place of torch's
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                expected = X[member] * (torch.empty(4, 6).bernoulli_(0.6) / 0.6)
        assert found[member].dtype == expected.dtype
        torch.testing.assert_close(found[member], expected)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.zeros(3).uniform_(),  # not the members', though their draws would have to be
        lambda x: F.alpha_dropout(x, 0.4, training=True),
        lambda x: F.rrelu(x - 0.5, training=True),
        lambda x: torch.rand(3, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["a common tensor", "alpha dropout", "rrelu", "an own generator"],
)
def test_other_draws_are_refused(draw: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError):
        together(draw)


def test_outside_of_vmap_nothing_changes() -> None:
    torch.manual_seed(3)
    first = torch.rand(3)
    torch.manual_seed(3)
    with MemberDraws(2, torch.device("cpu")):
        assert torch.equal(torch.rand(3), first)
