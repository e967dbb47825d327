"""DRAEM (Zavrtanik, Kristan, Skocaj 2021): one network repairs what a second one then finds.

Where Perlin noise lies above a half, half of the images get a foreign texture laid over, more or less opaque. The first
UNet, which has no skip connections, learns to give back the clean image (squared error and SSIM), the second to say
from both images which pixels were foreign (focal loss). The score is the maximum of the map under a mean filter of 21
pixels, as published. The texture data set of the paper is photographs of surfaces; here textures are other normals,
upside down, inverted and shifted, nothing else; images lie in [-1, 1], the learning rate falls as a cosine, gradients
are clipped at norm 1, and neither images nor noise are rotated. Both networks halve the image four times; the
published repairer ends at half the channels, the finder goes one deeper with no more of them, both enlarge bilinearly.
On a GPU the rest is as published: 128 and 64 channels, 8 images a step, 700 epochs of 200 images at 1e-4.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Config
from model import ssim
from peers.training import DEVICE, Lessons, UNet, autocast, gradient_noise, on_device, refuse_size, train

WIDTHS = {"cuda": (128, 64), "cpu": (8, 8)}[DEVICE]  # of the repairing and of the finding network
BATCH = {"cuda": 8, "cpu": 4}[DEVICE]
STEPS = {"cuda": 17_500, "cpu": 1_200}[DEVICE]
LR = {"cuda": 1e-4, "cpu": 1e-3}[DEVICE]
LEVELS = 5
SCALES = 6  # of the noise: 2^0 to 2^5 cells to a side
GAMMA = 2.0  # of the focal loss (Lin et al. 2017)
WINDOW = 21


class Draem:
    """What the second network says of an image and its repair."""

    def __init__(self, seed: int, config: Config, steps: int = STEPS):
        refuse_size(config, 2 ** (LEVELS - 1), "DRAEM")
        self.config, self.steps = config, steps
        self.random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.repair = on_device(UNet(1, 1, WIDTHS[0], LEVELS, nn.BatchNorm2d, skips=False))
        self.find = on_device(UNet(2, 1, WIDTHS[1], LEVELS, nn.BatchNorm2d))

    def fit(self, normals: np.ndarray) -> None:
        """Train both networks at once."""
        self.textures = torch.from_numpy(normals).unsqueeze(1)
        parameters = [*self.repair.parameters(), *self.find.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=LR)
        lessons = Lessons("DRAEM", normals, BATCH, self.steps, self.random)
        train([self.repair, self.find], optimizer, self._loss, lessons, self.config)
        self.repair.eval()
        self.find.eval()

    def _loss(self, clean: Tensor) -> Tensor:
        foreign, mask = self.corrupted(clean)
        clean, foreign, mask = (part.to(DEVICE) for part in (clean, foreign, mask))
        with autocast():
            repaired, logits = self._both(foreign)
        repaired, logits = repaired.float(), logits.float()
        entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        focal = ((1 - torch.exp(-entropy)) ** GAMMA * entropy).mean()
        return (repaired - clean).square().mean() + (1 - ssim(clean, repaired)).mean() + focal

    def _both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        repaired = self.repair(images)
        return repaired, self.find(torch.cat([repaired, images], dim=1))

    def corrupted(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of (B, 1, H, W), half of them with foreign texture, and where it lies, 0 or 1."""
        size = tuple(clean.shape[-2:])
        scales = 2 ** torch.randint(SCALES, (len(clean), 2), generator=self.random)
        noise = [gradient_noise(1, size, tuple(cells), self.random) for cells in scales.tolist()]
        chosen = torch.rand(len(clean), 1, 1, 1, generator=self.random) < 0.5
        mask = ((torch.cat(noise) > 0.5) & chosen).float()
        clear = 0.8 * torch.rand(len(clean), 1, 1, 1, generator=self.random)
        return torch.lerp(clean, clear * clean + (1 - clear) * self._texture(clean), mask), mask

    def _texture(self, clean: Tensor) -> Tensor:
        rows = torch.randint(len(self.textures), (len(clean),), generator=self.random)
        texture = self.textures[rows].flip(-2)
        shift = [int(torch.randint(size, (1,), generator=self.random)) for size in clean.shape[-2:]]
        sign = torch.where(torch.rand(len(clean), 1, 1, 1, generator=self.random) < 0.5, -1.0, 1.0)
        return sign * texture.roll(shift, dims=(-2, -1))

    @torch.no_grad()
    def score(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps of the probability that a pixel is foreign, and the maximum of their means."""
        maps = torch.sigmoid(self._both(torch.from_numpy(images).unsqueeze(1).to(DEVICE))[1])
        means = F.avg_pool2d(maps, WINDOW, stride=1, padding=WINDOW // 2)
        return maps[:, 0].cpu().numpy(), means.flatten(1).amax(1).cpu().numpy()
