"""Parts of speed.py: the reader's tuned backbone, a step with our backward pass and with torch's, and whole steps."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat

import numpy as np
import torch
from accelerate import Accelerator
from speed_work import FOR_EVER, IMAGES, computes_in, timed
from stopwatch import Work
from torch import Tensor
from torch.nn import functional as F

from config import Config
from depthwise import Depthwise
from reader import WHOLE, positions
from runtime import autocast, made_ahead
from tuned_backbone import TunedBackbone
from tuned_training import Lessons


class TorchsOwn(Depthwise):
    """The same convolution, as torch differentiates it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.padding(x), self.weight, self.bias, self.stride, groups=len(self.weight))


def tuning_step(config: Config, accelerator: Accelerator, ours: bool) -> Work:
    """A step of tuned_training.py on noise: crops of half a side of the magnified image, without their making."""
    settings, device = config.reader, accelerator.device
    size = tuple(settings.magnification * side // 2 for side in (config.data.height, config.data.width))
    crops = torch.randn(settings.crops, 1, *size, device=device)
    places = positions(size, [WHOLE] * settings.crops, device)
    lessons = repeat((crops, places, torch.zeros_like(crops)))
    return _steps(lessons, Work(None, settings.crops, computes_in(accelerator)), config, device, ours)


def whole_step(config: Config, accelerator: Accelerator) -> Work:
    """A step with its lesson: images of noise, moved, corrupted and cut by data.num_workers processes, or here."""
    times, settings = config.reader.magnification, replace(config.reader, tuned_steps=FOR_EVER)
    size = (IMAGES, times * config.data.height, times * config.data.width)
    images = np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)
    lessons = made_ahead(Lessons(images, replace(config, reader=settings)), range(FOR_EVER), config)
    work = Work(None, settings.crops, computes_in(accelerator))
    return _steps(timed(lessons, work.waited), work, config, accelerator.device)


def _steps(lessons: Iterator, work: Work, config: Config, device: torch.device, ours: bool = True) -> Work:
    """The work, whose step learns from the next lesson as tuned_training.py does."""
    network = TunedBackbone().to(device).train()
    if not ours:
        for block in network.backbone.blocks:
            block._depthwise_conv.__class__ = TorchsOwn
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step() -> None:
        crops, places, changed = (part.to(device) for part in next(lessons))
        optimizer.zero_grad()
        with autocast(config.runtime, device):
            logits = network.at_stride_two(crops, places).float()
        F.binary_cross_entropy_with_logits(logits, F.avg_pool2d(changed, 2)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    work.step = step
    return work
