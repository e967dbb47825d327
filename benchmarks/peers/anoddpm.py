"""AnoDDPM (Wyatt, Leach, Schmon, Willcocks 2022): a diffusion model of pixels that walks a quarter of the way and back.

Its noise is coarse and fine at once: six octaves of gradient noise, each finer one 0.8 times as strong (here Perlin's,
in the paper its simplex form), at unit variance. A UNet learns the noise of a linear schedule of 1,000 steps; an image
is taken to step 250 and back, and the map is the squared difference. On a GPU 128 channels and every step of the way
back; on a CPU fewer of both. The walk is that of Song et al. (2021) with eta 1, which may leave steps out, and the UNet
has no attention. What lies under the noise is not clipped to [-1, 1] on the way, and gradients are clipped at norm 1.
The score is the mean of the highest values of the map.
"""

import copy

import numpy as np
import torch
from torch import Tensor

from anomaly import image_score
from config import Config
from peers.training import DEVICE, Lessons, autocast, gradient_noise, refuse_size, timed_unet, train

CHANNELS = {"cuda": (128, 128, 256, 384, 512), "cpu": (8, 16, 32, 64)}[DEVICE]
BATCH = 4
STEPS = {"cuda": 40_000, "cpu": 1_500}[DEVICE]
LR = {"cuda": 1e-4, "cpu": 1e-3}[DEVICE]
WALK = {"cuda": 250, "cpu": 5}[DEVICE]  # steps of the way back
FAR, LENGTH = 250, 1000  # the step walked to, and all there are
OCTAVES, PERSISTENCE = 6, 0.8
COARSEST = 4  # cells to a side: 64 pixels each at 256
EMA = 0.99
TOP_SHARE = 0.001


class Anoddpm:
    """What the walk changes."""

    def __init__(self, seed: int, config: Config, steps: int = STEPS):
        refuse_size(config, 2 ** (len(CHANNELS) - 1), "AnoDDPM")
        self.config, self.steps = config, steps
        self.random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.network = timed_unet(1, CHANNELS, groups=4)
        self.kept = (1 - torch.linspace(1e-4, 0.02, LENGTH)).cumprod(0)  # share of the image's variance at each step

    def fit(self, normals: np.ndarray) -> None:
        """Train the network; its moving average examines."""
        averaged = copy.deepcopy(self.network)
        parameters = list(self.network.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)

        def average(*_: object) -> None:
            with torch.no_grad():
                torch._foreach_lerp_(list(averaged.parameters()), parameters, 1 - EMA)

        optimizer.register_step_post_hook(average)
        lessons = Lessons("AnoDDPM", normals, BATCH, self.steps, self.random)
        train([self.network, averaged], optimizer, self._loss, lessons, self.config)
        self.network = averaged.eval()

    def _loss(self, clean: Tensor) -> Tensor:
        times = torch.randint(LENGTH, (len(clean),), generator=self.random)
        noise = self.noise(clean)
        noisy = self.noisy(clean, noise, times)
        with autocast():
            told = self.network(noisy.to(DEVICE), times.to(DEVICE)).sample
        return (told.float() - noise.to(DEVICE)).square().mean()

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The images (B, 1, H, W) at these steps of the schedule."""
        kept = self.kept[times].reshape(-1, 1, 1, 1)
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise

    def noise(self, images: Tensor) -> Tensor:
        """Noise of the shape of (B, 1, H, W) at unit variance."""
        size = tuple(images.shape[-2:])
        total = torch.zeros(len(images), 1, *size)
        for octave in range(OCTAVES):  # each laid anywhere: at a corner of its cells, gradient noise is 0
            noise = gradient_noise(len(images), size, (COARSEST * 2**octave,) * 2, self.random)
            shift = [int(torch.randint(length, (1,), generator=self.random)) for length in size]
            total += PERSISTENCE**octave * noise.roll(shift, dims=(-2, -1))
        return total / total.std(dim=(1, 2, 3), keepdim=True)

    @torch.no_grad()
    def score(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps of the squared difference, and the mean of their highest values."""
        x = torch.from_numpy(images).unsqueeze(1)
        times = np.linspace(FAR, 0, WALK + 1).round().astype(int)
        z = self.noisy(x, self.noise(x), torch.full((len(x),), FAR)).to(DEVICE)
        for now, then in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            told = self.network(z, now).sample
            z = self._back(z, told, now, then)
        maps = (z.cpu() - x).square()
        return maps[:, 0].numpy(), image_score(maps, TOP_SHARE).numpy()

    def _back(self, noisy: Tensor, noise: Tensor, now: int, then: int) -> Tensor:
        """A step of the ancestral walk (Song et al. 2021, eq. 12 with eta 1), its fresh noise of the same kind."""
        kept, kept_then = self.kept[now], self.kept[then]
        clean = (noisy - (1 - kept).sqrt() * noise) / kept.sqrt()
        if then == 0:
            return clean
        fresh = ((1 - kept_then) / (1 - kept) * (1 - kept / kept_then)).sqrt()
        straight = (1 - kept_then - fresh**2).sqrt() * noise
        return kept_then.sqrt() * clean + straight + fresh * self.noise(noisy.cpu()).to(noisy.device)
