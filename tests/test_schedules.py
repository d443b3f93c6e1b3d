"""Schedules: reading, writing, drawing, and replay against loops written by hand."""

import copy
import json
import math
import pickle
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import nn

from tune_hypergrad.errors import InputError
from tune_hypergrad.schedules import Schedule, ScheduleLR

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.sampled_from(["lr", "beta1", "größe", "fc.weight/l2", '"quoted"'])
windows_strategy = st.lists(finite, min_size=1, max_size=12).map(tuple)
schedules = st.dictionaries(names, windows_strategy, min_size=1, max_size=4).map(Schedule)

EXAMPLE = Schedule({"lr": (0.1, 0.05, 0.01), "momentum": (0.9,)})


def refusal(function, *arguments, **keywords):
    with pytest.raises(InputError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def same_bits(a, b):
    assert {name: [v.hex() for v in windows] for name, windows in a.values.items()} == {
        name: [v.hex() for v in windows] for name, windows in b.values.items()
    }


@pytest.mark.parametrize("values", [{}, None, {"lr": ()}, {"lr": (math.nan,)}, {"lr": math.inf}, {"lr": "x"}, {1: 0.1}])
def test_values_are_checked(values):
    refusal(Schedule, values)


def test_values_are_copied_and_normal():
    windows = [1, 2]
    schedule = Schedule({"lr": windows, "momentum": 0})
    windows.append(3)
    assert schedule.values == {"lr": (1.0, 2.0), "momentum": (0.0,)}
    assert schedule == Schedule({"momentum": (0.0,), "lr": (1.0, 2.0)}) != EXAMPLE
    assert eval(repr(schedule)) == schedule
    assert str(EXAMPLE) == "lr 0.1 | 0.05 | 0.01, momentum 0.9"
    assert pickle.loads(pickle.dumps(EXAMPLE)) == EXAMPLE


@settings(deadline=None)
@given(schedules)
def test_config_round_trip(schedule):
    same_bits(Schedule.from_config(schedule.to_config()), schedule)
    same_bits(Schedule.from_config(schedule.to_config(), names=schedule.values), schedule)


def test_from_config_chooses_entries():
    config = {"lr": {"1": 0.2, "0": 0.1}, "optimizer": "adam", "momentum": 0.9, "nesterov": True, "model": {"width": 3}}
    assert Schedule.from_config(config) == Schedule({"lr": (0.1, 0.2), "momentum": (0.9,)})
    assert Schedule.from_config(config, names=["momentum"]) == Schedule({"momentum": (0.9,)})
    assert "'eps'" in refusal(Schedule.from_config, config, names=["lr", "eps"])
    assert "'optimizer'" in refusal(Schedule.from_config, config, names=["optimizer"])
    refusal(Schedule.from_config, {"optimizer": "adam"})


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 5000), st.data())
def test_progress_and_steps_agree(count, total_steps, data):
    schedule = Schedule({"lr": tuple(map(float, range(count)))})
    step = data.draw(st.integers(0, total_steps - 1))
    assert schedule.at_step(step, total_steps) == {"lr": count * step // total_steps}
    assert schedule.at(step / total_steps) == schedule.at_step(step, total_steps)
    window = data.draw(st.integers(0, count - 1))
    assert schedule.at(window / count) == {"lr": window}


def test_ends_of_training():
    assert EXAMPLE.at(0) == EXAMPLE.at_step(0, 7) == {"lr": 0.1, "momentum": 0.9}
    assert EXAMPLE.at(math.nextafter(1, 0)) == EXAMPLE.at_step(6, 7) == {"lr": 0.01, "momentum": 0.9}
    for progress in (-1e-9, 1, math.nan):
        refusal(EXAMPLE.at, progress)
    for step, total_steps in ((-1, 7), (7, 7), (1.0, 7), (0, 0), (0, 7.0)):
        refusal(EXAMPLE.at_step, step, total_steps)


@settings(deadline=None, max_examples=30)
@given(schedules)
def test_file_round_trip(tmp_path_factory, schedule):
    path = tmp_path_factory.mktemp("schedule") / "schedule.json"
    schedule.save(path)
    same_bits(Schedule.load(path), schedule)
    assert [entry.name for entry in path.parent.iterdir()] == ["schedule.json"]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "schedule.json"
    EXAMPLE.save(path)
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    assert str(path) in refusal(Schedule({"lr": 1.0}).save, path)
    assert Schedule.load(path) == EXAMPLE and len(list(tmp_path.iterdir())) == 1


def test_unwritable_path_is_refused(tmp_path):
    path = tmp_path / "missing" / "schedule.json"
    message = refusal(EXAMPLE.save, path)
    assert str(path) in message and "No such file" in message


VALID = {"format": "tune_hypergrad/schedule", "version": 1, "values": {"lr": [0.1]}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "not JSON"),
        (b"", "not JSON"),
        (b"[]", "format"),
        (json.dumps({"lr": 0.1}).encode(), "format"),
        (json.dumps({**VALID, "version": 3}).encode(), "version 3"),
        (json.dumps({**VALID, "values": {}}).encode(), "at least one"),
        (json.dumps({**VALID, "values": {"lr": [math.nan]}}).encode(), "not finite"),
        (json.dumps({**VALID, "values": {"lr": ["a"]}}).encode(), "'lr'"),
        (json.dumps({k: v for k, v in VALID.items() if k != "values"}).encode(), "at least one"),
    ],
)
def test_bad_files_are_refused_with_their_path(tmp_path, content, words):
    path = tmp_path / "schedule.json"
    path.write_bytes(content)
    message = refusal(Schedule.load, path)
    assert str(path) in message and words in message


