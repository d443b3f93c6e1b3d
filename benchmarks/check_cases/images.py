"""Good models of images: convolutional networks, and those that cut images into patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from check_cases.case import CLASSES, IGNORED, Flipped, Good, with_images, with_masks
from tune_hypergrad.problems.wide_resnet import wrn_16_1


class BasicBlock(nn.Module):
    """Two convolutions with BatchNorm, and a way past them."""

    def __init__(self, channels: int, width: int, stride: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.activation = activation
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            projection = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        return self.activation(residual + self.shortcut(x))


class ResNet18(nn.Module):
    """Four groups of two blocks, a 3x3 stem: He et al., "Deep Residual Learning for Image Recognition", 2016."""

    def __init__(self, activation: Callable[[Tensor], Tensor], widths: tuple[int, ...] = (4, 4, 8, 8)) -> None:
        super().__init__()
        channels = widths[0]
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.activation = activation
        self.blocks = nn.Sequential()
        for group, width in enumerate(widths):
            self.blocks.append(BasicBlock(channels, width, 2 if group else 1, activation))
            self.blocks.append(BasicBlock(width, width, 1, activation))
            channels = width
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(self.activation(self.stem(images)))
        return self.head(features.mean((2, 3)))


class FineTuned(ResNet18):
    """Its BatchNorms stay in evaluation mode, and its stem does not train."""

    def __init__(self) -> None:
        super().__init__(F.relu, widths=(4, 8))
        self.stem.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]

    def train(self, mode: bool = True) -> FineTuned:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def lenet() -> nn.Module:
    """Convolutions and max-pooling."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
    )


def vgg() -> nn.Module:
    """Pairs of convolutions, max-pooling and two kinds of dropout."""

    def block(channels: int, width: int) -> list[nn.Module]:
        first, second = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        return [first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout2d(0.1)]

    head = [nn.Flatten(), nn.Linear(32, 16), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(16, CLASSES)]
    return nn.Sequential(*block(3, 4), *block(4, 8), *head)


class MixerBlock(nn.Module):
    """An MLP over patches, then one over channels."""

    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.over_patches = nn.Sequential(nn.Linear(patches, 8), nn.GELU(), nn.Linear(8, patches))
        self.over_channels = nn.Sequential(nn.Linear(channels, 16), nn.GELU(), nn.Linear(16, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_patches(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norm2(x))


class Mixer(nn.Module):
    """Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", 2021."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.blocks = nn.Sequential(MixerBlock(16, 8), MixerBlock(16, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.patches(images).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


class ViT(nn.Module):
    """Patches with a class token, positions and torch's own transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(0.02 * torch.randn(1, 17, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class UNet(nn.Module):
    """A way down and a way up, GroupNorm, and features handed across."""

    def __init__(self) -> None:
        super().__init__()

        def block(channels: int, width: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(2, width), nn.SiLU())

        self.down, self.bottom, self.up = block(3, 4), block(4, 8), block(8, 4)
        self.widen = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.down(images)
        coarse = self.bottom(F.avg_pool2d(fine, 2))
        return self.head(self.up(torch.cat([fine, self.widen(coarse)], 1)))


class Upsampling(nn.Module):
    """A bilinear way up after strided convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.LeakyReLU(0.1))
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        coarse = self.head(self.encoder(images))
        return F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)


def smoothed(output: Tensor, target: Tensor, *, label_smoothing: float = 0.1) -> Tensor:
    """Cross entropy whose label smoothing is tuned."""
    return F.cross_entropy(output, target, label_smoothing=label_smoothing)


class SpatialTransformer(nn.Module):
    """Jaderberg et al., "Spatial Transformer Networks", 2015: looks at a part of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.locate, self.head = nn.Linear(192, 6), nn.Linear(192, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        identity = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=images.dtype)
        theta = (identity + 0.1 * self.locate(images.flatten(1))).unflatten(1, (2, 3))
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return self.head(F.grid_sample(images, grid, align_corners=False).flatten(1))


_WEIGHTED = partial(F.cross_entropy, weight=torch.tensor([0.5, 1.0, 2.0]))

IMAGES = [
    Good("ResNet-18, ReLU", partial(ResNet18, F.relu), with_images, "nesterov"),
    Good("ResNet-18, SiLU", partial(ResNet18, F.silu), with_images, train_loss=smoothed),
    Good("WRN-16-1", wrn_16_1, with_images),
    Good("ResNet with frozen BatchNorm", FineTuned, with_images, "adam"),
    Good("LeNet, max-pooling, augmented data", lenet, with_images, wrap=Flipped),
    Good("VGG, dropout", vgg, with_images, "rmsprop", train_loss=smoothed),
    Good("MLP-Mixer", Mixer, with_images, "adamw"),
    Good("ViT", ViT, with_images, "adamw", train_loss=smoothed),
    Good("U-Net, GroupNorm", UNet, with_masks, "adam", loss=_WEIGHTED),
    Good("bilinear segmentation", Upsampling, with_masks, "nesterov", loss=nn.CrossEntropyLoss(ignore_index=IGNORED)),
    Good(
        "spatial transformer",
        SpatialTransformer,
        with_images,
        refused={"forward": r"forward AD with grid_sampler_2d .*images\.py:\d+ `return self\.head\(F\.grid_sample"},
    ),
]
