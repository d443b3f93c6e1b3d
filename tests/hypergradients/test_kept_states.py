"""States that are kept in temporary files."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pytest
import torch
from engine_problems import double, make_loop, make_problem

from tune_hypergrad import InputError, hypergradient
from tune_hypergrad.hypergradients import hypergradient_run
from tune_hypergrad.hypergradients.keeping import Room, steps_again
from tune_hypergrad.hypergradients.kept_states import KeptStates
from tune_hypergrad.hypergradients.modes import state_bytes
from tune_hypergrad.hypergradients.state import State

VALUES = {"lr": double(0.05, 0.02), "momentum": double(0.5)}
STEPS = 40


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def made(step: int, still: torch.Tensor) -> State:
    params = torch.full((3,), float(step), dtype=torch.float64)
    buffers = {"still": still, "count": torch.tensor(step), "complex": params[:2] * (1 + 2j)}
    return State(params, (params + 1, params.to(torch.complex64)), buffers, (step, step - 1))


class TestKeptStates:
    def test_they_come_back_as_they_were(self, folder: Path) -> None:
        kept, still = KeptStates(offloaded=3), torch.arange(4.0)
        states = {step: made(step, still) for step in (0, 4, 7, 9, 12)}
        kept.update(states)
        assert list(kept) == [0, 4, 7, 9, 12] and len(kept) == 5 and 7 in kept and 8 not in kept
        assert len(list(folder.rglob("*.pt"))) == 3 and kept.in_memory(12) == 2 and kept.in_memory(9) == 1
        for step, state in states.items():
            found = kept[step]
            assert found.counts == state.counts and list(found.buffers) == list(state.buffers)
            assert found.buffers["still"] is still  # what no step changes is there once
            pairs = zip((found.params, *found.slots), (state.params, *state.slots), strict=True)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
            assert all(torch.equal(found.buffers[name], buffer) for name, buffer in state.buffers.items())

    def test_what_is_saved_is_not_brought_to_the_device(self) -> None:
        kept, asked = KeptStates(offloaded=1), list[torch.device | None]()
        kept[0], kept[3] = made(0, torch.zeros(1)), made(3, torch.zeros(1))
        get = kept._away[0]

        def noting(device: torch.device | None) -> State:
            asked.append(device)
            return get(device)

        kept._away[0] = noting
        assert torch.equal(kept.saved(0).params, kept[0].params) and kept.saved(3) is kept[3]
        assert asked == [torch.device("cpu"), None]

    def test_room_is_used_again(self, folder: Path) -> None:
        kept, still = KeptStates(offloaded=1), torch.zeros(1)
        for step in range(5):
            kept[step] = made(step, still)
            kept.discard(step - 1)
        assert list(kept) == [4] and len(list(folder.rglob("*.pt"))) <= 1
        with pytest.raises(KeyError):
            del kept[3]
        with pytest.raises(KeyError):
            kept[3]
        kept.clear()
        assert not kept and not list(folder.rglob("*.pt"))


@pytest.mark.parametrize("kind", [None, "batch_norm"])
@pytest.mark.parametrize("horizon", [None, 7])
def test_the_same_bits_with_fewer_steps_trained_again(kind: str | None, horizon: int | None, folder: Path) -> None:
    problem = make_problem() if kind is None else make_problem(kind)
    loop = make_loop(problem, STEPS)
    little = 10 * state_bytes(loop)
    results, gradients = [], []
    for offload in (None, STEPS * state_bytes(loop)):
        run = hypergradient_run(
            loop, VALUES, differentiation="reverse", max_memory=little, offload=offload, horizon=horizon
        )
        with loop.running():
            run.advance(STEPS + 5)
            assert bool(list(folder.rglob("*.pt"))) == (offload is not None)
            run.advance(STEPS)
        results.append(run.result())
        gradients.append(run.cost.gradients)
        del run
    gc.collect()
    assert gradients[1] < gradients[0] - 10
    for name, value in results[0].hypergradients.items():
        assert torch.equal(value, results[1].hypergradients[name])
    assert not list(folder.iterdir()), "what was kept is gone with the run"


def test_a_saved_run_goes_on_from_files(folder: Path) -> None:
    def begun() -> tuple[object, object]:
        loop = make_loop(make_problem(), STEPS)
        options = {"max_memory": 10 * state_bytes(loop), "offload": "1MB"}
        return loop, hypergradient_run(loop, VALUES, differentiation="reverse", **options)

    (loop, whole), (other, saved), (last, restored) = begun(), begun(), begun()
    with loop.running():
        whole.advance(2 * STEPS)
    with other.running():
        saved.advance(STEPS + 9)
    restored.load_state_dict(saved.state_dict())
    with last.running():
        restored.advance(2 * STEPS)
    for name, value in whole.result().hypergradients.items():
        assert torch.equal(value, restored.result().hypergradients[name])


def test_states_elsewhere_take_no_memory_in_a_plan() -> None:
    lean = Room(10, 1)
    assert steps_again(400, lean) > steps_again(400, Room(10, 1, states_offloaded=100)) > 399
    assert steps_again(400, Room(10, 1, states_offloaded=400)) == 399
    assert Room(30, 1, 10, states_offloaded=3).graphs(3) == 3 and Room(30, 1, 10).graphs(3) == 2


def test_less_memory_than_the_least_does_with_room_elsewhere() -> None:
    problem = make_problem()
    state = state_bytes(make_loop(problem, STEPS))
    options = {"steps": STEPS, "differentiation": "reverse", "max_memory": 2 * state}
    with pytest.raises(InputError, match="max_memory is"):
        hypergradient(problem, VALUES, **options)
    found = hypergradient(problem, VALUES, **options, offload="1MB")
    assert torch.equal(found.hypergradients["lr"], hypergradient(problem, VALUES, steps=STEPS).hypergradients["lr"])


def test_states_elsewhere_are_no_room_for_graphs() -> None:
    loop = make_loop(make_problem(), STEPS)
    limit = 2 * state_bytes(loop)
    run = hypergradient_run(loop, VALUES, differentiation="reverse", max_memory=limit, offload="1MB")
    assert run._room.memory == limit  # type: ignore[attr-defined]


def test_a_run_that_is_rejected_leaves_no_files(folder: Path) -> None:
    loop = make_loop(make_problem(), STEPS)
    run = hypergradient_run(loop, VALUES, differentiation="reverse", max_memory=10 * state_bytes(loop), offload="1MB")
    with loop.running():
        run.advance(STEPS + 3)
    assert list(folder.rglob("*.pt"))
    run.reject()
    assert not list(folder.iterdir())


def test_seeds_at_once(folder: Path) -> None:
    problem = make_problem()
    whole = hypergradient(problem, VALUES, steps=STEPS, seed=[0, 1])
    little = 2 * 10 * state_bytes(make_loop(problem, STEPS))
    found = hypergradient(
        problem, VALUES, steps=STEPS, seed=[0, 1], differentiation="reverse", max_memory=little, offload="1MB"
    )
    assert torch.equal(found.hypergradients["lr"], whole.hypergradients["lr"])
    assert found.cost.gradients < whole.cost.gradients + 2 * 2 * STEPS


@pytest.mark.parametrize("offload", ["much", -1, True])
def test_what_is_no_amount_is_refused(offload: object) -> None:
    with pytest.raises(InputError, match=r"offload is .*: give a number of bytes"):
        hypergradient(make_problem(), VALUES, steps=STEPS, offload=offload)


def test_a_folder_without_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"states cannot be kept in .*No space left on device.*TMPDIR"):
        hypergradient(make_problem(), VALUES, steps=STEPS, differentiation="reverse", offload="1MB", check=False)
