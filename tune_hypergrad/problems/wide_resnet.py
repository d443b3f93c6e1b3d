"""Wide residual networks with pre-activation (Zagoruyko and Komodakis, 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tune_hypergrad.problems.images import CLASSES
from tune_hypergrad.problems.models import xavier_initialised


def wrn_16_1() -> nn.Module:
    """WRN-16-1 with BatchNorm and Xavier weights, as Micaelli and Storkey (2021) train it: 175,066 weights."""
    return xavier_initialised(WideResNet(blocks_per_group=2, widths=(16, 32, 64)))


class WideResNet(nn.Module):
    """Groups of residual blocks of growing width, [b, 3, height, width] inputs to [b, 10] logits."""

    def __init__(self, blocks_per_group: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for group, width in enumerate(widths):
            for block in range(blocks_per_group):
                blocks.append(_Block(channels, width, stride=2 if group > 0 and block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.blocks(self.stem(images))))
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """A residual block, two 3x3 convolutions, each after BatchNorm and ReLU; a 1x1 convolution on the way past them
    where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        same = channels == width and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels, width, kernel_size=1, stride=stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        active = F.relu(self.norm1(inputs))
        past = inputs if self.shortcut is None else self.shortcut(active)
        residual: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return residual + past