def test_unreadable_files_are_refused(tmp_path):
    assert "none.json" in refusal(Schedule.load, tmp_path / "none.json")
    assert str(tmp_path) in refusal(Schedule.load, tmp_path)


def test_frame():
    frame = EXAMPLE.to_frame()
    assert list(frame.columns) == ["hyperparameter", "window", "start", "end", "value"]
    assert frame.values.tolist() == [
        ["lr", 0, 0.0, 1 / 3, 0.1],
        ["lr", 1, 1 / 3, 2 / 3, 0.05],
        ["lr", 2, 2 / 3, 1.0, 0.01],
        ["momentum", 0, 0.0, 1.0, 0.9],
    ]


def test_scalars():
    assert EXAMPLE.to_scalars() == {
        "schedule/lr/0": 0.1,
        "schedule/lr/1": 0.05,
        "schedule/lr/2": 0.01,
        "schedule/momentum": 0.9,
    }
    assert EXAMPLE.to_scalars("best").keys() == {"best/lr/0", "best/lr/1", "best/lr/2", "best/momentum"}


def test_plot_draws_every_hyperparameter(tmp_path):
    figure = EXAMPLE.plot()
    assert [axes.get_ylabel() for axes in figure.axes] == ["lr", "momentum"]
    values, edges, _ = figure.axes[0].patches[0].get_data()
    assert list(values) == [0.1, 0.05, 0.01] and list(edges) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    figure.savefig(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").stat().st_size > 1000
    assert pyplot.get_fignums() == []


def test_plot_on_given_axes():
    figure = Figure()
    assert EXAMPLE.plot(figure.subplots(2, 1)) is figure
    single = Figure()
    assert Schedule({"lr": (1.0, 1e-3)}).plot(single.subplots()) is single
    assert single.axes[0].get_yscale() == "log"
    assert "1 axes for 2" in refusal(EXAMPLE.plot, Figure().subplots())


def gradient(weights, step):
    """Of a quadratic that changes with the step, shape [3]."""
    return torch.tensor([1.0, 3.0, 0.3], dtype=torch.float64) * weights - math.sin(step)


def trained(optimizer_class, schedule, steps, *, scheduler=False, **options):
    """Weights after every step under torch.optim, the schedule applied by `apply` or by `ScheduleLR`."""
    weights = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = optimizer_class([weights], **options)
    replay = schedule.scheduler(optimizer, steps) if scheduler else None
    path = []
    for step in range(steps):
        if replay is None:
            assert schedule.apply(optimizer, step, steps) == {}
        weights.grad = gradient(weights.detach(), step)
        optimizer.step()
        if replay is not None:
            replay.step()
        path.append(weights.detach().clone())
    return torch.stack(path)


def sgd_by_hand(schedule, steps, nesterov=False):
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    velocity, path = torch.zeros_like(weights), []
    for step in range(steps):
        h = schedule.at_step(step, steps)
        decayed = gradient(weights, step) + h.get("weight_decay", 0.0) * weights
        dampening = h.get("dampening", 0.0) if step else 0.0  # torch's first velocity is the gradient itself
        velocity = h["momentum"] * velocity + (1 - dampening) * decayed
        weights = weights - h["lr"] * (decayed + h["momentum"] * velocity if nesterov else velocity)
        path.append(weights)
    return torch.stack(path)


def rmsprop_by_hand(schedule, steps):
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    square, velocity, path = torch.zeros_like(weights), torch.zeros_like(weights), []
    for step in range(steps):
        h, g = schedule.at_step(step, steps), gradient(weights, step)
        square = h["alpha"] * square + (1 - h["alpha"]) * g**2
        velocity = h["momentum"] * velocity + g / (square.sqrt() + h["eps"])
        weights = weights - h["lr"] * velocity
        path.append(weights)
    return torch.stack(path)


def adam_by_hand(schedule, steps, decoupled):
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    mean, square, path = torch.zeros_like(weights), torch.zeros_like(weights), []
    for step in range(steps):
        h, g = schedule.at_step(step, steps), gradient(weights, step)
        if decoupled:
            weights = weights - h["lr"] * h["weight_decay"] * weights
        else:
            g = g + h["weight_decay"] * weights
        mean = h["beta1"] * mean + (1 - h["beta1"]) * g
        square = h["beta2"] * square + (1 - h["beta2"]) * g**2
        root = (square / (1 - h["beta2"] ** (step + 1))).sqrt()
        weights = weights - h["lr"] * mean / (1 - h["beta1"] ** (step + 1)) / (root + h["eps"])
        path.append(weights)
    return torch.stack(path)


MOMENTA = [(0.0, 0.9), (0.9, 0.0), (0.0, 0.9, 0.0, 0.5), (0.0,), (0.5,)]


@pytest.mark.parametrize("scheduler", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("momenta", MOMENTA)
def test_sgd_replay(momenta, foreach, scheduler):
    schedule = Schedule({"lr": (0.1, 0.05, 0.2), "momentum": momenta, "weight_decay": (0.1, 0.0)})
    replayed = trained(torch.optim.SGD, schedule, 13, scheduler=scheduler, foreach=foreach)
    torch.testing.assert_close(replayed, sgd_by_hand(schedule, 13), rtol=1e-12, atol=1e-13)


def test_the_second_eps_of_adafactor():
    optimizer = torch.optim.Adafactor([torch.nn.Parameter(torch.ones(2))])
    assert Schedule({"lr": (0.1,), "eps2": (0.01, 0.02)}).apply(optimizer, 1, 2) == {}
    assert optimizer.param_groups[0]["eps"] == (None, 0.02)


def test_dampened_sgd_replay():
    schedule = Schedule({"lr": (0.1,), "momentum": (0.0, 0.9), "dampening": (0.3, 0.0, 0.6)})
    torch.testing.assert_close(
        trained(torch.optim.SGD, schedule, 13), sgd_by_hand(schedule, 13), rtol=1e-12, atol=1e-13
    )


def test_nesterov_replay():
    schedule = Schedule({"lr": (0.1, 0.05), "momentum": (0.0, 0.9, 0.0)})
    replayed = trained(torch.optim.SGD, schedule, 13, nesterov=True, momentum=0.9)
    torch.testing.assert_close(replayed, sgd_by_hand(schedule, 13, nesterov=True), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scheduler", [False, True])
@pytest.mark.parametrize("momenta", MOMENTA)
def test_rmsprop_replay(momenta, scheduler):
    schedule = Schedule({"lr": (0.1, 0.05, 0.2), "momentum": momenta, "alpha": (0.9, 0.99), "eps": (1e-8, 1e-4)})
    replayed = trained(torch.optim.RMSprop, schedule, 13, scheduler=scheduler)
    torch.testing.assert_close(replayed, rmsprop_by_hand(schedule, 13), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scheduler", [False, True])
@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_replay(optimizer_class, scheduler):
    schedule = Schedule(
        {
            "lr": (0.1, 0.05, 0.2),
            "beta1": (0.0, 0.9, 0.5),
            "beta2": (0.99, 0.999),
            "eps": (1e-8, 1e-3),
            "weight_decay": (0.1, 0.0),
        }
    )
    expected = adam_by_hand(schedule, 13, decoupled=optimizer_class is torch.optim.AdamW)
    replayed = trained(optimizer_class, schedule, 13, scheduler=scheduler)
    torch.testing.assert_close(replayed, expected, rtol=1e-11, atol=1e-12)


def test_momentum_windows_of_zero_do_matter():
    """Plain zeros replay wrongly: what `apply` avoids is real."""
    schedule = Schedule({"lr": (0.1,), "momentum": (0.0, 0.9)})
    weights = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([weights])
    for step in range(13):
        optimizer.param_groups[0].update(schedule.at_step(step, 13))
        weights.grad = gradient(weights.detach(), step)
        optimizer.step()
    assert (weights.detach() - sgd_by_hand(schedule, 13)[-1]).abs().max() > 0.01


def fresh_sgd(groups=1, **options):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(groups)], lr=1.0, **options)


def test_apply_sets_every_group_and_returns_the_rest():
    optimizer = fresh_sgd(groups=2)
    schedule = Schedule({"lr": (0.1, 0.2), "beta1": (0.5,), "label_smoothing": (0.0, 0.3), "nesterov": (1.0,)})
    assert schedule.apply(optimizer, 5, 10) == {"beta1": 0.5, "label_smoothing": 0.3, "nesterov": 1.0}
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2]
    assert optimizer.param_groups[0]["nesterov"] is False
    refusal(schedule.apply, optimizer, 10, 10)


def test_apply_leaves_a_momentum_of_zero_throughout_alone():
    optimizer = fresh_sgd()
    Schedule({"momentum": (0.0, 0.0)}).apply(optimizer, 0, 2)
    assert optimizer.param_groups[0]["momentum"] == 0.0
    Schedule({"momentum": (0.0, 0.1)}).apply(optimizer, 0, 2)
    assert optimizer.param_groups[0]["momentum"] == sys.float_info.min


def test_apply_keeps_one_beta_and_lr_tensors():
    lr = torch.tensor(1.0)
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=lr, betas=(0.8, 0.99))
    Schedule({"lr": (0.25,), "beta2": (0.9,)}).apply(optimizer, 0, 1)
    group = optimizer.param_groups[0]
    assert group["lr"] is lr and float(lr) == 0.25 and group["betas"] == (0.8, 0.9)


