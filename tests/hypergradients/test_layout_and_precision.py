"""What runs faster at the same numbers, or nearly: channels last in memory, and a GPU's TF32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_problems import assert_close, differentiate, double, make_loop, make_problem
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch_loops import MODES, SGD, assert_exact

from tune_hypergrad import Problem, check_problem, hypergradient
from tune_hypergrad.hypergradients.tensor_cores import tf32
from tune_hypergrad.regularisers import InputNoise

SEEDS = (3, 5)


class Images(nn.Sequential):
    """Convolutions and a normalisation; notes the layouts that it is given."""

    def __init__(self, kind: type[nn.Module] = nn.Conv2d, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__(kind(2, 4, 3), norm(4), nn.Softplus(), kind(4, 3, 2), nn.Flatten(), nn.LazyLinear(3))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.stride())
        return super().forward(x)  # type: ignore[no-any-return]


MADE: list[Images] = []


def images(dimensions: int = 2, dtype: torch.dtype = torch.float64, **fields: Any) -> Problem:
    """A problem of small images, or of volumes."""
    kinds = (nn.Conv2d, nn.BatchNorm2d) if dimensions == 2 else (nn.Conv3d, nn.BatchNorm3d)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(18, 2, *dimensions * [5], generator=generator, dtype=dtype)
    y = torch.randint(3, (18,), generator=generator)

    def model() -> nn.Module:
        made = Images(*kinds)
        with torch.no_grad():
            made(x[:2].float())
        made.seen.clear()
        MADE.append(made)
        return made.to(dtype)

    split = (x[:12], y[:12]), (x[12:], y[12:])
    return Problem(**{"model": model, "train": split[0], "val": split[1], "batch_size": 4, **fields})


class TestChannelsLast:
    def test_is_what_the_model_is_given(self) -> None:
        for dimensions, strides in ((2, (50, 1, 10, 2)), (3, (250, 1, 50, 10, 2))):
            loop = make_loop(images(dimensions), 3, channels_last=True)
            differentiate(loop, SGD, "checkpointed_reverse")
            assert set(MADE[-1].seen) == {strides}  # in training and in evaluation
        differentiate(make_loop(images(), 3), SGD, "checkpointed_reverse")
        assert set(MADE[-1].seen) == {(50, 25, 5, 1)}

    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_is_exact(self, dimensions: int) -> None:
        """Against differences of a plain loop of torch, and against derivatives in the usual layout."""
        problem = images(dimensions)
        found = assert_exact(problem, SGD, 4, channels_last=True)
        for mode in MODES:
            usual = differentiate(make_loop(problem, 4), SGD, mode)
            assert_close(found[mode].hypergradients, usual.hypergradients, 1e-10)

    def test_leaves_everything_else_as_it_is(self) -> None:
        for architecture in ("mlp", "lstm", "attention"):
            problem = make_problem(architecture)
            usual, other = (hypergradient(problem, SGD, steps=3, channels_last=on) for on in (False, True))
            assert usual.val_loss == other.val_loss
            assert all(torch.equal(other.hypergradients[name], v) for name, v in usual.hypergradients.items())

    def test_of_an_ensemble(self) -> None:
        problem = images()
        found = hypergradient(problem, SGD, steps=4, seed=SEEDS, channels_last=True, differentiation="reverse")
        for seed, member in zip(SEEDS, found.members, strict=True):
            own = hypergradient(problem, SGD, steps=4, seed=seed, channels_last=True, differentiation="reverse")
            assert_close(member.hypergradients, own.hypergradients, 1e-10)

    @pytest.mark.parametrize("mode", MODES)
    def test_inputs_that_depend_on_hyperparameters(self, mode: str) -> None:
        problem, values = images(regularisers=[InputNoise()]), {**SGD, "input_noise": double(0.2)}
        usual, other = (differentiate(make_loop(problem, 4, channels_last=on), values, mode) for on in (False, True))
        assert_close(other.hypergradients, usual.hypergradients, 1e-10)

    def test_with_autocast_and_kept_graphs(self) -> None:
        values = {name: value.float() for name, value in SGD.items()}
        usual, other = (
            hypergradient(images(dtype=torch.float32), values, steps=4, autocast="bfloat16", channels_last=on)
            for on in (False, True)
        )
        assert other.val_loss == pytest.approx(usual.val_loss, rel=1e-2)
        assert_close(other.hypergradients, usual.hypergradients, 0.1)

    def test_a_model_that_counts_on_a_layout_is_told_so_before_it_trains(self) -> None:
        class Viewing(Images):
            def forward(self, x: Tensor) -> Tensor:
                for layer in list(self)[:4]:
                    x = layer(x)
                return self[5](x.view(len(x), -1))  # type: ignore[no-any-return]

        def model() -> nn.Module:
            made = Viewing()
            with torch.no_grad():
                made(torch.randn(2, 2, 5, 5))
            return made.double()

        problem = images(model=model)
        assert check_problem(problem).ok
        check = check_problem(problem, channels_last=True)
        assert not check.ok and "view" in check.message and "reshape" in check.message


def _to_tf32(tensor: Tensor) -> Tensor:
    """A float32 tensor rounded to the 10 bits of TF32's mantissa."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class RoundedFactors(TorchDispatchMode):
    """While entered, matrix products and convolutions have their float32 factors rounded as tensor cores round them."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward")

    def __init__(self) -> None:
        super().__init__()
        self.rounded = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in self.PRODUCTS:
            self.rounded += 1
            args = tree_map_only(Tensor, _to_tf32, args)
        return func(*args, **(kwargs or {}))


class TestTF32:
    def test_rounding_here_is_that_of_tf32(self) -> None:
        step = 2.0**-10
        given = torch.tensor([1 + step, 1 + 0.4 * step, 1 + 0.6 * step, -3.0, 0.0])
        assert _to_tf32(given).tolist() == [1 + step, 1, 1 + step, -3, 0]

    @pytest.mark.parametrize("architecture", ["mlp", "conv", "attention"])
    @pytest.mark.parametrize("mode", MODES)
    def test_hypergradients_keep_their_signs(self, architecture: str, mode: str) -> None:
        """With factors rounded on a CPU as tensor cores round them; those that are tiny beside others are left out."""
        values = {"lr": double(0.05, 0.03, 0.02, 0.01), "momentum": double(0.8), "weight_decay": double(0.01, 0.02)}
        exact = differentiate(make_loop(make_problem(architecture), 8), values, mode).hypergradients
        single = make_loop(make_problem(architecture, dtype=torch.float32), 8)
        with RoundedFactors() as products:
            found = differentiate(single, {n: v.float() for n, v in values.items()}, mode).hypergradients
        assert products.rounded > 8
        plain = differentiate(single, {n: v.float() for n, v in values.items()}, mode).hypergradients
        assert any(not torch.equal(found[name], plain[name]) for name in values)
        for name, expected in exact.items():
            telling = expected.abs() > 0.02 * expected.abs().max()
            assert torch.equal(found[name].sign()[telling].double(), expected.sign()[telling])
        assert_close({n: v.double() for n, v in found.items()}, exact, 0.02)

    @pytest.mark.parametrize("allowed", [True, False])
    def test_torchs_switches_are_set_while_steps_run_and_given_back(self, allowed: bool) -> None:
        seen = []

        def loss(output: Tensor, target: Tensor) -> Tensor:
            seen.append(_switches())
            return F.cross_entropy(output, target)

        before, problem = _switches(), make_problem(loss=loss)
        problem.check()
        seen.clear()
        differentiate(make_loop(problem, 2, tf32=allowed), SGD)
        assert set(seen) == {("tf32" if allowed else "ieee",) * 3} and _switches() == before
        seen.clear()
        differentiate(make_loop(make_problem(loss=loss), 2), SGD)
        assert set(seen) == {before}

    @pytest.mark.parametrize("allowed", [False, True])
    @pytest.mark.parametrize("by_old_switch", [False, True])
    def test_recurrent_networks(self, allowed: bool, by_old_switch: bool) -> None:
        """They run without fused kernels, which have switches, too."""
        drawn = torch.randn(12, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x, y = drawn[..., :2], drawn[..., 2:]
        cudnn = torch.backends.cudnn
        seen: set[tuple[bool, ...]] = set()
        before, own = (cudnn.enabled, cudnn.deterministic, torch.backends.mkldnn.enabled), cudnn.allow_tf32

        class Recurrent(nn.LSTM):
            def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
                seen.add((cudnn.enabled, cudnn.deterministic, torch.backends.mkldnn.enabled))
                return super().forward(x)[0]  # type: ignore[no-any-return]

        def model() -> nn.Module:
            return Recurrent(2, 3, batch_first=True).double()

        problem = Problem(model, (x, y), (x, y), loss=F.mse_loss, batch_size=4)
        try:
            if by_old_switch:
                cudnn.allow_tf32 = not own
            found = hypergradient(problem, {"lr": torch.tensor([0.1])}, steps=3, tf32=allowed, check=False)
        finally:
            cudnn.allow_tf32 = own
        expected = hypergradient(problem, {"lr": torch.tensor([0.1])}, steps=3)
        assert torch.equal(found.hypergradients["lr"], expected.hypergradients["lr"])
        assert (cudnn.enabled, cudnn.deterministic, torch.backends.mkldnn.enabled) == before
        assert seen == {before, (False, before[1], False)}

    def test_they_are_given_back_after_an_error(self) -> None:
        before = _switches()
        with pytest.raises(ZeroDivisionError), tf32(not _is_on(before)):
            assert _switches() != before
            raise ZeroDivisionError
        assert _switches() == before

    def test_versions_of_torch_with_other_switches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Old:
            allow_tf32 = True

        monkeypatch.setattr(torch.backends, "cudnn", Old())
        monkeypatch.setattr(torch.backends.cuda, "matmul", Old())
        with tf32(False):
            assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


def _switches() -> tuple[str, ...]:
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    return tuple(switch.fp32_precision for switch in switches)


def _is_on(switches: tuple[str, ...]) -> bool:
    return switches == ("tf32",) * 3
