"""Regularisers do what their formulas say, with a value per example or one for all, and in every training run."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_problems import (
    MODES,
    TOKENS,
    Recurrent,
    Values,
    assert_close,
    differentiate,
    double,
    dropout,
    make_loop,
    make_problem,
    mlp,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Beta
from torch.func import functional_call
from torch.utils._pytree import tree_map

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import hypergradient
from tune_hypergrad.hypergradients.check import finite_differences
from tune_hypergrad.hypergradients.hypergradient import hypergradient_run
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, State
from tune_hypergrad.losses import smoothed_cross_entropy
from tune_hypergrad.objective import Objective, Prediction
from tune_hypergrad.problem import Problem
from tune_hypergrad.regularisers import (
    L1,
    ActivationRegularisation,
    DropConnect,
    Dropout,
    EmbeddingDropout,
    InputNoise,
    InputScaling,
    Mixup,
    Regulariser,
    TemporalActivationRegularisation,
    VariationalDropout,
    WeightDecay,
)
from tune_hypergrad.stn.convert import self_tuning
from tune_hypergrad.stn.hyperparameters import TunedHyperparameter, TunedHyperparameters
from tune_hypergrad.stn.steps import VARIANTS, training_gradients

RATES = (0.0, 0.2, 0.5, 0.9)


def alone(layer: nn.Module) -> nn.Module:
    """A model of one layer "0", in double precision."""
    model = nn.Sequential(layer)
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    return model.double()


def predict(model: nn.Module, regularisers: Sequence[Regulariser], values: Any, *inputs: Tensor) -> Prediction:
    """What a model, regularised here, makes of inputs in a training step."""
    parameters = dict(model.named_parameters())

    def call(factors: dict[str, Tensor]) -> Any:
        return functional_call(model, {name: parameters[name] * factor for name, factor in factors.items()}, inputs)

    return Objective(lambda *_: torch.zeros(()), regularisers, model).predict(call, parameters, values)


def assert_share(found: Tensor, expected: float, deviations: float = 5.0) -> None:
    """The share of true values among independent ones is what is expected, within so many standard deviations."""
    sigma = (expected * (1 - expected) / found.numel()) ** 0.5
    assert abs(float(found.double().mean()) - expected) <= deviations * sigma + 1e-12


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


KINDS = [
    pytest.param(nn.Dropout, (4, 6000), None, id="elements"),
    pytest.param(nn.Dropout1d, (4, 6000, 3), 2, id="channels of sequences"),
    pytest.param(nn.Dropout2d, (4, 6000, 3, 2), 2, id="channels of images"),
    pytest.param(nn.Dropout3d, (4, 6000, 2, 1, 3), 2, id="channels of volumes"),
]


class TestDropout:
    @pytest.mark.parametrize(("kind", "shape", "masked_dims"), KINDS)
    def test_rates_of_examples(self, kind: type[nn.Module], shape: tuple[int, ...], masked_dims: int | None) -> None:
        x = 2 * torch.randint(2, shape).double() - 1
        rates = double(*RATES)
        y = predict(alone(kind(0.7)), [Dropout()], {"dropout": rates}, x).output
        mask = (y / x).flatten(masked_dims) if masked_dims else (y / x)[..., None]
        assert (mask == mask[..., :1]).all(), "one mask for a channel"
        for rate, example in zip(RATES, mask[..., 0], strict=True):
            assert_share(example == 0, rate)
            torch.testing.assert_close(example[example != 0], torch.full_like(example[example != 0], 1 / (1 - rate)))
        assert torch.equal(y[0], x[0])

    @settings(deadline=None, max_examples=50)
    @given(
        kind=st.sampled_from([nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d]),
        further=st.lists(st.integers(0, 4), min_size=1, max_size=4),
        rate=st.floats(0, 1),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    )
    def test_elements_are_zero_or_scaled(
        self, kind: type[nn.Module], further: list[int], rate: float, dtype: torch.dtype
    ) -> None:
        x = torch.ones(3, *further, dtype=dtype)
        model = alone(kind(0.5)).to(dtype)
        y = predict(model, [Dropout()], {"dropout": rate}, x).output
        kept = float(1 / (1 - torch.tensor(rate, dtype=dtype)))
        assert y.shape == x.shape and y.dtype == dtype
        assert all(value == 0 or value == pytest.approx(kept, rel=0.01) for value in y.flatten().tolist())

    @pytest.mark.parametrize(("kind", "shape", "_"), KINDS)
    def test_a_rate_of_0_is_the_identity(self, kind: type[nn.Module], shape: tuple[int, ...], _: Any) -> None:
        x = torch.randn(shape, dtype=torch.float64)
        for zero in (0.0, torch.zeros(4)):
            assert torch.equal(predict(alone(kind(0.5)), [Dropout()], {"dropout": zero}, x).output, x)

    @pytest.mark.parametrize("rate", [1.0, 1 - 1e-17, torch.ones(4)])
    @pytest.mark.parametrize(("kind", "shape", "_"), KINDS)
    def test_a_rate_that_rounds_to_1_gives_zeros(
        self, kind: type[nn.Module], shape: tuple[int, ...], _: Any, rate: Any
    ) -> None:
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = predict(alone(kind()), [Dropout()], {"dropout": rate}, x).output
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert not y.any() and not gradient.any()

    def test_the_gradient_goes_through_the_same_mask(self) -> None:
        x = torch.ones(5, 40, dtype=torch.float64, requires_grad=True)
        y = predict(alone(nn.Dropout()), [Dropout()], {"dropout": 0.4}, x).output
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)

    def test_small_rates_of_half_precision_inputs(self) -> None:
        """1 - 0.001 is 1 in bfloat16."""
        x = torch.ones(1000, 1000, dtype=torch.bfloat16)
        y = predict(alone(nn.Dropout()).float(), [Dropout()], {"dropout": 0.001}, x).output
        assert y.dtype == torch.bfloat16
        assert_share(y == 0, 0.001)

    @pytest.mark.parametrize(("kind", "shape", "_"), KINDS)
    @pytest.mark.parametrize(("training", "values"), [(True, {}), (False, {"dropout": 0.9}), (False, {})])
    def test_else_the_module_is_as_it_was(
        self, kind: type[nn.Module], shape: tuple[int, ...], _: Any, training: bool, values: dict[str, float]
    ) -> None:
        """In evaluation the identity; without a value its own rate, to the same random numbers."""
        x = torch.randn(shape, dtype=torch.float64)
        expected = alone(kind(0.3)).train(training)(x)
        torch.manual_seed(0)
        x = torch.randn(shape, dtype=torch.float64)
        assert torch.equal(predict(alone(kind(0.3)).train(training), [Dropout()], values, x).output, expected)

    def test_the_first_that_matches_has_a_module(self) -> None:
        model = alone(nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.0)))
        regularisers = [Dropout("first", "0.0"), Dropout("rest", "*")]
        x = torch.ones(2000, 10)
        for values, rate in (({"first": 0.4}, 0.4), ({"rest": 0.2}, 0.2), ({"first": 0.4, "rest": 0.2}, 0.52)):
            assert_share(predict(copy.deepcopy(model), regularisers, values, x).output == 0, rate)

    def test_a_module_of_several_names_and_with_hooks(self) -> None:
        shared, seen = nn.Dropout(0.0), []
        shared.register_forward_hook(lambda module, inputs, output: seen.append(output))
        model = alone(nn.Sequential(shared, nn.Identity(), shared))
        x = torch.ones(2000, 10)
        y = predict(model, [Dropout()], {"dropout": 0.5}, x).output
        assert_share(y == 0, 0.75)
        assert seen[1] is y and shared.p == 0.0 and isinstance(shared, nn.Dropout)

    def test_some_modules_only(self) -> None:
        model = alone(nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.0)))
        x = torch.ones(2000, 10)
        assert_share(predict(model, [Dropout("dropout", "*.1")], {"dropout": 0.5}, x).output == 0, 0.5)

    @pytest.mark.parametrize(("kind", "shape", "_"), KINDS)
    def test_inputs_by_keyword(self, kind: type[nn.Module], shape: tuple[int, ...], _: Any) -> None:
        model, x = alone(kind()), torch.ones(shape)
        objective = Objective(lambda *_: torch.zeros(()), [Dropout()], model)
        assert not objective.predict(lambda factors: model[0](input=x), {}, {"dropout": 1.0}).output.any()
        assert torch.equal(model.eval()[0](input=x), x)

    @pytest.mark.parametrize("regulariser", [Dropout("rate"), VariationalDropout("rate", "0")])
    def test_rates_of_examples_that_the_tensor_has_not(self, regulariser: Regulariser) -> None:
        message = r"rates for 4 examples, .* shape \(20, 5, 3\), which has 20 along dimension 0: .* in per_minibatch$"
        with pytest.raises(InputError, match=message) as caught:
            predict(alone(nn.Dropout()), [regulariser], {"rate": double(*RATES)}, torch.ones(20, 5, 3))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("regulariser", [Dropout("rate"), VariationalDropout("rate", "0")])
    def test_one_tensor_for_all_examples(self, regulariser: Regulariser) -> None:
        y = predict(alone(nn.Dropout()), [regulariser], {"rate": double(0, 0.5, 0.5, 0.9)}, torch.ones(1, 3, 4000))
        dropped = y.output == 0
        assert dropped.shape == (4, 3, 4000) and not torch.equal(dropped[1], dropped[2])
        for rate, example in zip((0, 0.5, 0.5, 0.9), dropped, strict=True):
            assert_share(example[0], rate)


class Tagger(nn.Module):
    """Gives every time step's features, by way of a recurrent network."""

    def __init__(self, cell: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.recurrent = cell(8, 300, batch_first=True)
        self.state: Any = None

    def forward(self, words: Tensor) -> Tensor:
        output, state = self.recurrent(self.embedding(words))
        self.state = tree_map(torch.detach, state)
        return output


class TestVariationalDropout:
    @pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
    def test_outputs_of_recurrent_networks(self, cell: type[nn.RNNBase]) -> None:
        model, words = Tagger(cell).double(), torch.randint(50, (4, 7))
        plain, state = model(words), model.state
        y = predict(model, [VariationalDropout("rate", "recurrent")], {"rate": double(*RATES)}, words).output
        mask = y / plain
        torch.testing.assert_close(mask, mask[:, :1].expand_as(mask))
        for rate, example in zip(RATES, mask[:, 0], strict=True):
            assert_share(example == 0, rate)
            torch.testing.assert_close(example[example != 0], torch.full_like(example[example != 0], 1 / (1 - rate)))
        for now, before in zip(model.state, state, strict=True):
            assert torch.equal(now, before)
        assert torch.equal(y[0], plain[0])

    def test_a_plain_dropout_module(self) -> None:
        x = torch.ones(4, 5, 3000, dtype=torch.float64)
        y = predict(alone(nn.Dropout(0.3)), [VariationalDropout("rate", "0")], {"rate": double(*RATES)}, x).output
        assert torch.equal(y, y[:, :1].expand_as(y))
        for rate, example in zip(RATES, y[:, 0], strict=True):
            assert_share(example == 0, rate)

    @pytest.mark.parametrize(
        "regularisers",
        [
            [VariationalDropout("rate", "0.0"), Dropout("rate", "0.*")],
            [Dropout("rate", "0.1"), VariationalDropout("rate", "0.*")],
        ],
    )
    def test_the_first_that_matches_has_a_module(self, regularisers: list[Regulariser]) -> None:
        x = torch.ones(4000, 2, 3, dtype=torch.float64)
        y = predict(alone(nn.Sequential(nn.Dropout(), nn.Dropout())), regularisers, {"rate": 0.5}, x).output
        assert_share(y[:, 0, 0] == 0, 0.75)

    @pytest.mark.parametrize("rate", [1.0, torch.ones(4)])
    def test_a_rate_of_1_gives_zeros(self, rate: Any) -> None:
        words = torch.randint(50, (4, 7))
        y = predict(Tagger(), [VariationalDropout("rate", "recurrent")], {"rate": rate}, words).output
        assert not y.any()

    def test_a_rate_of_0_evaluation_and_no_value_are_the_identity(self) -> None:
        model, words = Tagger(), torch.randint(50, (4, 7))
        plain, regularisers = model(words), [VariationalDropout("rate", "recurrent")]
        for training, values in ((True, {"rate": 0.0}), (True, {}), (False, {"rate": 0.5})):
            assert torch.equal(predict(copy.deepcopy(model).train(training), regularisers, values, words).output, plain)

    def test_outputs_without_time(self) -> None:
        with pytest.raises(InputError, match=r"outputs of shape \[examples, time, features\], not \[4, 3\]"):
            predict(alone(nn.Identity()), [VariationalDropout("rate", "0")], {"rate": 0.5}, torch.ones(4, 3))

    def test_packed_sequences(self) -> None:
        packed = nn.utils.rnn.pack_padded_sequence(torch.ones(2, 3, 8).double(), [3, 2], batch_first=True)
        with pytest.raises(InputError, match="a regularised module gives a PackedSequence: it has to give a tensor"):
            predict(alone(nn.LSTM(8, 5)), [VariationalDropout("rate", "0")], {"rate": 0.5}, packed)


class TestEmbeddingDropout:
    @pytest.mark.parametrize("shape", [(4, 400), (4, 20, 20), (4,)])
    def test_words_share_their_fate_within_an_example(self, shape: tuple[int, ...]) -> None:
        vocabulary = 3000
        model, words = alone(nn.Embedding(vocabulary, 5)), torch.randint(vocabulary, shape)
        y = predict(model, [EmbeddingDropout()], {"embedding_dropout": double(*RATES)}, words).output
        factors = y / model[0].weight[words]
        torch.testing.assert_close(factors, factors[..., :1].expand_as(factors))
        for rate, example, found in zip(RATES, words.reshape(4, -1), factors[..., 0].reshape(4, -1), strict=True):
            fates = {word: value for word, value in zip(example.tolist(), found.tolist(), strict=True)}
            assert [fates[word] for word in example.tolist()] == pytest.approx(found.tolist())
            assert_share(double(*fates.values()) == 0, rate)
            assert all(fate == 0 or fate == pytest.approx(1 / (1 - rate)) for fate in fates.values())

    def test_examples_have_fates_of_their_own(self) -> None:
        model, words = alone(nn.Embedding(2, 1)), torch.zeros(4000, 3, dtype=torch.int64)
        y = predict(model, [EmbeddingDropout()], {"embedding_dropout": 0.3}, words).output
        assert_share(y[:, 0] == 0, 0.3)
        assert torch.equal(y[:, 0], y[:, 1]) and torch.equal(y[:, 0], y[:, 2])

    def test_rates_of_examples_that_the_words_have_not(self) -> None:
        positions, values = torch.arange(7), {"embedding_dropout": double(*RATES)}
        with pytest.raises(InputError, match=r"rates for 4 examples, .* has 7 along dimension 0: .* arange\(t\)"):
            predict(alone(nn.Embedding(9, 3)), [EmbeddingDropout()], values, positions)

    def test_one_row_of_words_for_all_examples(self) -> None:
        model, words = alone(nn.Embedding(3000, 2)), torch.arange(3000)[None]
        y = predict(model, [EmbeddingDropout()], {"embedding_dropout": double(*RATES)}, words).output
        assert y.shape == (4, 3000, 2)
        for rate, example in zip(RATES, y, strict=True):
            assert_share(example[:, 0] == 0, rate)

    def test_limits(self) -> None:
        model, words = alone(nn.Embedding(9, 3)), torch.randint(9, (4, 6))
        plain = model(words)
        for training, rate, expected in ((True, 0.0, plain), (True, 1.0, 0 * plain), (False, 0.5, plain)):
            regularised = copy.deepcopy(model).train(training)
            y = predict(regularised, [EmbeddingDropout()], {"embedding_dropout": rate}, words).output
            assert torch.equal(y, expected)


class TestDropConnect:
    def test_in_the_inner_loop(self) -> None:
        """The gradient of a linear model is 0 where its weight is dropped, and the formula's elsewhere."""
        problem = make_problem(lambda: nn.Linear(4, 3), regularisers=[DropConnect("rate", "weight")])
        loop = make_loop(problem, fixed={"rate": 0.4})
        masks = []
        with loop.running():
            state = loop.initial_state()
            for step in range(3):
                gradient = loop.training(state, {}, step).gradient
                masks.append((loop.unflatten(gradient)["weight"] != 0) / 0.6)
                named = {name: p.clone().requires_grad_() for name, p in loop.unflatten(state.params).items()}
                x, y = loop.batches.of_step(step)
                loss = F.cross_entropy(F.linear(x, named["weight"] * masks[-1], named["bias"]), y)
                expected = torch.autograd.grad(loss, list(named.values()))
                torch.testing.assert_close(gradient, torch.cat([g.reshape(-1) for g in expected]))
                assert (masks[-1] == 0).any()
        assert not torch.equal(masks[0], masks[1]) or not torch.equal(masks[1], masks[2])

    def test_one_mask_for_examples_and_times(self) -> None:
        model, words = Tagger().double(), torch.randint(50, (4, 7))
        y = predict(model, [DropConnect()], {"weight_drop": 0.3}, words).output
        recurrent = model.recurrent.weight_hh_l0
        (gradient,) = torch.autograd.grad(y.square().sum(), recurrent)
        assert_share(gradient == 0, 0.3)
        with torch.no_grad():
            recurrent.mul_((gradient != 0) / 0.7)
        torch.testing.assert_close(y, model(words))

    def test_two_on_one_weight_multiply(self) -> None:
        model, x = nn.Linear(100, 100).double(), torch.eye(100, dtype=torch.float64)
        regularisers = [DropConnect("a", "weight"), DropConnect("b", "weight")]
        y = predict(model, regularisers, {"a": 0.5, "b": 0.2}, x).output - model.bias
        assert_share(y == 0, 0.6)
        torch.testing.assert_close(y[y != 0], (model.weight.T / 0.4)[y != 0])

    def test_limits(self) -> None:
        model, x = nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64)
        regularisers = [DropConnect("rate", "weight")]
        assert torch.equal(predict(model, regularisers, {"rate": 0.0}, x).output, model(x))
        assert torch.equal(predict(model, regularisers, {"rate": 1.0}, x).output, model.bias.expand(5, 3))