def advance(optimizer, scheduler, steps):
    seen = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"], *scheduler.get_last_lr()))
    return seen


SCHEDULE = Schedule({"lr": (0.1, 0.2, 0.3), "momentum": (0.5, 0.9), "label_smoothing": (0.0, 0.1)})


def test_scheduler_sets_all_values_and_stays_at_the_last_window():
    optimizer = fresh_sgd()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = SCHEDULE.scheduler(optimizer, total_steps=6)
        assert isinstance(scheduler, ScheduleLR) and isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.1, 0.5)
        assert scheduler.get_last_lr() == [0.1] and scheduler.loss_values == {"label_smoothing": 0.0}
        seen = advance(optimizer, scheduler, 8)
    lrs, momenta = [0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    assert seen == [(lr, momentum, lr) for lr, momentum in zip(lrs, momenta, strict=True)]
    assert scheduler.loss_values == {"label_smoothing": 0.1}


def test_scheduler_without_lr_leaves_it_to_the_groups():
    optimizer = fresh_sgd(groups=2)
    optimizer.param_groups[1]["lr"] = 0.5
    scheduler = Schedule({"momentum": (0.5, 0.9)}).scheduler(optimizer, 2)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [1.0, 0.5] and optimizer.param_groups[1]["momentum"] == 0.9


@pytest.mark.parametrize("done", range(7))
def test_scheduler_resumes(tmp_path, done):
    optimizer = fresh_sgd()
    scheduler = SCHEDULE.scheduler(optimizer, 6)
    advance(optimizer, scheduler, done)
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "checkpoint.pt")
    expected = advance(optimizer, scheduler, 8 - done)

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for order in (("optimizer", "scheduler"), ("scheduler", "optimizer")):
        optimizer = fresh_sgd()
        scheduler = Schedule({"lr": (9.0,)}).scheduler(optimizer, 3)
        for which in order:
            {"optimizer": optimizer, "scheduler": scheduler}[which].load_state_dict(copy.deepcopy(saved[which]))
        current = SCHEDULE.at_step(min(done, 5), 6)
        assert optimizer.param_groups[0]["lr"] == current["lr"] == scheduler.get_last_lr()[0]
        assert optimizer.param_groups[0]["momentum"] == current["momentum"]
        assert scheduler.loss_values == {"label_smoothing": current["label_smoothing"]}
        assert advance(optimizer, scheduler, 8 - done) == expected


def test_last_lr_never_aliases_the_optimizers_tensor():
    lr = torch.tensor(1.0)
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=lr)
    scheduler = Schedule({"lr": (0.25, 0.5)}).scheduler(optimizer, 2)
    scheduler.get_last_lr()[0].fill_(7.0)
    assert float(lr) == 0.25


@pytest.mark.parametrize("total_steps", [0, 1.5, True])
def test_scheduler_checks_total_steps(total_steps):
    assert repr(total_steps) in refusal(SCHEDULE.scheduler, fresh_sgd(), total_steps)
