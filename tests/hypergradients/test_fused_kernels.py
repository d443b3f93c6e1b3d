"""Plain runs keep torch's fused kernels, and give the numbers of differentiated ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_problem import tiny_problem
from torch import Tensor, nn

from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings, hypergradient_run

VALUES = {"lr": torch.tensor([0.2])}


class Recurrent(nn.Module):
    """Notes whether oneDNN may be used."""

    seen: set[bool]

    def __init__(self, cell: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.seen = set()
        self.cell, self.head = cell(2, 6, batch_first=True, **settings), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(torch.backends.mkldnn.enabled)
        return self.head(self.cell(x.unflatten(1, (2, 2)))[0][:, -1])


class Direct(nn.Module):
    """Calls the attention itself."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, batch_first: bool) -> None:
        super().__init__()
        self.qkv, self.dropout = nn.Linear(width, 3 * width), dropout

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), None, dropout)


class Attending(nn.Module):
    def __init__(self, dropout: float, layer: type[nn.Module] = nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.layer = layer(2, 2, 4, dropout, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.unflatten(1, (2, 2))).flatten(1))


def trained(model: Callable[[], nn.Module], plain: bool) -> tuple[float, Tensor, nn.Module]:
    loop = InnerLoop(tiny_problem(model=model), TrainingSettings(10))
    run = hypergradient_run(loop, VALUES, reject_above=-torch.inf)
    assert run.plain
    with loop.running(plain=plain):
        run.advance(run.length)
    return run.result().val_loss, run.state.params, loop.model


@pytest.mark.parametrize(
    "model",
    [
        lambda: Recurrent(nn.LSTM),
        lambda: Recurrent(nn.GRU, dropout=0.5),
        lambda: Recurrent(nn.LSTM, dropout=0.5, num_layers=2),
        lambda: Attending(0.0),
        lambda: Attending(0.5),
        lambda: Attending(0.5, Direct),
    ],
    ids=["lstm", "gru", "dropping lstm", "attention", "dropping attention", "dropping attention by itself"],
)
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_the_same_numbers(model: Callable[[], nn.Module]) -> None:
    (loss, params, _), (slow_loss, slow_params, _) = trained(model, True), trained(model, False)
    assert loss == pytest.approx(slow_loss, rel=1e-5)
    torch.testing.assert_close(params, slow_params, rtol=1e-4, atol=1e-5)


def test_recurrent_layers_are_fused_where_they_draw_nothing() -> None:
    for model, plain, fused in (
        (lambda: Recurrent(nn.LSTM), True, True),
        (lambda: Recurrent(nn.LSTM), False, False),
        (lambda: Recurrent(nn.LSTM, dropout=0.5, num_layers=2), True, False),
    ):
        *_, used = trained(model, plain)
        assert isinstance(used, Recurrent) and used.seen == {fused}


def test_attention_within_layers_is_fused_where_it_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = F.scaled_dot_product_attention

    def noting(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, *further: Any) -> Tensor:
        seen.add((dropout > 0, torch.backends.cuda.flash_sdp_enabled()))
        return theirs(q, k, v, mask, dropout, *further)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    for plain in (True, False):
        for dropout in (0.0, 0.5):
            seen: set[tuple[bool, bool]] = set()
            trained(lambda: Attending(dropout), plain)  # noqa: B023
            assert (dropout > 0, plain and dropout == 0) in seen
            assert seen <= {(True, False), (False, plain)}


def test_a_run_that_is_differentiated_is_not_plain() -> None:
    loop = InnerLoop(tiny_problem(), TrainingSettings(10))
    assert not hypergradient_run(loop, {"lr": VALUES["lr"].double()}, differentiation="reverse").plain
