"""Every example runs as it stands, and does what its first line says."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from paths import REPOSITORY

from tune_hypergrad import Schedule, hpbandster_result

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_explain_themselves(path):
    text = path.read_text()
    assert text.startswith('"""') and f"python examples/{path.name}" in text
    assert len(text.splitlines()) < 60


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, ray_session, tmp_path, monkeypatch, capsys):
    if path.stem == "transformers_trainer":
        pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other cores are busy with Ray
    try:
        names = runpy.run_path(str(path), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert shown.strip()
    if path.stem == "fds_in_ray":
        found = Schedule.load("schedule.json")
        assert len(found.values["lr"]) == 5 and max(found.values["lr"]) > 0
        assert Path("schedule.png").stat().st_size > 5000
    elif path.stem == "schedule_shapes":
        found = Schedule.load("schedule.json")
        assert found.values["lr"].form == "cosine" and 0 < found.values["momentum"][0] <= 0.99
        assert f"lr {found.at_step(2, 34)['lr']:.4f}" in shown, "the search has gone nowhere, or is replayed otherwise"
        assert float(shown.split(", accuracy ")[1].split()[0]) > 0.85  # Ray's own tables have accuracies, too
    elif path.stem == "replay_schedule":
        Schedule({"lr": (0.3, 0.1)}).save("mine.json")
        assert names["main"](Schedule.load("mine.json")) < 0.6
    elif path.stem == "bohb_in_ray":
        (folder,) = Path().glob("bohb")
        budgets = sorted(run.budget for run in hpbandster_result(folder).get_all_runs())
        assert len(budgets) == 40 and set(budgets) == {1, 3, 9}
        assert float(shown.split("validation loss ")[1].split()[0]) < 0.5
    elif path.stem == "bohb_over_delta_stn":
        (folder,) = Path().glob("bohb_over_delta_stn")
        budgets = sorted(run.budget for run in hpbandster_result(folder).get_all_runs())
        assert len(budgets) == 16 and set(budgets) == {1, 3, 9}
        assert float(shown.split("test accuracy ")[1].split()[0]) > 0.8
        assert all(name in shown for name in names["INSIDE"])
    elif path.stem == "own_problem":
        assert "d loss / d l2" in shown
    elif path.stem == "loop_to_problem":
        by_hand, tuned = (float(shown.split(f"{name} ")[1].split()[0].strip(",")) for name in ("by hand", "tuned"))
        assert tuned < by_hand
    elif path.stem == "asha_and_pbt":
        epochs = json.loads(shown.split("epochs of each trial ")[1].splitlines()[0])
        assert len(epochs) == 8 and min(epochs) < max(epochs) == 4
        rates = [json.loads(line.split("learning rates ")[1]) for line in shown.splitlines() if line.startswith("PBT")]
        assert len(rates) == 4 and max(map(len, rates)) > 1
    elif path.stem == "lightning_replay":
        assert len({rate for rate, _ in names["module"].used}) == 4 and len(names["module"].used) == 80
        assert float(shown.split("accuracy ")[1].split(",")[0]) > 0.9
    elif path.stem in ("lightning_module", "transformers_trainer"):
        by_hand, tuned = (float(shown.split(f"{name} ")[-1].split()[0].strip(",;")) for name in ("by hand", "tuned"))
        assert tuned < by_hand
