"""A saved schedule replayed in a plain PyTorch training loop: two lines, and no Ray.

python examples/replay_schedule.py [SCHEDULE.json]
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from tune_hypergrad import Schedule

EPOCHS, BATCH = 5, 32


def main(schedule: Schedule) -> float:
    """Train; returns the final training loss."""
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = (x[:, :3] + 0.3 * torch.randn(512, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # the schedule sets it

    scheduler = schedule.scheduler(optimizer, total_steps=EPOCHS * len(x) // BATCH)  # line one
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            scheduler.step()  # line two
        loss = float(F.cross_entropy(model(x), y).detach())
        group = optimizer.param_groups[0]
        print(f"epoch {epoch}: loss {loss:.3f}, lr {group['lr']:.3f}, momentum {group['momentum']:.2f}")
    return loss


if __name__ == "__main__":
    default = Schedule({"lr": (0.05, 0.2, 0.1, 0.02), "momentum": (0.8,)})
    main(Schedule.load(sys.argv[1]) if len(sys.argv) > 1 else default)
