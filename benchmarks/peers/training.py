"""How the peers beside this file that are trained learn: a UNet, gradient noise, and the loop over batches of normals.

Each says what it is on a GPU, with the settings of its paper where that gives them, and for a CPU a narrow network and
a number of steps that take one core about half an hour, as long as the reader takes there: not what a GPU would make
of it. They take the GPU where there is one.
"""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from checks import UsageError
from config import Config
from runtime import multiplies_bf16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(network: nn.Module) -> nn.Module:
    """Where it is trained, laid out as convolutions are fastest."""
    return network.to(DEVICE, memory_format=torch.channels_last)


def autocast() -> torch.autocast:
    """bf16 where the hardware multiplies it."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=multiplies_bf16(DEVICE == "cpu"))


def train(
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor], Tensor],
    images: np.ndarray,
    batch: int,
    steps: int,
    random: torch.Generator,
    name: str,
) -> None:
    """`steps` steps on batches of (N, H, W) drawn with replacement, the learning rate falling as a cosine."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    everyone = torch.from_numpy(images).unsqueeze(1)
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    with tqdm(range(steps), desc=name, unit="step") as progress:
        for step in progress:
            rows = torch.randint(len(everyone), (batch,), generator=random)
            loss = loss_of(everyone[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.4f}")


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
