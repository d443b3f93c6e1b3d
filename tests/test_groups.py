"""Parameter groups: exact hypergradients what can be a group, and replay on torch's param groups."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_problems import MODES, Values, assert_close, data, differentiate, double, make_loop, make_problem
from torch import Tensor, nn
from torch.func import functional_call

from tune_hypergrad import InputError, Schedule
from tune_hypergrad.curves import split_group, split_name
from tune_hypergrad.groups import in_group, regrouped, ungrouped
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings, hypergradient
from tune_hypergrad.hypergradients.check import check_problem, finite_differences
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.partial_update import step_blocks
from tune_hypergrad.outer.natural_scales import natural_range
from tune_hypergrad.problem import Problem
from tune_hypergrad.space import Range
from tune_hypergrad.stn import TunedHyperparameter
from tune_hypergrad.stn.self_tuning_run import SelfTuningRun, SelfTuningSettings

STEPS = 6
TWO = {"first": "0.*", "bias": ["*.bias"]}
TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
OPTIONS: dict[str, dict[str, float]] = {"sgd": {}, "adamw": {"eps": 1e-3}}
OF_TWO: dict[str, Values] = {
    "sgd": {
        "lr": double(0.1, 0.2),
        "lr/first": double(0.2, 0.05, 0.1),
        "momentum": double(0.5),
        "momentum/bias": double(0.8, 0.6),
        "weight_decay/first": double(0.05),
    },
    "adamw": {
        "lr": double(0.01, 0.02),
        "lr/bias": double(0.03, 0.01, 0.02),
        "beta1/first": double(0.8, 0.6),
        "beta2/bias": double(0.9),
        "weight_decay/first": double(0.1, 0.3),
    },
}
OF_TENSORS: dict[str, Values] = {
    optimizer: {
        f"lr/{name}": scale * double(1, 0.5)
        for name, scale in {"0.weight": 0.2, "0.bias": 0.1, "2.weight": 0.05, "2.bias": 0.3}.items()
    }
    for optimizer in TORCH
}
CASES = [
    (optimizer, groups, values[optimizer])
    for groups, values in ((TWO, OF_TWO), ("tensor", OF_TENSORS))
    for optimizer in TORCH
]


def full_batch(groups: Any, **fields: Any) -> Problem:
    return make_problem(groups=groups, batch_size=12, **fields)


def at(values: Values, step: int, optimizer: str) -> dict[str, Any]:
    """The values of one step by flat name, torch's defaults included."""
    defaults = {
        "sgd": {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0},
        "adamw": {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8},
    }[optimizer]
    now = {name: windows[len(windows) * step // STEPS] for name, windows in values.items()}
    return {**defaults, **OPTIONS[optimizer], **now}


def torch_loss(loop: InnerLoop, values: Values, optimizer: str) -> float:
    """The validation loss of a plain loop with torch's param groups."""
    (x, y), (x_val, y_val) = loop.problem.train.tensors, loop.problem.val.tensors
    model = copy.deepcopy(loop.model)
    members = dict(zip(dict(model.named_parameters()), loop.groups.members, strict=True))
    names = dict.fromkeys(members.values())
    param_groups = [
        {"name": name, "params": [p for n, p in model.named_parameters() if members[n] == name]} for name in names
    ]
    theirs = TORCH[optimizer](param_groups, lr=1.0)
    for step in range(STEPS):
        for group in theirs.param_groups:
            own = {name: float(value) for name, value in in_group(at(values, step, optimizer), group["name"]).items()}
            group.update({name: value for name, value in own.items() if name in group})
            if "betas" in group:
                group["betas"] = own["beta1"], own["beta2"]
        theirs.zero_grad()
        F.cross_entropy(model(x), y).backward()
        theirs.step()
    return float(F.cross_entropy(model(x_val), y_val).detach())


def differences(loss: Callable[[Values], float], values: Values, epsilon: float = 1e-6) -> Values:
    found: Values = {}
    for name, windows in values.items():
        shifts = epsilon * torch.eye(len(windows), dtype=torch.float64)
        pairs = [(loss({**values, name: windows + s}), loss({**values, name: windows - s})) for s in shifts]
        found[name] = double(*[(ahead - behind) / (2 * epsilon) for ahead, behind in pairs])
    return found


def unrolled(loop: InnerLoop, values: Values, optimizer: str) -> Values:
    """Backpropagation through the whole training run, tensor by tensor, its updates written out."""
    (x, y), (x_val, y_val) = loop.problem.train.tensors, loop.problem.val.tensors
    leaves = {name: windows.clone().requires_grad_() for name, windows in values.items()}
    weights = {name: p.detach().clone().requires_grad_() for name, p in loop.model.named_parameters()}
    members = dict(zip(weights, loop.groups.members, strict=True))
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = dict(first)
    for step in range(STEPS):
        loss = F.cross_entropy(functional_call(loop.model, weights, x), y)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        for (name, w), g in zip(list(weights.items()), gradients, strict=True):
            h = in_group(at(leaves, step, optimizer), members[name])
            if optimizer == "sgd":
                g = g + h["weight_decay"] * w
                first[name] = g if step == 0 else h["momentum"] * first[name] + g
                weights[name] = w - h["lr"] * first[name]
                continue
            first[name] = h["beta1"] * first[name] + (1 - h["beta1"]) * g
            second[name] = h["beta2"] * second[name] + (1 - h["beta2"]) * g * g
            mean, square = (
                moment / (1 - h[beta] ** (step + 1))
                for moment, beta in ((first[name], "beta1"), (second[name], "beta2"))
            )
            weights[name] = (1 - h["lr"] * h["weight_decay"]) * w - h["lr"] * mean / (square.sqrt() + h["eps"])
    F.cross_entropy(functional_call(loop.model, weights, x_val), y_val).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


class TestHypergradients:
    @pytest.mark.parametrize(("optimizer", "groups", "values"), CASES)
    def test_agree_with_torch_and_an_unrolled_loop(self, optimizer: str, groups: Any, values: Values) -> None:
        loop = make_loop(full_batch(groups), STEPS, optimizer, fixed=OPTIONS[optimizer])
        by_differences = differences(lambda given: torch_loss(loop, given, optimizer), values)
        by_autograd = unrolled(loop, values, optimizer)
        for mode in MODES:
            result = differentiate(loop, values, mode)
            assert result.val_loss == pytest.approx(torch_loss(loop, values, optimizer), rel=1e-10)
            assert_close(result.hypergradients, by_differences, 1e-5)
            assert_close(result.hypergradients, by_autograd, 1e-9)

    @pytest.mark.parametrize("mode", MODES)
    def test_curves(self, mode: str) -> None:
        values = {
            "lr": double(0.1),
            "lr/first/cosine/peak": double(0.3),
            "lr/first/cosine/warm_up": double(0.3),
            "weight_decay/2.bias/knots": double(0.1, 0.3, 0.2),
        }
        groups = {"first": "0.*", "2.bias": "2.bias"}
        loop = make_loop(make_problem(groups=groups), STEPS, fixed={"lr/first/cosine/floor": 0.1})
        assert_close(differentiate(loop, values, mode).hypergradients, finite_differences(loop, values), 1e-5)

    def test_greedy(self) -> None:
        loop = make_loop(make_problem(groups=TWO), STEPS)
        values = {"lr": double(*[0.1] * STEPS), "lr/first": double(*[0.2] * STEPS)}
        forward, reverse = (differentiate(loop, values, mode, horizon=1).hypergradients for mode in MODES[:2])
        assert_close(forward, reverse, 1e-10)

    def test_a_common_value_that_nobody_has_is_refused(self) -> None:
        loop = make_loop(make_problem(groups="layer"), STEPS)
        own = {"lr/layer0": double(0.2), "lr/layer2": double(0.1)}
        loop.values.check_names(own)
        message = (
            "'lr' acts on no parameter, since every group has a value of its own: give lr/layer0, lr/layer2 instead"
        )
        with pytest.raises(InputError, match=message):
            loop.values.check_names({"lr": double(0.1), **own})

        def brought(model: nn.Module) -> list[dict[str, Any]]:
            return [{"params": [parameter], "lr": 0.1} for parameter in model.parameters()]

        for fixed in ({}, {"lr": 0.5}):
            loop = make_loop(make_problem(groups=brought), STEPS, fixed=fixed)
            with pytest.raises(InputError, match="'lr' acts on no parameter"):
                loop.values.check_names({} if fixed else {"lr": double(0.1)})

    def test_an_average_has_no_groups(self) -> None:
        loop = InnerLoop(make_problem(groups=TWO), TrainingSettings(STEPS, ema=0.9))
        with pytest.raises(InputError, match="'ema/first': all weights have one average, whose decay is 'ema'"):
            loop.values.check_names({"ema/first": double(0.5)})

    def test_one_value_for_all_groups_is_the_common_one(self) -> None:
        common = differentiate(make_loop(), {"lr": double(0.1, 0.2)})
        values = {f"lr/{name}": double(0.1, 0.2) for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
        by_tensor = differentiate(make_loop(make_problem(groups="tensor")), values, "reverse")
        assert by_tensor.val_loss == pytest.approx(common.val_loss, rel=1e-14)
        total = torch.stack(list(by_tensor.hypergradients.values())).sum(0)
        torch.testing.assert_close(total, common.hypergradients["lr"], rtol=1e-10, atol=0)

    @pytest.mark.parametrize("optimizer", list(TORCH))
    def test_ensembles(self, optimizer: str) -> None:
        problem, values = make_problem(groups=TWO), OF_TWO[optimizer]
        given: dict[str, Any] = {"steps": 5, "optimizer": optimizer, "fixed": OPTIONS[optimizer], "check": False}
        given |= {"differentiation": "reverse"}
        result = hypergradient(problem, values, seed=[3, 5], **given)
        assert "runs at once" in result.reason
        for member, seed in zip(result.members, (3, 5), strict=True):
            alone = hypergradient(problem, values, seed=seed, **given)
            assert_close(member.hypergradients, alone.hypergradients, 1e-10)

    def test_ensembles_of_an_optimizer_of_ones_own(self) -> None:
        own = make_loop(optimizer="sgd").optimizer._replace(name="own")
        problem, values = make_problem(groups=TWO), {"lr": double(0.1), "lr/first": double(0.2, 0.1)}
        loop = EnsembleLoop(problem, make_loop(problem, optimizer=own).settings, [3, 5])
        with loop.running():
            state = loop.step(loop.initial_state(), loop.scalars(values, 0), 0)
            for number, member in enumerate(loop.members):
                alone = member.step(member.initial_state(), member.scalars(values, 0), 0)
                torch.testing.assert_close(state.params[number], alone.params)

    @pytest.mark.parametrize("optimizer", list(TORCH))
    def test_parameters_without_a_gradient_stay(self, optimizer: str) -> None:
        loop = make_loop(full_batch(TWO), STEPS, optimizer, fixed=OPTIONS[optimizer])
        values, state = OF_TWO[optimizer], loop.initial_state()
        theirs = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
        groups = [
            {
                "name": name,
                "params": [p for p, own in zip(theirs.values(), loop.groups.members, strict=True) if own == name],
            }
            for name in ("", "first", "bias")
        ]
        reference = TORCH[optimizer](groups, lr=1.0)
        schedule = Schedule.from_tensors(values, loop.settings.fixed)
        params, slots, counts = state.params, state.slots, [0] * 4
        for step, without in enumerate([{0}, {3}, {1, 2}, set()]):
            gradients = [torch.full_like(p, 0.1 * (step + 1)) for p in theirs.values()]
            for position, (p, gradient) in enumerate(zip(theirs.values(), gradients, strict=True)):
                p.grad = None if position in without else gradient
            schedule.apply(reference, step, STEPS)
            reference.step()
            blocks = step_blocks(counts, without)
            flat, h = torch.cat([g.flatten() for g in gradients]), loop.scalars(values, step)
            params, slots = loop.update(params, flat, slots, h, step, blocks)
            counts = [count + (position not in without) for position, count in enumerate(counts)]
            expected = torch.cat([p.flatten() for p in theirs.values()])
            torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-14)

    def test_check_compares_with_param_groups(self, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = make_problem(groups=TWO)
        check = check_problem(problem)
        assert check.ok and set(check.errors) == {"forward", "reverse"}
        values = {"lr": double(0.1), "lr/first": double(0.2)}
        assert check_problem(problem, values, optimizer="adamw", fixed={"eps": 1e-3, "weight_decay/bias": 0.5}).ok

        def without_groups(self: Any, values: Any, *arguments: Any) -> dict[str, Any]:
            return {name: value for name, value in values.items() if not split_group(name)[1]}

        monkeypatch.setattr("tune_hypergrad.groups.Groups.spread", without_groups)
        assert "trains another network than plain torch" in check_problem(problem, values).message


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """As people make them for an optimizer."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name.endswith("weight")], "name": "decay"},
        {"params": [p for name, p in named if name.endswith("bias")], "name": "no_decay", "weight_decay": 0.0},
    ]


class TestWhatCanBeAGroup:
    @pytest.mark.parametrize(
        ("groups", "members"),
        [
            (None, ["", "", "", ""]),
            (TWO, ["first", "first", "", "bias"]),
            ({"bias": "*.bias", "first": "0.*"}, ["first", "bias", "", "bias"]),
            ("tensor", ["0.weight", "0.bias", "2.weight", "2.bias"]),
            ("layer", ["layer0", "layer0", "layer2", "layer2"]),
            (param_groups, ["decay", "no_decay", "decay", "no_decay"]),
            (lambda model: [{"params": model[0].parameters()}, {"params": model[2].named_parameters("2")}], None),
        ],
    )
    def test_members(self, groups: Any, members: list[str] | None) -> None:
        expected = members or ["group0", "group0", "group1", "group1"]
        assert list(make_loop(make_problem(groups=groups)).groups.members) == expected

    def test_frozen_parameters_are_in_none(self) -> None:
        problem = make_problem("frozen", groups={"last": "layers.*"})
        assert make_loop(problem).groups.members == ("last", "last")

    def test_tied_weights_are_found_by_either_name(self) -> None:
        loop = make_loop(make_problem("tied_weights", groups={"head": "head.*"}))
        assert loop.groups.positions("head") == [0]

    def test_parameters_of_losses(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

            def forward(self, output: Tensor, target: Tensor) -> Tensor:
                return F.cross_entropy(self.scale * output, target)

        problem = make_problem(loss=Scaled(), groups={"loss": "loss.*"})
        assert make_loop(problem).groups.members[-1] == "loss"
        assert check_problem(problem).ok

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ({"first": "O.weight"}, "no parameter is called 'O.weight'; there are 2.weight, 0.weight"),
            ({"all": "*", "bias": "*.bias"}, "group 'bias' has no trainable parameter"),
            ({"knots": "0.*"}, "reads as a part of a schedule"),
            ({"a/cosine/peak": "0.*"}, "reads as a part of a schedule"),
            ({"0": "0.*"}, "reads as a part of a schedule"),
            ({"*": "0.*"}, "reads as a part of a schedule"),
            ({"": "0.*"}, "its name must be a string"),
            ({"first": 3}, "give a pattern"),
            ("tensors", "groups is 'tensors'"),
            (7, "groups is 7"),
            (lambda model: [], "a list of dicts with 'params'"),
            (lambda model: [{"params": model.parameters()}, {"params": model[0].parameters()}], "list it once"),
            (lambda model: [{"params": model[0].parameters()}], "'2.weight' is in no group"),
            (lambda model: [{"params": [torch.ones(3)]}], "no parameter of the model"),
            (lambda model: [{"params": model.parameters(), "weight_decay": "none"}], "groups have numbers"),
            (lambda model: [{"params": model.parameters(), "beta3": 0.1}], "unknown hyperparameter 'beta3/group0'"),
        ],
    )
    def test_refusals(self, groups: Any, message: str) -> None:
        with pytest.raises(InputError, match=message.replace("*", r"\*")) as error:
            make_loop(make_problem(groups=groups)).values.check_names({})
        assert "\n" not in str(error.value)

    def test_frozen_parameters_in_a_function_s_groups_are_skipped(self) -> None:
        def groups(model: nn.Module) -> list[dict[str, Any]]:
            frozen = [p for p in model.parameters() if not p.requires_grad]
            return [{"params": model.parameters(), "name": "all"}, {"params": frozen, "name": "frozen"}]

        made = make_loop(make_problem("frozen", groups=groups)).groups
        assert made is not None and made.names == ("all",)

    @pytest.mark.parametrize(
        ("values", "fixed", "message"),
        [
            ({"lr/frist": double(0.1)}, {}, "no group 'frist': it has first, bias; did you mean 'first'?"),
            ({}, {"lr/frist": 0.1}, "no group 'frist'"),
            ({"lr/first": double(0.1)}, {"lr/first": 0.2}, "both tuned and fixed"),
            ({"smoothing/first": double(0.1)}, {}, "only hyperparameters of the optimizer"),
        ],
    )
    def test_refused_values(self, values: Values, fixed: dict[str, float], message: str) -> None:
        def smoothed(output: Tensor, target: Tensor, *, smoothing: float = 0.1) -> Tensor:
            return F.cross_entropy(output, target, label_smoothing=0.0) * (1 - smoothing)

        loop = make_loop(make_problem(groups=TWO, train_loss=smoothed), fixed=fixed)
        with pytest.raises(InputError, match=message.replace("?", r"\?")):
            loop.values.check_names(values)

    def test_a_group_s_own_values_are_held_unless_said_otherwise(self) -> None:
        problem = full_batch(param_groups)

        def decay(values: Values, **fixed: Any) -> dict[str, Any]:
            loop = make_loop(problem, fixed=fixed)
            loop.values.check_names(values)
            return {**loop.values.fixed_at(0), **{name: float(v) for name, v in loop.scalars(values, 0).items()}}

        assert decay({"weight_decay": double(0.1)}) == {"weight_decay/no_decay": 0.0, "weight_decay": 0.1}
        assert decay({}, **{"weight_decay/no_decay": 0.3}) == {"weight_decay/no_decay": 0.3}
        assert decay({"weight_decay/no_decay": double(0.2)}) == {"weight_decay/no_decay": 0.2}
        loop = make_loop(problem, fixed={"lr": 0.1})
        assert loop.values.fixed_beside(["weight_decay"]) == {"weight_decay/no_decay": 0.0, "lr": 0.1}

    def test_self_tuning_networks_refuse_values_of_groups(self) -> None:
        def penalised(output: Tensor, target: Tensor, *, params: dict[str, Tensor], l2: float = 0.0) -> Tensor:
            return F.cross_entropy(output, target) + l2 * sum(p.square().sum() for p in params.values())

        tuned = [TunedHyperparameter("l2", 1e-4, 1e-2, log=True)]
        problem = make_problem(groups=TWO, train_loss=penalised)
        assert SelfTuningRun(make_loop(problem), tuned, SelfTuningSettings()).position == 0
        with pytest.raises(InputError, match="'lr/first' is a value of a parameter group"):
            SelfTuningRun(make_loop(problem, fixed={"lr/first": 0.1}), tuned, SelfTuningSettings())


class TestNames:
    @pytest.mark.parametrize(
        ("name", "parts"),
        [
            ("lr", ("lr", "", "")),
            ("lr/backbone", ("lr", "backbone", "")),
            ("lr/encoder.0.weight/knots", ("lr", "encoder.0.weight", "knots")),
            ("lr/linear/linear/peak", ("lr", "linear", "linear/peak")),
            ("momentum/a/b/one_minus/cosine/floor", ("momentum", "a/b", "one_minus/cosine/floor")),
        ],
    )
    def test_parts_of_a_flat_name(self, name: str, parts: tuple[str, str, str]) -> None:
        base, suffix = split_name(name)
        assert (*split_group(base), suffix) == parts

    def test_nested_entries(self) -> None:
        nested = {"lr": {"groups": {"*": 0.1, "backbone": {"knots": {"0": 0.2, "1": 0.1}}}}, "momentum": 0.9}
        flat = {"lr": 0.1, "lr/backbone": {"knots": {"0": 0.2, "1": 0.1}}, "momentum": 0.9}
        assert ungrouped(nested) == flat and regrouped(flat) == nested
        assert Schedule(nested) == Schedule(flat)
        with pytest.raises(InputError, match="'lr/backbone' is given twice"):
            ungrouped({**nested, "lr/backbone": 0.1})

    def test_natural_scales(self) -> None:
        limits = Range(1, 0.0, 1.0)
        assert natural_range("lr/a.b", limits) == natural_range("lr", limits) != limits
        assert natural_range("weight_decay/a/cosine/peak", limits).scale == "log"
        assert natural_range("momentum/a", Range(1, 0.0, 0.9)).scale == "complement"


SCHEDULE = Schedule(
    {
        "lr": (0.1, 0.05),
        "lr/head": {"cosine": {"peak": 0.3, "warm_up": 0.2, "floor": 0.1}},
        "lr/encoder.0.weight": {"knots": {"0": 0.1, "1": 0.2}},
        "weight_decay/head": 0.01,
        "momentum": (0.9, 0.5, 0.2),
        "label_smoothing": 0.1,
    }
)


def sgd_with(**names: float) -> torch.optim.SGD:
    """An optimizer of a group of each name with this weight decay; `_` is one without a name."""
    groups = [
        {"params": [nn.Parameter(torch.ones(2))], "weight_decay": decay, **({} if name == "_" else {"name": name})}
        for name, decay in names.items()
    ]
    return torch.optim.SGD(groups, lr=1.0)


class TestReplay:
    @pytest.mark.parametrize("optimizer", list(TORCH))
    def test_is_the_engine_s_training(self, optimizer: str, tmp_path: Path) -> None:
        values = {
            "lr": double(0.05, 0.1),
            "lr/decay": double(0.1, 0.2, 0.05),
            "weight_decay": double(0.05, 0.1),
            **({"momentum": double(0.3), "momentum/decay": double(0.0, 0.9)} if optimizer == "sgd" else {}),
            **({"beta1/decay": double(0.5, 0.9)} if optimizer == "adamw" else {}),
        }
        problem = full_batch(param_groups)
        loop = make_loop(problem, STEPS, optimizer)
        with loop.running():
            state = loop.run(values)
        Schedule.from_tensors(values, loop.values.fixed_beside(values)).save(tmp_path / "schedule.json")
        model = copy.deepcopy(loop.model)
        theirs = TORCH[optimizer](param_groups(model), lr=1.0)
        scheduler = Schedule.load(tmp_path / "schedule.json").scheduler(theirs, total_steps=STEPS)
        x, y = data()
        for _ in range(STEPS):
            theirs.zero_grad()
            F.cross_entropy(model(x), y).backward()
            theirs.step()
            scheduler.step()
        for name, weight in loop.unflatten(state.params).items():
            torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=1e-12, atol=1e-13)

    def test_groups_have_their_own_or_the_common_value(self) -> None:
        optimizer = sgd_with(head=0.5, other=0.3, _=0.2)
        schedule = Schedule({"lr": 0.1, "lr/head": 0.2, "weight_decay/head": 0.01, "label_smoothing": 0.1})
        assert schedule.apply(optimizer, 0, 10) == {"label_smoothing": 0.1}
        assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.2, 0.01), (0.1, 0.3), (0.1, 0.2)]

    def test_param_groups_with_values_of_their_own_keep_them(self) -> None:
        decays = Schedule({"lr": (0.2, 0.1), "weight_decay": (0.4, 0.3)})
        for given, expected in (
            ((0.1, 0.0), (0.3, 0.0)),  # as the customary recipe has it
            ((0.0, 0.0), (0.3, 0.3)),
            ((0.1, 0.1), (0.3, 0.3)),
            ((0.7, 0.01), (0.7, 0.3)),
        ):
            optimizer = torch.optim.AdamW(
                [{"params": [nn.Parameter(torch.ones(2))], "weight_decay": each} for each in given], weight_decay=0.01
            )
            scheduler = decays.scheduler(optimizer, 2)
            optimizer.step()
            scheduler.step()
            again = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups])
            again.load_state_dict(optimizer.state_dict())
            decays.apply(again, 1, 2)
            for each in (optimizer, again):
                assert tuple(group["weight_decay"] for group in each.param_groups) == expected
                assert [group["lr"] for group in each.param_groups] == [0.1, 0.1]
            decays.apply(optimizer, 1, 2, groups={})
            assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]
        with pytest.raises(InputError, match=r"have weight_decay 0\.1, 0\.2, and the schedule one for all"):
            decays.apply(sgd_with(_=0.1, other=0.2), 0, 2)

    def test_groups_by_position(self) -> None:
        optimizer = sgd_with(_=0.5, other=0.3)
        schedule = Schedule({"lr/head": (0.2, 0.1)})
        schedule.apply(optimizer, 0, 10, groups={0: "head"})
        assert [g["lr"] for g in optimizer.param_groups] == [0.2, 1.0]
        scheduler = schedule.scheduler(optimizer, 2, groups={0: "head", 1: "head"})
        assert scheduler.get_last_lr() == [0.2, 0.2]
        with pytest.raises(InputError, match="keys are positions of param groups, 0 to 1"):
            schedule.apply(optimizer, 0, 10, groups={2: "head"})

    def test_a_group_that_the_optimizer_lacks(self) -> None:
        message = r"the schedule has the groups body, head, and the optimizer's param groups are called head, tail"
        with pytest.raises(InputError, match=message):
            Schedule({"lr/head": 0.1, "lr/body": 0.2}).scheduler(sgd_with(head=0.0, tail=0.0), 10)
        with pytest.raises(InputError, match="are called group0: give them"):
            Schedule({"lr/head": 0.1}).apply(sgd_with(_=0.0), 0, 10)

    def test_a_scheduler_goes_on(self) -> None:
        schedule = Schedule({"lr": (0.4, 0.3), "lr/head": (0.2, 0.1)})
        first = schedule.scheduler(sgd_with(_=0.0, tail=0.0), 2, groups={1: "head"})
        first.optimizer.step()
        first.step()
        second = Schedule({"lr": 1.0}).scheduler(sgd_with(_=0.0, tail=0.0), 5)
        second.load_state_dict(first.state_dict())
        assert second.get_last_lr() == first.get_last_lr() == [0.3, 0.1]

    def test_files_scalars_and_words(self, tmp_path: Path) -> None:
        SCHEDULE.save(tmp_path / "schedule.json")
        assert Schedule.load(tmp_path / "schedule.json") == SCHEDULE
        scalars = SCHEDULE.to_scalars()
        assert scalars["schedule/lr/head/cosine/peak"] == 0.3 and scalars["schedule/lr/1"] == 0.05
        assert Schedule.from_scalars(scalars) == SCHEDULE
        assert Schedule.from_config(SCHEDULE.to_config()) == SCHEDULE
        assert Schedule.from_tensors(SCHEDULE.to_tensors()) == SCHEDULE
        assert "lr/head cosine (peak 0.3" in str(SCHEDULE)

    def test_pictures_have_a_panel_for_each_hyperparameter(self) -> None:
        figure = SCHEDULE.plot()
        panels = {axes.get_ylabel(): axes for axes in figure.axes}
        assert list(panels) == ["lr", "weight_decay/head", "momentum", "label_smoothing"]
        labels = [text.get_text() for text in panels["lr"].get_legend().get_texts()]
        assert labels == ["others", "head", "encoder.0.weight"]

    def test_many_groups_are_rows(self) -> None:
        figure = Schedule({f"lr/{i}.weight": (0.1, 0.01 * (i + 1)) for i in range(30)}).plot()
        rows = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        assert rows == [f"{i}.weight" for i in range(30)]
        assert figure.axes[1].get_ylabel() == "lr"  # of the colours
        assert figure.get_figheight() > 4
