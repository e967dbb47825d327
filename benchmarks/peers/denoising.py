"""Denoising autoencoder with coarse noise (Kascenas, Pugeault, O'Neil 2022): what a UNet cleans out of a radiograph.

Gaussian noise of 0.2 of the grey range, drawn on a coarse grid and enlarged, is added; a UNet with skip connections
learns to give back the clean image under a squared error (Adam with amsgrad). It examines radiographs as they are; the
map is the absolute difference under a median filter of 5 pixels. On a GPU 64 channels, 16 images a step and 67,200
steps at 1e-4, as published; the rate falls once, where the authors' rises and falls, gradients are clipped at norm 1,
and the UNet is that of training.py, without their weight normalization, average pooling and reflected borders. Its mask
of the head has no counterpart here: a panoramic fills its frame.
"""

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly import image_score
from config import Config
from peers.training import DEVICE, Lessons, UNet, autocast, on_device, train

WIDTH = {"cuda": 64, "cpu": 16}[DEVICE]
BATCH = {"cuda": 16, "cpu": 4}[DEVICE]
STEPS = {"cuda": 67_200, "cpu": 1_500}[DEVICE]
LR = {"cuda": 1e-4, "cpu": 1e-3}[DEVICE]
NOISE = 0.4  # of [-1, 1]
CELLS = 16  # of the coarse grid, to each side
TOP_SHARE = 0.001  # of the map, whose mean is the score


class Denoising:
    """What a network that removes coarse noise takes away."""

    def __init__(self, seed: int, config: Config, steps: int = STEPS):
        self.config, self.steps = config, steps
        self.random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.network = on_device(UNet(1, 1, WIDTH, 4, norm=lambda channels: nn.GroupNorm(8, channels)))

    def fit(self, normals: np.ndarray) -> None:
        """Train the network."""
        optimizer = torch.optim.Adam(self.network.parameters(), lr=LR, amsgrad=True, weight_decay=1e-5)
        lessons = Lessons("denoising autoencoder", normals, BATCH, self.steps, self.random)
        train([self.network], optimizer, self._loss, lessons, self.config)
        self.network.eval()

    def _loss(self, clean: Tensor) -> Tensor:
        noisy = (clean + self.noise(clean)).to(DEVICE)
        with autocast():
            cleaned = self.network(noisy)
        return (cleaned.float() - clean.to(DEVICE)).square().mean()

    def noise(self, images: Tensor) -> Tensor:
        """Coarse noise of the shape of (B, 1, H, W), its grid laid anywhere."""
        coarse = NOISE * torch.randn(len(images), 1, CELLS, CELLS, generator=self.random)
        fine = F.interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=False)
        down, across = (int(torch.randint(size, (1,), generator=self.random)) for size in images.shape[-2:])
        return fine.roll((down, across), dims=(-2, -1))

    @torch.no_grad()
    def score(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps of what it changes, and the mean of their highest values."""
        x = torch.from_numpy(images).unsqueeze(1).to(DEVICE)
        changed = (self.network(x) - x).abs()[:, 0].cpu().numpy()
        maps = median_filter(changed, size=(1, 5, 5))
        return maps, image_score(torch.from_numpy(maps).unsqueeze(1), TOP_SHARE).numpy()
