"""How the peers beside this file that are trained learn: a UNet, gradient noise, and the loop over batches of normals.

Each says what it is on a GPU, with the settings of its paper where that gives them, and for a CPU a narrow network and
a number of steps that take one core about half an hour, as long as the reader takes there: not what a GPU would make
of it. They take the GPU where there is one. A training that was killed goes on as if it had not been.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from checks import UsageError
from config import Config
from interruption import Steps, remember
from last_step import LastStep
from runtime import multiplies_bf16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAVE_EVERY = 100  # steps


def on_device(network: nn.Module) -> nn.Module:
    """Where it is trained, laid out as convolutions are fastest."""
    return network.to(DEVICE, memory_format=torch.channels_last)


def autocast() -> torch.autocast:
    """bf16 where the hardware multiplies it."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=multiplies_bf16(DEVICE == "cpu"))


@dataclass(frozen=True)
class Lessons:
    """What a peer is trained on: batches of (N, ...), so many and so large, drawn with replacement."""

    name: str
    images: np.ndarray
    batch: int
    steps: int
    random: torch.Generator

    def identity(self) -> dict:
        """What tells this training from others."""
        shape = list(self.images.shape)
        content = hashlib.sha256(np.ascontiguousarray(self.images)).hexdigest()
        numbers = {"batch": self.batch, "steps": self.steps, "seed": self.random.initial_seed()}
        return {"name": self.name, "shape": shape, "content": content, **numbers}


def train(
    networks: list[nn.Module],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor], Tensor],
    lessons: Lessons,
    config: Config,
) -> None:
    """As many steps as the lessons have, the learning rate falling as a cosine.

    loss_of, a method of a peer, takes a batch (B, 1, ...). All of `networks`, averages among them, are kept with the
    optimizer and the random numbers in --inference.calibration, and an interrupted training goes on from there.
    """
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, lessons.steps)
    everyone = torch.from_numpy(lessons.images).unsqueeze(1)
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    identity = lessons.identity() | {"numbers": numbers_of(sys.modules[loss_of.__module__])}
    parts = {f"network {number}": network for number, network in enumerate(networks)}
    parts |= {"optimizer": optimizer, "schedule": schedule, "random": Drawing(lessons.random)}
    last = Path(config.inference.calibration) / f"{lessons.name.replace(' ', '_')}_last.pt"
    last.parent.mkdir(parents=True, exist_ok=True)
    kept = LastStep(last, "peer in training", identity, parts, "python benchmarks/detection.py --runtime.resume False")
    begun = kept.take_up(config.runtime.resume)
    with tqdm(total=lessons.steps, initial=begun, desc=lessons.name, unit="step") as progress:
        steps = Steps()
        for step in steps.of(range(begun, lessons.steps)):
            rows = torch.randint(len(everyone), (lessons.batch,), generator=lessons.random)
            loss = loss_of(everyone[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.4f}")
            progress.update()
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == lessons.steps or steps.asked:
                kept.write(step + 1)
                remember(f"the same command goes on with {lessons.name}, step {step + 1} of {lessons.steps}")


class Drawing:
    """A source of random numbers, as part of what is gone on from."""

    def __init__(self, random: torch.Generator):
        self.random = random

    def state_dict(self) -> dict:
        return {"state": self.random.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.random.set_state(state["state"])


def numbers_of(module: ModuleType) -> dict:
    """Those at the top of a peer's file, the device it is trained on among them, as JSON gives them back."""
    named = {name: value for name, value in vars(module).items() if name.isupper()}
    return json.loads(json.dumps({n: v for n, v in named.items() if isinstance(v, (int, float, str, tuple))}))


def gradient_noise(count: int, size: tuple[int, int], cells: tuple[int, int], random: torch.Generator) -> Tensor:
    """Perlin's noise (1985, with the fade of 2002), (count, 1, H, W) within about [-1, 1], of cells down and across."""
    angle = 2 * np.pi * torch.rand(count, cells[0] + 1, cells[1] + 1, generator=random)
    slopes = torch.stack([angle.sin(), angle.cos()])
    down, across = (torch.arange(length) / length * number for length, number in zip(size, cells, strict=True))
    rows, columns = down.floor().long(), across.floor().long()
    dy, dx = (down - rows)[:, None], (across - columns)[None]

    def reach(below: int, right: int) -> Tensor:  # what the slope of one corner says of each pixel of its cell
        corner = slopes[:, :, rows + below][..., columns + right]
        return corner[0] * (dy - below) + corner[1] * (dx - right)

    fade_y, fade_x = (part**3 * (part * (6 * part - 15) + 10) for part in (dy, dx))
    above = torch.lerp(reach(0, 0), reach(0, 1), fade_x.expand(size))
    below = torch.lerp(reach(1, 0), reach(1, 1), fade_x.expand(size))
    return 2**0.5 * torch.lerp(above, below, fade_y.expand(size)).unsqueeze(1)


def timed_unet(channels: int, widths: tuple[int, ...], groups: int) -> UNet2DModel:
    """A UNet that is told a time: (B, channels, H, W) to the same, one layer per resolution, without attention."""
    network = UNet2DModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=groups,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
    )
    return on_device(network)


def refuse_size(config: Config, divisor: int, name: str) -> None:
    """UsageError for images that a network cannot halve as often as it does."""
    if config.data.height % divisor or config.data.width % divisor:
        raise UsageError(f"{name} needs a --size that divides by {divisor}")


class UNet(nn.Module):
    """Images (B, inputs, H, W) to (B, outputs, H, W); `levels` resolutions, twice as many channels at each.

    norm is a layer for a number of channels; without skips the way up hears of the coarsest level alone.
    """

    def __init__(
        self, inputs: int, outputs: int, width: int, levels: int, norm: Callable[[int], nn.Module], skips: bool = True
    ):
        super().__init__()
        self.skips = skips
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList([_block(i, o, norm) for i, o in zip([inputs, *widths], widths, strict=False)])
        self.grow = nn.ModuleList([nn.ConvTranspose2d(2 * each, each, 2, stride=2) for each in widths[:-1]])
        self.up = nn.ModuleList([_block((1 + skips) * each, each, norm) for each in widths[:-1]])
        self.last = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for number, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if number else x)
            kept.append(x)
        for skip, grow, block in reversed(list(zip(kept, self.grow, self.up, strict=False))):
            x = block(torch.cat([skip, grow(x)], dim=1) if self.skips else grow(x))
        return self.last(x)


def _block(inputs: int, outputs: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    layers = []
    for entering in (inputs, outputs):
        layers += [nn.Conv2d(entering, outputs, 3, padding=1), norm(outputs), nn.SiLU()]
    return nn.Sequential(*layers)
