"""The part "tuning" of speed.py: a step of the reader's tuned backbone with our backward pass and with torch's."""

import torch
from accelerate import Accelerator
from speed_work import computes_in
from stopwatch import Work
from torch import Tensor
from torch.nn import functional as F

from config import Config
from depthwise import Depthwise
from reader import WHOLE, positions
from runtime import autocast
from tuned_backbone import TunedBackbone


class TorchsOwn(Depthwise):
    """The same convolution, as torch differentiates it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.padding(x), self.weight, self.bias, self.stride, groups=len(self.weight))


def tuning_step(config: Config, accelerator: Accelerator, ours: bool) -> Work:
    """A step of tuned_training.py on noise: crops of half a side of the magnified image, without their making."""
    settings, device = config.reader, accelerator.device
    network = TunedBackbone().to(device).train()
    if not ours:
        for block in network.backbone.blocks:
            block._depthwise_conv.__class__ = TorchsOwn
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    size = tuple(settings.magnification * side // 2 for side in (config.data.height, config.data.width))
    crops = torch.randn(settings.crops, 1, *size, device=device)
    places = positions(size, [WHOLE] * settings.crops, device)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(config.runtime, device):
            logits = network.at_stride_two(crops, places).float()
        F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return Work(step, settings.crops, computes_in(accelerator))
