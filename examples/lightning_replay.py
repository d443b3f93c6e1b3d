"""A saved schedule replayed in Lightning by a callback, and no Ray; needs `pip install lightning`.

python examples/lightning_replay.py [SCHEDULE.json]
"""

import sys

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from tune_hypergrad import Schedule
from tune_hypergrad.bridges.lightning import ScheduleCallback


class Module(lightning.LightningModule):
    """The module you have; it also notes what its optimizer used."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.used: list[tuple[float, float]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.used.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.5)  # the schedule sets both


if __name__ == "__main__":
    torch.manual_seed(0)
    default = Schedule({"lr": (0.05, 0.2, 0.1, 0.02), "momentum": (0.8, 0.9)})
    schedule = Schedule.load(sys.argv[1]) if len(sys.argv) > 1 else default
    x = torch.randn(512, 8)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=32, shuffle=True)
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module = Module()
    lightning.Trainer(accelerator="cpu", max_epochs=5, callbacks=[ScheduleCallback(schedule)], **off).fit(
        module, loader
    )
    steps = [schedule.at_step(step, module.global_step) for step in range(module.global_step)]
    assert module.used == [(values.get("lr", 1.0), values.get("momentum", 0.5)) for values in steps]
    print(f"accuracy {(module.model(x).argmax(1) == x[:, :3].argmax(1)).float().mean():.2f}, lr {module.used[-1][0]}")