class TestMixup:
    @staticmethod
    def shares(strength: Any, examples: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Shares of the examples themselves, by mixing the identity matrix's rows."""
        x = torch.eye(examples, dtype=dtype)
        mixed, target = Mixup().transform((x, x.clone()), {"mixup": torch.as_tensor(strength, dtype=dtype)})
        assert torch.equal(mixed, target)
        return mixed.diagonal()

    @pytest.mark.parametrize("strength", [0.2, 1.0, 5.0])
    def test_shares_are_of_a_beta_distribution(self, strength: float) -> None:
        draws = torch.cat([self.shares(strength, 2000) for _ in range(5)])
        expected = Beta(double(strength), double(strength)).sample((20000,))[:, 0]
        expected = torch.maximum(expected, 1 - expected)
        for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert_share(
                draws <= expected.quantile(quantile),
                float((expected <= expected.quantile(quantile)).double().mean()),
                8,
            )
        assert float(draws.mean()) == pytest.approx(float(expected.mean()), abs=0.005)

    def test_small_strengths_mix_in_proportion(self) -> None:
        """The smaller share's expectation is about the strength times log 2."""
        smaller = torch.cat([1 - self.shares(1e-3, 2000) for _ in range(20)])
        assert float(smaller.mean()) == pytest.approx(1e-3 * math.log(2), rel=0.4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("strength", [0.0, 1e-30, 1e-8, 1e4])
    def test_extreme_strengths_are_finite(self, strength: float, dtype: torch.dtype) -> None:
        shares = self.shares(strength, 500, dtype)
        assert shares.isfinite().all() and (shares >= 0.49).all() and (shares <= 1).all()

    def test_mixed_pairs(self) -> None:
        x, target = torch.randn(30, 2, 3, dtype=torch.float64), torch.randint(4, (30,))
        further = torch.arange(30)
        mixed, kept, probabilities = Mixup(classes=4).transform((x, further, target), {"mixup": double(1.0)[0]})
        assert kept is further and probabilities.shape == (30, 4) and probabilities.dtype == x.dtype
        torch.testing.assert_close(probabilities.sum(1), torch.ones(30, dtype=torch.float64))
        for i in range(30):
            candidates = [(j, _share_of(x[i], x[j], mixed[i])) for j in range(30) if j != i]
            found = [(j, share) for j, share in candidates if share is not None]
            assert found or torch.equal(mixed[i], x[i])
            for j, share in found[:1]:
                own, other = (F.one_hot(target[k], 4).double() for k in (i, j))
                expected = share * own + (1 - share) * other
                torch.testing.assert_close(probabilities[i], expected)

    def test_strengths_of_examples(self) -> None:
        strengths = torch.zeros(400, dtype=torch.float64)
        strengths[200:] = 5.0
        shares = self.shares(strengths, 400)
        assert (shares[:200] == 1).all()
        assert (shares[200:] < 1).double().mean() > 0.98
        assert float(shares[200:].mean()) == pytest.approx(1 - 0.377, abs=0.03)

    @pytest.mark.parametrize("classes", [4, None])
    def test_a_strength_of_0_is_the_identity(self, classes: int | None) -> None:
        x = torch.randn(30, 2, dtype=torch.float64)
        target = torch.randint(4, (30,)) if classes else torch.randn(30, dtype=torch.float64)
        mixed, given = Mixup(classes).transform((x, target), {"mixup": torch.zeros(30)})
        assert torch.equal(mixed, x)
        assert torch.equal(given, F.one_hot(target, 4).double() if classes else target)

    def test_a_target_for_each_pixel(self) -> None:
        """Class probabilities where `F.cross_entropy` looks for them."""
        x, target = torch.randn(6, 1, 5, 5), torch.randint(3, (6, 5, 5))
        _, probabilities = Mixup(classes=3).transform((x, target), {"mixup": torch.tensor(0.0)})
        logits = torch.randn(6, 3, 5, 5)
        torch.testing.assert_close(F.cross_entropy(logits, probabilities), F.cross_entropy(logits, target))

    @settings(deadline=None, max_examples=30)
    @given(examples=st.integers(1, 6), classes=st.integers(1, 5), smoothing=st.floats(0, 1), seed=st.integers(0, 99))
    def test_smoothed_cross_entropy_takes_probabilities(
        self, examples: int, classes: int, smoothing: float, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits, other = (torch.randn(examples, classes, generator=generator, dtype=torch.float64) for _ in range(2))
        probabilities = other.softmax(1)
        expected = F.cross_entropy(logits, probabilities, label_smoothing=smoothing)
        for value in (smoothing, torch.full((examples,), smoothing, dtype=torch.float64)):
            actual = smoothed_cross_entropy(logits, probabilities, label_smoothing=value)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def _share_of(own: Tensor, other: Tensor, mixed: Tensor) -> float | None:
    """The share with which `mixed` is a combination of the two, if it is one."""
    direction = own - other
    share = float(((mixed - other) * direction).sum() / direction.square().sum())
    return share if torch.allclose(other + share * direction, mixed, atol=1e-10) else None


class TestInputs:
    @pytest.mark.parametrize("deviation", [double(0.3)[0], torch.tensor([0.0, 0.5, 2.0])])
    def test_noise(self, deviation: Tensor) -> None:
        x, other, y = torch.randn(3, 4, 5000), torch.arange(3), torch.arange(3)
        noisy, *rest = InputNoise("noise").transform((x, other, y), {"noise": deviation})
        noise = (noisy - x).flatten(1)
        expected = deviation.float().expand(3)
        torch.testing.assert_close(noise.std(1), expected, rtol=0.03, atol=0)
        assert (noise.mean(1).abs() <= 5 * expected / 20000**0.5).all()
        assert noisy.dtype == x.dtype and rest[0] is other and rest[1] is y

    @pytest.mark.parametrize("deviation", [double(0.3)[0], torch.linspace(0, 1, 4000)])
    def test_scaling(self, deviation: Tensor) -> None:
        x, y = torch.randn(4000, 3, 2), torch.arange(4000)
        scaled, target = InputScaling("scale").transform((x, y), {"scale": deviation})
        factors = (scaled / x).flatten(1)
        torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
        normal = factors[1:, 0].log() / deviation.float().expand(4000)[1:]
        assert target is y and scaled.dtype == x.dtype
        assert abs(float(normal.mean())) < 0.08 and float(normal.std()) == pytest.approx(1, rel=0.05)

    @pytest.mark.parametrize("regulariser", [InputNoise("d"), InputScaling("d")])
    @pytest.mark.parametrize("deviation", [torch.tensor(0.0), torch.zeros(3)])
    def test_a_deviation_of_0_is_the_identity(self, regulariser: Regulariser, deviation: Tensor) -> None:
        x = torch.randn(3, 4)
        assert torch.equal(regulariser.transform((x, x), {"d": deviation})[0], x)

    @pytest.mark.parametrize("regulariser", [InputNoise("d"), InputScaling("d"), Mixup(3, "d")])
    @pytest.mark.parametrize(("x", "kind"), [(torch.arange(3), "torch.int64"), ({"x": torch.ones(3)}, "dict")])
    def test_other_inputs_are_refused(self, regulariser: Regulariser, x: Any, kind: str) -> None:
        name = type(regulariser).__name__
        with pytest.raises(InputError, match=f"^{name} needs a floating first input, not {kind}$"):
            regulariser.transform((x, torch.arange(3)), {"d": torch.tensor(0.1)})


class TestPenalties:
    def loss(self, regularisers: Sequence[Regulariser], model: nn.Module, values: Any, *inputs: Tensor) -> Tensor:
        """The training loss where the model's own is 2."""
        objective = Objective(lambda *_: torch.tensor(2.0, dtype=torch.float64), regularisers, model)
        parameters = dict(model.named_parameters())
        prediction = objective.predict(lambda factors: model(*inputs), parameters, values)
        return objective.loss(prediction, None, lambda: parameters, values)

    @settings(deadline=None, max_examples=20)
    @given(weight=st.floats(0, 100), pattern=st.sampled_from(["*weight", "0.*", "2.bias", "*"]))
    def test_of_weights(self, weight: float, pattern: str) -> None:
        model, x = mlp().double(), torch.randn(5, 4, dtype=torch.float64)
        parts = [p for name, p in model.named_parameters() if _matches(name, pattern)]
        squares, sizes = (sum(f(p).sum() for p in parts) for f in (torch.square, torch.abs))
        for value in (weight, torch.tensor(weight, dtype=torch.float64)):
            decayed = self.loss([WeightDecay("w", pattern)], model, {"w": value}, x)
            torch.testing.assert_close(decayed, 2 + weight * squares / 2)
            torch.testing.assert_close(self.loss([L1("w", pattern)], model, {"w": value}, x), 2 + weight * sizes)

    def test_the_gradient_of_weight_decay_is_the_weight_times_the_parameters(self) -> None:
        model, x = mlp().double(), torch.randn(5, 4, dtype=torch.float64)
        loss = self.loss([WeightDecay("w", "0.weight")], model, {"w": 0.3}, x)
        (gradient,) = torch.autograd.grad(loss, model[0].weight)
        torch.testing.assert_close(gradient, 0.3 * model[0].weight)

    @pytest.mark.parametrize("weight", [0.7, double(0.7)[0], double(0.0, 1.0, 0.5, 2.0), torch.ones(4) / 8])
    def test_of_activations(self, weight: Any) -> None:
        model, words = Tagger().double(), torch.randint(50, (4, 7))
        h = model(words)
        weights = torch.as_tensor(weight).double().expand(4)
        ar = self.loss([ActivationRegularisation("recurrent", "w")], model, {"w": weight}, words)
        torch.testing.assert_close(ar, 2 + (weights[:, None, None] * h.square()).mean())
        tar = self.loss([TemporalActivationRegularisation("recurrent", "w")], model, {"w": weight}, words)
        torch.testing.assert_close(tar, 2 + (weights[:, None, None] * (h[:, 1:] - h[:, :-1]).square()).mean())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        ("kind", "mean"), [(ActivationRegularisation, 100), (TemporalActivationRegularisation, 400)]
    )
    def test_of_activations_in_half_precision(self, kind: Any, mean: float, dtype: torch.dtype) -> None:
        """Their sum is beyond the type's range, or too coarse."""
        x = torch.full((4, 3, 1000), 10.0, dtype=dtype) * torch.tensor([1, -1, 1])[:, None]
        assert self.loss([kind("0", "w")], alone(nn.Identity()).to(dtype), {"w": torch.ones(4)}, x) == 2 + mean

    @pytest.mark.parametrize("shape", [(4, 3), (4,)])
    def test_changes_without_time(self, shape: tuple[int, ...]) -> None:
        message = r"^TemporalActivationRegularisation acts on outputs of shape \[examples, time, features\], not \[4"
        with pytest.raises(InputError, match=message) as caught:
            self.loss([TemporalActivationRegularisation("0")], alone(nn.Identity()), {"tar": 0.1}, torch.ones(shape))
        assert str(caught.value).endswith(": choose other modules")

    def test_numbers_are_as_precise_as_trained_weights(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3).bfloat16().requires_grad_(False), nn.Linear(3, 2).double())
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        objective = Objective(lambda *_: torch.zeros((), dtype=torch.float64), [WeightDecay("w", "1.*")], model)
        loss = objective.loss(Prediction(None, {}), None, lambda: parameters, {"w": 0.1})
        squares = sum(p.square().sum() for p in parameters.values()) / 2
        torch.testing.assert_close(loss, 0.1 * squares, rtol=1e-12, atol=0)

    def test_of_several_modules_add_up(self) -> None:
        model, words = Tagger().double(), torch.randint(50, (4, 7))
        expected = model.embedding(words).square().mean() + model(words).square().mean()
        loss = self.loss([ActivationRegularisation("*", "w")], model, {"w": 0.5}, words)
        torch.testing.assert_close(loss, 2 + 0.5 * expected)

    def test_outputs_are_as_the_regularisers_before_left_them(self) -> None:
        """As in AWD-LSTMs: TAR before, AR after dropout."""
        model, words = Tagger().double(), torch.randint(50, (4, 7))
        h = model(words)
        regularisers = [
            TemporalActivationRegularisation("recurrent", "tar"),
            VariationalDropout("rate", "recurrent"),
            ActivationRegularisation("recurrent", "ar"),
        ]
        values = {"tar": 0.7, "rate": 1.0, "ar": 1e6}
        torch.testing.assert_close(
            self.loss(regularisers, model, values, words), 2 + 0.7 * (h[:, 1:] - h[:, :-1]).square().mean()
        )

    def test_a_hook_on_dropout_survives_whatever_the_order(self) -> None:
        x = torch.ones(4, 1000, dtype=torch.float64)
        for order in (1, -1):
            regularisers = [ActivationRegularisation("0", "w"), Dropout("rate", "0")][::order]
            loss = self.loss(regularisers, alone(nn.Dropout()), {"w": 1.0, "rate": 0.5}, x)
            assert float(loss) == pytest.approx(2 + 2, abs=0.2)

    def test_one_time_step_changes_nothing(self) -> None:
        words = torch.randint(50, (4, 1))
        regulariser = TemporalActivationRegularisation("recurrent", "w")
        assert self.loss([regulariser], Tagger().double(), {"w": 3.0}, words).item() == 2

    def test_without_a_value_or_in_evaluation_nothing_is_kept(self) -> None:
        model, words = Tagger(), torch.randint(50, (4, 7))
        regularisers = [ActivationRegularisation("recurrent", "w")]
        assert not predict(model, regularisers, {}, words).activations
        assert not predict(copy.deepcopy(model).eval(), regularisers, {"w": 1.0}, words).activations
        assert predict(model, regularisers, {"w": 1.0}, words).activations

    def test_a_module_that_the_model_does_not_call(self) -> None:
        model = mlp().double()
        model.add_module("3", nn.Identity())
        model.forward = lambda x: model[2](x @ model[0].weight.T)
        with pytest.raises(InputError, match="ActivationRegularisation has no output of '3'"):
            self.loss([ActivationRegularisation("3")], model, {"ar": 1.0}, torch.ones(2, 4, dtype=torch.float64))


def _matches(name: str, pattern: str) -> bool:
    return {"*weight": name.endswith("weight"), "0.*": name.startswith("0."), "*": True}.get(pattern, name == pattern)


def of_features(**fields: Any) -> Problem:
    """A network with dropout, and everything that can regularise it."""
    regularisers = [
        InputScaling(),
        InputNoise(),
        Mixup(classes=3),
        Dropout(),
        DropConnect(parameters="3.weight"),
        WeightDecay("l2_first", "0.*"),
        WeightDecay("l2_last", "3.weight"),
        L1(),
        ActivationRegularisation("1"),
    ]
    return make_problem(dropout, regularisers=regularisers, **fields)


def of_tokens(**fields: Any) -> Problem:
    """A recurrent network, and everything that can regularise it."""
    regularisers = [
        EmbeddingDropout(),
        VariationalDropout("variational", "embedding"),
        DropConnect(),
        TemporalActivationRegularisation("recurrent"),
        VariationalDropout("output", "recurrent"),
        ActivationRegularisation("recurrent"),
        WeightDecay("l2", "*weight*"),
    ]
    return make_problem(lambda: Recurrent(nn.LSTM), TOKENS, regularisers=regularisers, **fields)


CASES: dict[str, tuple[Any, Values, dict[str, Any]]] = {
    "features": (
        of_features,
        {
            "l2_first": double(0.05, 0.2),
            "l2_last": double(0.1),
            "l1": double(0.02, 0.01, 0.03),
            "ar": double(0.3, 0.5),
            "input_noise": double(0.2, 0.1, 0.4),
            "input_scaling": double(0.1, 0.3),
        },
        {"dropout": [0.2, 0.5], "mixup": 0.4, "weight_drop": [0.3, 0.1, 0.2]},
    ),
    "tokens": (
        of_tokens,
        {"ar": double(0.3, 0.5), "tar": double(0.4, 0.2, 0.6), "l2": double(0.1)},
        {"embedding_dropout": 0.2, "variational": [0.1, 0.3], "weight_drop": 0.3, "output": 0.2},
    ),
}


class TestHypergradients:
    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    @pytest.mark.parametrize("case", CASES)
    def test_finite_differences(self, case: str, optimizer: str) -> None:
        """Others are held in the same run, so that going back has to repeat their random draws."""
        problem, values, fixed = CASES[case]
        values = {**values, "lr": double(0.1, 0.05)}
        fixed = {**fixed, **({"eps": 1e-2} if optimizer == "adam" else {"momentum": 0.5})}
        loop = make_loop(problem(), optimizer=optimizer, fixed=fixed)
        expected = finite_differences(loop, values)
        results = [differentiate(loop, values, mode).hypergradients for mode in MODES]
        for result in results:
            assert_close(result, expected, 1e-5)
            assert_close(result, results[0], 1e-9)

    @pytest.mark.parametrize("horizon", [1, 2])
    @pytest.mark.parametrize("case", CASES)
    def test_modes_agree_on_truncated_hypergradients(self, case: str, horizon: int) -> None:
        problem, values, fixed = CASES[case]
        loop = make_loop(problem(), fixed=fixed)
        forward, *others = (differentiate(loop, values, mode, horizon=horizon).hypergradients for mode in MODES)
        for other in others:
            assert_close(other, forward, 1e-9)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_saved_run_continues_to_the_bit(self, mode: str) -> None:
        problem, values, fixed = CASES["features"]
        expected = differentiate(make_loop(problem(), fixed=fixed), values, mode)
        first, second = (
            hypergradient_run(make_loop(problem(), fixed=fixed), values, differentiation=mode) for _ in range(2)
        )
        with first.loop.running():
            first.advance(3)
        second.load_state_dict(through_a_file(first.state_dict()))
        with second.loop.running():
            second.advance(second.length)
        assert second.result().val_loss == expected.val_loss
        for name, gradient in second.result().hypergradients.items():
            assert torch.equal(gradient, expected.hypergradients[name])

    def test_held_and_differentiated_values_are_the_same(self) -> None:
        """A number that is held is as precise as a tensor."""
        problem, values, fixed = CASES["features"]
        held = {**fixed, **{name: windows.tolist() for name, windows in values.items()}}
        expected = make_loop(problem(), fixed=fixed).run(values)
        assert torch.equal(make_loop(problem(), fixed=held).run({}).params, expected.params)


def through_a_file(saved: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def train(loop: InnerLoop, values: Values | None = None, begin: int = 0, state: State | None = None) -> list[State]:
    """States before each step from `begin` on, and after the last one."""
    with loop.running():
        states = [loop.initial_state() if state is None else state]
        for step in range(begin, loop.steps):
            states.append(loop.step(states[-1], loop.scalars(values or {}, step), step))
    return states


EVERY = [(case, name) for case, (_, values, fixed) in CASES.items() for name in {**values, **fixed}]


def without_own_dropout(model: Any) -> nn.Module:
    """Dropout at a rate of 0 draws no random numbers, so that runs with other draws can be compared."""
    made = model()
    for layer in made.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        elif isinstance(layer, nn.RNNBase):
            layer.dropout = 0.0
    return made


class TestPlainTraining:
    @pytest.mark.parametrize(("case", "name"), EVERY)
    def test_windows_of_values(self, case: str, name: str) -> None:
        """The first half is that of one constant, the second that of the other, from the same state on."""
        problem = CASES[case][0]()
        windows = make_loop(problem, steps=4, fixed={name: [0.2, 0.6]})
        small, large = (make_loop(problem, steps=4, fixed={name: value}) for value in (0.2, 0.6))
        states = train(windows)
        for actual, expected in zip(states[:3], train(small)[:3], strict=True):
            assert torch.equal(actual.params, expected.params)
        assert torch.equal(states[-1].params, train(large, begin=2, state=states[2])[-1].params)
        assert not torch.equal(states[-1].params, train(small)[-1].params)

    @pytest.mark.parametrize(("case", "name"), EVERY)
    def test_values_of_a_tuned_schedule_are_the_held_ones(self, case: str, name: str) -> None:
        problem = CASES[case][0]()
        held, given = make_loop(problem, fixed={name: [0.2, 0.6]}), make_loop(problem)
        assert torch.equal(train(held)[-1].params, train(given, {name: double(0.2, 0.6)})[-1].params)

    @pytest.mark.parametrize("case", CASES)
    def test_draws_are_functions_of_seed_and_step(self, case: str) -> None:
        problem, values, fixed = CASES[case]
        loop = make_loop(problem(), fixed=fixed)
        first = train(loop, values)
        torch.manual_seed(99)
        for again in (loop, make_loop(problem(), fixed=fixed)):
            assert torch.equal(train(again, values)[-1].params, first[-1].params)
        assert not torch.equal(train(make_loop(problem(), fixed=fixed, seed=1), values)[-1].params, first[-1].params)
        with loop.running():
            gradients = [loop.training(first[0], loop.scalars(values, step), step).gradient for step in (0, 1, 0)]
        assert torch.equal(gradients[0], gradients[2]) and not torch.equal(gradients[0], gradients[1])

    @pytest.mark.parametrize("case", CASES)
    def test_without_values_training_is_as_without_regularisers(self, case: str) -> None:
        problem = CASES[case][0]()
        loop = make_loop(problem)
        plain = make_loop(problem.replace(regularisers=()))
        for actual, expected in zip(train(loop), train(plain), strict=True):
            assert torch.equal(actual.params, expected.params)
        assert loop.evaluate(train(loop)[-1]).loss == plain.evaluate(train(plain)[-1]).loss

    @pytest.mark.parametrize("case", CASES)
    def test_neutral_values_change_no_more_than_rounding(self, case: str) -> None:
        problem = CASES[case][0]()
        problem = problem.replace(model=partial(without_own_dropout, problem.model))
        neutral = {name: strength.neutral for name, strength in problem.regulariser_hyperparameters.items()}
        expected = train(make_loop(problem))[-1]
        torch.testing.assert_close(train(make_loop(problem, fixed=neutral))[-1].params, expected.params)

    @pytest.mark.parametrize("case", CASES)
    def test_a_saved_run_continues_to_the_bit(self, case: str) -> None:
        problem, values, fixed = CASES[case]
        states = train(make_loop(problem(), optimizer="adam", fixed=fixed), values)
        saved = State(*through_a_file(tuple(states[2])))
        again = make_loop(problem(), optimizer="adam", fixed=fixed)
        assert torch.equal(train(again, values, begin=2, state=saved)[-1].params, states[-1].params)

    @pytest.mark.parametrize("case", CASES)
    def test_evaluation_is_not_regularised(self, case: str) -> None:
        problem, values, fixed = CASES[case]
        state = train(make_loop(problem(), fixed=fixed), values)[-1]
        plain = make_loop(problem().replace(regularisers=()))
        with plain.running():
            expected = plain.evaluate(state).loss
        regularised = make_loop(problem(), fixed=fixed)
        with regularised.running():
            assert regularised.evaluate(state).loss == expected


class TestSelfTuning:
    @staticmethod
    def gradients(case: str, variant: str, scale: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """By weights in plain training, and in a self-tuning network, and by its responses; for the same values."""
        problem = CASES[case][0]()
        loop = make_loop(problem)
        definitions = [
            TunedHyperparameter(name, 0.0, 0.6, per_example=name not in problem.per_minibatch_hyperparameters)
            for name in problem.regulariser_hyperparameters
        ]
        initial = {definition.name: 0.3 for definition in definitions}
        tuned = TunedHyperparameters(definitions, initial=initial, dtype=loop.dtype)
        network = self_tuning(loop.model, len(definitions)).train()
        perturbations = scale * torch.randn(problem.batch_size, len(definitions), dtype=loop.dtype)
        with loop.running():
            values = {name: value.detach() for name, value in tuned.values().items()}
            plain = loop.training(loop.initial_state(), values, 0).gradient
            batch = loop.batches.of_step(0)
            loop.seed_model(0)
            general, responses = training_gradients(
                network, tuned, VARIANTS[variant], loop.objective, batch, perturbations
            )
        return plain, loop.flatten(general), responses

    @pytest.mark.parametrize("case", CASES)
    def test_values_of_examples_that_are_equal_are_one_value(self, case: str) -> None:
        plain, general, _ = self.gradients(case, "centered-stn", scale=0.0)
        torch.testing.assert_close(general, plain, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("case", CASES)
    def test_values_of_examples(self, case: str, variant: str) -> None:
        plain, general, responses = self.gradients(case, variant, scale=1.0)
        # Delta-STN's general weights take a plain step
        same = VARIANTS[variant].linearised
        assert general.isfinite().all() and torch.allclose(general, plain) == same
        assert responses and all(gradient.isfinite().all() for gradient in responses.values())
        assert any(gradient.any() for gradient in responses.values())


class TwoNames(Regulariser):
    """Takes two hyperparameters and does nothing."""

    @property
    def hyperparameters(self) -> Any:
        return {**WeightDecay("first").hyperparameters, **WeightDecay("second").hyperparameters}


def assert_one_line(message: str, do: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        do()
    assert "\n" not in str(caught.value)


def named_dropout(dropout: float = 0.1) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(dropout))


class TestRefusals:
    @pytest.mark.parametrize(
        ("regulariser", "message"),
        [
            (Dropout(modules="4"), "the model has no plain dropout module '4': it has 2$"),
            (VariationalDropout(modules="embeding*"), r"the model has no module 'embeding\*': it has 0, 1, 2, 3$"),
            (EmbeddingDropout(), r"the model has no embedding '\*': it has none$"),
            (DropConnect(parameters="3.weigth"), "no trainable parameter '3.weigth': .*; did you mean '3.weight'?"),
            (WeightDecay(parameters="0.wieght"), "no trainable parameter '0.wieght': .*; did you mean '0.weight'?"),
            (L1(parameters="fc*"), r"no trainable parameter 'fc\*': it has 0.weight, 0.bias, 3.weight, 3.bias$"),
            (ActivationRegularisation("rnn"), "no module 'rnn': it has 0, 1, 2, 3$"),
            (TemporalActivationRegularisation("rnn"), "no module 'rnn': it has 0, 1, 2, 3$"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Regulariser) else "",
    )
    def test_a_pattern_that_matches_nothing(self, regulariser: Regulariser, message: str) -> None:
        problem = make_problem(dropout, regularisers=[regulariser])
        assert_one_line(message, lambda: make_loop(problem))
        assert_one_line(message, problem.check)

    def test_frozen_parameters(self) -> None:
        problem = make_problem("frozen", regularisers=[WeightDecay(parameters="layers.0.*")])
        assert_one_line("no trainable parameter 'layers.0.*'", lambda: make_loop(problem))

    def test_many_names_are_cut_short(self) -> None:
        model = nn.Sequential(*[nn.Identity() for _ in range(40)])
        assert_one_line("it has 0, 1, .*, 11 and 28 more$", lambda: ActivationRegularisation("rnn").attach(model, None))

    def test_one_dropout_module_for_two(self) -> None:
        problem = make_problem(dropout, regularisers=[Dropout("a"), Dropout("b")])
        assert_one_line(r"no plain dropout module '\*': it has none", lambda: make_loop(problem))

    def test_one_name_for_two_ranges(self) -> None:
        assert_one_line(
            "Dropout and L1 both have a hyperparameter 'a', of different ranges: rename one",
            lambda: make_problem(dropout, regularisers=[Dropout("a"), L1("a")]),
        )

    def test_one_name_for_two_of_a_range_is_shared(self) -> None:
        problem = make_problem(regularisers=[WeightDecay("a", "0.weight"), L1("a", "2.weight")])
        assert set(problem.regulariser_hyperparameters) == {"a"}
        shared = train(make_loop(problem, fixed={"a": 0.1}))[-1].params
        apart = problem.replace(regularisers=[WeightDecay("b", "0.weight"), L1("a", "2.weight")])
        assert torch.equal(shared, train(make_loop(apart, fixed={"a": 0.1, "b": 0.1}))[-1].params)

    def test_a_name_of_the_train_loss(self) -> None:
        regularisers = [WeightDecay("label_smoothing")]
        assert_one_line(
            "'label_smoothing' is a hyperparameter of both the train loss and a regulariser: rename the regulariser's",
            lambda: make_problem(train_loss=smoothed_cross_entropy, regularisers=regularisers),
        )

    def test_a_name_of_the_optimizer(self) -> None:
        loop = make_loop(make_problem(regularisers=[WeightDecay("momentum")]))
        assert_one_line(
            "'momentum' is a hyperparameter of both a regulariser and optimizer 'sgd': rename the regulariser's",
            lambda: loop.values.check_names({}),
        )

    def test_a_name_of_the_model_factory(self) -> None:
        assert_one_line(
            "'dropout' is an argument of the model factory and a regulariser's hyperparameter: rename one",
            lambda: make_problem().replace(model=named_dropout, regularisers=[Dropout()]),
        )

    @pytest.mark.parametrize(
        ("name", "value", "interval"),
        [
            ("dropout", 1.5, "0 to 1"),
            ("dropout", -0.1, "0 to 1"),
            ("l1", -1e-3, "0 to inf"),
            ("l1", float("inf"), "0 to inf"),
            ("mixup", float("nan"), "0 to inf"),
        ],
    )
    def test_a_value_outside_its_range(self, name: str, value: float, interval: str) -> None:
        message = f"'{name}' is {value}: its regulariser takes finite numbers from {interval}"
        assert_one_line(message, lambda: make_loop(of_features(), fixed={name: [0.1, value]}).values.check_names({}))
        assert_one_line(message, lambda: hypergradient(of_features(), {name: double(0.1, value)}, steps=4))

    def test_one_value_of_two(self) -> None:
        problem = make_problem(regularisers=[TwoNames()])
        message = "TwoNames has no value for 'second': tune it or fix it as well"
        assert_one_line(message, lambda: make_loop(problem, fixed={"first": 0.1}).values.check_names({}))
        make_loop(problem, fixed={"first": 0.1}).values.check_names({"second"})

    @pytest.mark.parametrize("name", ["dropout", "mixup", "weight_drop"])
    def test_no_derivative(self, name: str) -> None:
        assert_one_line(
            f"the training loss has no derivative by '{name}', a regulariser's random draws: fix it, tune it by",
            lambda: hypergradient(of_features(), {name: double(0.1)}, steps=4),
        )

    def test_class_indices_of_unknown_number(self) -> None:
        problem = make_problem(regularisers=[Mixup()])
        assert_one_line("Mixup has classes=None, but the targets are class indices: say how many", problem.check)

    def test_too_few_classes(self) -> None:
        assert_one_line("a regulariser on a train batch fails: ", make_problem(regularisers=[Mixup(1)]).check)

    @pytest.mark.parametrize("regulariser", [InputNoise(), InputScaling(), Mixup(3)])
    def test_inputs_that_are_indices(self, regulariser: Regulariser) -> None:
        problem = make_problem("lstm", regularisers=[regulariser])
        assert_one_line("needs a floating first input, not torch.int64", problem.check)

    def test_modules_without_time(self) -> None:
        problem = make_problem(regularisers=[VariationalDropout(modules="1")])
        assert_one_line(r"not \[4, 6\]: choose other modules", problem.check)

    @pytest.mark.parametrize("wrong", [Dropout, "dropout", {"dropout": 0.1}, nn.Dropout()])
    def test_what_is_no_regulariser(self, wrong: Any) -> None:
        assert_one_line("regularisers has .*: give instances of", lambda: make_problem(regularisers=[wrong]))

    @pytest.mark.parametrize("wrong", [Dropout(), Dropout, {"dropout": 0.1}, None, (r for r in (Dropout(),))])
    def test_what_is_no_list(self, wrong: Any) -> None:
        assert_one_line("regularisers is .*: give a list of them", lambda: make_problem(regularisers=wrong))

    def test_right_ones_pass_the_check(self) -> None:
        of_features().check()
        of_tokens().check()


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


class TestCopies:
    @pytest.mark.parametrize("copied", [pickled, copy.deepcopy, copy.copy])
    @pytest.mark.parametrize("case", CASES)
    def test_regularisers(self, case: str, copied: Any) -> None:
        for regulariser in CASES[case][0]().regularisers:
            assert copied(regulariser) == regulariser
            assert copied(regulariser).hyperparameters == regulariser.hyperparameters

    @pytest.mark.parametrize("copied", [pickled, copy.deepcopy, copy.copy])
    def test_problems(self, copied: Any) -> None:
        problem = of_features().replace(model=double_dropout)
        _, values, fixed = CASES["features"]
        again = copied(problem)
        make_loop(again, fixed=fixed).values.check_names(values)
        actual, expected = (train(make_loop(each, fixed=fixed), values)[-1] for each in (again, problem))
        assert torch.equal(actual.params, expected.params)

    def test_copies_of_a_model_read_the_same_context(self) -> None:
        model, x = alone(nn.Dropout(0.0)), torch.ones(4, 50)
        objective = Objective(lambda *_: torch.zeros(()), [Dropout()], model)
        twin = copy.deepcopy(model)
        prediction = objective.predict(lambda factors: twin(x), {}, {"dropout": 1.0})
        assert not prediction.output.any()
        assert torch.equal(twin(x), x)

    def test_a_regularised_model_can_be_pickled(self) -> None:
        for case in CASES:
            model = make_loop(CASES[case][0]()).model
            assert pickled(model).state_dict().keys() == model.state_dict().keys()

    def test_attaching_leaves_names_alone(self) -> None:
        for case in CASES:
            problem = CASES[case][0]()
            regularised, plain = (make_loop(each).model for each in (problem, problem.replace(regularisers=())))
            assert [name for name, _ in regularised.named_modules()] == [name for name, _ in plain.named_modules()]
            assert list(regularised.state_dict()) == list(plain.state_dict())

    def test_two_models_do_not_disturb_each_other(self) -> None:
        x = torch.ones(4, 50)
        models = [alone(nn.Dropout(0.0)) for _ in range(2)]
        first, second = (Objective(lambda *_: torch.zeros(()), [Dropout()], model) for model in models)

        def both(_: Any) -> tuple[Tensor, Any]:
            return models[0](x), second.predict(lambda factors: models[1](x), {}, {"dropout": 0.0}).output

        dropped, kept = first.predict(both, {}, {"dropout": 1.0}).output
        assert not dropped.any() and torch.equal(kept, x)

    def test_a_step_that_fails_leaves_no_values_behind(self) -> None:
        model, x = alone(nn.Dropout(0.0)), torch.ones(4, 50)
        objective = Objective(lambda *_: torch.zeros(()), [Dropout()], model)
        with pytest.raises(ZeroDivisionError):
            objective.predict(lambda factors: 1 / 0, {}, {"dropout": 1.0})
        assert torch.equal(model(x), x)


def double_dropout() -> nn.Module:
    return dropout().double()
