"""Latent repair in one step, after REFLECT (Beizaee et al. 2025) and DeCo-Diff (Beizaee et al., CVPR 2025).

In the latent of the pretrained autoencoder, not fine-tuned, patches are blended with noise or with another normal's. A
UNet learns the straight way from what was spoilt back to what was there (a rectified flow, its time drawn at random)
and repairs a radiograph by one step of the whole way, as in REFLECT. The map is, as in DeCo-Diff, the geometric mean of
what changed in the image and of what changed in the latent, here neither clipped nor blurred alike; the score is the
mean of its highest values. Sizes of network and training are ours.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly import image_score
from checks import UsageError
from config import Config
from model import pretrained_vae
from peers.frozen import in_batches
from peers.training import DEVICE, Lessons, autocast, refuse_size, timed_unet, train

CHANNELS = {"cuda": (128, 256, 512, 512), "cpu": (64, 128, 192)}[DEVICE]
BATCH = {"cuda": 32, "cpu": 16}[DEVICE]
STEPS = {"cuda": 50_000, "cpu": 1_200}[DEVICE]
LR = {"cuda": 1e-4, "cpu": 4e-4}[DEVICE]
MOST_PATCHES, LARGEST = 8, 0.4  # spoilt patches of a latent, and the longest side as a share of its own
TOP_SHARE = 0.001


class LatentRepair:
    """What one step towards normal latents changes."""

    def __init__(self, seed: int, config: Config, steps: int = STEPS):
        refuse_size(config, 8 * 2 ** (len(CHANNELS) - 1), "latent repair")
        self.config, self.steps = config, steps
        self.random = torch.Generator().manual_seed(seed)
        self.seed = seed
        if config.vae.pretrained == "scratch":
            raise UsageError(
                "latent repair needs a pretrained autoencoder: give --vae.pretrained a folder or a hub name"
            )
        self.vae = pretrained_vae(config.vae).to(DEVICE).requires_grad_(False).eval()

    def fit(self, normals: np.ndarray) -> None:
        """Encode the normals, and train the network on their latents."""
        latents = in_batches(self._encode, normals)
        self.mean, self.std = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)
        self.normal = (latents - self.mean) / self.std
        torch.manual_seed(self.seed)
        self.network = timed_unet(self.normal.shape[1], CHANNELS, groups=16)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=LR)
        lessons = Lessons("latent repair", self.normal.numpy(), BATCH, self.steps, self.random)
        train([self.network], optimizer, self._loss, lessons, self.config)
        self.network.eval()

    def _loss(self, latents: Tensor) -> Tensor:
        z = latents.squeeze(1)
        spoilt = self.spoilt(z)
        time = torch.rand(len(z), generator=self.random)
        between = torch.lerp(spoilt, z, time.reshape(-1, 1, 1, 1)).to(DEVICE)
        with autocast():
            way = self.network(between, 1000 * time.to(DEVICE)).sample
        return (way.float() - (z - spoilt).to(DEVICE)).square().mean()

    def spoilt(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) with rectangles of noise, or of another one; some have none."""
        spoilt, (height, width) = z.clone(), z.shape[-2:]
        for image in spoilt:
            for _ in range(int(torch.randint(MOST_PATCHES + 1, (1,), generator=self.random))):
                share = LARGEST * torch.rand(2, generator=self.random)
                tall, wide = max(1, round(float(share[0]) * height)), max(1, round(float(share[1]) * width))
                top = int(torch.randint(height - tall + 1, (1,), generator=self.random))
                left = int(torch.randint(width - wide + 1, (1,), generator=self.random))
                donor = self.normal[int(torch.randint(len(self.normal), (1,), generator=self.random))]
                noise = torch.randn(image.shape, generator=self.random)
                foreign = noise if torch.rand(1, generator=self.random) < 0.5 else donor.roll((tall, wide), (-2, -1))
                box = (slice(None), slice(top, top + tall), slice(left, left + wide))
                image[box] = torch.lerp(image[box], foreign[box], float(torch.rand(1, generator=self.random)))
        return spoilt

    @torch.no_grad()
    def score(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps, and the mean of their highest values."""
        z = ((self._encode(images) - self.mean) / self.std).to(DEVICE)
        way = self.network(z, 0).sample
        before, after = self._decode(z), self._decode(z + way)
        pixels = F.avg_pool2d((before - after).abs(), 5, stride=1, padding=2, count_include_pad=False)
        latent = F.interpolate(way.abs().mean(1, keepdim=True), size=images.shape[1:], mode="bilinear")
        maps = (pixels * latent).sqrt().cpu()
        return maps[:, 0].numpy(), image_score(maps, TOP_SHARE).numpy()

    @torch.no_grad()
    def _encode(self, images: np.ndarray) -> Tensor:
        return self.vae.encode(torch.from_numpy(images).unsqueeze(1).to(DEVICE))[0].cpu()

    def _decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z * self.std.to(DEVICE) + self.mean.to(DEVICE))
